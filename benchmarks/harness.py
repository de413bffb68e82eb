"""The benchmark's own time, without the LLM: run a method on 1,000 queries with cached LLM answers.

    python benchmarks/harness.py [--queries 1000] [--methods rag@4 hydra@4,8] [--seed 0] [--json]

The users are simulated (simulated_users.py); the LLM is a fake whose answers are cached by a first
run. The second run of each method, into a new folder, is timed: retrieval, reranking, prompts,
cache look-ups, selection, the run log, and the table with its bootstrap. The limit is for the first
method. Exits with 1 if it is missed.
"""

import random
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from measure import Limit, finish, options
from simulated_users import CLASSIFY, simulate_users, simulated_data

from hydra_llm.bench.experiment import run_methods
from hydra_llm.bench.method import Parts, find_methods
from hydra_llm.bench.results import tabulate
from hydra_llm.bench.runlog import RunLog
from hydra_llm.config import load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.history import as_query
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.llm.registry import wrap
from hydra_llm.training.api import fit, learn
from hydra_llm.types import Message

LIMIT = 60.0
"""Seconds for 1,000 queries."""
PER_USER = 10


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--methods", nargs="+", default=["rag@4", "hydra@4,8"])
    args = parser.parse_args()
    data = simulated_queries(args.queries, args.seed)
    queries = [query for user in data.users("test") for query in data.queries(user)]
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(
            cache=Path(folder), seed=args.seed, labelled_users=10, queries_per_user=1
        )
        llm = wrap(RuleLLM(random_label), settings)
        bundle = fit(data, learn(data, llm, settings).bundle, llm, settings=settings).bundle
        parts = Parts(bundle, llm, settings, bundle.records)
        seconds = {
            name: replay_seconds(name, parts, queries, Path(folder)) for name in args.methods
        }
    rows = {
        name: {"seconds": duration, "ms_per_query": 1000 * duration / len(queries)}
        for name, duration in seconds.items()
    }
    lines = [
        f"{name:<14} {row['seconds']:6.1f} s for {len(queries)} queries, {row['ms_per_query']:.1f}"
        " ms each"
        for name, row in rows.items()
    ]
    first = args.methods[0]
    name = f"{first} replayed on 1,000 queries, s"
    finish(args, {"rows": rows}, lines, [Limit(name, rows[first]["ms_per_query"], LIMIT)])


def simulated_queries(count: int, seed: int) -> DataSet:
    """Training users, and new users whose latest records are the queries, `count` in all."""
    users = max(2, count // PER_USER)
    data = simulated_data(CLASSIFY, simulate_users(users + 10, seed), 50, seed, new=users)
    histories = {user: list(data.history(user)) for user in data.users()}
    queries = []
    for user in data.users("test"):
        queries += [as_query(record) for record in histories[user][-PER_USER:]]
        histories[user] = histories[user][:-PER_USER]
    earlier = [record for records in histories.values() for record in records]
    return DataSet.from_records(CLASSIFY, data.splits, earlier, queries[:count])


def random_label(messages: Sequence[Message], index: int, rng: random.Random) -> str:
    return rng.choice(CLASSIFY.labels)


def replay_seconds(name: str, parts: Parts, queries: Sequence[Any], folder: Path) -> float:
    """Seconds of the second run of a method."""
    for turn in ("first", "second"):
        start = time.perf_counter()
        log = RunLog(folder / f"{name}-{turn}", {"method": name})
        samples = run_sync(partial(run_methods, find_methods([name]), parts, queries, log))
        tabulate(parts.bundle.task, samples)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
