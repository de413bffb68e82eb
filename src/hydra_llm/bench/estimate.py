"""The cost estimate of a run before it begins: `bench run --dry-run`.

The run is gone through with an LLM that only collects the calls, so that each distinct call counts
once, as in the cache; cached ones are counted apart. A few of the calls are then made, and cached:
their tokens and seconds stand for the others'. The reranker's order, which is not known before
learning, is taken to differ from the retriever's: an upper bound. Knows no tables.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any

from hydra_llm.bench.experiment import Experiment, usable_methods
from hydra_llm.bench.method import Parts
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
"""Calls that are really made."""
ENCODED = 64
"""Texts that are really encoded."""


# ---- the estimate


@dataclass(frozen=True)
class StageEstimate:
    """The cost of a stage beyond the stages before it."""

    stage: str
    kept: int
    """Calls that the cache answers."""
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    seconds: float
    """Of the LLM, one call after the other."""


@dataclass(frozen=True)
class CostEstimate:
    """What a run will cost."""

    stages: tuple[StageEstimate, ...]
    sampled: int
    """Calls that were made to measure tokens and seconds."""
    parallel: int = 1
    """Calls at once."""
    texts: int = 0
    """Records and queries to encode; pairs (features=cross) are not counted."""
    encoding: float = 0.0
    """Seconds to encode them."""

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run, without the arithmetic of learning."""
        return self.total.seconds / self.parallel + self.encoding

    @property
    def total(self) -> StageEstimate:
        names = ("kept", "calls", "prompt_tokens", "completion_tokens", "cost", "seconds")
        sums = {name: sum(getattr(stage, name) for stage in self.stages) for name in names}
        return StageEstimate("total", **sums)

    def to_json(self) -> dict[str, Any]:
        names = ("sampled", "parallel", "texts", "encoding", "seconds")
        return {
            "stages": [asdict(stage) for stage in self.stages],
            "total": asdict(self.total),
            **{name: getattr(self, name) for name in names},
        }


