"""Run methods on the queries of users and score them. Knows no LLM."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from hydra_llm.bench.method import Answerer, Learner, Method, Parts
from hydra_llm.bench.metrics import Failed, Metric, score
from hydra_llm.bench.runlog import Key, RunLog, Sample
from hydra_llm.bench.stats import interval
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import BudgetExceeded, LLMError
from hydra_llm.llm.concurrency import StageProgress, map_calls
from hydra_llm.llm.meter import FREE, Prices
from hydra_llm.tasks.base import Task
from hydra_llm.types import Answer, Query


def chosen_queries(dataset: DataSet, users: Sequence[str], limit: int | None) -> list[Query]:
    """Each user's first `limit` queries whose gold answer is known."""
    return [
        query
        for user in users
        for query in [q for q in dataset.queries(user) if q.gold is not None][:limit]
    ]


# ---- answering

Case = tuple[str, int, Query]
"""Method, seed, query."""


async def run_methods(
    methods: Sequence[Method],
    parts: Parts | Sequence[Parts],
    queries: Sequence[Query],
    log: RunLog | None = None,
    progress: StageProgress | None = None,
) -> list[Sample]:
    """Answer every query by every method, unless the log has the sample; a failed call is a failed
    sample. `parts` has one entry per seed.

    All methods answer a query before the next query, ordered by the number of records in their
    prompts: an embedded engine then still holds the prompts that they share.

    Raises:
        LLMError: the budget is spent, or every call failed (the first error).
    """
    seeds = [parts] if isinstance(parts, Parts) else list(parts)
    instances = [(each, part) for each in methods for part in each.instances(seeds)]
    answerers = {(each.name, part.seed): each.build(part) for each, part in instances}
    by_records = sorted(instances, key=lambda each: _records_shown(*each))
    order = dict.fromkeys((each.name, part.seed) for each, part in by_records)
    done = {} if log is None else dict(log.samples)
    faults: list[LLMError] = []
    todo = [(*name, q) for q in queries for name in order if _key(*name, q) not in done]

    async def one(case: Case) -> Sample:
        sample = await _sample(case, answerers[case[:2]], faults)
        if log is not None:
            log.add(sample)
        return sample

    report = None if progress is None else partial(progress, "answer")
    for found in await map_calls(one, todo, limit=seeds[0].settings.concurrency, progress=report):
        assert isinstance(found, Sample)  # a failed call is a failed sample
        done[found.key] = found
    if faults and not any(sample.calls for sample in done.values()):
        raise faults[0]  # a wrong key or a dead endpoint, which a table would hide
    return [done[_key(*name, query)] for name in answerers for query in queries]


def _records_shown(method: Method, parts: Parts) -> int:
    """How many records its prompts show, as far as the parameters and settings tell."""
    default = parts.settings.k if "reranker" in method.uses or "k" in method.takes else 0
    return method.given.get("k", default)


def _key(method: str, seed: int, query: Query) -> Key:
    return method, query.user, query.id, seed


async def _sample(case: Case, answerer: Answerer, faults: list[LLMError]) -> Sample:
    method, seed, query = case
    failed = Sample(method, query.user, query.id, query.gold or "", None, seed=seed)
    try:
        answer = await answerer.aanswer(query)
    except BudgetExceeded:
        raise
    except LLMError as error:
        faults.append(error)
        return replace(failed, error=str(error))
    spent = answerer.pop_spent() if isinstance(answerer, Learner) else {}
    learned = {user: each.to_json() for user, each in spent.items()}
    return replace(failed, learned=learned, **_figures(answer))


def _figures(answer: Answer) -> dict[str, Any]:
    """What a sample keeps of an answer."""
    usage, pick = answer.usage, answer.candidates[answer.chosen]
    votes = [candidate.votes for candidate in answer.candidates]
    return {
        "answer": pick.answer,
        "calls": usage.calls + usage.cached,
        "tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens": usage.completion_tokens,
        "llm_seconds": usage.seconds,
        "seconds": dict(answer.seconds),
        "notes": answer.proposal.notes,
        "probability": pick.probability,
        "agreement": max(votes) / sum(votes) if sum(votes) > 1 else None,
    }


