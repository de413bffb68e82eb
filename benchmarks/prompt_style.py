"""How to present records in the prompt of a task with labels, by the LLM's greedy answers for
training users.

    python benchmarks/prompt_style.py [--data FOLDER] [--llm smollm2] [--users 12] [--queries 3]
    [--k 4] [--unconstrained] [--json]

Three prompts for each of a training user's latest records: without records (`none`), with the k
best of BM25 as one list (`block`), and with the same records as earlier turns of the conversation
(`turns`). The gain is the task's; for ratings, the correlation of answers and truth says whether
the LLM uses its input at all, and the share of its most frequent answer whether it repeats itself.
Without `--data` the users are the demo's. There is no limit: this is the measurement behind a
default (`prompt_style=auto`). Answers are cached.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from measure import finish, options
from simulated_users import open_data

from hydra_llm.bench.stats import paired
from hydra_llm.config import load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.demo import movielens
from hydra_llm.llm.concurrency import map_calls, run_sync
from hydra_llm.llm.registry import open_llm
from hydra_llm.pipeline import UserPipeline
from hydra_llm.retrieve import make_retriever
from hydra_llm.training.labelling import training_queries
from hydra_llm.types import Query

WAYS: dict[str, dict[str, Any]] = {
    "none": {"k": 0},
    "block": {"prompt_style": "block"},
    "turns": {"prompt_style": "turns"},
}


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument(
        "--data", default=None, help="a data set with labels; the demo's users otherwise"
    )
    parser.add_argument("--llm", default="smollm2")
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--queries", type=int, default=3)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--unconstrained", action="store_true")
    given = parser.parse_args()
    data = open_data(given.data) if given.data else movielens(max(given.users, 2), 2, given.seed)
    records = {user: data.history(user) for user in data.users("train")[: given.users]}
    queries = [
        query
        for user in records
        for query in training_queries(data.task, records[user], given.queries)
    ]
    rows = {way: figures(given, data, records, queries, way) for way in WAYS}
    lines = [
        f"{len(queries)} queries of {len(records)} training users of {data.task.name}, {given.llm},"
        f" k = {given.k}"
    ]
    lines += [
        f"{way:<6} " + "  ".join(f"{name} {value:.3f}" for name, value in row["figures"].items())
        for way, row in rows.items()
    ]
    difference = paired(
        rows["turns"]["gains"], rows["block"]["gains"], [query.user for query in queries]
    )
    lines.append(
        f"gain, turns − block: {difference.difference:+.3f} [{difference.low:+.3f},"
        f" {difference.high:+.3f}]"
    )
    result = {
        "ways": {way: row["figures"] for way, row in rows.items()},
        "turns_minus_block": difference._asdict(),
    }
    finish(given, {**result, "queries": len(queries), "users": len(records)}, lines, [])


def figures(
    given: argparse.Namespace,
    data: DataSet,
    records: dict[str, Any],
    queries: Sequence[Query],
    way: str,
) -> dict[str, Any]:
    """What the LLM's answers are worth when it is asked in this way."""
    answers = answers_of(given, data, records, queries, way)
    pairs = list(zip(answers, (query.gold or "" for query in queries), strict=True))
    gains = [data.task.gain(answer, gold) for answer, gold in pairs]
    most_frequent = Counter(answers).most_common(1)[0][1] / len(answers)
    out = {"gain": float(np.mean(gains)), "most_frequent": most_frequent}
    if data.task.kind == "rating":
        known = [
            (float(answer), float(gold or "nan")) for answer, gold in pairs if answer is not None
        ]
        rated = np.array(known)
        constant = len(rated) < 2 or np.ptp(rated[:, 0]) == 0
        out |= {
            "mae": float(np.abs(rated[:, 0] - rated[:, 1]).mean()),
            "correlation": 0.0 if constant else float(np.corrcoef(rated.T)[0, 1]),
        }
    return {"figures": out, "gains": gains}


def answers_of(
    given: argparse.Namespace,
    data: DataSet,
    records: dict[str, Any],
    queries: Sequence[Query],
    way: str,
) -> list[str | None]:
    limits = {"constrain": not given.unconstrained, "max_tokens": 16 if given.unconstrained else 4}
    style = {"k": given.k, **WAYS[way]}
    settings = load_settings(samples=1, candidates="sampled", seed=given.seed, **limits, **style)
    llm, retriever = open_llm(given.llm, settings), make_retriever("bm25")
    asks = UserPipeline(data.task, retriever, settings, llm=llm, records=records)
    answers = []
    for proposal in run_sync(
        partial(map_calls, asks.apropose, queries, limit=settings.concurrency)
    ):
        if isinstance(proposal, Exception):
            raise proposal
        answers.append(proposal.candidates[0].answer)
    return answers


if __name__ == "__main__":
    main()
