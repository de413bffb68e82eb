"""What a run will cost, before it is begun: `bench run --dry-run`.

The run is gone through with an LLM that only notes what it is asked, so that every distinct request
is counted once, as the cache will make it; what the cache holds already is told apart. A few of the
requests are then really made, and kept: their tokens and seconds stand for the others'. What nobody
can know before learning, the reranker's order, is taken to differ from the retriever's: the most
that it can cost. Knows no tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any

from hydra_llm.bench.experiment import Experiment, whole_methods
from hydra_llm.bench.methods import Parts
from hydra_llm.bench.runner import chosen_queries
from hydra_llm.bundle import Bundle
from hydra_llm.context import Context
from hydra_llm.errors import LLMError
from hydra_llm.history import in_order
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.cache import CachedLLM, key_of, request_of
from hydra_llm.llm.concurrency import StageProgress, map_calls, run_sync
from hydra_llm.llm.meter import Prices
from hydra_llm.pipeline import Personalizer
from hydra_llm.prompt import PER_MESSAGE, estimate
from hydra_llm.rerank import record_text
from hydra_llm.training.api import blank_bundle
from hydra_llm.training.labelling import (
    adapter_groups,
    offers_all,
    reranker_groups,
    training_queries,
)
from hydra_llm.types import Generation, Message, Query, Ranked, Usage

SAMPLE = 5
"""Requests that are really made."""
ENCODED = 64
"""Texts that are really encoded."""


@dataclass(frozen=True)
class Request:
    """One call that is still to be made."""

    stage: str
    messages: Sequence[Message]
    sampling: Sampling
    """Its `n` is the number of texts that are missing."""

    @property
    def prompt_tokens(self) -> int:
        return sum(estimate(message["content"]) + PER_MESSAGE for message in self.messages)


@dataclass(frozen=True)
class Stage:
    """What a stage will cost beyond those before it."""

    stage: str
    kept: int
    """Requests that the cache holds."""
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    seconds: float
    """Of the LLM, one call after the other."""


@dataclass(frozen=True)
class Plan:
    """What the run will need."""

    stages: tuple[Stage, ...]
    sampled: int
    """Requests that were made to tell tokens and seconds; 0 where none was missing, or none came
    through.
    """
    parallel: int = 1
    """Calls at once."""
    texts: int = 0
    """Records and queries that the encoder has not read yet; of pairs (features=cross) there are
    more, which nobody knows before.
    """
    encoding: float = 0.0
    """Seconds that it will take for them."""

    @property
    def seconds(self) -> float:
        """Of the whole run, as a clock on the wall tells them; learning's own arithmetic is left
        out.
        """
        return self.total.seconds / self.parallel + self.encoding

    @property
    def total(self) -> Stage:
        names = ("kept", "calls", "prompt_tokens", "completion_tokens", "cost", "seconds")
        return Stage(
            "total", **{name: sum(getattr(stage, name) for stage in self.stages) for name in names}
        )

    def to_json(self) -> dict[str, Any]:
        known = {
            "sampled": self.sampled,
            "parallel": self.parallel,
            "texts": self.texts,
            "encoding": self.encoding,
            "seconds": self.seconds,
        }
        return {
            "stages": [asdict(stage) for stage in self.stages],
            "total": asdict(self.total),
            **known,
        }


@dataclass
class NotingLLM:
    """Answers the first label, or any text, and notes each distinct request that the cache could
    not answer.
    """

    cache: CachedLLM
    labels: Sequence[str]
    stage: str = ""
    missing: dict[str, Request] = field(default_factory=dict)
    kept: dict[str, set[str]] = field(default_factory=dict)
    """Stage → keys that the cache holds."""

    @property
    def identity(self) -> Mapping[str, Any]:
        return self.cache.identity

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        key = key_of(request_of(self.identity, messages, sampling))
        distinct = sampling.n if sampling.temperature > 0 else 1
        missing = distinct - len([index for index in self.cache.kept(key) if 0 <= index < distinct])
        if not missing:
            if not any(key in keys for keys in self.kept.values()):
                self.kept.setdefault(self.stage, set()).add(key)
        elif key not in self.missing:
            self.missing[key] = Request(self.stage, messages, replace(sampling, n=missing))
        return Generation(
            (self.labels[0] if self.labels else "a text",) * sampling.n, Usage(calls=1)
        )

    async def aclose(self) -> None:
        """Nothing to release."""


class Reversed:
    """Stands for an order that nobody knows yet."""

    def order(self, context: Context, retrieved: Sequence[Ranked]) -> list[Ranked]:
        return list(reversed(retrieved))


@dataclass(frozen=True)
class PlannedParts(Parts):
    """Parts before anything is learned."""

    def personalizer(
        self, *, rerank: bool = False, adapt: bool = False, **settings: object
    ) -> Personalizer:
        made = super().personalizer(rerank=rerank, adapt=adapt, **settings)
        return (
            replace(made, reranker=Reversed()) if rerank and self.bundle.reranker is None else made
        )


def plan(experiment: Experiment, progress: StageProgress, bundle: Bundle | None = None) -> Plan:
    """Go through a run without making its calls, but for a few.

    Raises:
        LLMError: the LLM refuses even those.
    """
    llm = NotingLLM(experiment.llm, experiment.data.task.labels)
    encoding = run_sync(partial(_go_through, experiment, llm, progress, bundle))
    requests = list(llm.missing.values())
    spent, made = run_sync(
        partial(_made, experiment.llm, requests[:: max(1, len(requests) // SAMPLE)][:SAMPLE])
    )
    prices = Prices(experiment.settings.price_prompt, experiment.settings.price_completion)
    names = list(dict.fromkeys([*llm.kept, *(request.stage for request in requests)]))
    stages = [
        _stage(
            name,
            len(llm.kept.get(name, ())),
            [request for request in requests if request.stage == name],
            spent,
            made,
            prices,
        )
        for name in names
    ]
    return Plan(tuple(stages), len(made), experiment.llm.parallel, *encoding)


async def _go_through(
    experiment: Experiment, llm: NotingLLM, progress: StageProgress, bundle: Bundle | None
) -> tuple[int, float]:
    """Returns how many texts are still to be encoded, and the seconds for those; what going through
    has encoded is kept.
    """
    settings, data, new = experiment.settings, experiment.data, experiment.new_users
    training = [user for user in data.users("train")[: settings.users] if data.history(user)]
    learns = bundle is None and experiment.learns
    records = {user: data.answered(user) for user in training} | {
        user: in_order(data.history(user)) for user in new
    }
    known = bundle or replace(
        blank_bundle(data.task, llm, settings, records), trained_on=tuple(training)
    )
    parts = PlannedParts(
        known,
        experiment.llm,
        settings,
        {**known.records, **{user: data.history(user) for user in new}},
    )
    parts = replace(parts, llm=llm)
    if learns:
        await _label(
            parts,
            llm,
            training[: settings.labelled_users],
            "label",
            reranker=settings.retrieved > 0,
            adapter=True,
        )
        texts = not offers_all(data.task, settings)
        await _label(
            parts, llm, new, "fit", reranker=settings.reranker_labels == "llm", adapter=texts
        )
    queries = chosen_queries(
        data, [user for user in new if user in known.records], experiment.limit
    )
    methods = (
        experiment.methods
        if learns or bundle is None
        else whole_methods(experiment.methods, [bundle], print_nothing)
    )
    for place, method in enumerate(methods):
        progress("plan", place, len(methods))
        llm.stage = f"answer {method.name}"
        await map_calls(method.build(parts).aanswer, queries, limit=settings.concurrency)
    return (
        _encoding(parts, [*training, *new], queries) if learns else (0, 0.0)
    )  # without learning all has been read by now


def print_nothing(line: str) -> None:
    """What is left out is told by the run itself."""


def _encoding(parts: Parts, users: Sequence[str], queries: Sequence[Query]) -> tuple[int, float]:
    """How many texts of records and queries the encoder has not read, and the seconds for them by a
    few that it reads now.
    """
    store, records = (
        parts.bundle.store,
        [record for user in users for record in parts.records.get(user, ())],
    )
    answered = (
        [record_text(record, with_answer=True) for record in records]
        if parts.settings.record_answer
        else []
    )
    texts = list(
        dict.fromkeys(
            [record.input for record in records] + answered + [query.input for query in queries]
        )
    )
    missing = [text for text in texts if store.missing([text])]
    if not missing:
        return 0, 0.0
    sample, started = missing[:: max(1, len(missing) // ENCODED)], perf_counter()
    store.texts(sample)
    return len(missing), len(missing) * (perf_counter() - started) / len(sample)


async def _label(
    parts: PlannedParts,
    llm: NotingLLM,
    users: Sequence[str],
    stage: str,
    *,
    reranker: bool,
    adapter: bool,
) -> None:
    task, settings = parts.bundle.task, parts.settings
    queries = [
        query
        for user in users
        for query in training_queries(
            task, in_order(parts.records[user]), settings.queries_per_user
        )
    ]
    if reranker:
        llm.stage = f"{stage} records"
        await reranker_groups(parts.personalizer(), parts.bundle.featurizer, queries)
    if adapter:
        llm.stage = f"{stage} candidates"
        await adapter_groups(parts.personalizer(rerank=True), parts.bundle.featurizer, queries)


async def _made(llm: CachedLLM, sample: Sequence[Request]) -> tuple[Usage, list[Request]]:
    """What a few of the requests cost; one that fails tells nothing."""
    spent, made, faults = Usage(), [], []
    for request in sample:
        try:
            spent += (await llm.generate(request.messages, request.sampling)).usage
            made.append(request)
        except LLMError as error:
            faults.append(error)
    if faults and not made:
        raise faults[0]
    return spent, made


def _stage(
    name: str,
    kept: int,
    own: Sequence[Request],
    spent: Usage,
    made: Sequence[Request],
    prices: Prices,
) -> Stage:
    """By proportion to what was made: prompts to their estimated tokens, answers to their number,
    seconds to both.
    """
    longer = (
        spent.prompt_tokens / max(1, sum(request.prompt_tokens for request in made))
        if spent.prompt_tokens
        else 1.0
    )
    each = spent.completion_tokens / max(1, sum(request.sampling.n for request in made))
    prompt = round(longer * sum(request.prompt_tokens for request in own))
    completion = round(each * sum(request.sampling.n for request in own))
    second = spent.seconds / max(1, spent.prompt_tokens + spent.completion_tokens)
    cost = prices.cost(Usage(prompt_tokens=prompt, completion_tokens=completion))
    return Stage(name, kept, len(own), prompt, completion, cost, second * (prompt + completion))


def as_rows(found: Plan) -> list[dict[str, Any]]:
    """A row per stage, one for the encoder where it has texts to read, and the sum; minutes are
    those of the wall.
    """
    encode = Stage(f"encode {found.texts} texts", 0, 0, 0, 0, 0.0, found.encoding * found.parallel)
    total = replace(found.total, seconds=found.seconds * found.parallel)
    rows = []
    for stage in (*found.stages, *([encode] if found.texts else []), total):
        cells = {
            "stage": stage.stage,
            "kept": stage.kept,
            "calls": stage.calls,
            "prompt tokens": stage.prompt_tokens,
        }
        minutes = round(stage.seconds / found.parallel / 60, 1)
        cells |= {
            "answer tokens": stage.completion_tokens,
            "money": round(stage.cost, 4),
            "minutes": minutes,
        }
        rows.append(cells)
    return rows
