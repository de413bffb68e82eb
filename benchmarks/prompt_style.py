"""How to put records into the prompt of a task with labels, by the LLM's greedy answers for
training users.

    python benchmarks/prompt_style.py [--data FOLDER] [--llm smollm2] [--users 12] [--queries 3]
    [--k 4] [--unconstrained] [--json]

Three prompts for each query: without records (`none`), with the k best of BM25 as one list
(`block`), and with the same records as earlier turns of the conversation (`turns`). The queries are
training users' latest records. Reported are the task's gain and the share of the most frequent
answer (does the LLM repeat itself?); for ratings also the correlation of answers and gold answers
(does the LLM use its input at all?). Without `--data` the users are the demo's. Answers are cached.
There is no limit: the result is the reason for a default (`prompt_style=auto`).
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
from hydra_llm.llm.concurrency import at_once, map_calls, run_sync
from hydra_llm.llm.registry import open_llm
from hydra_llm.pipeline import UserPipeline
from hydra_llm.retrieve import make_retriever
from hydra_llm.training.labelling import training_queries
from hydra_llm.types import Query

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"k": 0},
    "block": {"prompt_style": "block"},
    "turns": {"prompt_style": "turns"},
}


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument(
        "--data", default=None, help="a data set with labels; default: the demo's users"
    )
    parser.add_argument("--llm", default="smollm2")
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--queries", type=int, default=3)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--unconstrained", action="store_true")
    args = parser.parse_args()
    data = open_data(args.data) if args.data else movielens(max(args.users, 2), 2, args.seed)
    records = {user: data.history(user) for user in data.users("train")[: args.users]}
    queries = [
        query
        for user in records
        for query in training_queries(data.task, records[user], args.queries)
    ]
    rows = {variant: measure(args, data, records, queries, variant) for variant in VARIANTS}
    lines = [
        f"{len(queries)} queries of {len(records)} training users of {data.task.name}, {args.llm},"
        f" k = {args.k}"
    ]
    lines += [
        f"{variant:<6} "
        + "  ".join(f"{name} {value:.3f}" for name, value in row["figures"].items())
        for variant, row in rows.items()
    ]
    difference = paired(
        rows["turns"]["gains"], rows["block"]["gains"], [query.user for query in queries]
    )
    lines.append(
        f"gain, turns − block: {difference.difference:+.3f} [{difference.low:+.3f},"
        f" {difference.high:+.3f}]"
    )
    result = {
        "ways": {variant: row["figures"] for variant, row in rows.items()},
        "turns_minus_block": difference._asdict(),
    }
    finish(args, {**result, "queries": len(queries), "users": len(records)}, lines, [])


def measure(
    args: argparse.Namespace,
    data: DataSet,
    records: dict[str, Any],
    queries: Sequence[Query],
    variant: str,
) -> dict[str, Any]:
    """Gains of the LLM's answers with one variant of the prompt, and their summary."""
    answers = answers_of(args, data, records, queries, variant)
    pairs = list(zip(answers, (query.gold or "" for query in queries), strict=True))
    gains = [data.task.gain(answer, gold) for answer, gold in pairs]
    most_frequent = Counter(answers).most_common(1)[0][1] / len(answers)
    out = {"gain": float(np.mean(gains)), "most_frequent": most_frequent}
    if data.task.kind == "rating":
        rated_pairs = [
            (float(answer), float(gold or "nan")) for answer, gold in pairs if answer is not None
        ]
        rated = np.array(rated_pairs)
        constant = len(rated) < 2 or np.ptp(rated[:, 0]) == 0
        out |= {
            "mae": float(np.abs(rated[:, 0] - rated[:, 1]).mean()),
            "correlation": 0.0 if constant else float(np.corrcoef(rated.T)[0, 1]),
        }
    return {"figures": out, "gains": gains}


def answers_of(
    args: argparse.Namespace,
    data: DataSet,
    records: dict[str, Any],
    queries: Sequence[Query],
    variant: str,
) -> list[str | None]:
    settings = load_settings(
        samples=1,
        candidates="sampled",
        seed=args.seed,
        constrain=not args.unconstrained,
        max_tokens=16 if args.unconstrained else 4,
        **{"k": args.k, **VARIANTS[variant]},
    )
    llm, retriever = open_llm(args.llm, settings), make_retriever("bm25")
    pipeline = UserPipeline(data.task, retriever, settings, llm=llm, records=records)
    answers = []
    for proposal in run_sync(
        partial(map_calls, pipeline.apropose, queries, limit=at_once(llm, settings.concurrency))
    ):
        if isinstance(proposal, Exception):
            raise proposal
        answers.append(proposal.candidates[0].answer)
    return answers


if __name__ == "__main__":
    main()
