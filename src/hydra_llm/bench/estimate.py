"""The cost estimate of a run before it begins: `bench run --dry-run`.

The run is gone through with an LLM that only collects the calls, so that each distinct call counts
once, as in the cache; cached ones are counted apart. A few of the calls are then made, and cached:
their tokens and seconds stand for the others'. The reranker's order, which is not known before
learning, is taken to differ from the retriever's: an upper bound.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from time import perf_counter
from typing import Any

from hydra_llm.bench.experiment import Experiment, chosen_queries, evaluated_queries, usable_methods
from hydra_llm.bench.method import Answerer, NotAsked, Parts
from hydra_llm.context import Context
from hydra_llm.errors import LLMError
from hydra_llm.history import in_order
from hydra_llm.llm.base import Batch, Sampling
from hydra_llm.llm.cache import CHOICES, CachedLLM, key_of, request_of
from hydra_llm.llm.concurrency import at_once, map_calls, run_sync
from hydra_llm.llm.none import is_none
from hydra_llm.llm.prices import prices_of
from hydra_llm.pipeline import UserPipeline
from hydra_llm.prompt import PER_MESSAGE, estimate
from hydra_llm.rerank import Reranker, record_text
from hydra_llm.training import labelling
from hydra_llm.training.api import blank_bundle
from hydra_llm.training.choosing import choose_sampling, judged, some_of_each
from hydra_llm.training.labelling import Asked
from hydra_llm.types import Generation, Message, Overlaid, Query, Ranked, Usage

SAMPLE, ENCODED = 5, 64  # calls that are made, and texts that are encoded, to measure them


@dataclass(frozen=True)
class StageEstimate:
    """The cost of a stage beyond the stages before it."""

    stage: str
    kept: int = 0  # calls that the cache answers
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = math.nan  # NaN where no price of the LLM is known
    seconds: float = 0.0  # of the LLM, one call after the other


@dataclass(frozen=True)
class CostEstimate:
    """What a run will cost."""

    stages: tuple[StageEstimate, ...]
    sampled: int  # calls that were made to measure tokens and seconds
    parallel: int  # calls at once
    texts: int  # records and queries to encode; pairs (features=cross) are not counted
    encoding: float  # seconds to encode them

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run, without the arithmetic of learning."""
        return self.total.seconds / self.parallel + self.encoding

    @property
    def total(self) -> StageEstimate:
        names = [field.name for field in fields(StageEstimate)[1:]]
        sums = (sum(getattr(stage, name) for stage in self.stages) for name in names)
        return StageEstimate("total", *sums)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "total": asdict(self.total), "seconds": self.seconds}


@dataclass(frozen=True)
class PendingCall:
    """One call that is still to be made; its `n` is the number of texts that are missing."""

    stage: str
    messages: Sequence[Message]
    sampling: Sampling
    prompt_tokens: int  # estimated


