"""How the time of each stage scales with users, records per user and words per text, compared with
the scaling that the design expects.

    python benchmarks/growth.py [--stages learn fit ...] [--runs 5] [--seed 0] [--json] [--out
    FILE.json] [--plot FILE.svg]

Each series varies one size over a geometric grid. The other sizes are constant: 4 training users,
20 records per user, 20 words per text (half as many in an answer of the headline task), M = 10,
k = 4, 8 candidates. Bundles of many users have a head and a history for each; queries come from
random users. Tower features, linear heads, the default encoder, simulated users
(simulated_users.py).

The main figure is CPU time of all threads (torch has one), because wall-clock time depends on the
load of the machine; wall-clock time is in the JSON too. Figures are medians of several runs after a
warm-up, with sizes interleaved; slow stages have three fifths of the runs. Each series is fitted as
seconds = a + b·x^p (power_law.py). `grows` is the share of the largest size's time that is not the
constant a: if it is small, p means little. The interval of p is a bootstrap over runs; with few
runs it is too narrow.

    label      the part of learning before the fits: histories, retrieval, prompts, reading of the
               LLM's answers, labelled groups
    train      the fits of base and heads with cached features
    fit        both heads of one new user; `first sight`: no features are cached, so that the
               encoder reads the whole history
    retrieve   BM25; `first sight`: the user's index is built; `kept`: it is cached
    rerank     a new query; `first sight`: no features are cached; `kept`: those of the history are
    generate   prompt and candidates
    adapt      8 new headlines, or 12 labels with cached features of the query
    encode     the encoder alone: what `first sight` adds

The LLM is a fake that answers at once (its own time is included). Its cost is given as calls and
prompt tokens (words, for the fake), which are exact. Texts are short enough that neither the
encoder's limit (256 tokens) nor max_prompt_tokens cuts them.
"""

import argparse
import json
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from measure import finish, options, summary
from power_law import Growth, growth
from simulated_users import CLASSIFY, HEADLINE, LABELS, SimulatedUser, simulate_users, words

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings, load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.heads import Head
from hydra_llm.pipeline import UserPipeline
from hydra_llm.rerank import KeepOrder, record_text
from hydra_llm.tasks.base import Task
from hydra_llm.training.api import fit, learn
from hydra_llm.types import Candidate, Query, Ranked, Record

USERS, RECORDS, WORDS = 4, 20, 20
"""The constant sizes; each series varies one of them."""
LEARNING = {"users": (4, 8, 16, 32), "records": (15, 30, 60, 120), "words": (6, 15, 38, 96)}
ANSWERING = {
    "users": (10, 100, 1_000, 10_000),
    "records": (10, 20, 40, 80, 160),
    "words": (6, 12, 24, 48, 96),
}
UNCACHED = {"records": (10, 20, 40, 80), "words": (6, 15, 38, 96)}
USERS_WITH_HISTORY = (10, 40, 160, 640)
"""Users with different histories, each with its own index."""
RETRIEVED_RECORDS = (20, 80, 320, 1_280)
"""Records of one user, for BM25 only."""
PROMPT_RECORDS = (1, 2, 4, 8)

