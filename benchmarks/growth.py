"""How the time of each stage grows with users, records per user and words per text, compared with
the growth that the design expects.

    python benchmarks/growth.py [--stages learn fit ...] [--runs 5] [--seed 0] [--json] [--out
    FILE.json] [--plot FILE.svg]

Each series varies one thing over a geometric grid; the rest is constant: 4 training users, 20
records a user, 20 words a text (an answer of the headline task has half as many), M = 10, k = 4, 8
candidates. Bundles of many users hold a head and a history for each; the asking users are random.
Tower features, linear heads, the packaged encoder; users are simulated (simulated_users.py).

The main figure is the processor time of all threads (torch has one), as wall-clock time depends on
the load of the machine; it is in the JSON too. Medians of several runs after a warm-up, the sizes
in turn; slow stages have three fifths of the runs. The growth law is seconds = a + b·x^p (fitted as
in power_law.py); `grows` is the share of the largest size's time that is not the fixed cost a: if
it is small, p says little. The interval of p is a bootstrap over the runs, too narrow for few runs.

    label      the part of learning before the fits: reading histories, retrieval, prompts,
               bookkeeping of the LLM's answers, labelled groups
    train      the fits of base and heads with cached features
    fit        both heads of one new user; `first sight`: no text is cached, the encoder reads the
               whole history
    retrieve   BM25; `first sight`: the user's index is built, `kept`: it is cached
    rerank     a new question; `first sight`: the history is new too, `kept`: only the question's
               text is new
    generate   prompt and candidates
    adapt      8 new headlines, or 12 labels whose query the reranker has encoded
    encode     the encoder alone: what `first sight` adds

The LLM is a fake that answers at once (its own time is included); its cost is given in calls and
prompt tokens (words, for the fake), which are exact. Texts are short enough that neither the
encoder's window (256 tokens) nor max_prompt_tokens cuts them.
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
"""The base, from which one thing at a time is varied."""
TRAINING = {"users": (4, 8, 16, 32), "records": (15, 30, 60, 120), "words": (6, 15, 38, 96)}
SERVING = {
    "users": (10, 100, 1_000, 10_000),
    "records": (10, 20, 40, 80, 160),
    "words": (6, 12, 24, 48, 96),
}
FIRST = {"records": (10, 20, 40, 80), "words": (6, 15, 38, 96)}
ASKED = (10, 40, 160, 640)
"""Users whose histories differ, each with an index of its own."""
LONG = (20, 80, 320, 1_280)
"""Records of one user that only BM25 reads."""
FEW = (1, 2, 4, 8)

Exponents = Mapping[str, float]
FIXED: Exponents = {"users": 0, "records": 0, "words": 0}
READS_WORDS: Exponents = {"users": 0, "records": 0, "words": 1}
READS_HISTORY: Exponents = {"records": 1, "words": 1}
EXPECTED: Mapping[str, Exponents] = {
    "label": {
        "users": 1,
        "records": 1,
        "words": 0,
    },  # groups: every record of a task with labels is one
    "label, LLM calls": {"users": 1, "records": 0, "words": 0},  # queries_per_user of each user
    "label, prompt tokens": {"users": 1, "records": 0, "words": 1},
    "train": {"users": 1, "records": 1, "words": 0},
    "fit labels, kept": {"users": 0, "records": 1, "words": 0},
    "fit labels, first sight": READS_HISTORY,
    "fit headlines, kept": {
        "users": 0,
        "records": 1,
        "words": 0,
    },  # every record teaches the reranker
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
"""The exponent that the design expects: 0 is a cost that does not grow."""
WHY: Mapping[tuple[str, str], str] = {
    ("label", "records"): (
        "every record is a query, and each looks up all that came before it and has an index of"
        " its own"
    ),
    ("train", "users"): (
        "tables of at most 300 groups learn in ten folds, larger ones in three: few users cost more"
        " than their share"
    ),
    (
        "label",
        "words",
    ): "the words of an index and of a prompt are read once each; no LLM waits for that",
    ("fit labels, kept", "users"): (
        "asyncio prints the result of sync `fit` as it hands Ctrl-C back: the repr of a bundle has"
        " all records"
    ),
    ("fit headlines, kept", "users"): "as for labels",
    (
        "fit labels, kept",
        "records",
    ): "each record is a query with a BM25 index and a memory of its own slice of the history",
    ("fit headlines, kept", "records"): "as for labels",
    ("fit labels, kept", "words"): "BM25 splits the texts anew for each slice of the history",
    ("fit headlines, kept", "words"): "as for labels",
    ("retrieve, kept", "users"): (
        "256 indexes are kept: with more random users it is a step up to `first sight`, not a slope"
    ),
    ("retrieve, first sight", "words"): (
        "made-up texts draw on 140 words: longer ones repeat them, and an index holds each once a"
        " record"
    ),
    ("generate", "records"): "`before` looks at every record; no LLM waits for that",
    ("adapt labels", "records"): "side features compare every record with the query",
    ("rerank, kept", "M"): (
        "the M records are known, scoring them is one product: the question's own pass through the"
        " encoder is all"
    ),
}
"""Where an expectation failed, why; printed only where it fails."""
LAWS = {0: "constant", 1: "linear"}
NEAR = 0.25
"""How far an interval may be from the expected exponent."""
LEAST_SECONDS = 0.02
"""A run lasts at least that long: quick things are done several times in it."""


@dataclass(frozen=True)
class Take:
    """One run of a stage."""

    cpu: float
    """Seconds of the processor, or the count itself."""
    wall: float = math.nan


Sampler = Callable[[], Mapping[str, Take]]
"""Runs once; what each stage took."""


@dataclass(frozen=True)
class Series:
    """What is varied, and how to run each size."""

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
    takes: list[list[Take]] = field(default_factory=list)
    """[S][R]"""

    def law(self, seed: int) -> Growth:
        return growth(self.sizes, [[take.cpu for take in runs] for runs in self.takes], seed)


def main() -> None:
    parser = options(__doc__, runs=5)
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--out", type=Path, help="write the results there, as JSON")
    parser.add_argument("--plot", type=Path, help="draw them there, as SVG (altair, vl-convert)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    # a shell's background job ignores it, and asyncio then does less
    signal.signal(signal.SIGINT, signal.default_int_handler)
    began, wall = time.process_time(), time.perf_counter()
    series = run_stages(given)
    cpu, clock = time.process_time() - began, time.perf_counter() - wall
    spent = {"cpu_s": round(cpu, 1), "wall_s": round(clock, 1)}
    figure = "seconds of the processor, all threads"
    result = {"main_figure": figure, "base": base(), "spent": spent, "rows": series}
    if given.out:
        text = json.dumps({**about(given), **result}, indent=1)
        given.out.write_text(text + "\n", encoding="utf-8")
    if given.plot:
        plot(series, given.plot)
    given.out, given.plot = (str(path) if path else None for path in (given.out, given.plot))
    took = f"this took {spent['cpu_s']} s of the processor, {spent['wall_s']} s by the clock"
    finish(given, result, [*lines_of(series), took], [])


def run_stages(given: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), given.seed)
        series = (each for name in given.stages for each in STAGES[name](bench))
        rows = [row for each in series for row in measured(each, given.runs)]
    return [in_full(row, row.law(given.seed)) for row in rows]


# ---- running


def measured(series: Series, runs: int) -> list[Row]:
    """The sizes take turns after a run of each to warm up; slow series are warm by the way that
    they are set up.
    """
    samplers = [series.sampler(size) for size in series.sizes]
    for sampler in samplers[:1] if series.slow else samplers:
        sampler()
    rows: dict[str, Row] = {}
    for _ in range(max(2, runs * 3 // 5) if series.slow else runs):
        for place, sampler in enumerate(samplers):
            for stage, take in sampler().items():
                unit = stage.rpartition(", ")[2] if math.isnan(take.wall) else "s"
                row = rows.setdefault(
                    stage, Row(stage, series.variable, unit, series.sizes, [[] for _ in samplers])
                )
                row.takes[place].append(take)
    return list(rows.values())


def timed(
    stage: str, prepare: Callable[[], Any], run: Callable[[Any], Mapping[str, float] | object]
) -> Sampler:
    """Times `run` on what `prepare` gives, anew each time; what `run` counts (a dict by name) is
    counted.
    """
    calls = 1

    def sample() -> dict[str, Take]:
        nonlocal calls
        things = [prepare() for _ in range(calls)]
        cpu, wall = time.process_time(), time.perf_counter()
        results = [run(thing) for thing in things]
        cpu, wall = (time.process_time() - cpu) / calls, (time.perf_counter() - wall) / calls
        counts = (
            {f"{stage}, {name}": Take(value) for name, value in results[0].items()}
            if isinstance(results[0], dict)
            else {}
        )
        if calls == 1:
            calls = min(100, max(1, round(LEAST_SECONDS / max(cpu, 1e-6))))
        return {stage: Take(cpu, wall), **counts}

    return sample


class Watch:
    """Told of the progress of `learn`, it counts the time up to each report: that of a fit's end is
    `train`, all before is `label`.
    """

    def __init__(self) -> None:
        self.spent = {"label": [0.0, 0.0], "train": [0.0, 0.0]}
        self.last = self.now()

    def now(self) -> tuple[float, float]:
        return time.process_time(), time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now, fits = self.now(), not stage.startswith("label") and done > 0
        spent = self.spent["train" if fits else "label"]
        for clock in (0, 1):
            spent[clock] += now[clock] - self.last[clock]
        self.last = now

    def takes(self) -> dict[str, Take]:
        return {stage: Take(*spent) for stage, spent in self.spent.items()}


# ---- what is measured


def history(
    task: Task, person: SimulatedUser, records: int, length: int, seed: int
) -> list[Record]:
    """A person's records; fewer of them are the first of more."""
    dice, out = random.Random(f"{person.name} {length} {seed}"), []
    for place in range(records):
        topics = dice.sample(LABELS, 2)
        topic = person.prefers(topics)
        answer = topic if task.labels else words([topic], length // 2, dice)
        out.append(
            Record(person.name, f"r{place}", words(topics, length, dice), answer, position=place)
        )
    return out


def renamed(records: Sequence[Record], user: str) -> list[Record]:
    return [replace(record, user=user) for record in records]


def by_rule(task: Task) -> RuleLLM:
    """A fake: a random label, or ten random words about a topic."""
    return RuleLLM(
        lambda _messages, _index, rng: (
            rng.choice(LABELS) if task.labels else words([rng.choice(LABELS)], WORDS // 2, rng)
        )
    )


class Given:
    """A retriever that has the answer at hand."""

    def __init__(self, ranked: list[Ranked]):
        self.ranked = ranked

    def retrieve(self, query: Query, records: Sequence[Record], m: int) -> list[Ranked]:
        return self.ranked


class Bench:
    """The learned bundles of both tasks, and what the series take from them."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed, self.number, self.dice = folder, seed, count(), random.Random(seed)
        self.bundles: dict[str, Bundle] = {}
        self.asker = simulate_users(1, seed, "asker ")[0]

    def settings(self, **changed: Any) -> Settings:
        return load_settings(**{"cache": self.folder / "kept", "seed": self.seed, **changed})

    def bundle(self, task: Task) -> Bundle:
        """Learned once, from the base."""
        if task.name not in self.bundles:
            self.bundles[task.name] = learn(
                self.training(task), by_rule(task), self.settings()
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
            for person in simulated
            for record in history(task, person, records, length, self.seed)
        ]
        return DataSet.from_records(task, {person.name: "train" for person in simulated}, rows, [])

    def keep(self, task: Task, records: Sequence[Record], *, reranker: bool = True) -> None:
        """Let the store know these texts, as it does after a first look; those that only the
        reranker reads too.
        """
        outputs = [] if task.labels else [record.output for record in records]
        both = [record_text(record, with_answer=True) for record in records] if reranker else []
        self.bundle(task).store.texts([*(record.input for record in records), *both, *outputs])

    def crowd(self, task: Task, users: int, histories: Sequence[Sequence[Record]]) -> Bundle:
        """The bundle with a head and a history for each of many users; the histories go round."""
        bundle, names = self.bundle(task), [f"user {i}" for i in range(users)]
        heads = {
            name: dict.fromkeys(names, Head.of(scorer.head.empty()))
            for name, scorer in bundle.scorers.items()
        }
        records = {
            name: renamed(histories[i % len(histories)], name) for i, name in enumerate(names)
        }
        return replace(bundle, heads=heads, records=records)

    def unseen(self, bundle: Bundle) -> Bundle:
        """The bundle with a store that knows no text."""
        return replace(
            bundle,
            store=FeatureCache(bundle.store.encoder, self.folder / f"{next(self.number)}.sqlite"),
        )

    def own(self, task: Task, records: int = RECORDS, length: int = WORDS) -> list[Record]:
        return history(task, self.asker, records, length, self.seed)

    def text(self, length: int) -> str:
        """A text that nobody has seen."""
        return words(self.dice.sample(LABELS, 2), length, self.dice)

    def query(self, bundle: Bundle, length: int = WORDS) -> Query:
        """A new question of a random user."""
        return Query(
            f"user {self.dice.randrange(len(bundle.records))}",
            f"asked {next(self.number)}",
            self.text(length),
        )


# ---- the stages' series


def learning(bench: Bench) -> Iterator[Series]:
    """Label and train: one `learn`, taken apart by its progress."""

    def sampler(**size: int) -> Sampler:
        data, settings = bench.training(CLASSIFY, **size), bench.settings()
        bench.keep(CLASSIFY, [record for user in data.users() for record in data.history(user)])

        def sample() -> Mapping[str, Take]:
            watch = Watch()
            usage = learn(data, by_rule(CLASSIFY), settings, progress=watch).usage
            return {
                **watch.takes(),
                "label, LLM calls": Take(usage.calls),
                "label, prompt tokens": Take(usage.prompt_tokens),
            }

        return sample

    yield Series("users", TRAINING["users"], lambda n: sampler(users=n), slow=True)
    yield Series("records", TRAINING["records"], lambda n: sampler(records=n), slow=True)
    yield Series("words", TRAINING["words"], lambda n: sampler(length=n), slow=True)


def fitting(bench: Bench) -> Iterator[Series]:
    """One new user after another."""

    def sampler(task: Task, kept: bool, users: int = 10, **size: int) -> Sampler:
        own = bench.own(task, **size)
        if kept:
            bench.keep(task, own)
        bundle = bench.crowd(task, users, [own[:1]])

        def prepare() -> tuple[DataSet, Bundle, str]:
            name = f"new {next(bench.number)}"
            data = DataSet.from_records(task, {name: "test"}, renamed(own, name), [])
            return data, bundle if kept else bench.unseen(bundle), name

        def run(given: tuple[DataSet, Bundle, str]) -> None:
            fit(given[0], given[1], by_rule(task), users=[given[2]])

        kind = "labels" if task.labels else "headlines"
        return timed(f"fit {kind}, {'kept' if kept else 'first sight'}", prepare, run)

    for task in (CLASSIFY, HEADLINE):
        yield Series("users", SERVING["users"], lambda n, task=task: sampler(task, True, users=n))
        yield Series(
            "records", SERVING["records"], lambda n, task=task: sampler(task, True, records=n)
        )
        yield Series("words", SERVING["words"], lambda n, task=task: sampler(task, True, length=n))
        yield Series(
            "records",
            FIRST["records"],
            lambda n, task=task: sampler(task, False, records=n),
            slow=True,
        )
        yield Series(
            "words", FIRST["words"], lambda n, task=task: sampler(task, False, length=n), slow=True
        )


def retrieving(bench: Bench) -> Iterator[Series]:
    """BM25; every user has an index of its own."""

    def sampler(kept: bool, users: int = 1, records: int = RECORDS, length: int = WORDS) -> Sampler:
        simulated = simulate_users(users, bench.seed)
        bundle = bench.crowd(
            CLASSIFY,
            users,
            [history(CLASSIFY, person, records, length, bench.seed) for person in simulated],
        )
        personalizer = bundle.personalizer(by_rule(CLASSIFY))
        for own in bundle.records.values():
            personalizer.retriever.retrieve(bench.query(bundle), own, 1)

        def prepare() -> tuple[UserPipeline, Query]:
            return personalizer if kept else bundle.personalizer(by_rule(CLASSIFY)), bench.query(
                bundle, length
            )

        def run(given: tuple[UserPipeline, Query]) -> None:
            given[0].retriever.retrieve(
                given[1], bundle.records[given[1].user], given[0].settings.retrieved
            )

        return timed(f"retrieve, {'kept' if kept else 'first sight'}", prepare, run)

    yield Series("users", ASKED, lambda n: sampler(True, users=n))
    for kept in (True, False):
        yield Series("records", LONG, lambda n, kept=kept: sampler(kept, records=n))
        yield Series("words", SERVING["words"], lambda n, kept=kept: sampler(kept, length=n))


def reranking(bench: Bench) -> Iterator[Series]:
    """A new question each time."""

    def sampler(
        kept: bool, users: int = 1, length: int = WORDS, m: int = 10, **size: int
    ) -> Sampler:
        own = bench.own(CLASSIFY, length=length, **size)
        if kept:
            bench.keep(CLASSIFY, own)
        bundle = bench.crowd(CLASSIFY, users, [own])
        personalizer = bundle.personalizer(by_rule(CLASSIFY))

        def prepare() -> tuple[UserPipeline, Query, list[Ranked]]:
            query = bench.query(bundle, length)
            retrieved = personalizer.retriever.retrieve(query, bundle.records[query.user], m)
            return (
                personalizer if kept else bench.unseen(bundle).personalizer(by_rule(CLASSIFY)),
                query,
                retrieved,
            )

        def run(given: tuple[UserPipeline, Query, list[Ranked]]) -> None:
            context = given[0].context(given[1], bundle.records[given[1].user])
            given[0].rerank(context, given[2])

        return timed(f"rerank, {'kept' if kept else 'first sight'}", prepare, run)

    for variable in ("users", "records", "words"):
        name = "length" if variable == "words" else variable
        yield Series(variable, SERVING[variable], lambda n, name=name: sampler(True, **{name: n}))
    yield Series("M", (5, 10, 20, 40), lambda n: sampler(True, m=n, records=80))
    yield Series("records", FIRST["records"], lambda n: sampler(False, records=n), slow=True)
    yield Series("words", FIRST["words"], lambda n: sampler(False, length=n), slow=True)


def generating(bench: Bench) -> Iterator[Series]:
    """`propose` with null parts before the prompt: the records are at hand, their order stands."""

    def sampler(users: int = 1, length: int = WORDS, k: int = 4, **size: int) -> Sampler:
        bundle = bench.crowd(CLASSIFY, users, [bench.own(CLASSIFY, length=length, **size)])
        personalizer = bundle.personalizer(
            by_rule(CLASSIFY), bundle.settings.model_copy(update={"k": k})
        )

        def prepare() -> tuple[UserPipeline, Query]:
            query = bench.query(bundle, length)
            ranked = personalizer.retriever.retrieve(query, bundle.records[query.user], 10)
            return replace(personalizer, retriever=Given(ranked), reranker=KeepOrder()), query

        def run(given: tuple[UserPipeline, Query]) -> dict[str, float]:
            usage = given[0].propose(given[1]).usage
            return {"LLM calls": usage.calls, "prompt tokens": usage.prompt_tokens}

        return timed("generate", prepare, run)

    for variable in ("users", "records", "words"):
        name = "length" if variable == "words" else variable
        yield Series(variable, SERVING[variable], lambda n, name=name: sampler(**{name: n}))
    yield Series("k", FEW, lambda n: sampler(k=n))


def adapting(bench: Bench) -> Iterator[Series]:
    """The reranker has read the question; headlines are new each time."""

    def sampler(
        task: Task, users: int = 1, length: int = WORDS, candidates: int = 8, **size: int
    ) -> Sampler:
        own = bench.own(task, length=length, **size)
        bench.keep(task, own, reranker=False)
        bundle = bench.crowd(task, users, [own])
        pipeline = bundle.pipeline()

        def prepare() -> tuple[Query, list[Candidate]]:
            query = bench.query(bundle, length)
            bundle.store.texts([query.input])
            texts = task.labels or [bench.text(max(2, length // 2)) for _ in range(candidates)]
            return query, [
                Candidate(text, text, votes=int(i < 8), greedy=i == 0)
                for i, text in enumerate(texts)
            ]

        def run(given: tuple[Query, list[Candidate]]) -> None:
            context = pipeline.context(given[0], bundle.records[given[0].user])
            pipeline.select(context, given[1])

        return timed("adapt labels" if task.labels else "adapt headlines", prepare, run)

    for task in (CLASSIFY, HEADLINE):
        for variable in ("users", "records", "words"):
            name = "length" if variable == "words" else variable
            yield Series(
                variable,
                SERVING[variable],
                lambda n, task=task, name=name: sampler(task, **{name: n}),
            )
    yield Series("candidates", (4, 8, 16, 32), lambda n: sampler(HEADLINE, candidates=n))


def encoding(bench: Bench) -> Iterator[Series]:
    """The encoder without a store."""

    def sampler(texts: int = 16, length: int = WORDS) -> Sampler:
        encoder = bench.bundle(CLASSIFY).store.encoder
        return timed("encode", lambda: [bench.text(length) for _ in range(texts)], encoder.encode)

    yield Series("texts", (4, 8, 16, 32, 64), lambda n: sampler(texts=n))
    yield Series("words", SERVING["words"], lambda n: sampler(length=n))


STAGES: Mapping[str, Callable[[Bench], Iterator[Series]]] = {
    "learn": learning,
    "fit": fitting,
    "retrieve": retrieving,
    "rerank": reranking,
    "generate": generating,
    "adapt": adapting,
    "encode": encoding,
}


# ---- the report


def in_full(row: Row, law: Growth) -> dict[str, Any]:
    medians = [statistics.median(take.cpu for take in runs) for runs in row.takes]
    expected = EXPECTED[row.stage][row.variable]
    return {
        "stage": row.stage,
        "variable": row.variable,
        "unit": row.unit,
        "law": asdict(law),
        "grows": 1 - law.constant / law.at(row.sizes[-1]) if law.factor else 0.0,
        "expected_exponent": expected,
        "verdict": (found := verdict(law, expected)),
        "why": WHY.get((row.stage, row.variable)) if found != "as expected" else None,
        "points": [
            {"size": size, "median": median, "runs": [take.cpu for take in runs], **spread(runs)}
            for size, median, runs in zip(row.sizes, medians, row.takes, strict=True)
        ],
    }


def spread(runs: Sequence[Take]) -> dict[str, Any]:
    """Quartiles of the main figure, and the clock's median where there is one."""
    found = summary([take.cpu for take in runs])
    wall = (
        {}
        if math.isnan(runs[0].wall)
        else {"wall_median": statistics.median(take.wall for take in runs)}
    )
    return {"quartiles": [found["quartile_1_ms"], found["quartile_3_ms"]], **wall}


def verdict(law: Growth, expected: float) -> str:
    """Whether the expectation holds; the interval may miss it by a little, as it knows the clock's
    noise alone.
    """
    if expected == 0:
        return "GROWS" if law.low > 0 else "as expected"
    if law.low > expected + NEAR:
        return "STEEPER"
    return "FLATTER" if law.high < expected - NEAR else "as expected"


def lines_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = f"{'stage':<27}{'variable':<11}{'range':>14}{'smallest':>12}{'largest':>11}"
    head = f"{names}  {'exponent p':<20}{'grows':>6}  {'expected':<10}verdict"
    failed = [
        (row, WHY.get((row["stage"], row["variable"])))
        for row in rows
        if row["verdict"] != "as expected"
    ]
    notes = [
        f"{row['verdict']:<8} {row['stage']} in {row['variable']}: {why or 'not looked into'}"
        for row, why in failed
    ]
    return [head, *map(line_of, rows), *notes]


def line_of(row: Mapping[str, Any]) -> str:
    first, last, law = row["points"][0], row["points"][-1], row["law"]
    ends = [written(point["median"], row["unit"]) for point in (first, last)]
    exponent = f"{law['exponent']:.2f} [{law['low']:.2f}, {law['high']:.2f}]"
    span, expected = f"{first['size']:,} to {last['size']:,}", LAWS[row["expected_exponent"]]
    text = (
        f"{row['stage']:<27}{row['variable']:<11}{span:>14}{ends[0]:>12}{ends[1]:>11} "
        f" {exponent:<20}{row['grows']:>6.0%}"
    )
    return f"{text}  {expected:<10}{row['verdict']}"


def written(value: float, unit: str) -> str:
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


def about(given: argparse.Namespace) -> dict[str, Any]:
    """What the results were made with; no path."""
    machine = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    return {
        "options": {"stages": given.stages, "runs": given.runs, "seed": given.seed},
        "machine": machine,
    }


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A log-log panel for each stage: medians as points, laws as lines."""
    import altair as alt

    charts = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == stage]
        values = [
            {
                "variable": f"{row['variable']}, p = {row['law']['exponent']:.2f}",
                "size": p["size"],
                "value": p["median"],
                "law": law_at(row, p),
            }
            for row in mine
            for p in row["points"]
        ]
        chart = alt.Chart(alt.Data(values=values)).encode(
            x=alt.X("size:Q").scale(type="log").title("size"),
            color=alt.Color("variable:N").title(None),
        )
        points = chart.mark_point(filled=True, size=40).encode(
            y=alt.Y("value:Q").scale(type="log").title(mine[0]["unit"])
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