# ---- scoring


@dataclass(frozen=True)
class MethodResult:
    """The figures of a method over all of its samples."""

    method: str
    metrics: Mapping[str, tuple[float, float, float]]
    """Metric → value and ends of its 95 % interval over users; NaN if not scored."""
    queries: int
    """Each counted once, however many seeds answered it."""
    failed: int
    unparsable: int
    calls: float
    """LLM calls per query."""
    tokens: float
    """Tokens per query."""
    llm_seconds: float
    """Seconds of the LLM per query, as measured when it was called."""
    own_seconds: float
    """Seconds per query of everything else, in this run."""
    cost: float
    """Money per query, at the given prices."""
    seconds: Mapping[str, float]
    """Seconds per query and stage, in this run; `llm` is near 0 if cached."""
    seeds: Mapping[int, Mapping[str, float]]
    """Seed of the learned parts → metric → value, if there are several seeds."""

    def to_json(self) -> dict[str, Any]:
        """JSON values; what was not scored is null."""
        return {
            **asdict(self),
            "metrics": {name: rounded(values) for name, values in self.metrics.items()},
            "seeds": {
                seed: dict(zip(values, rounded(values.values()), strict=True))
                for seed, values in self.seeds.items()
            },
        }


def rounded(values: Iterable[float]) -> list[float | None]:
    """Six decimals for JSON; NaN is null."""
    return [None if math.isnan(value) else round(value, 6) for value in values]


def scored(task: Task, samples: Sequence[Sample]) -> dict[str, Metric]:
    """The samples by every metric of the task."""
    answers = [Failed(sample.error) if sample.error else sample.answer for sample in samples]
    return score(task, answers, [sample.gold for sample in samples])


def tabulate(task: Task, samples: Sequence[Sample], prices: Prices = FREE) -> list[MethodResult]:
    """One result per method, in the order in which methods first appear."""
    return [
        _result(task, [sample for sample in samples if sample.method == method], prices)
        for method in dict.fromkeys(sample.method for sample in samples)
    ]


def _result(task: Task, own: Sequence[Sample], prices: Prices) -> MethodResult:
    answered = [sample for sample in own if not sample.error]

    def mean(values: Iterable[float]) -> float:
        return sum(values) / max(1, len(answered))

    stages = dict.fromkeys(stage for sample in answered for stage in sample.seconds)
    seconds = {
        stage: mean(sample.seconds.get(stage, 0.0) for sample in answered) for stage in stages
    }
    return MethodResult(
        own[0].method,
        _with_intervals(task, own),
        queries=len({(sample.user, sample.query) for sample in own}),
        failed=len(own) - len(answered),
        unparsable=sum(sample.answer is None for sample in answered),
        calls=mean(sample.calls for sample in answered),
        tokens=mean(sample.tokens for sample in answered),
        llm_seconds=mean(sample.llm_seconds for sample in answered),
        own_seconds=sum(time for stage, time in seconds.items() if stage != "llm"),
        cost=mean(prices.cost(sample.usage) for sample in answered),
        seconds=seconds,
        seeds=_by_seed(task, own),
    )


def _with_intervals(task: Task, own: Sequence[Sample]) -> dict[str, tuple[float, float, float]]:
    users = [sample.user for sample in own]
    return {
        name: (metric.value, *interval(metric, users))
        if not math.isnan(metric.value)
        else (math.nan,) * 3
        for name, metric in scored(task, own).items()
    }


def _by_seed(task: Task, own: Sequence[Sample]) -> dict[int, dict[str, float]]:
    seeds = sorted({sample.seed for sample in own})
    if len(seeds) < 2:
        return {}
    return {
        seed: {
            name: metric.value
            for name, metric in scored(task, [each for each in own if each.seed == seed]).items()
        }
        for seed in seeds
    }