Exponents = Mapping[str, float]
FIXED: Exponents = {"users": 0, "records": 0, "words": 0}
READS_WORDS: Exponents = {"users": 0, "records": 0, "words": 1}
READS_HISTORY: Exponents = {"records": 1, "words": 1}
EXPECTED: Mapping[str, Exponents] = {
    "label": {
        "users": 1,
        "records": 1,
        "words": 0,
    },  # every record of a task with labels is a group
    "label, LLM calls": {"users": 1, "records": 0, "words": 0},  # queries_per_user of each user
    "label, prompt tokens": {"users": 1, "records": 0, "words": 1},
    "train": {"users": 1, "records": 1, "words": 0},
    "fit labels, kept": {"users": 0, "records": 1, "words": 0},
    "fit labels, first sight": READS_HISTORY,
    "fit headlines, kept": {
        "users": 0,
        "records": 1,
        "words": 0,
    },  # every record is a reranker query
    "fit headlines, first sight": READS_HISTORY,
    "retrieve, kept": {"users": 0, "records": 1, "words": 1},
    "retrieve, first sight": {"records": 1, "words": 1},
    "rerank, kept": {**READS_WORDS, "M": 1},
    "rerank, first sight": READS_HISTORY,
    "generate": {**READS_WORDS, "k": 1},
    "generate, LLM calls": {**FIXED, "k": 0},
    "generate, prompt tokens": {**READS_WORDS, "k": 1},
    "adapt labels": FIXED,
    "adapt headlines": {**READS_WORDS, "candidates": 1},
    "encode": {"texts": 1, "words": 1},
}
"""The exponent that the design expects; 0 is constant."""
WHY: Mapping[tuple[str, str], str] = {
    ("label", "records"): ("every record is a query, and each query indexes all records before it"),
    ("train", "users"): (
        "training sets of at most 300 groups use ten folds, larger ones three: few users cost"
        " relatively more"
    ),
    ("label", "words"): "the words of an index and of a prompt are read once each",
    ("fit labels, kept", "users"): (
        "asyncio formats the result of sync `fit` when it restores the SIGINT handler: the repr of"
        " a bundle has all records"
    ),
    ("fit headlines, kept", "users"): "as for labels",
    (
        "fit labels, kept",
        "records",
    ): "each record is a query with its own BM25 index and history vectors",
    ("fit headlines, kept", "records"): "as for labels",
    ("fit labels, kept", "words"): "BM25 tokenizes the texts again for each query's history",
    ("fit headlines, kept", "words"): "as for labels",
    ("retrieve, kept", "users"): (
        "256 indexes are cached: with more users the time steps up to `first sight`"
    ),
    ("retrieve, first sight", "words"): (
        "simulated texts have 140 different words: longer texts repeat them, and an index has each"
        " word once per record"
    ),
    ("generate", "records"): "`before` reads every record",
    ("adapt labels", "records"): "side features compare every record with the query",
    ("rerank, kept", "M"): (
        "features of the M records are cached and scoring is one product: the time is that of"
        " encoding the query"
    ),
}
"""Reasons where the expectation does not hold; printed only there."""
LAWS = {0: "constant", 1: "linear"}
TOLERANCE = 0.25
"""Allowed distance of an interval from the expected exponent."""
MIN_SECONDS = 0.02
"""Minimum duration of a run: fast stages are called several times in a run."""


@dataclass(frozen=True)
class Measurement:
    """One run of a stage."""

    cpu: float
    """CPU seconds, or the value of a counter."""
    wall: float = math.nan


Sampler = Callable[[], Mapping[str, Measurement]]
"""Runs once and returns the measurement of each stage."""


@dataclass(frozen=True)
class Series:
    """The varied size, its values, and a sampler for each value."""

    variable: str
    sizes: Sequence[int]
    sampler: Callable[[int], Sampler]
    slow: bool = False


@dataclass
class Row:
    """A stage over the sizes of one variable."""

    stage: str
    variable: str
    unit: str
    sizes: Sequence[int]
    measurements: list[list[Measurement]] = field(default_factory=list)
    """[S][R]"""

    def law(self, seed: int) -> Growth:
        return growth(
            self.sizes,
            [[measurement.cpu for measurement in runs] for runs in self.measurements],
            seed,
        )


