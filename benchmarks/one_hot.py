"""A store of users' heads as it grows to a million users: opening, memory, scoring, changes; beside
the one-hot product by which the paper's authors select a user's parameters.

    python benchmarks/heads_store.py [--users 1000000] [--calls 2000] [--folder FOLDER] [--json]
        [--plot FILE.svg]

A bundle's users in one file, `lowrank` heads (K = 16) and `linear` heads at full width (H = 768),
one short record each. Each size is opened and read by a process of its own, since memory is that
of a process. A scored user is random, with 20 candidates, without the encoder. Exits with 1 if a
limit is missed.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from measure import Limit, finish, in_turn, options, show, summary

from hydra_llm.model.bundle_users import delete_user, write_users
from hydra_llm.model.head import Head
from hydra_llm.model.heads import make_head
from hydra_llm.model.heads.base import gather
from hydra_llm.model.interactions import Cross, Groups
from hydra_llm.model.persistence import BundleFiles, read_bundle, write_bundle
from hydra_llm.model.scorer import Scorer
from hydra_llm.model.users_file import UsersFile
from hydra_llm.types import Record

T = TypeVar("T")
H, RANK, CANDIDATES, MIXED, CHANGES = 768, 16, 20, 64, 20
KINDS = ("lowrank", "linear")
PUBLISHED = 592_130  # numbers per user and scorer of the published head: H × H + H + 2 × H + 2
ONE_HOT_USERS = (100, 1_000, 10_000)
BLOCK = 400_000_000  # numbers of the matrix of all users that are in memory at once


class Made(Mapping[str, T]):
    """So many users, each made when it is asked for."""

    def __init__(self, count: int, make: Callable[[str], T]):
        self.count, self.make = count, make

    def __getitem__(self, user: str) -> T:
        return self.make(user)

    def __iter__(self) -> Iterator[str]:
        return (f"user-{i:07d}" for i in range(self.count))

    def __len__(self) -> int:
        return self.count


def main() -> None:
    parser = options(__doc__, runs=30)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--calls", type=int, default=2_000, help="scored users per size")
    parser.add_argument("--folder", type=Path, help="default: a temporary one; 4 GB for a million")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--read", help=argparse.SUPPRESS)  # of the process that reads
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read(Path(args.read), args)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = [measure(kind, users, folder, args) for kind in KINDS for users in sizes(args.users)]
    result = {"rows": rows, "one_hot": [one_hot(*case, args) for case in one_hot_cases()]}
    if args.plot:
        args.plot.write_text(plot(result))
    finish(args, result, report_lines(result), limits(rows))


def sizes(most: int) -> list[int]:
    return [10**e for e in range(2, 8) if 10**e <= most]


def scorer_of(kind: str) -> Scorer:
    interaction = Cross(H)
    return Scorer(interaction, make_head(kind, interaction, rank=RANK), ()).eval()


# ---- one size of the store


def measure(kind: str, users: int, folder: str, args: argparse.Namespace) -> dict[str, Any]:
    place, scorer = Path(folder) / f"{kind}-{users}", scorer_of(kind)
    size, draw = scorer.head.numbers_per_user or 0, np.random.default_rng(args.seed)
    heads = Made(users, lambda _: Head(draw.standard_normal(size, dtype=np.float32), 50, 1e9))
    records = Made(users, lambda user: [Record(user, "1", "a short text", "its answer")])
    tensors = {f"adapter.{name}": value for name, value in scorer.tensors().items()}
    started = time.perf_counter()
    config = {"scorers": {"adapter": {"head": kind}}, "trained_on": []}
    files = BundleFiles(config, tensors, records, "", heads={"adapter": heads})
    version = write_bundle(place, files)
    written = time.perf_counter() - started
    command = [sys.executable, __file__, "--read", str(place), "--calls", str(args.calls)]
    child = subprocess.run([*command, "--seed", str(args.seed)], capture_output=True, text=True)
    if child.returncode:
        raise SystemExit(child.stderr)
    (file,) = place.glob("content-*/users.sqlite")
    row = {
        "kind": kind,
        "users": users,
        "bytes_per_user": file.stat().st_size / users,
        "write_seconds": written,
        **json.loads(child.stdout),
        **changes(place, version, size, args.seed, users),
    }
    file.unlink()
    return row


def read(place: Path, args: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: open, score random users one by one, then mixed batches."""
    torch.set_num_threads(1)
    before, started = resident(), time.perf_counter()
    files = read_bundle(place)
    opened = time.perf_counter() - started
    kind = files.config["scorers"]["adapter"]["head"]
    heads, scorer = files.heads["adapter"], scorer_of(kind)
    users = 10 ** (len(str(len(heads))) - 1)
    rng, wall, cpu = random.Random(args.seed), [], []
    groups = groups_of(1)
    scorer.score(groups, [None])
    for _ in range(args.calls):
        user = f"user-{rng.randrange(users):07d}"
        begin, spent = time.perf_counter(), time.process_time()
        scorer.score(groups, [heads[user]])
        wall.append((time.perf_counter() - begin) * 1000)
        cpu.append((time.process_time() - spent) * 1000)
    mixed, batch = groups_of(MIXED), [f"user-{rng.randrange(users):07d}" for _ in range(MIXED)]
    jobs = {
        "mixed": lambda: scorer.score(mixed, heads.many(batch)),  # type: ignore[attr-defined]
        "one by one": lambda: [scorer.score(groups, [heads[user]]) for user in batch],
    }
    times = in_turn(jobs, 20)
    return {
        "open_ms": opened * 1000,
        "score": {**summary(wall), "p99_ms": float(np.percentile(wall, 99))},
        "score_cpu": summary(cpu),
        "mixed_64": summary(times["mixed"]),
        "one_by_one_64": summary(times["one by one"]),
        "process_mb": resident() / 1e6,
        "process_mb_before_opening": before / 1e6,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 * 1.048576,
    }


