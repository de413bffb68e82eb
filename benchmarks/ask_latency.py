"""Latency of one `ask` without the LLM: retrieve, rerank, prompt, select.

    python benchmarks/ask_latency.py [--data FOLDER] [--runs 40] [--seed 0] [--json]

A headline task with 10 retrieved records and 8 candidates. Query and candidates are new each time,
so that their features are not cached; features of the user's records are cached. The LLM is a fake
that answers at once; its own time is subtracted. One bundle with `tower` and one with `cross`
features are trained, saved, loaded and called alternately. Without `--data` the texts are simulated
(20 words in, 10 words out, 60 records per user). With it (news_headline) they are the users' own,
and new texts come from other users. Exits with 1 if a median exceeds its limit: 60 ms with `tower`,
300 ms with `cross`. On a busy machine use CPU time with OMP_NUM_THREADS=1: it is closer to the
wall-clock time of an idle machine.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import Limit, finish, options, show, summary
from simulated_users import HEADLINE, LABELS, open_data, simulate_users, simulated_data, words

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings, load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.llm.base import Sampling
from hydra_llm.pipeline import UserPipeline
from hydra_llm.rerank import record_text
from hydra_llm.training.api import learn
from hydra_llm.types import Generation, Message, Query, Usage

LIMITS = {"tower": 60.0, "cross": 300.0}
STAGES = ("retrieve", "rerank", "prompt", "llm", "adapt")


class Writer:
    """A fake LLM that returns the next texts of an iterator, so that all answers differ."""

    def __init__(self, headlines: Iterator[str]):
        self.headlines, self.seconds = headlines, 0.0

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"kind": "fake", "model": "fake:writer", "constrains": False}

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        start = time.perf_counter()
        texts = tuple(next(self.headlines) for _ in range(sampling.n))
        self.seconds += time.perf_counter() - start
        return Generation(texts, Usage(calls=1))

    async def aclose(self) -> None:
        """Nothing to release."""


class Stopwatch:
    """Sums the seconds spent in the encoder's two methods."""

    def __init__(self, bundle: Bundle):
        self.seconds = 0.0
        encoder = bundle.features.encoder
        for name in ("encode", "encode_pairs"):
            setattr(encoder, name, self._timed(getattr(encoder, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return run


def main() -> None:
    parser = options(__doc__, runs=40)
    parser.add_argument("--data", type=Path, help="folder of a data set; default: simulated users")
    parser.add_argument("--users", type=int, default=8, help="users in the bundle")
    args = parser.parse_args()
    data, questions, headlines = open_texts(args)
    with tempfile.TemporaryDirectory() as folder:
        bundles = {kind: learn_bundle(kind, data, args, headlines, Path(folder)) for kind in LIMITS}
        rows = measure(bundles, data.users("train")[: args.users], questions, headlines, args.runs)
    args.data = str(args.data) if args.data else None
    limits = [
        Limit(
            f"one ask with {kind}, without the LLM, ms (p50)", rows[kind]["own"]["median_ms"], limit
        )
        for kind, limit in LIMITS.items()
    ]
    finish(
        args,
        {"rows": rows},
        [line for kind, row in rows.items() for line in report_lines(kind, row)],
        limits,
    )


def open_texts(args: argparse.Namespace) -> tuple[DataSet, Iterator[str], Iterator[str]]:
    """The data set, and inputs and headlines that the bundle's users do not have."""
    rng = random.Random(args.seed)
    if args.data is None:
        return (
            simulated_data(HEADLINE, simulate_users(args.users, args.seed), 60, args.seed),
            random_texts(20, rng),
            random_texts(10, rng),
        )
    data = open_data(args.data)
    in_bundle = data.users("train")[: args.users]
    own_texts = {
        text
        for user in in_bundle
        for record in data.answered(user)
        for text in (record.input, record.output)
    }
    other_records = [
        record for user in data.users() if user not in in_bundle for record in data.answered(user)
    ]
    rng.shuffle(other_records)
    inputs = dict.fromkeys(
        record.input for record in other_records if record.input not in own_texts
    )
    return (
        data,
        iter(inputs),
        iter(
            dict.fromkeys(
                record.output for record in other_records if record.output not in own_texts
            )
        ),
    )


def random_texts(count: int, rng: random.Random) -> Iterator[str]:
    while True:
        yield words(rng.sample(LABELS, 2), count, rng)


def learn_bundle(
    kind: str, data: DataSet, args: argparse.Namespace, headlines: Iterator[str], folder: Path
) -> tuple[Bundle, Settings]:
    """A bundle of few users, trained with the fake LLM and loaded from disk."""
    settings = load_settings(
        features=kind,
        cache=folder / kind,
        users=args.users,
        queries_per_user=2,
        retrieved=10,
        samples=8,
        seed=args.seed,
    )
    learn(data, Writer(headlines), settings, out=folder / f"{kind}-bundle")
    bundle = Bundle.load(folder / f"{kind}-bundle", cache=folder / kind)
    if bundle.reranker is None or bundle.adapter is None:
        raise SystemExit(f"the {kind} bundle lacks a scorer: {bundle.report}")
    return bundle, settings


def measure(
    bundles: dict[str, tuple[Bundle, Settings]],
    users: Sequence[str],
    questions: Iterator[str],
    headlines: Iterator[str],
    runs: int,
) -> dict[str, Any]:
    parts = {
        kind: (bundle.personalizer(llm := Writer(headlines), settings), llm, Stopwatch(bundle))
        for kind, (bundle, settings) in bundles.items()
    }
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in parts}
    for bundle, _ in bundles.values():
        warm(bundle, users)
    order = [
        users[i % len(users)] for i in range(runs + len(users))
    ]  # the first round builds the users' retrieval indexes and is not timed
    for number, user in enumerate(order):
        text = next(questions)
        for kind, (personalizer, llm, encoder) in parts.items():
            row = time_answer(personalizer, llm, encoder, Query(user, f"asked {number}", text))
            if number >= len(users):
                results[kind].append(row)
    return {kind: summarize(rows) for kind, rows in results.items()}


def warm(bundle: Bundle, users: Sequence[str]) -> None:
    """Cache the features of every record; pairs with a new query cannot be cached."""
    for user in users:
        bundle.featurizer.vectorize(bundle.records[user])
        bundle.features.texts(
            [
                record_text(record, with_answer=bundle.settings.record_answer)
                for record in bundle.records[user]
            ]
        )


def time_answer(
    personalizer: UserPipeline, llm: Writer, encoder: Stopwatch, query: Query
) -> dict[str, float]:
    """Milliseconds of one answer: each stage, the encoder, and the total without the LLM."""
    llm.seconds = encoder.seconds = 0.0
    start, cpu = time.perf_counter(), time.process_time()
    answer = personalizer.answer(query)
    total, cpu = (time.perf_counter() - start) * 1000, (time.process_time() - cpu) * 1000
    if len(answer.candidates) != 8 or len(answer.proposal.retrieved) != 10:
        raise SystemExit(
            f"{len(answer.candidates)} candidates and {len(answer.proposal.retrieved)} records"
            " instead of 8 and 10"
        )
    stages = {stage: answer.seconds[stage] * 1000 for stage in STAGES}
    own = total - llm.seconds * 1000
    stages["llm"] -= llm.seconds * 1000
    return {
        **stages,
        "between the stages": total - sum(answer.seconds.values()) * 1000,
        "encoder": encoder.seconds * 1000,
        "cpu": cpu,
        "own": own,
    }


def summarize(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    own = [row["own"] for row in rows]
    p95 = float(np.quantile(own, 0.95))
    return {name: summary([row[name] for row in rows]) for name in rows[0]} | {"p95_ms": p95}


def report_lines(kind: str, row: dict[str, Any]) -> list[str]:
    inner = [
        show(f"  {name}", values, digits=2)
        for name, values in row.items()
        if name not in ("own", "p95_ms", "encoder", "cpu")
    ]
    return [
        show(f"{kind}: one ask, without the LLM", row["own"], f"  p95 {row['p95_ms']:.1f}"),
        *inner,
        show("  of this in the encoder", row["encoder"], digits=2),
        show("  CPU time, all threads", row["cpu"], digits=2),
    ]


if __name__ == "__main__":
    main()
