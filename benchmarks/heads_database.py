"""A million users' heads in the gateway's database: reading one user as a request does, scoring 20
candidates, and the memory of the process, whose cache of users is bounded.

    python tools/with_postgres.py --required python benchmarks/heads_database.py
        [--users 1000000] [--kinds lowrank,linear] [--calls 1000] [--folder FOLDER] [--json]

SQLite and PostgreSQL, `lowrank` (K = 16) and `linear` heads (H = 768). A process of its own reads
random users by the gateway's `UserCache`, so that none is in memory, and scores without the
encoder: version, records, heads and whether the user is off are four statements. Exits with 1 if a
limit is missed.
"""

import argparse
import json
import os
import random
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from measure import Limit, finish, options, show, summary
from scale_steps import groups_of, resident, scorer_of

from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.user_cache import UserCache
from hydra_llm.store.schema import VERSIONS_PER_KEY
from hydra_llm.store.store import Store

KINDS, BUNDLE = ("lowrank", "linear"), "w" * 64
COLUMNS = '"user", bundle, scorer, known, delta, updated, until'


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--databases", default="sqlite,postgresql")
    parser.add_argument("--calls", type=int, default=1_000, help="scored users")
    parser.add_argument("--folder", type=Path, help="of SQLite's file; default: a temporary one")
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)  # of the process that reads
    args = parser.parse_args()
    if args.read:
        url, kind = args.read
        print(json.dumps(read(url, kind, args)))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for kind in args.kinds.split(","):
            urls = {"sqlite": f"sqlite:///{folder}/{kind}.sqlite"}
            if url := os.environ.get("TEST_POSTGRES_URL"):
                urls["postgresql"] = url
            for name in sorted(urls.keys() & set(args.databases.split(","))):
                rows.append(measure(name, urls[name], kind, args))
                print(*lines(rows[-1]), sep="\n", file=sys.stderr)
            Path(f"{folder}/{kind}.sqlite").unlink(missing_ok=True)
    finish(args, {"rows": rows}, [line for row in rows for line in lines(row)], limits(rows))


def measure(database: str, url: str, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    fill(url, kind, args)
    filled = time.perf_counter() - started
    command = [sys.executable, __file__, "--read", url, kind, "--users", str(args.users)]
    command += ["--calls", str(args.calls), "--seed", str(args.seed)]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        raise SystemExit(child.stderr)
    told = {"database": database, "kind": kind, "users": args.users, "fill_seconds": filled}
    told |= json.loads(child.stdout)
    return told


def read(url: str, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    before, started = resident(), time.perf_counter()
    store = Store(url)
    opened, scorer = time.perf_counter() - started, scorer_of(kind)
    bundle: Any = SimpleNamespace(weights=BUNDLE, scorers={"adapter": scorer})
    size = ServeSettings.model_fields["users_in_memory"].default
    cache, groups, rng = UserCache(store, bundle, size), groups_of(1), random.Random(args.seed)
    times: dict[str, list[float]] = {"head": [], "user": [], "user_and_score": [], "cpu": []}
    for _ in range(args.calls):
        name = f"user-{rng.randrange(args.users):07d}"
        begin = time.perf_counter()
        store.heads(name, BUNDLE)
        times["head"].append((time.perf_counter() - begin) * 1000)
        begin, spent = time.perf_counter(), time.process_time()
        user = cache.current(name)
        times["user"].append((time.perf_counter() - begin) * 1000)
        assert user is not None
        scorer.score(groups, [user.heads["adapter"]])
        times["user_and_score"].append((time.perf_counter() - begin) * 1000)
        times["cpu"].append((time.process_time() - spent) * 1000)
    return {
        "open_ms": opened * 1000,
        **{name: summary(values) for name, values in times.items()},
        "users_in_memory": size,
        "process_mb": resident() / 1e6,
        "process_mb_before_opening": before / 1e6,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }


# ---- filling


def fill(url: str, kind: str, args: argparse.Namespace) -> None:
    """Tables by the program's own migrations, rows as fast as the database takes them."""
    store = Store(url)
    store.close()
    users = ((n + 1, f"user-{n:07d}", (n + 1) * VERSIONS_PER_KEY, 0.0) for n in range(args.users))
    if url.startswith("sqlite"):
        with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
            database.execute("PRAGMA synchronous = OFF")
            database.executemany(
                "INSERT INTO users (key, name, version, created) VALUES (?, ?, ?, ?)", users
            )
            insert = f"INSERT INTO heads ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)"
            database.executemany(insert, heads(kind, args))
        database.close()
        return
    import psycopg

    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("TRUNCATE users CASCADE")
        cursor = connection.cursor()
        with cursor.copy("COPY users (key, name, version, created) FROM STDIN") as copy:
            for row in users:
                copy.write_row(row)
        types = ["int8", "varchar", "varchar", "int8", "bytea", "float8", "float8"]
        with cursor.copy(f"COPY heads ({COLUMNS}) FROM STDIN (FORMAT BINARY)") as copy:
            copy.set_types(types)
            for head in heads(kind, args):
                copy.write_row(head)
        connection.execute("ANALYZE")


def heads(kind: str, args: argparse.Namespace) -> Iterator[tuple[Any, ...]]:
    size, draw = scorer_of(kind).head.numbers_per_user or 0, np.random.default_rng(args.seed)
    for n in range(args.users):
        numbers = draw.standard_normal(size, dtype=np.float32).tobytes()
        yield n + 1, BUNDLE, "adapter", 50, numbers, 0.0, 1e9


# ---- report


def limits(rows: list[dict[str, Any]]) -> list[Limit]:
    names = [f"{row['database']}, {row['kind']}, {row['users']:,} users" for row in rows]
    return [
        Limit(f"{name}: memory of the process, MB", row["peak_mb"], 500)
        for name, row in zip(names, rows, strict=True)
    ]


def lines(row: dict[str, Any]) -> list[str]:
    memory = f"{row['process_mb']:.0f} MB (before opening {row['process_mb_before_opening']:.0f})"
    return [
        f"{row['database']}, {row['kind']}, {row['users']:,} users: opened in {row['open_ms']:.0f}"
        f" ms; {memory}; filled in {row['fill_seconds']:.0f} s",
        show("    read one head", row["head"], digits=3),
        show("    read one user, as a request does", row["user"], digits=3),
        show("    the same, and score 20 candidates", row["user_and_score"], digits=3),
        show("    the same, CPU of the process", row["cpu"], digits=3),
    ]


if __name__ == "__main__":
    main()
