"""What a benchmark costs beside the LLM: replay a method on 1,000 queries.

    python benchmarks/harness.py [--queries 1000] [--methods rag@4 hydra@4,8] [--seed 0] [--json]

Simulated users rate by topic (simulated_users.py); the LLM is a fake whose answers are cached after
a first run. The second run of each method into a new run folder is timed: retrieval, reranking,
prompts, cache look-ups, selection, the run log, and the table with its bootstrap. The limit is for
the first method. Exits with 1 if it is missed.
"""

import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import Limit, finish, options
from simulated_users import CLASSIFY, simulate_users, simulated_data

from hydra_llm.bench.method import Parts, find_methods
from hydra_llm.bench.runlog import RunLog
from hydra_llm.bench.runner import run_methods, tabulate
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
    given = parser.parse_args()
    data = simulated_queries(given.queries, given.seed)
    queries = [query for user in data.users("test") for query in data.queries(user)]
    with tempfile.TemporaryDirectory() as folder:
        cheap = {"labelled_users": 10, "queries_per_user": 1}
        settings = load_settings(cache=Path(folder), seed=given.seed, **cheap)
        llm = wrap(RuleLLM(random_label), settings)
        bundle = fit(data, learn(data, llm, settings).bundle, llm, settings=settings).bundle
        parts = Parts(bundle, llm, settings, bundle.records)
        seconds = {name: replayed(name, parts, queries, Path(folder)) for name in given.methods}
    rows = {
        name: {"seconds": taken, "ms_per_query": 1000 * taken / len(queries)}
        for name, taken in seconds.items()
    }
    lines = [
        f"{name:<14} {row['seconds']:6.1f} s for {len(queries)} queries, {row['ms_per_query']:.1f}"
        " ms each"
        for name, row in rows.items()
    ]
    first = given.methods[0]
    name = f"{first} replayed on 1,000 queries, s"
    finish(given, {"rows": rows}, lines, [Limit(name, rows[first]["ms_per_query"], LIMIT)])


def simulated_queries(count: int, seed: int) -> DataSet:
    """Training users, and new ones whose latest records are the queries, `count` in all."""
    users = max(2, count // PER_USER)
    whole = simulated_data(CLASSIFY, simulate_users(users + 10, seed), 50, seed, new=users)
    histories = {user: list(whole.history(user)) for user in whole.users()}
    queries = []
    for user in whole.users("test"):
        queries += [as_query(record) for record in histories[user][-PER_USER:]]
        histories[user] = histories[user][:-PER_USER]
    earlier = [record for records in histories.values() for record in records]
    return DataSet.from_records(CLASSIFY, whole.splits, earlier, queries[:count])


def random_label(messages: Sequence[Message], index: int, rng: random.Random) -> str:
    return rng.choice(CLASSIFY.labels)


def replayed(name: str, parts: Parts, queries: Sequence[Any], folder: Path) -> float:
    """Seconds of the second run."""
    for turn in ("first", "second"):
        began = time.perf_counter()
        log = RunLog(folder / f"{name}-{turn}", {"method": name})
        samples = run_sync(lambda log=log: run_methods(find_methods([name]), parts, queries, log))
        tabulate(parts.bundle.task, samples)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