def groups_of(count: int) -> Groups:
    pairs = torch.randn(count, CANDIDATES, H, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(count, CANDIDATES, dtype=torch.bool)
    return Groups(torch.zeros(count, 0), pairs, torch.zeros(count, CANDIDATES, 0), mask)


def changes(place: Path, version: str, size: int, seed: int, users: int) -> dict[str, Any]:
    """One user at a time, as `fit` and `users delete` do: durable when each returns."""
    draw, rng = np.random.default_rng(seed), random.Random(seed)
    (file,) = place.glob("content-*/users.sqlite")
    before, times = file.stat().st_size, dict[str, list[float]]()

    def put(user: str) -> None:
        head = Head(draw.standard_normal(size, dtype=np.float32), 51, 1e9)
        records = {user: [Record(user, "1", "another text", "its answer")]}
        assert write_users(place, [user], {"adapter": {user: head}}, records, version=version)

    def known() -> str:
        return f"user-{rng.randrange(users):07d}"

    for i in range(CHANGES):
        begin = time.perf_counter()
        put(f"new-{i:07d}")
        times.setdefault("add", []).append((time.perf_counter() - begin) * 1000)
        begin = time.perf_counter()
        put(known())
        times.setdefault("replace", []).append((time.perf_counter() - begin) * 1000)
        begin = time.perf_counter()
        assert delete_user(place, f"new-{i:07d}")
        times.setdefault("delete", []).append((time.perf_counter() - begin) * 1000)
    with closing(UsersFile(file)) as opened:
        assert opened.count("adapter") == users
    grown = file.stat().st_size - before
    return {name: summary(values) for name, values in times.items()} | {"grown_bytes": grown}


def resident() -> int:
    """Bytes of this process in memory (Linux); 0 where that cannot be read."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


# ---- the one-hot product


def one_hot_cases() -> list[tuple[int, int]]:
    return [(users, size) for size in (H + 1, PUBLISHED) for users in ONE_HOT_USERS]


def one_hot(users: int, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """One user's numbers [1, size] by a one-hot vector [1, users] times the matrix [users, size],
    and by a look-up in the file; where the matrix would not fit, by blocks of its columns.
    """
    torch.set_num_threads(1)
    columns = min(size, BLOCK // users)
    blocks = -(-size // columns)
    matrix = torch.randn(users, columns)
    rng, kept = random.Random(args.seed), min(users, 200 if size == PUBLISHED else users)
    draw = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        made = Made(kept, lambda _: Head(draw.standard_normal(size, dtype=np.float32)))
        UsersFile.create(Path(folder) / "users", {"adapter": made}, {})
        with closing(UsersFile(Path(folder) / "users")) as file:
            heads = file.heads("adapter")

            def product() -> None:
                chosen = torch.zeros(1, users)
                chosen[0, rng.randrange(users)] = 1
                for _ in range(blocks):
                    chosen @ matrix

            def look_up() -> None:
                gather([heads[f"user-{rng.randrange(kept):07d}"]], size)

            def in_memory() -> None:
                gather([Head(matrix[rng.randrange(users)].numpy())] * blocks, columns)

            jobs = {"product": product, "look_up": look_up, "in_memory": in_memory}
            runs = args.runs if users * size < 10**9 else max(3, args.runs // 6)
            times = {name: summary(ms) for name, ms in in_turn(jobs, runs, warm_up=3).items()}
    product_ms = times["product"]["median_ms"]
    ratios = {"ratio": product_ms / times["look_up"]["median_ms"]}
    ratios["ratio_in_memory"] = product_ms / times["in_memory"]["median_ms"]
    told = {"users": users, "numbers": size, "matrix_gb": users * size * 4 / 1e9, "blocks": blocks}
    return {**told, **times, **ratios, "users_in_file": kept}


# ---- report


def limits(rows: list[dict[str, Any]]) -> list[Limit]:
    found = []
    for row in (row for row in rows if row["users"] == max(r["users"] for r in rows)):
        name = f"{row['kind']}, {row['users']:,} users"
        found += [
            Limit(f"{name}: opening, ms", row["open_ms"], 1000),
            Limit(f"{name}: memory of the process, MB", row["peak_mb"], 500),
            Limit(f"{name}: 20 candidates of a random user, ms", row["score"]["median_ms"], 2),
        ]
    return found


def report_lines(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for row in result["rows"]:
        name = f"{row['kind']}, {row['users']:,} users"
        memory = (
            f"{row['process_mb']:.0f} MB (before opening {row['process_mb_before_opening']:.0f})"
        )
        lines += [
            f"{name}: opened in {row['open_ms']:.1f} ms; {memory}; {row['bytes_per_user']:,.0f}"
            f" bytes per user; written in {row['write_seconds']:.0f} s",
            show("    score 20 candidates", row["score"], digits=3),
            show("    64 users in one batch", row["mixed_64"], digits=3),
            show("    64 users one by one", row["one_by_one_64"], digits=3),
            *(show(f"    {name}", row[name], digits=2) for name in ("add", "replace", "delete")),
        ]
    for row in result["one_hot"]:
        blocks = f", {row['blocks']} blocks of columns" if row["blocks"] > 1 else ""
        lines += [
            f"{row['users']:,} users of {row['numbers']:,} numbers: one-hot / look-up in the file ="
            f" {row['ratio']:,.1f}, / row of a matrix in memory = {row['ratio_in_memory']:,.1f}"
            f" (matrix of {row['matrix_gb']:.2f} GB{blocks})",
            show("    one-hot product", row["product"], digits=4),
            show("    look-up in the file", row["look_up"], digits=4),
        ]
    return lines


def plot(result: Mapping[str, Any]) -> str:
    """Three growth curves and the ratio, as SVG."""
    import altair as alt
    import vl_convert

    rows = [
        {"users": row["users"], "kind": row["kind"], "what": what, "value": value}
        for row in result["rows"]
        for what, value in (
            ("open, ms", row["open_ms"]),
            ("memory of the process, MB", row["process_mb"]),
            ("score 20 candidates, p50, ms", row["score"]["median_ms"]),
        )
    ]
    rows += [
        {
            "users": row["users"],
            "kind": f"{row['numbers']:,} numbers",
            "what": "one-hot product / look-up, times",
            "value": row["ratio"],
        }
        for row in result["one_hot"]
    ]
    x = alt.X("users:Q", scale=alt.Scale(type="log"), axis=alt.Axis(format="~s"), title="users")
    y = alt.Y("value:Q", scale=alt.Scale(type="log"), title=None)
    line = alt.Chart().mark_line(point=True).encode(x, y, alt.Color("kind:N", title=None))
    shown = line.properties(width=210, height=160).facet(
        alt.Facet("what:N", title=None),
        data=alt.Data(values=rows),
        columns=2,  # type: ignore[no-untyped-call]
    )
    return vl_convert.vegalite_to_svg(shown.resolve_scale(y="independent").to_json())


if __name__ == "__main__":
    main()
