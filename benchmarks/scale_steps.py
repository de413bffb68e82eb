"""The steps of scale.py that are no commands of the program, each run in a process of its own:

    python benchmarks/scale_steps.py STEP FOLDER [--users N] [--calls N] [--seed N] ...

`pool` fills the cache of features, `data` writes a data set, `ask` and `delete` measure a learned
bundle of so many users, `store` writes a bundle of so many users with random heads, `read` and
`change` measure it. Each prints one line of JSON. Letters: H width, K rank.
"""

import argparse
import json
import os
import random
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from simulated_users import LIKES, Pool, hashed_vectors, write_simulated

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.gate import generic_requests
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.model.bundle_users import delete_user, write_users
from hydra_llm.model.encoder import open_encoder
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.head import Head
from hydra_llm.model.heads import make_head
from hydra_llm.model.interactions import Cross, Groups
from hydra_llm.model.persistence import BundleFiles, read_bundle, write_bundle
from hydra_llm.model.scorer import Scorer
from hydra_llm.model.users_file import UsersFile
from hydra_llm.types import Query, Record

T = TypeVar("T")
Figures = dict[str, Any]
H, RANK, CANDIDATES, MIXED, CHANGES, BATCHES = 768, 16, 20, 64, 20, 5
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=sorted(STEPS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--new", type=int, default=0, help="new users of the data set")
    parser.add_argument("--records", type=int, default=50)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--calls", type=int, default=90)
    parser.add_argument("--kind", default="lowrank", help="kind of head")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(STEPS[args.step](args)))


def peak_mb() -> float:
    """Peak of this process's resident memory. Not by `getrusage`: that counts the memory which the
    parent had when it started the process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB


def resident() -> int:
    """Bytes of this process in memory (Linux); 0 where that cannot be read."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


def forget_pages(file: Path) -> None:
    """Drop a file from the system's page cache."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())  # pages that are not on the disk yet would stay
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes() -> int:
    """What this process has read from disks (Linux); 0 where that cannot be read."""
    told = Path("/proc/self/io")
    lines = told.read_text().splitlines() if told.exists() else ["read_bytes: 0"]
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def timed(jobs: Sequence[Callable[[], object]]) -> tuple[list[float], list[float]]:
    """Milliseconds of each job, of this process's CPU and by the clock."""
    cpu, wall = [], []
    for job in jobs:
        begin, spent = time.perf_counter(), time.process_time()
        job()
        cpu.append((time.process_time() - spent) * 1000)
        wall.append((time.perf_counter() - begin) * 1000)
    return cpu, wall


def figures(name: str, times: tuple[Sequence[float], Sequence[float]]) -> Figures:
    """Medians of each of `BATCHES` parts, whose spread shows what a repeat would scatter by."""
    cpu, wall = (
        [float(np.median(part)) for part in np.array_split(values, BATCHES)] for values in times
    )
    return {f"{name} cpu ms": cpu, f"{name} ms": wall}


# ---- data


class StandIn:
    """Cheap vectors under the name of the default encoder."""

    def __init__(self) -> None:
        settings = Settings()
        real = open_encoder(settings.encoder, pooling=settings.pooling)
        self.digest, self.width = real.digest, real.width

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return hashed_vectors(texts, self.width)


def pool(args: argparse.Namespace) -> Figures:
    """Put the stand-ins of the pool's texts into the cache of features of `folder`."""
    texts = [*Pool.of(args.texts, args.seed).texts, *generic_requests()]
    store = FeatureCache(StandIn(), args.folder / "features.sqlite")  # type: ignore[arg-type]
    for start in range(0, len(texts), 5000):
        store.texts(texts[start : start + 5000])
    store.close()
    return {"texts": len(texts)}


def data(args: argparse.Namespace) -> Figures:
    texts = Pool.of(args.texts, args.seed)
    write_simulated(args.folder, texts, args.users, args.records, new=args.new, seed=args.seed)
    return {"users": args.users, "new": args.new}


# ---- a learned bundle


def ask(args: argparse.Namespace) -> Figures:
    """Answers to random users of a bundle, each asked for the first time by this process, and then
    once more. The questions' vectors are kept, the LLM is a fake.
    """
    begin = time.perf_counter()
    bundle = Bundle.load(args.folder)
    answers = bundle.personalizer(RuleLLM(lambda _messages, _index, rng: rng.choice(LIKES.labels)))
    opened, rng = (time.perf_counter() - begin) * 1000, random.Random(args.seed)
    texts = Pool.of(args.texts, args.seed).texts
    users = rng.sample(range(args.users), min(args.calls, args.users - 10) + 10)
    jobs = [
        lambda user=user: answers.answer(Query(f"p{user}", "q", rng.choice(texts)))
        for user in users
    ]
    timed(jobs[:10])  # a warm-up
    heads = sum(scorer.head.numbers_per_user or 0 for scorer in bundle.scorers.values())
    return {
        "open ms": opened,
        **figures("ask", timed(jobs[10:])),
        **figures("ask again", timed(jobs[10:])),
        "ask peak MB": peak_mb(),
        "bytes of a user's heads": 4 * heads,
    }


