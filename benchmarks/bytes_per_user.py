"""What a user of the gateway takes: bytes in the database, in the file of features and in memory,
and the processor time of what grows with the number of users. The figures of docs/scale.md.

    python benchmarks/bytes_per_user.py [--users 1000] [--records 100] [--json]
    python tools/with_postgres.py --required python benchmarks/bytes_per_user.py [--json]

A record has 20 words (about 150 bytes), a head 384 numbers (one scorer, `linear`). The
database is SQLite, and PostgreSQL too where tools/with_postgres.py starts one. Bytes are those of
the whole database with its indexes over the number of users; memory is the resident set's growth
while users are read into the gateway's cache. Milliseconds are processor time of this process, the
median of `--runs`; `wall` has the whole time, with the database's.
"""

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure import Limit, finish, options
from simulated_users import LABELS, words

from hydra_llm.gateway.user_cache import UserCache, to_stored
from hydra_llm.model.encoder import open_encoder
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.head import Head
from hydra_llm.store.store import Store
from hydra_llm.store.values import Request
from hydra_llm.types import Record

WIDTH, REQUESTS = 384, 5  # numbers of a head, answered requests of a user
Row = dict[str, float]


def main() -> None:
    parser = options(__doc__, runs=50)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--records", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        urls = {"sqlite": f"sqlite:///{folder}/store.db"}
        if postgres := os.environ.get("TEST_POSTGRES_URL"):
            urls["postgresql"] = postgres
        series = {name: of_store(url, args) for name, url in urls.items()}
        series["features"] = of_features(Path(folder) / "features.sqlite")
    lines = [
        f"{name:<12} {key:<34} {value:12,.3f}"
        for name, row in series.items()
        for key, value in row.items()
    ]
    record = series["sqlite"]["bytes_per_record"]
    limits = [
        Limit("a user's head in the database, in KB", series["sqlite"]["bytes_per_head"] / 1024, 4)
    ]
    limits.append(
        Limit(
            "a record in the database, over its text",
            record / series["sqlite"]["text_bytes_per_record"],
            4,
        )
    )
    finish(args, {"series": series}, lines, limits)


def of_store(url: str, args: Any) -> Row:
    rng, store = random.Random(args.seed), Store(url)
    empty, text = size(store), 0
    names = [f"person{i}" for i in range(args.users)]
    for name in names:
        own = [
            Record(name, f"r{i}", words(LABELS[:3], 12, rng), words(LABELS[:2], 8, rng))
            for i in range(args.records)
        ]
        text += sum(len(r.input) + len(r.output) for r in own)
        store.add_records(name, own)
    with_records = size(store)
    head = to_stored({"adapter": Head(np.ones(WIDTH, np.float32), args.records)})
    for name in names:
        with store.change(name) as change:
            change.put_heads("0" * 64, head)
    total = args.users * args.records
    row = {
        "users": float(args.users),
        "text_bytes_per_record": text / total,
        "bytes_per_record": (with_records - empty) / total,
        "bytes_per_head": (size(store) - with_records) / args.users,
    }
    with_heads = size(store)
    for number, name in enumerate(names * REQUESTS):
        store.add_request(request(f"req_{number:024d}", name, rng))
    row["bytes_per_request"] = (size(store) - with_heads) / (args.users * REQUESTS)
    row |= of_memory(store, names, args)
    store.close()
    return row


def request(id: str, user: str, rng: random.Random) -> Request:
    """An answered request with eight candidates, as the gateway keeps it for feedback."""
    texts = [words(LABELS[:3], 12, rng) for _ in range(8)]
    of_each = {"votes": 1, "greedy": False, "score": 0.123456, "probability": 0.123456}
    candidates = [{"said": text, "text": text, "answer": text, **of_each} for text in texts]
    content = {"candidates": candidates, "repeats": [], "visible": 100, "abstained": False}
    content |= {"unscored": None, "records": ["r1", "r2", "r3", "r4"]}
    return Request(id, user, time.time(), "0" * 64, words(LABELS[:3], 8, rng), content)


def of_memory(store: Store, names: list[str], args: Any) -> Row:
    """Bytes of a user in the gateway's cache, and how long its look-ups take."""
    cache, begin = UserCache(store, None, len(names)), resident()
    for name in names:
        cache.current(name)
    row = {"memory_bytes_per_user": (resident() - begin) / len(names)}
    jobs: dict[str, Callable[[], object]] = {
        "is a user in memory current": lambda: cache.current(names[0]),
        "who in memory is stale, of all": cache.stale,
        "has something been deleted": store.watched,
        "take requests of a limit": lambda: store.take_requests("key", 6000, 1, time.time()),
    }
    for name, job in jobs.items():
        row |= timed(name, job, args.runs)
    gone = iter(names)
    return row | timed(
        "delete a user", lambda: store.delete_user(next(gone)), min(args.runs, len(names))
    )


def of_features(path: Path) -> Row:
    """Bytes of a text's vector in the file of features."""
    rng, cache = random.Random(0), FeatureCache(open_encoder("minilm"), path)
    texts = [words(LABELS[:3], 12, rng) for _ in range(500)]
    cache.texts(texts)
    cache.close()
    files = path.parent.glob(f"{path.name}*")
    return {"bytes_per_vector": sum(file.stat().st_size for file in files) / len(set(texts))}


def timed(name: str, job: Callable[[], object], runs: int) -> Row:
    cpu, wall = [], []
    for _ in range(runs):
        begin, moment = time.process_time(), time.perf_counter()
        job()
        cpu.append(1000 * (time.process_time() - begin))
        wall.append(1000 * (time.perf_counter() - moment))
    return {f"{name}, ms": statistics.median(cpu), f"{name}, ms wall": statistics.median(wall)}


def size(store: Store) -> int:
    """Bytes of the database, without what a log holds."""
    if store.on_sqlite:
        store.truncate_log()
        return Path(str(store.url.database)).stat().st_size
    return int(store.run_outside_transaction("SELECT pg_database_size(current_database())"))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