def estimate_cost(experiment: Experiment, batch: Batch | None = None) -> CostEstimate:
    """Go through a run without making its calls, but for a few; with `batch` at the prices of the
    Batch API. LLMError if all of those fail, DataError as `evaluated_queries` says.
    """
    cache, settings = experiment.llm, experiment.settings
    llm = DryRunLLM(cache, cache.identity, experiment.data.task.labels)
    turns = experiment.turns()
    evaluated_queries(turns)
    done = [run_sync(partial(_go_through, turn, llm)) for turn in turns]
    texts, encoding = max(done)  # of each fold nearly all texts
    calls = list(llm.missing.values())
    sample = calls[:: max(1, len(calls) // SAMPLE)][:SAMPLE]
    measured, usage = run_sync(partial(_measure, cache, sample))
    # other calls are as the measured ones: by estimated tokens of prompts and number of answers
    if usage.untold:
        raise LLMError("the LLM does not tell its tokens, which an estimate needs")
    ratio = usage.prompt_tokens / max(1, sum(call.prompt_tokens for call in measured)) or 1.0
    per_text = usage.completion_tokens / max(1, sum(call.sampling.n for call in measured))
    second = usage.seconds / max(1, usage.prompt_tokens + usage.completion_tokens)
    prices, stages = prices_of(cache.identity, settings, batch=batch is not None), []
    for name in dict.fromkeys([*llm.kept, *(call.stage for call in calls)]):
        own = [call for call in calls if call.stage == name]
        prompt = round(ratio * sum(call.prompt_tokens for call in own))
        completion = round(per_text * sum(call.sampling.n for call in own))
        spent = Usage(prompt_tokens=prompt, completion_tokens=completion)
        cost = prices.cost(spent) if prices else (math.nan if own else 0.0)
        kept, seconds = len(llm.kept.get(name, ())), second * (prompt + completion)
        stages.append(StageEstimate(name, kept, len(own), prompt, completion, cost, seconds))
    return CostEstimate(tuple(stages), len(measured), cache.parallel, texts, encoding)


def estimate_rows(cost: CostEstimate) -> list[dict[str, Any]]:
    """A row per stage, for the encoder, and the total; minutes are wall-clock time."""
    rows = [(stage, stage.seconds / cost.parallel) for stage in cost.stages]
    if cost.texts:
        rows.append((StageEstimate(f"encode {cost.texts} texts", cost=0.0), cost.encoding))
    return [
        {
            "stage": stage.stage,
            "kept": stage.kept,
            "calls": stage.calls,
            "prompt tokens": stage.prompt_tokens,
            "answer tokens": stage.completion_tokens,
            "money": "no price" if math.isnan(stage.cost) else round(stage.cost, 4),
            "minutes": round(seconds / 60, 1),
        }
        for stage, seconds in [*rows, (cost.total, cost.seconds)]
    ]


@dataclass
class DryRunLLM:
    """Answers the first label, or any text, and collects the calls that are not cached."""

    cache: CachedLLM
    identity: Mapping[str, Any]
    labels: Sequence[str]
    stage: str = ""
    missing: dict[str, PendingCall] = field(default_factory=dict)
    kept: dict[str, set[str]] = field(default_factory=dict)  # stage → keys that the cache holds

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        key = key_of(request_of(self.identity, messages, sampling))
        distinct = sampling.n if sampling.temperature > 0 else 1
        stored = self.cache.stored(key)
        missing = distinct - sum(0 <= index < distinct for index in stored)
        if sampling.probabilities and sampling.choices and CHOICES not in stored:
            missing = max(missing, 1)  # it is asked once more, for the probabilities alone
        if missing and key not in self.missing:
            tokens = sum(estimate(message["content"]) + PER_MESSAGE for message in messages)
            call = PendingCall(self.stage, messages, replace(sampling, n=missing), tokens)
            self.missing[key] = call
        elif not missing and not any(key in keys for keys in self.kept.values()):
            self.kept.setdefault(self.stage, set()).add(key)
        text = self.labels[0] if self.labels else "a text"
        return Generation((text,) * sampling.n, Usage(calls=1))

    async def aclose(self) -> None:
        """Nothing to release."""


class ReversedOrder(Reranker):
    """Stands for a reranker that has not been learned."""

    def order(self, context: Context, retrieved: Sequence[Ranked]) -> list[Ranked]:
        return list(reversed(retrieved))


@dataclass(frozen=True)
class UnlearnedParts(Parts):
    """Parts before anything is learned."""

    def personalizer(
        self, *, rerank: bool = False, adapt: bool = False, **settings: object
    ) -> UserPipeline:
        pipeline = super().personalizer(rerank=rerank, adapt=adapt, **settings)
        unknown = rerank and self.bundle.reranker is None and self.settings.learns_reranker
        return replace(pipeline, reranker=ReversedOrder()) if unknown else pipeline


async def _go_through(experiment: Experiment, llm: DryRunLLM) -> tuple[int, float]:
    """Returns how many texts are still to be encoded, and the seconds for them."""
    settings, data, new = experiment.settings, experiment.data, experiment.new_users
    training = [user for user in data.users("train")[: settings.users] if data.history(user)]
    methods, bundle = experiment.methods, experiment.bundle
    if bundle is None:
        records = {user: data.answered(user) for user in training}
        records |= {user: in_order(data.history(user)) for user in new}
        blank = blank_bundle(data.task, llm, settings, records)
        bundle = replace(blank, trained_on=tuple(training))
    else:
        methods = usable_methods(methods, [bundle], lambda line: None)
    visible = Overlaid({user: data.history(user) for user in new}, bundle.records)
    parts = experiment.parts(UnlearnedParts(bundle, llm, settings, visible))
    if experiment.learns and not is_none(experiment.llm):
        labelled = labelling.asked_about(data, settings, training[: settings.labelled_users])
        queries_of = partial(labelling.training_queries, data.task, count=settings.queries_per_user)
        own = {user: bundle.records[user] for user in new}
        latest = Asked({user: queries_of(records) for user, records in own.items()}, own)
        reranks = settings.learns_reranker
        for stage, asked, needed in (
            ("label records", labelled, reranks and labelling.asks_of_records(settings)),
            ("choose sampling", labelled, settings.choose == "auto"),
            ("label candidates", labelled, True),
            ("fit records", latest, reranks and settings.reranker_labels == "llm"),
            ("fit candidates", latest, labelling.asks_in_fit(data.task, settings)),
        ):
            llm.stage = stage
            if needed:
                await _label(parts, asked, stage)
    queries = chosen_queries(data, [u for u in new if u in bundle.records], experiment.limit)
    limit = at_once(llm, settings.concurrency)
    for place, method in enumerate(methods):
        experiment.progress("plan", place, len(methods))
        llm.stage = f"answer {method.name}"
        if is_none(experiment.llm) and method.uses:
            continue  # what has been learned by then asks nobody
        await map_calls(partial(_asked, method.build(parts)), queries, limit)
    # without learning, all texts have been encoded by now
    return _encoding(parts, [*training, *new], queries) if experiment.learns else (0, 0.0)


async def _asked(answerer: Answerer, query: Query) -> None:
    """Let a method ask what it will ask; of a query that it cannot answer that is nothing."""
    with suppress(NotAsked):
        await answerer.aanswer(query)


async def _label(parts: Parts, asked: Asked, stage: str) -> None:
    """Let the LLM label records, or candidates, of these queries, or try settings on them."""
    if stage == "choose sampling":
        plain = replace(parts.personalizer(), records=asked.records)
        await choose_sampling(judged(plain, parts.bundle), some_of_each(asked.all))
        return
    candidates = stage.endswith("candidates")
    rerank = candidates and parts.settings.label_order != "retriever"
    collect = labelling.adapter_groups if candidates else labelling.reranker_groups
    await collect(replace(parts.personalizer(rerank=rerank), records=asked.records), asked.all)


def _encoding(parts: Parts, users: Sequence[str], queries: Sequence[Query]) -> tuple[int, float]:
    """How many texts are not encoded, and the seconds for them as measured on a few."""
    store = parts.bundle.features
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


async def _measure(
    llm: CachedLLM, sample: Sequence[PendingCall]
) -> tuple[list[PendingCall], Usage]:
    """Make a few of the calls; one that fails measures nothing."""
    usage, measured, faults = Usage(), [], []
    for call in sample:
        try:
            usage += (await llm.generate(call.messages, call.sampling)).usage
            measured.append(call)
        except LLMError as error:
            faults.append(error)
    if faults and not measured:
        raise faults[0]
    return measured, usage