def delete(args: argparse.Namespace) -> Figures:
    """Users leave the bundle, as by `users delete`; each is durable when the call returns."""
    names = random.Random(args.seed).sample(range(args.users), min(args.users // 2, 60))
    jobs = [lambda name=name: delete_user(args.folder, f"p{name}") for name in names]
    timed(jobs[:10])  # a warm-up
    jobs = jobs[10:]
    return {**figures("delete", timed(jobs)), "delete peak MB": peak_mb()}


# ---- a bundle of random heads


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


def scorer_of(kind: str) -> Scorer:
    interaction = Cross(H)
    return Scorer(interaction, make_head(kind, interaction, rank=RANK), ()).eval()


def groups_of(count: int) -> Groups:
    pairs = torch.randn(count, CANDIDATES, H, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(count, CANDIDATES, dtype=torch.bool)
    return Groups(torch.zeros(count, 0), pairs, torch.zeros(count, CANDIDATES, 0), mask)


def store(args: argparse.Namespace) -> Figures:
    """Write a bundle of so many users: `lowrank` (K = 16) or `linear` heads at full width
    (H = 768), and one short record each.
    """
    scorer, draw = scorer_of(args.kind), np.random.default_rng(args.seed)
    size = scorer.head.numbers_per_user or 0
    heads = Made(args.users, lambda _: Head(draw.standard_normal(size, dtype=np.float32), 50, 1e9))
    records = Made(args.users, lambda user: [Record(user, "1", "a short text", "its answer")])
    tensors = {f"adapter.{name}": value for name, value in scorer.tensors().items()}
    config = {"scorers": {"adapter": {"head": args.kind}}, "trained_on": []}
    files = BundleFiles(config, tensors, records, "", heads={"adapter": heads})
    cpu, wall = timed([lambda: write_bundle(args.folder, files)])
    (file,) = args.folder.glob("content-*/users.sqlite")
    return {
        "write cpu s": cpu[0] / 1000,
        "write s": wall[0] / 1000,
        "write peak MB": peak_mb(),
        "bytes per user": file.stat().st_size / args.users,
    }


def read(args: argparse.Namespace) -> Figures:
    """Open it, and score 20 candidates of random users one by one, also after the file has left the
    system's page cache (`cold`), then a batch that mixes them.
    """
    opened = timed([lambda: read_bundle(args.folder)] * (2 * BATCHES))
    heads, scorer = read_bundle(args.folder).heads["adapter"], scorer_of(args.kind)
    rng = random.Random(args.seed)
    groups, mixed = groups_of(1), groups_of(MIXED)

    def user() -> str:
        return f"user-{rng.randrange(args.users):07d}"

    scorer.score(groups, [heads[user()]])
    one = timed([lambda: scorer.score(groups, [heads[user()]])] * args.calls)
    (file,) = args.folder.glob("content-*/users.sqlite")
    forget_pages(file)
    timed([lambda: scorer.score(groups, [heads[user()]])] * (args.calls // 2))  # reads the index
    read_before = disk_bytes()
    cold = timed([lambda: scorer.score(groups, [heads[user()]])] * args.calls)
    batch, read = [user() for _ in range(MIXED)], disk_bytes() - read_before
    many = timed([lambda: scorer.score(mixed, heads.many(batch))] * BATCHES)  # type: ignore[attr-defined]
    return {
        **figures("open", opened),
        **figures("score", one),
        "score p99 ms": float(np.percentile(one[1], 99)),
        **figures("score cold", cold),
        "score cold disk KB": read / 1024 / args.calls,
        **figures("mixed 64", many),
        "read peak MB": peak_mb(),
    }


def change(args: argparse.Namespace) -> Figures:
    """One user at a time, as `fit` and `users delete` do: durable when each returns."""
    draw, rng = np.random.default_rng(args.seed), random.Random(args.seed)
    size = scorer_of(args.kind).head.numbers_per_user or 0
    (file,) = args.folder.glob("content-*/users.sqlite")
    before, version = file.stat().st_size, read_bundle(args.folder).version

    def put(user: str) -> None:
        head = Head(draw.standard_normal(size, dtype=np.float32), 51, 1e9)
        records = {user: [Record(user, "1", "another text", "its answer")]}
        assert write_users(args.folder, [user], {"adapter": {user: head}}, records, version=version)

    names = [f"new-{i:07d}" for i in range(CHANGES)]
    known = [f"user-{rng.randrange(args.users):07d}" for _ in names]
    found: Figures = {}
    for name, users, job in (
        ("add", names, put),
        ("replace", known, put),
        ("delete", names, lambda user: delete_user(args.folder, user)),
    ):
        found |= figures(name, timed([lambda user=user, job=job: job(user) for user in users]))
    with closing(UsersFile(file)) as opened:
        assert opened.count("adapter") == args.users
    grown = file.stat().st_size - before
    return {**found, "change peak MB": peak_mb(), "grown bytes": grown}


STEPS: Mapping[str, Callable[[argparse.Namespace], Figures]] = {
    "pool": pool,
    "data": data,
    "ask": ask,
    "delete": delete,
    "store": store,
    "read": read,
    "change": change,
}

if __name__ == "__main__":
    main()