def main() -> None:
    parser = options(__doc__, runs=5)
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument(
        "--plot", type=Path, help="draw the results as SVG (needs altair, vl-convert)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    # background jobs of a shell ignore SIGINT; asyncio then skips its handler
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cpu_start, wall = time.process_time(), time.perf_counter()
    series = run_stages(args)
    cpu, clock = time.process_time() - cpu_start, time.perf_counter() - wall
    seconds = {"cpu_s": round(cpu, 1), "wall_s": round(clock, 1)}
    figure = "CPU seconds, all threads"
    result = {"main_figure": figure, "base": base(), "spent": seconds, "rows": series}
    if args.out:
        text = json.dumps({**run_info(args), **result}, indent=1)
        args.out.write_text(text + "\n", encoding="utf-8")
    if args.plot:
        plot(series, args.plot)
    args.out, args.plot = (str(path) if path else None for path in (args.out, args.plot))
    duration = f"total: {seconds['cpu_s']} s CPU time, {seconds['wall_s']} s wall-clock time"
    finish(args, result, [*report_lines(series), duration], [])


def run_stages(args: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Fixtures(Path(folder), args.seed)
        all_series = (series for name in args.stages for series in STAGES[name](bench))
        rows = [row for series in all_series for row in run_series(series, args.runs)]
    return [row_to_json(row, row.law(args.seed)) for row in rows]


# ---- running


def run_series(series: Series, runs: int) -> list[Row]:
    """Measure the sizes alternately, after one warm-up run each; setting up a slow series warms it
    up.
    """
    samplers = [series.sampler(size) for size in series.sizes]
    for sampler in samplers[:1] if series.slow else samplers:
        sampler()
    rows: dict[str, Row] = {}
    for _ in range(max(2, runs * 3 // 5) if series.slow else runs):
        for index, sampler in enumerate(samplers):
            for stage, measurement in sampler().items():
                unit = stage.rpartition(", ")[2] if math.isnan(measurement.wall) else "s"
                row = rows.setdefault(
                    stage, Row(stage, series.variable, unit, series.sizes, [[] for _ in samplers])
                )
                row.measurements[index].append(measurement)
    return list(rows.values())


def timed(
    stage: str, prepare: Callable[[], Any], run: Callable[[Any], Mapping[str, float] | object]
) -> Sampler:
    """Times `run` on a new result of `prepare` each time. If `run` returns a dict, its values are
    counters by name.
    """
    calls = 1

    def sample() -> dict[str, Measurement]:
        nonlocal calls
        inputs = [prepare() for _ in range(calls)]
        cpu, wall = time.process_time(), time.perf_counter()
        results = [run(item) for item in inputs]
        cpu, wall = (time.process_time() - cpu) / calls, (time.perf_counter() - wall) / calls
        counts = (
            {f"{stage}, {name}": Measurement(value) for name, value in results[0].items()}
            if isinstance(results[0], dict)
            else {}
        )
        if calls == 1:
            calls = min(100, max(1, round(MIN_SECONDS / max(cpu, 1e-6))))
        return {stage: Measurement(cpu, wall), **counts}

    return sample


class StageTimer:
    """Progress callback of `learn` that sums the time up to each report: that of a fit's end counts
    as `train`, all else as `label`.
    """

    def __init__(self) -> None:
        self.seconds = {"label": [0.0, 0.0], "train": [0.0, 0.0]}
        self.last = self.now()

    def now(self) -> tuple[float, float]:
        return time.process_time(), time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now, fits = self.now(), not stage.startswith("label") and done > 0
        seconds = self.seconds["train" if fits else "label"]
        for clock in (0, 1):
            seconds[clock] += now[clock] - self.last[clock]
        self.last = now

    def measurements(self) -> dict[str, Measurement]:
        return {stage: Measurement(*seconds) for stage, seconds in self.seconds.items()}


# ---- what is measured


def history(task: Task, user: SimulatedUser, records: int, length: int, seed: int) -> list[Record]:
    """A user's records. A shorter history is a prefix of a longer one."""
    rng, out = random.Random(f"{user.name} {length} {seed}"), []
    for index in range(records):
        topics = rng.sample(LABELS, 2)
        topic = user.prefers(topics)
        answer = topic if task.labels else words([topic], length // 2, rng)
        out.append(
            Record(user.name, f"r{index}", words(topics, length, rng), answer, position=index)
        )
    return out


def renamed(records: Sequence[Record], user: str) -> list[Record]:
    return [replace(record, user=user) for record in records]


def fake_llm(task: Task) -> RuleLLM:
    """A fake LLM: a random label, or ten random words about a topic."""
    return RuleLLM(
        lambda _messages, _index, rng: (
            rng.choice(LABELS) if task.labels else words([rng.choice(LABELS)], WORDS // 2, rng)
        )
    )


class FixedRetriever:
    """A retriever that returns given records."""

    def __init__(self, ranked: list[Ranked]):
        self.ranked = ranked

    def retrieve(self, query: Query, records: Sequence[Record], m: int) -> list[Ranked]:
        return self.ranked


class Fixtures:
    """The trained bundles of both tasks, and helpers for the series."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed, self.number, self.rng = folder, seed, count(), random.Random(seed)
        self.bundles: dict[str, Bundle] = {}
        self.user = simulate_users(1, seed, "asker ")[0]

    def settings(self, **changed: Any) -> Settings:
        return load_settings(**{"cache": self.folder / "kept", "seed": self.seed, **changed})

    def bundle(self, task: Task) -> Bundle:
        """The bundle of a task, trained once on the constant sizes."""
        if task.name not in self.bundles:
            self.bundles[task.name] = learn(
                self.training(task), fake_llm(task), self.settings()
            ).bundle
            if self.bundles[task.name].reranker is None or self.bundles[task.name].adapter is None:
                raise SystemExit(f"the bundle lacks a scorer: {self.bundles[task.name].report}")
        return self.bundles[task.name]

    def training(
        self, task: Task, users: int = USERS, records: int = RECORDS, length: int = WORDS
    ) -> DataSet:
        simulated = simulate_users(users, self.seed)
        rows = [
            record
            for user in simulated
            for record in history(task, user, records, length, self.seed)
        ]
        return DataSet.from_records(task, {user.name: "train" for user in simulated}, rows, [])

    def cache_features(
        self, task: Task, records: Sequence[Record], *, reranker: bool = True
    ) -> None:
        """Cache the records' features; with `reranker` also of the texts that only it reads."""
        outputs = [] if task.labels else [record.output for record in records]
        both = [record_text(record, with_answer=True) for record in records] if reranker else []
        self.bundle(task).features.texts([*(record.input for record in records), *both, *outputs])

    def with_users(self, task: Task, users: int, histories: Sequence[Sequence[Record]]) -> Bundle:
        """The bundle with a head and a history for each of many users; the histories repeat."""
        bundle, names = self.bundle(task), [f"user {i}" for i in range(users)]
        heads = {
            name: dict.fromkeys(names, Head.of(scorer.head.empty()))
            for name, scorer in bundle.scorers.items()
        }
        records = {
            name: renamed(histories[i % len(histories)], name) for i, name in enumerate(names)
        }
        return replace(bundle, heads=heads, records=records)

    def without_cache(self, bundle: Bundle) -> Bundle:
        """The bundle with an empty feature cache."""
        return replace(
            bundle,
            features=FeatureCache(
                bundle.features.encoder, self.folder / f"{next(self.number)}.sqlite"
            ),
        )

    def user_history(self, task: Task, records: int = RECORDS, length: int = WORDS) -> list[Record]:
        return history(task, self.user, records, length, self.seed)

    def text(self, length: int) -> str:
        """A new text, whose features are not cached."""
        return words(self.rng.sample(LABELS, 2), length, self.rng)

    def query(self, bundle: Bundle, length: int = WORDS) -> Query:
        """A new query of a random user."""
        return Query(
            f"user {self.rng.randrange(len(bundle.records))}",
            f"asked {next(self.number)}",
            self.text(length),
        )


# ---- the stages' series


def learning(bench: Fixtures) -> Iterator[Series]:
    """`learn`, split into label and train by its progress reports."""

    def sampler(**size: int) -> Sampler:
        data, settings = bench.training(CLASSIFY, **size), bench.settings()
        bench.cache_features(
            CLASSIFY, [record for user in data.users() for record in data.history(user)]
        )

        def sample() -> Mapping[str, Measurement]:
            timer = StageTimer()
            usage = learn(data, fake_llm(CLASSIFY), settings, progress=timer).usage
            return {
                **timer.measurements(),
                "label, LLM calls": Measurement(usage.calls),
                "label, prompt tokens": Measurement(usage.prompt_tokens),
            }

        return sample

    yield Series("users", LEARNING["users"], lambda n: sampler(users=n), slow=True)
    yield Series("records", LEARNING["records"], lambda n: sampler(records=n), slow=True)
    yield Series("words", LEARNING["words"], lambda n: sampler(length=n), slow=True)


def fitting(bench: Fixtures) -> Iterator[Series]:
    """`fit` of one new user at a time."""

    def sampler(task: Task, cached: bool, users: int = 10, **size: int) -> Sampler:
        user_history = bench.user_history(task, **size)
        if cached:
            bench.cache_features(task, user_history)
        bundle = bench.with_users(task, users, [user_history[:1]])

        def prepare() -> tuple[DataSet, Bundle, str]:
            name = f"new {next(bench.number)}"
            data = DataSet.from_records(task, {name: "test"}, renamed(user_history, name), [])
            return data, bundle if cached else bench.without_cache(bundle), name

        def run(args: tuple[DataSet, Bundle, str]) -> None:
            fit(args[0], args[1], fake_llm(task), users=[args[2]])

        kind = "labels" if task.labels else "headlines"
        return timed(f"fit {kind}, {'kept' if cached else 'first sight'}", prepare, run)

    for task in (CLASSIFY, HEADLINE):
        yield Series("users", ANSWERING["users"], lambda n, task=task: sampler(task, True, users=n))
        yield Series(
            "records", ANSWERING["records"], lambda n, task=task: sampler(task, True, records=n)
        )
        yield Series(
            "words", ANSWERING["words"], lambda n, task=task: sampler(task, True, length=n)
        )
        yield Series(
            "records",
            UNCACHED["records"],
            lambda n, task=task: sampler(task, False, records=n),
            slow=True,
        )
        yield Series(
            "words",
            UNCACHED["words"],
            lambda n, task=task: sampler(task, False, length=n),
            slow=True,
        )


def retrieving(bench: Fixtures) -> Iterator[Series]:
    """BM25; every user has its own index."""

    def sampler(
        cached: bool, users: int = 1, records: int = RECORDS, length: int = WORDS
    ) -> Sampler:
        simulated = simulate_users(users, bench.seed)
        bundle = bench.with_users(
            CLASSIFY,
            users,
            [history(CLASSIFY, user, records, length, bench.seed) for user in simulated],
        )
        personalizer = bundle.personalizer(fake_llm(CLASSIFY))
        for user_history in bundle.records.values():
            personalizer.retriever.retrieve(bench.query(bundle), user_history, 1)

        def prepare() -> tuple[UserPipeline, Query]:
            return personalizer if cached else bundle.personalizer(fake_llm(CLASSIFY)), bench.query(
                bundle, length
            )

        def run(args: tuple[UserPipeline, Query]) -> None:
            args[0].retriever.retrieve(
                args[1], bundle.records[args[1].user], args[0].settings.retrieved
            )

        return timed(f"retrieve, {'kept' if cached else 'first sight'}", prepare, run)

    yield Series("users", USERS_WITH_HISTORY, lambda n: sampler(True, users=n))
    for cached in (True, False):
        yield Series(
            "records", RETRIEVED_RECORDS, lambda n, cached=cached: sampler(cached, records=n)
        )
        yield Series(
            "words", ANSWERING["words"], lambda n, cached=cached: sampler(cached, length=n)
        )


def reranking(bench: Fixtures) -> Iterator[Series]:
    """Reranking for a new query each time."""

    def sampler(
        cached: bool, users: int = 1, length: int = WORDS, m: int = 10, **size: int
    ) -> Sampler:
        user_history = bench.user_history(CLASSIFY, length=length, **size)
        if cached:
            bench.cache_features(CLASSIFY, user_history)
        bundle = bench.with_users(CLASSIFY, users, [user_history])
        personalizer = bundle.personalizer(fake_llm(CLASSIFY))

        def prepare() -> tuple[UserPipeline, Query, list[Ranked]]:
            query = bench.query(bundle, length)
            retrieved = personalizer.retriever.retrieve(query, bundle.records[query.user], m)
            return (
                personalizer
                if cached
                else bench.without_cache(bundle).personalizer(fake_llm(CLASSIFY)),
                query,
                retrieved,
            )

        def run(args: tuple[UserPipeline, Query, list[Ranked]]) -> None:
            context = args[0].context(args[1], bundle.records[args[1].user])
            args[0].rerank(context, args[2])

        return timed(f"rerank, {'kept' if cached else 'first sight'}", prepare, run)

    for variable in ("users", "records", "words"):
        name = "length" if variable == "words" else variable
        yield Series(variable, ANSWERING[variable], lambda n, name=name: sampler(True, **{name: n}))
    yield Series("M", (5, 10, 20, 40), lambda n: sampler(True, m=n, records=80))
    yield Series("records", UNCACHED["records"], lambda n: sampler(False, records=n), slow=True)
    yield Series("words", UNCACHED["words"], lambda n: sampler(False, length=n), slow=True)


def generating(bench: Fixtures) -> Iterator[Series]:
    """`propose` with given records in their given order."""

    def sampler(users: int = 1, length: int = WORDS, k: int = 4, **size: int) -> Sampler:
        bundle = bench.with_users(
            CLASSIFY, users, [bench.user_history(CLASSIFY, length=length, **size)]
        )
        personalizer = bundle.personalizer(
            fake_llm(CLASSIFY), bundle.settings.model_copy(update={"k": k})
        )

        def prepare() -> tuple[UserPipeline, Query]:
            query = bench.query(bundle, length)
            ranked = personalizer.retriever.retrieve(query, bundle.records[query.user], 10)
            return replace(
                personalizer, retriever=FixedRetriever(ranked), reranker=KeepOrder()
            ), query

        def run(args: tuple[UserPipeline, Query]) -> dict[str, float]:
            usage = args[0].propose(args[1]).usage
            return {"LLM calls": usage.calls, "prompt tokens": usage.prompt_tokens}

        return timed("generate", prepare, run)

    for variable in ("users", "records", "words"):
        name = "length" if variable == "words" else variable
        yield Series(variable, ANSWERING[variable], lambda n, name=name: sampler(**{name: n}))
    yield Series("k", PROMPT_RECORDS, lambda n: sampler(k=n))


def adapting(bench: Fixtures) -> Iterator[Series]:
    """`select` for a query whose features are cached; headlines are new each time."""

    def sampler(
        task: Task, users: int = 1, length: int = WORDS, candidates: int = 8, **size: int
    ) -> Sampler:
        user_history = bench.user_history(task, length=length, **size)
        bench.cache_features(task, user_history, reranker=False)
        bundle = bench.with_users(task, users, [user_history])
        pipeline = bundle.pipeline()

        def prepare() -> tuple[Query, list[Candidate]]:
            query = bench.query(bundle, length)
            bundle.features.texts([query.input])
            texts = task.labels or [bench.text(max(2, length // 2)) for _ in range(candidates)]
            return query, [
                Candidate(text, text, votes=int(i < 8), greedy=i == 0)
                for i, text in enumerate(texts)
            ]

        def run(args: tuple[Query, list[Candidate]]) -> None:
            context = pipeline.context(args[0], bundle.records[args[0].user])
            pipeline.select(context, args[1])

        return timed("adapt labels" if task.labels else "adapt headlines", prepare, run)

    for task in (CLASSIFY, HEADLINE):
        for variable in ("users", "records", "words"):
            name = "length" if variable == "words" else variable
            yield Series(
                variable,
                ANSWERING[variable],
                lambda n, task=task, name=name: sampler(task, **{name: n}),
            )
    yield Series("candidates", (4, 8, 16, 32), lambda n: sampler(HEADLINE, candidates=n))


def encoding(bench: Fixtures) -> Iterator[Series]:
    """The encoder without a cache."""

    def sampler(texts: int = 16, length: int = WORDS) -> Sampler:
        encoder = bench.bundle(CLASSIFY).features.encoder
        return timed("encode", lambda: [bench.text(length) for _ in range(texts)], encoder.encode)

    yield Series("texts", (4, 8, 16, 32, 64), lambda n: sampler(texts=n))
    yield Series("words", ANSWERING["words"], lambda n: sampler(length=n))


STAGES: Mapping[str, Callable[[Fixtures], Iterator[Series]]] = {
    "learn": learning,
    "fit": fitting,
    "retrieve": retrieving,
    "rerank": reranking,
    "generate": generating,
    "adapt": adapting,
    "encode": encoding,
}


# ---- the report


def row_to_json(row: Row, law: Growth) -> dict[str, Any]:
    medians = [
        statistics.median(measurement.cpu for measurement in runs) for runs in row.measurements
    ]
    expected = EXPECTED[row.stage][row.variable]
    outcome = verdict(law, expected)
    return {
        "stage": row.stage,
        "variable": row.variable,
        "unit": row.unit,
        "law": asdict(law),
        "grows": 1 - law.constant / law.at(row.sizes[-1]) if law.factor else 0.0,
        "expected_exponent": expected,
        "verdict": outcome,
        "why": WHY.get((row.stage, row.variable)) if outcome != "as expected" else None,
        "points": [
            {
                "size": size,
                "median": median,
                "runs": [measurement.cpu for measurement in runs],
                **spread(runs),
            }
            for size, median, runs in zip(row.sizes, medians, row.measurements, strict=True)
        ],
    }


def spread(runs: Sequence[Measurement]) -> dict[str, Any]:
    """Quartiles of the main figure, and the median wall-clock time where measured."""
    quartiles = summary([measurement.cpu for measurement in runs])
    wall = (
        {}
        if math.isnan(runs[0].wall)
        else {"wall_median": statistics.median(measurement.wall for measurement in runs)}
    )
    return {"quartiles": [quartiles["quartile_1_ms"], quartiles["quartile_3_ms"]], **wall}


def verdict(law: Growth, expected: float) -> str:
    """Whether the expectation holds up to `TOLERANCE`: the interval covers only timing noise."""
    if expected == 0:
        return "GROWS" if law.low > 0 else "as expected"
    if law.low > expected + TOLERANCE:
        return "STEEPER"
    return "FLATTER" if law.high < expected - TOLERANCE else "as expected"


def report_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = f"{'stage':<27}{'variable':<11}{'range':>14}{'smallest':>12}{'largest':>11}"
    head = f"{names}  {'exponent p':<20}{'grows':>6}  {'expected':<10}verdict"
    failed = [
        (row, WHY.get((row["stage"], row["variable"])))
        for row in rows
        if row["verdict"] != "as expected"
    ]
    notes = [
        f"{row['verdict']:<8} {row['stage']} in {row['variable']}: {why or 'not investigated'}"
        for row, why in failed
    ]
    return [head, *map(report_line, rows), *notes]


def report_line(row: Mapping[str, Any]) -> str:
    first, last, law = row["points"][0], row["points"][-1], row["law"]
    ends = [format_value(point["median"], row["unit"]) for point in (first, last)]
    exponent = f"{law['exponent']:.2f} [{law['low']:.2f}, {law['high']:.2f}]"
    span, expected = f"{first['size']:,} to {last['size']:,}", LAWS[row["expected_exponent"]]
    text = (
        f"{row['stage']:<27}{row['variable']:<11}{span:>14}{ends[0]:>12}{ends[1]:>11} "
        f" {exponent:<20}{row['grows']:>6.0%}"
    )
    return f"{text}  {expected:<10}{row['verdict']}"


def format_value(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:.0f}"
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def base() -> dict[str, Any]:
    return {
        "training_users": USERS,
        "records": RECORDS,
        "words": WORDS,
        "features": "tower",
        "head": "linear",
        "encoder": "minilm",
    }


def run_info(args: argparse.Namespace) -> dict[str, Any]:
    """Options and machine, without paths."""
    machine = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    return {
        "options": {"stages": args.stages, "runs": args.runs, "seed": args.seed},
        "machine": machine,
    }


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A log-log panel for each stage: medians as points, laws as lines."""
    import altair as alt

    charts = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        stage_rows = [row for row in rows if row["stage"] == stage]
        values = [
            {
                "variable": f"{row['variable']}, p = {row['law']['exponent']:.2f}",
                "size": p["size"],
                "value": p["median"],
                "law": law_at(row, p),
            }
            for row in stage_rows
            for p in row["points"]
        ]
        chart = alt.Chart(alt.Data(values=values)).encode(
            x=alt.X("size:Q").scale(type="log").title("size"),
            color=alt.Color("variable:N").title(None),
        )
        points = chart.mark_point(filled=True, size=40).encode(
            y=alt.Y("value:Q").scale(type="log").title(stage_rows[0]["unit"])
        )
        charts.append(
            (points + chart.mark_line().encode(y="law:Q")).properties(
                title=stage, width=220, height=160
            )
        )
    alt.concat(*charts, columns=3).resolve_scale(
        color="independent", x="independent", y="independent"
    ).save(str(path))


def law_at(row: Mapping[str, Any], point: Mapping[str, Any]) -> float:
    law = Growth(**row["law"])
    return law.at(point["size"])


if __name__ == "__main__":
    main()