def estimate_cost(
    experiment: Experiment, progress: StageProgress, bundle: Bundle | None = None
) -> CostEstimate:
    """Go through a run without making its calls, but for a few.

    Raises:
        LLMError: the LLM refuses even those.
    """
    llm, settings = DryRunLLM(experiment.llm, experiment.data.task.labels), experiment.settings
    encoding = run_sync(partial(_go_through, experiment, llm, progress, bundle))
    calls = list(llm.missing.values())
    chosen = calls[:: max(1, len(calls) // SAMPLE)][:SAMPLE]
    measured = run_sync(partial(_measure, experiment.llm, chosen))
    prices = Prices(settings.price_prompt, settings.price_completion)
    stages = [
        measured.stage_cost(
            name,
            len(llm.kept.get(name, ())),
            [call for call in calls if call.stage == name],
            prices,
        )
        for name in dict.fromkeys([*llm.kept, *(call.stage for call in calls)])
    ]
    return CostEstimate(tuple(stages), len(measured.calls), experiment.llm.parallel, *encoding)


# ---- the calls of a run


@dataclass(frozen=True)
class PendingCall:
    """One call that is still to be made."""

    stage: str
    messages: Sequence[Message]
    sampling: Sampling
    """Its `n` is the number of texts that are missing."""

    @property
    def prompt_tokens(self) -> int:
        return sum(estimate(message["content"]) + PER_MESSAGE for message in self.messages)


@dataclass
class DryRunLLM:
    """Answers the first label, or any text, and collects the calls that are not cached."""

    cache: CachedLLM
    labels: Sequence[str]
    stage: str = ""
    missing: dict[str, PendingCall] = field(default_factory=dict)
    kept: dict[str, set[str]] = field(default_factory=dict)
    """Stage → keys that the cache holds."""

    @property
    def identity(self) -> Mapping[str, Any]:
        return self.cache.identity

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        key = key_of(request_of(self.identity, messages, sampling))
        distinct = sampling.n if sampling.temperature > 0 else 1
        missing = distinct - sum(0 <= index < distinct for index in self.cache.kept(key))
        if missing:
            call = PendingCall(self.stage, messages, replace(sampling, n=missing))
            self.missing.setdefault(key, call)
        elif not any(key in keys for keys in self.kept.values()):
            self.kept.setdefault(self.stage, set()).add(key)
        text = self.labels[0] if self.labels else "a text"
        return Generation((text,) * sampling.n, Usage(calls=1))

    async def aclose(self) -> None:
        """Nothing to release."""


class ReversedOrder:
    """Stands for a reranker that has not been learned."""

    def order(self, context: Context, retrieved: Sequence[Ranked]) -> list[Ranked]:
        return list(reversed(retrieved))


@dataclass(frozen=True)
class UnlearnedParts(Parts):
    """Parts before anything is learned."""

    def personalizer(
        self, *, rerank: bool = False, adapt: bool = False, **settings: object
    ) -> Personalizer:
        made = super().personalizer(rerank=rerank, adapt=adapt, **settings)
        unknown = rerank and self.bundle.reranker is None
        return replace(made, reranker=ReversedOrder()) if unknown else made


async def _go_through(
    experiment: Experiment, llm: DryRunLLM, progress: StageProgress, bundle: Bundle | None
) -> tuple[int, float]:
    """Returns how many texts are still to be encoded, and the seconds for them."""
    settings, data, new = experiment.settings, experiment.data, experiment.new_users
    training = [user for user in data.users("train")[: settings.users] if data.history(user)]
    if bundle is None:
        records = {user: data.answered(user) for user in training}
        records |= {user: in_order(data.history(user)) for user in new}
        blank = blank_bundle(data.task, llm, settings, records)
        known, methods = replace(blank, trained_on=tuple(training)), experiment.methods
    else:
        known = bundle
        methods = usable_methods(experiment.methods, [bundle], lambda line: None)
    visible = {**known.records, **{user: data.history(user) for user in new}}
    parts = UnlearnedParts(known, llm, settings, visible)
    learns = bundle is None and experiment.learns
    if learns:
        await _label(
            parts, llm, "label", training[: settings.labelled_users], (settings.retrieved > 0, True)
        )
        asks_llm = settings.reranker_labels == "llm", not offers_all(data.task, settings)
        await _label(parts, llm, "fit", new, asks_llm)
    fitted = [user for user in new if user in known.records]
    queries = chosen_queries(data, fitted, experiment.limit)
    for place, method in enumerate(methods):
        progress("plan", place, len(methods))
        llm.stage = f"answer {method.name}"
        await map_calls(method.build(parts).aanswer, queries, limit=settings.concurrency)
    # without learning, all texts have been encoded by now
    return _encoding(parts, [*training, *new], queries) if learns else (0, 0.0)


async def _label(
    parts: UnlearnedParts,
    llm: DryRunLLM,
    stage: str,
    users: Sequence[str],
    asked: tuple[bool, bool],
) -> None:
    """Label the users' records; `asked`: whether records, and whether candidates need the LLM."""
    task, count = parts.bundle.task, parts.settings.queries_per_user
    queries = [
        query
        for user in users
        for query in training_queries(task, in_order(parts.records[user]), count)
    ]
    if asked[0]:
        llm.stage = f"{stage} records"
        await reranker_groups(parts.personalizer(), queries)
    if asked[1]:
        llm.stage = f"{stage} candidates"
        await adapter_groups(parts.personalizer(rerank=True), queries)


def _encoding(parts: Parts, users: Sequence[str], queries: Sequence[Query]) -> tuple[int, float]:
    """How many texts are not encoded, and the seconds for them as measured on a few."""
    store = parts.bundle.store
    records = [record for user in users for record in parts.records.get(user, ())]
    texts = [record.input for record in records] + [query.input for query in queries]
    if parts.settings.record_answer:
        texts += [record_text(record, with_answer=True) for record in records]
    missing = [text for text in dict.fromkeys(texts) if store.missing([text])]
    if not missing:
        return 0, 0.0
    sample, started = missing[:: max(1, len(missing) // ENCODED)], perf_counter()
    store.texts(sample)
    return len(missing), len(missing) * (perf_counter() - started) / len(sample)


# ---- their tokens and seconds


@dataclass(frozen=True)
class Measured:
    """A few calls that were made, and their usage."""

    calls: tuple[PendingCall, ...]
    usage: Usage

    def stage_cost(
        self, name: str, kept: int, own: Sequence[PendingCall], prices: Prices
    ) -> StageEstimate:
        """By estimated tokens of prompts and number of answers, as in the measured calls."""
        usage = self.usage
        ratio = usage.prompt_tokens / max(1, _prompt_tokens(self.calls)) or 1.0
        prompt = round(ratio * _prompt_tokens(own))
        completion = round(usage.completion_tokens / max(1, _texts(self.calls)) * _texts(own))
        second = usage.seconds / max(1, usage.prompt_tokens + usage.completion_tokens)
        cost = prices.cost(Usage(prompt_tokens=prompt, completion_tokens=completion))
        seconds = second * (prompt + completion)
        return StageEstimate(name, kept, len(own), prompt, completion, cost, seconds)


def _prompt_tokens(calls: Iterable[PendingCall]) -> int:
    return sum(call.prompt_tokens for call in calls)


def _texts(calls: Iterable[PendingCall]) -> int:
    return sum(call.sampling.n for call in calls)


async def _measure(llm: CachedLLM, sample: Sequence[PendingCall]) -> Measured:
    """Make a few of the calls; one that fails measures nothing."""
    usage, made, faults = Usage(), [], []
    for call in sample:
        try:
            usage += (await llm.generate(call.messages, call.sampling)).usage
            made.append(call)
        except LLMError as error:
            faults.append(error)
    if faults and not made:
        raise faults[0]
    return Measured(tuple(made), usage)


# ---- for people


def estimate_rows(found: CostEstimate) -> list[dict[str, Any]]:
    """A row per stage, for the encoder, and the total; minutes are wall-clock time."""
    parallel = found.parallel
    stages = list(found.stages)
    if found.texts:
        name = f"encode {found.texts} texts"
        stages.append(StageEstimate(name, 0, 0, 0, 0, 0.0, found.encoding * parallel))
    stages.append(replace(found.total, seconds=found.seconds * parallel))
    return [
        {
            "stage": stage.stage,
            "kept": stage.kept,
            "calls": stage.calls,
            "prompt tokens": stage.prompt_tokens,
            "answer tokens": stage.completion_tokens,
            "money": round(stage.cost, 4),
            "minutes": round(stage.seconds / parallel / 60, 1),
        }
        for stage in stages
    ]
