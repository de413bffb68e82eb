"""Run methods on the queries of users and score them. Knows no LLM."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from hydra_llm.bench.method import Answerer, Learner, Method, Parts
from hydra_llm.bench.metrics import Failed, Metric, score
from hydra_llm.bench.runlog import RunLog, Sample, by_method
from hydra_llm.bench.stats import interval
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import BudgetExceeded, LLMError
from hydra_llm.llm.concurrency import StageProgress, map_calls
from hydra_llm.llm.meter import FREE, Prices
from hydra_llm.tasks.base import Task
from hydra_llm.types import Query


def chosen_queries(dataset: DataSet, users: Sequence[str], limit: int | None) -> list[Query]:
    """Each user's first `limit` queries whose gold answer is known."""
    known = ([q for q in dataset.queries(user) if q.gold is not None] for user in users)
    return [query for queries in known for query in queries[:limit]]


async def run_methods(
    methods: Sequence[Method],
    parts: Parts | Sequence[Parts],
    queries: Sequence[Query],
    log: RunLog | None = None,
    progress: StageProgress | None = None,
) -> list[Sample]:
    """Answer every query by every method, unless the log has the sample; a failed call is a failed
    sample, LLMError only if all fail or the budget is spent. `parts` has one entry per seed.

    All methods answer a query before the next query, ordered by the number of records in their
    prompts: an embedded engine then still holds the prompts that they share.
    """
    seeds = [parts] if isinstance(parts, Parts) else list(parts)
    instances = [(method, own) for method in methods for own in method.instances(seeds)]
    answerers = {(method.name, own.seed): method.build(own) for method, own in instances}
    order = [(method.name, own.seed) for method, own in sorted(instances, key=_records_shown)]
    done = {} if log is None else dict(log.samples)
    todo = [
        (Sample(name, query.user, query.id, query.gold or "", None, seed=seed), query)
        for query in queries
        for name, seed in order
        if (name, query.user, query.id, seed) not in done
    ]
    faults: list[LLMError] = []

    async def one(case: tuple[Sample, Query]) -> None:
        blank, query = case
        sample = await _sample(blank, query, answerers[blank.method, blank.seed], faults)
        done[sample.key] = sample
        if log is not None:
            log.add(sample)

    report = None if progress is None else partial(progress, "answer")
    await map_calls(one, todo, limit=seeds[0].settings.concurrency, progress=report)
    if faults and not any(sample.calls for sample in done.values()):
        raise faults[0]  # a wrong key or a dead endpoint, which a table would hide
    return [done[name, query.user, query.id, seed] for name, seed in answerers for query in queries]


def _records_shown(instance: tuple[Method, Parts]) -> int:
    method, own = instance
    default = own.settings.k if "reranker" in method.uses or "k" in method.takes else 0
    return method.given.get("k", default)


async def _sample(
    blank: Sample, query: Query, answerer: Answerer, faults: list[LLMError]
) -> Sample:
    """The sample of a query with its answer or error; `faults` collects the errors."""
    try:
        answer = await answerer.aanswer(query)
    except BudgetExceeded:
        raise
    except LLMError as error:
        faults.append(error)
        return replace(blank, error=str(error))
    spent = answerer.pop_spent() if isinstance(answerer, Learner) else {}
    usage, pick = answer.usage, answer.candidates[answer.chosen]
    votes = [candidate.votes for candidate in answer.candidates]
    return replace(
        blank,
        answer=pick.answer,
        calls=usage.calls + usage.cached,
        tokens=usage.prompt_tokens + usage.completion_tokens,
        completion_tokens=usage.completion_tokens,
        llm_seconds=usage.seconds,
        seconds=dict(answer.seconds),
        notes=answer.proposal.notes,
        probability=pick.probability,
        agreement=max(votes) / sum(votes) if sum(votes) > 1 else None,
        learned={user: cost.to_json() for user, cost in spent.items()},
    )


@dataclass(frozen=True)
class MethodResult:
    """The figures of a method over all of its samples; calls, tokens, cost and seconds per query.

    `metrics` has the value and the ends of its 95 % interval over users, NaN if not scored; `seeds`
    has each seed's values by metric, if there are several seeds of the learned parts.
    """

    method: str
    metrics: Mapping[str, tuple[float, float, float]]
    queries: int  # each counted once, however many seeds answered it
    failed: int
    unparsable: int
    calls: float
    tokens: float
    llm_seconds: float  # of the LLM, as measured when it was called
    own_seconds: float  # of everything else in this run
    cost: float  # money at the given prices
    seconds: Mapping[str, float]  # per stage, in this run; `llm` is near 0 if cached
    seeds: Mapping[int, Mapping[str, float]]

    def to_json(self) -> dict[str, Any]:
        """JSON values; what was not scored is null."""
        metrics = {name: rounded(values) for name, values in self.metrics.items()}
        seeds = {
            seed: dict(zip(own, rounded(own.values()), strict=True))
            for seed, own in self.seeds.items()
        }
        return {**asdict(self), "metrics": metrics, "seeds": seeds}


def rounded(values: Iterable[float]) -> list[float | None]:
    """Six decimals for JSON; NaN is null."""
    return [None if math.isnan(value) else round(value, 6) for value in values]


def scored(task: Task, samples: Sequence[Sample]) -> dict[str, Metric]:
    """The samples by every metric of the task."""
    answers = [Failed(sample.error) if sample.error else sample.answer for sample in samples]
    return score(task, answers, [sample.gold for sample in samples])


def tabulate(task: Task, samples: Sequence[Sample], prices: Prices = FREE) -> list[MethodResult]:
    """One result per method, in the order in which methods first appear."""
    return [_result(task, own, prices) for own in by_method(samples).values()]


def _result(task: Task, own: Sequence[Sample], prices: Prices) -> MethodResult:
    answered = [sample for sample in own if not sample.error]

    def mean(values: Iterable[float]) -> float:
        return sum(values) / max(1, len(answered))

    users, seeds = [sample.user for sample in own], sorted({sample.seed for sample in own})
    metrics = dict.fromkeys(task.metric_specs, (math.nan,) * 3)
    for name, metric in scored(task, own).items():
        if not math.isnan(metric.value):
            metrics[name] = (metric.value, *interval(metric, users))
    of_seeds = {}
    for seed in seeds if len(seeds) > 1 else ():
        metrics_of_seed = scored(task, [sample for sample in own if sample.seed == seed])
        of_seeds[seed] = {name: metric.value for name, metric in metrics_of_seed.items()}
    stages = dict.fromkeys(stage for sample in answered for stage in sample.seconds)
    seconds = {name: mean(s.seconds.get(name, 0.0) for s in answered) for name in stages}
    return MethodResult(
        own[0].method,
        metrics,
        queries=len({(sample.user, sample.query) for sample in own}),
        failed=len(own) - len(answered),
        unparsable=sum(sample.answer is None for sample in answered),
        calls=mean(sample.calls for sample in answered),
        tokens=mean(sample.tokens for sample in answered),
        llm_seconds=mean(sample.llm_seconds for sample in answered),
        own_seconds=sum(time for stage, time in seconds.items() if stage != "llm"),
        cost=mean(prices.cost(sample.usage) for sample in answered),
        seconds=seconds,
        seeds=of_seeds,
    )
