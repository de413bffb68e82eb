"""Memory and CPU time of `hydra-llm learn` and `fit` by the number of users.

    python benchmarks/learning_scale.py [--users 100 1000 10000] [--records 50] [--texts 20000]
        [--base-users 500] [--out FILE.json] [--plot FILE.svg] [--json]

For each number of users a data set is generated (`simulated_users.write_simulated`: a task with two
labels, no LLM), a bundle is learned from them, and heads of a tenth as many new users are fitted
with it. Each command is a process of its own, of which the kernel tells the peak of resident memory
and the CPU time of all threads; on a busy machine CPU time is higher than on an idle one.

Vectors of texts are cheap stand-ins (sums of a random vector for each word), which are put into the
cache of features under the encoder's name before anything is measured: what encoding costs is left
out. The texts come from a pool, so that several users have answered the same ones.

Seconds and memory are fitted as a + b·x^p (power_law.py), x the number of users. `--out` adds to
the points that the file has: a larger size can be measured alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from measure import Limit, finish, options
from power_law import Growth, growth
from simulated_users import Pool, hashed_vectors, write_simulated

from hydra_llm.config import Settings
from hydra_llm.gate import generic_requests
from hydra_llm.model.encoder import open_encoder
from hydra_llm.model.feature_cache import FeatureCache

MOST_GB, MOST_EXPONENT = 8.0, 1.1  # exponents of measured times scatter by a tenth
FIGURES = ("learn cpu", "learn peak", "fit cpu", "fit peak")
SMALLEST = 1000  # users; below, the choice of strengths on few groups is most of the time
Point = dict[str, Any]


class StandIn:
    """Cheap vectors under the name of the default encoder."""

    def __init__(self) -> None:
        settings = Settings()
        real = open_encoder(settings.encoder, pooling=settings.pooling)
        self.digest, self.width = real.digest, real.width

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return hashed_vectors(texts, self.width)


def fill(cache: Path, texts: Sequence[str]) -> None:
    """Put the stand-ins of these texts into a cache of features."""
    store = FeatureCache(StandIn(), cache / "features.sqlite")  # type: ignore[arg-type]
    for start in range(0, len(texts), 5000):
        store.texts(texts[start : start + 5000])
    store.close()


def measured(work: Path, pool: Pool, users: int, args: argparse.Namespace) -> Point:
    """The peaks and CPU seconds of learning from so many users, and of fitting a tenth as many."""
    records, base = args.records, args.base_users
    data, bundle = work / f"data-{users}", work / f"bundle-{users}"
    new = max(1, users // 10)
    write_simulated(data, pool, users, records, new=new, seed=args.seed)
    point: Point = {"users": users, "new": new, "records": records, "texts": len(pool.texts)}
    point["base_users"] = min(base, users)
    log = work / "log.json"
    for name in ("learn", "fit"):
        place = ["--bundle", str(bundle)]
        if name == "learn":
            place = ["--out", str(bundle), "--set", f"research.base_users={base}"]
        command = [sys.executable, "-m", "hydra_llm", name, str(data), *place, "--json"]
        with log.open("w") as out:
            begin = time.perf_counter()
            child = subprocess.Popen(
                command, stdout=out, env={**os.environ, "HYDRA_CACHE": str(work)}
            )
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            sys.exit(f"{' '.join(command)}: exit code {child.returncode}")
        own = {"cpu": usage.ru_utime + usage.ru_stime, "wall": time.perf_counter() - begin}
        point |= {f"{name} {key}": round(value, 2) for key, value in own.items()}
        point[f"{name} peak"] = round(usage.ru_maxrss / 2**20, 3)  # of kilobytes: gigabytes
    told = json.loads(log.read_text(encoding="utf-8"))["report"]
    shown = ("prior", "prior_error", "loss_shared", "loss_user", "loss_user_error")
    return {**point, **{key: told["adapter"].get(key) for key in shown}}


def laws(points: Sequence[Point]) -> dict[str, Growth]:
    """How each figure grows with the number of users."""
    large = [point for point in points if point["users"] >= SMALLEST]
    counted = large if len(large) > 2 else points
    sizes = [point["users"] for point in counted]
    return {name: growth(sizes, [[point[name]] for point in counted]) for name in FIGURES}


def plot(points: Sequence[Point], path: Path) -> None:
    """CPU seconds and peaks of memory by the number of users, log-log."""
    import altair as alt

    charts = []
    for figure, title in (("cpu", "CPU seconds"), ("peak", "peak of memory, GB")):
        rows = [
            {"users": point["users"], "value": point[f"{name} {figure}"], "command": name}
            for point in points
            for name in ("learn", "fit")
        ]
        chart = alt.Chart(alt.Data(values=rows)).encode(
            x=alt.X("users:Q").scale(type="log").title("training users"),
            y=alt.Y("value:Q").scale(type="log").title(title),
            color=alt.Color("command:N").title(None),
        )
        lines = chart.mark_line() + chart.mark_point(filled=True, size=50)
        charts.append(lines.properties(width=280, height=220, title=title))
    alt.hconcat(*charts).save(str(path))


def line(point: Mapping[str, Any]) -> str:
    costs = ", ".join(
        f"{name} {point[f'{name} cpu']:.1f} CPU s, {point[f'{name} peak']:.2f} GB"
        for name in ("learn", "fit")
    )
    return f"{point['users']:>8,} users and {point['new']:,} new ones: {costs}"


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument("--users", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--records", type=int, default=50)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--base-users", type=int, default=500, help="research.base_users")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    points = stored_points(args)
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool.of(args.texts, args.seed)
        fill(Path(folder), [*pool.texts, *generic_requests()])
        for users in args.users:
            points[users] = measured(Path(folder), pool, users, args)
            print(line(points[users]), file=sys.stderr, flush=True)
            save(args, list(points.values()))
    ordered = [points[users] for users in sorted(points)]
    grown = laws(ordered)
    limits = [
        Limit(f"{name} GB", max(p[f"{name} peak"] for p in ordered), MOST_GB)
        for name in ("learn", "fit")
    ]
    limits += [
        Limit(f"exponent of {name}", grown[name].exponent, MOST_EXPONENT)
        for name in ("learn cpu", "fit cpu")
    ]
    if args.plot:
        plot(ordered, args.plot)
    finish(args, result(ordered), [line(point) for point in ordered], limits)


def stored_points(args: argparse.Namespace) -> dict[int, Point]:
    if args.out is None or not args.out.exists():
        return {}
    stored = json.loads(args.out.read_text(encoding="utf-8"))["points"]
    return {point["users"]: point for point in stored}


def result(points: Sequence[Point]) -> dict[str, Any]:
    grown = laws(points) if len(points) > 2 else {}
    return {"points": points, "laws": {name: asdict(law) for name, law in grown.items()}}


def save(args: argparse.Namespace, points: Sequence[Point]) -> None:
    if args.out is not None:
        ordered = sorted(points, key=lambda point: point["users"])
        args.out.write_text(json.dumps(result(ordered), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
