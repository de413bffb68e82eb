"""The pipeline's own time for one `ask`, without the LLM: retrieve, rerank, prompt, adapt.

    python benchmarks/ask_latency.py [--data FOLDER] [--runs 40] [--seed 0] [--json]

A headline task with 10 retrieved records and 8 candidates. Question and candidates are new each
time, so that their features are not cached; the user's records are cached. The LLM is a fake that
answers at once, and its own time is subtracted. `tower` and `cross` bundles are learned and loaded
from disk first, then asked in turn. Without `--data` the texts are simulated (20 words in, 10 words
out, 60 records a user); with it (news_headline) they are the users' own, and new texts come from
other users. Exits with 1 if a median is above its limit: 60 ms with `tower`, 300 ms with `cross`.
On a busy machine the processor time, with OMP_NUM_THREADS=1, is closer to that of an idle machine
than the wall-clock time.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    """A fake LLM: every text is the next one of a list, so that no two are alike."""

    def __init__(self, headlines: Iterator[str]):
        self.headlines, self.seconds = headlines, 0.0

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"kind": "fake", "model": "fake:writer", "constrains": False}

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        began = time.perf_counter()
        texts = tuple(next(self.headlines) for _ in range(sampling.n))
        self.seconds += time.perf_counter() - began
        return Generation(texts, Usage(calls=1))

    async def aclose(self) -> None:
        """Nothing to release."""


class Stopwatch:
    """Counts the seconds that an encoder's two methods take."""

    def __init__(self, personalizer_bundle: Bundle):
        self.seconds = 0.0
        encoder = personalizer_bundle.store.encoder
        for name in ("encode", "encode_pairs"):
            setattr(encoder, name, self._timed(getattr(encoder, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args, **options)
            finally:
                self.seconds += time.perf_counter() - began

        return run


def main() -> None:
    parser = options(__doc__, runs=40)
    parser.add_argument(
        "--data", type=Path, help="a data set's folder; without it, users are made up"
    )
    parser.add_argument("--users", type=int, default=8, help="users in the bundle")
    given = parser.parse_args()
    data, asked, headlines = material(given)
    with tempfile.TemporaryDirectory() as folder:
        bundles = {kind: learned(kind, data, given, headlines, Path(folder)) for kind in LIMITS}
        rows = measure(bundles, data.users("train")[: given.users], asked, headlines, given.runs)
    given.data = str(given.data) if given.data else None
    limits = [
        Limit(
            f"one ask with {kind}, all but the LLM, ms (p50)", rows[kind]["own"]["median_ms"], limit
        )
        for kind, limit in LIMITS.items()
    ]
    finish(
        given,
        {"rows": rows},
        [line for kind, row in rows.items() for line in lines_of(kind, row)],
        limits,
    )


def material(given: argparse.Namespace) -> tuple[DataSet, Iterator[str], Iterator[str]]:
    """The data set, and texts and headlines that it does not hold."""
    dice = random.Random(given.seed)
    if given.data is None:
        return (
            simulated_data(HEADLINE, simulate_users(given.users, given.seed), 60, given.seed),
            endless(20, dice),
            endless(10, dice),
        )
    data = open_data(given.data)
    in_bundle = data.users("train")[: given.users]
    mine = {
        text
        for user in in_bundle
        for record in data.answered(user)
        for text in (record.input, record.output)
    }
    others = [
        record for user in data.users() if user not in in_bundle for record in data.answered(user)
    ]
    dice.shuffle(others)
    inputs = dict.fromkeys(record.input for record in others if record.input not in mine)
    return (
        data,
        iter(inputs),
        iter(dict.fromkeys(record.output for record in others if record.output not in mine)),
    )


def endless(count: int, dice: random.Random) -> Iterator[str]:
    while True:
        yield words(dice.sample(LABELS, 2), count, dice)


def learned(
    kind: str, data: DataSet, given: argparse.Namespace, headlines: Iterator[str], folder: Path
) -> tuple[Bundle, Settings]:
    """A bundle of few users, learned with the fake, as loaded from disk."""
    settings = load_settings(
        features=kind,
        cache=folder / kind,
        users=given.users,
        queries_per_user=2,
        retrieved=10,
        samples=8,
        seed=given.seed,
    )
    learn(data, Writer(headlines), settings, out=folder / f"{kind}-bundle")
    bundle = Bundle.load(folder / f"{kind}-bundle", cache=folder / kind)
    if bundle.reranker is None or bundle.adapter is None:
        raise SystemExit(f"the {kind} bundle lacks a scorer: {bundle.report}")
    return bundle, settings


def measure(
    bundles: dict[str, tuple[Bundle, Settings]],
    users: Sequence[str],
    asked: Iterator[str],
    headlines: Iterator[str],
    runs: int,
) -> dict[str, Any]:
    parts = {
        kind: (bundle.personalizer(llm := Writer(headlines), settings), llm, Stopwatch(bundle))
        for kind, (bundle, settings) in bundles.items()
    }
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in parts}
    for bundle, _ in bundles.values():
        warm(bundle, users)
    order = [
        users[i % len(users)] for i in range(runs + len(users))
    ]  # each user once first: that warms the indexes
    for place, user in enumerate(order):
        text = next(asked)
        for kind, (personalizer, llm, encoder) in parts.items():
            row = ask(personalizer, llm, encoder, Query(user, f"asked {place}", text))
            if place >= len(users):
                found[kind].append(row)
    return {kind: in_short(rows) for kind, rows in found.items()}


def warm(bundle: Bundle, users: Sequence[str]) -> None:
    """Let the store know the text of every record; it cannot know pairs with a new query."""
    for user in users:
        bundle.featurizer.vectorize(bundle.records[user])
        bundle.store.texts(
            [
                record_text(record, with_answer=bundle.settings.record_answer)
                for record in bundle.records[user]
            ]
        )


def ask(
    personalizer: UserPipeline, llm: Writer, encoder: Stopwatch, query: Query
) -> dict[str, float]:
    """Milliseconds of one answer: its stages, the encoder's part in them, and all but the LLM."""
    llm.seconds = encoder.seconds = 0.0
    began, cpu = time.perf_counter(), time.process_time()
    answer = personalizer.answer(query)
    whole, cpu = (time.perf_counter() - began) * 1000, (time.process_time() - cpu) * 1000
    if len(answer.candidates) != 8 or len(answer.proposal.retrieved) != 10:
        raise SystemExit(
            f"{len(answer.candidates)} candidates and {len(answer.proposal.retrieved)} records"
            " instead of 8 and 10"
        )
    stages = {stage: answer.seconds[stage] * 1000 for stage in STAGES}
    own = whole - llm.seconds * 1000
    stages["llm"] -= llm.seconds * 1000
    return {
        **stages,
        "between the stages": whole - sum(answer.seconds.values()) * 1000,
        "encoder": encoder.seconds * 1000,
        "cpu": cpu,
        "own": own,
    }


def in_short(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    own = [row["own"] for row in rows]
    p95 = statistics.quantiles(own, n=20, method="inclusive")[-1]
    return {name: summary([row[name] for row in rows]) for name in rows[0]} | {"p95_ms": p95}


def lines_of(kind: str, row: dict[str, Any]) -> list[str]:
    inner = [
        show(f"  {name}", values, digits=2)
        for name, values in row.items()
        if name not in ("own", "p95_ms", "encoder", "cpu")
    ]
    return [
        show(f"{kind}: one ask, all but the LLM", row["own"], f"  p95 {row['p95_ms']:.1f}"),
        *inner,
        show("  of all this in the encoder", row["encoder"], digits=2),
        show("  the processor's time, all threads", row["cpu"], digits=2),
    ]


if __name__ == "__main__":
    main()
