"""Run methods on the queries of users and score them. Knows the methods only by `aanswer`, the LLM
not at all.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hydra_llm.bench.methods import Answerer, Learner, Method, Parts
from hydra_llm.bench.metrics import Failed, Metric, score, title
from hydra_llm.bench.runlog import Key, RunLog, Sample
from hydra_llm.bench.stats import interval
from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import BudgetExceeded, LLMError
from hydra_llm.llm.concurrency import StageProgress, map_calls
from hydra_llm.llm.meter import FREE, Prices
from hydra_llm.tasks.base import Task
from hydra_llm.types import Answer, Query, Usage


@dataclass(frozen=True)
class Row:
    """A method's line in the table."""

    method: str
    metrics: Mapping[str, tuple[float, float, float]]
    """Metric → value, lower and upper end of its 95 % interval (bootstrap over users); NaN where
    nothing was scored.
    """
    queries: int
    """Each counted once, however many seeds answered it."""
    failed: int
    unparsable: int
    calls: float
    """LLM calls per query."""
    tokens: float
    """Tokens per query."""
    llm_seconds: float
    """Seconds of LLM per query, as measured when it was asked."""
    own_seconds: float
    """Seconds per query of everything else, in this run."""
    seconds: Mapping[str, float]
    """Seconds per query and stage, in this run: retrieve, rerank, prompt, llm (near 0 where answers
    were kept), adapt.
    """
    cost: float
    """Money per query, at the prices that were given."""
    seeds: Mapping[int, Mapping[str, float]]
    """Seed of the learned parts → metric → value; the figures above are over all of them."""

    def to_json(self) -> dict[str, Any]:
        """JSON values; what was not scored is null."""
        plain = {
            name: [None if math.isnan(v) else round(v, 6) for v in values]
            for name, values in self.metrics.items()
        }
        named = (
            "queries",
            "failed",
            "unparsable",
            "calls",
            "tokens",
            "llm_seconds",
            "own_seconds",
            "cost",
        )
        seeds = {
            seed: {name: None if math.isnan(v) else round(v, 6) for name, v in values.items()}
            for seed, values in self.seeds.items()
        }
        rest = {name: getattr(self, name) for name in named} | {
            "seconds": dict(self.seconds),
            "seeds": seeds,
        }
        return {"method": self.method, "metrics": plain, **rest}


def chosen_queries(dataset: DataSet, users: Sequence[str], limit: int | None) -> list[Query]:
    """Each user's first `limit` queries whose gold answer is known."""
    return [
        query
        for user in users
        for query in [q for q in dataset.queries(user) if q.gold is not None][:limit]
    ]


Case = tuple[str, int, Query]
"""Method, seed, query."""


async def run_methods(
    methods: Sequence[Method],
    parts: Parts | Sequence[Parts],
    queries: Sequence[Query],
    log: RunLog | None = None,
    progress: StageProgress | None = None,
) -> list[Sample]:
    """Answer every query by every method; a sample that is in the log is taken from there. A failed
    call stays as a failed sample.

    `parts` of several seeds: a method that needs the adapter answers with each, the others with the
    first. All methods answer a query before the next query's turn, and those that show equally many
    records follow each other: an embedded engine still holds the prompts that they share.

    Raises:
        LLMError: the budget is spent, or every call failed (the first one's error).
    """
    every = [parts] if isinstance(parts, Parts) else list(parts)
    seeded = [(method, part) for method in methods for part in method.of(every)]
    answerers = {(method.name, part.seed): method.build(part) for method, part in seeded}
    shown = {(method.name, part.seed): _shown(method, part.settings) for method, part in seeded}
    done = {} if log is None else dict(log.samples)
    faults: list[LLMError] = []
    todo = [
        (*name, query)
        for query in queries
        for name in sorted(answerers, key=shown.__getitem__)
        if _key(*name, query) not in done
    ]

    async def one(case: Case) -> Sample:
        sample = await _sample(case, answerers[case[:2]], faults)
        if log is not None:
            log.add(sample)
        return sample

    told = None if progress is None else partial(progress, "answer")
    for found in await map_calls(one, todo, limit=every[0].settings.concurrency, progress=told):
        assert isinstance(found, Sample)  # what fails is a failed sample
        done[found.key] = found
    if faults and not any(sample.calls for sample in done.values()):
        raise faults[
            0
        ]  # no call at all came through: a wrong key or a dead endpoint, which a table would hide
    return [done[_key(*name, query)] for name in answerers for query in queries]


def _shown(method: Method, settings: Settings) -> int:
    """How many records its prompts show, as far as that is known before; sampling and adapting
    alone stand on the settings' k.
    """
    return method.given.get(
        "k", settings.k if "reranker" in method.needs or "k" in method.takes else 0
    )


def _key(method: str, seed: int, query: Query) -> Key:
    return method, query.user, query.id, seed


async def _sample(case: Case, answerer: Answerer, faults: list[LLMError]) -> Sample:
    method, seed, query = case
    try:
        answer = await answerer.aanswer(query)
        spent = answerer.taken() if isinstance(answerer, Learner) else {}
        return replace(
            _of_answer(method, seed, query, answer),
            learned={user: each.to_json() for user, each in spent.items()},
        )
    except BudgetExceeded:
        raise
    except LLMError as error:
        faults.append(error)
        return Sample(method, query.user, query.id, query.gold or "", None, str(error), seed=seed)


def _of_answer(method: str, seed: int, query: Query, answer: Answer) -> Sample:
    usage, pick = answer.usage, answer.candidates[answer.chosen]
    votes = [candidate.votes for candidate in answer.candidates]
    return Sample(
        method,
        query.user,
        query.id,
        query.gold or "",
        pick.answer,
        calls=usage.calls + usage.cached,
        tokens=usage.prompt_tokens + usage.completion_tokens,
        completion_tokens=usage.completion_tokens,
        llm_seconds=usage.seconds,
        seconds=dict(answer.seconds),
        notes=answer.proposal.notes,
        seed=seed,
        probability=pick.probability,
        agreement=max(votes) / sum(votes) if sum(votes) > 1 else None,
    )


def tabulate(task: Task, samples: Sequence[Sample], prices: Prices = FREE) -> list[Row]:
    """One row per method, in the order in which methods first appear."""
    rows = []
    for method in dict.fromkeys(sample.method for sample in samples):
        own = [sample for sample in samples if sample.method == method]
        rows.append(_row(task, method, own, prices))
    return rows


def scored(task: Task, samples: Sequence[Sample]) -> dict[str, Metric]:
    """The samples by every metric of the task."""
    return score(
        task,
        [Failed(sample.error) if sample.error else sample.answer for sample in samples],
        [s.gold for s in samples],
    )


def _row(task: Task, method: str, own: Sequence[Sample], prices: Prices) -> Row:
    users = [sample.user for sample in own]
    metrics = {}
    for name, metric in scored(task, own).items():
        span = interval(metric, users) if not math.isnan(metric.value) else None
        metrics[name] = (metric.value, span.low, span.high) if span else (math.nan,) * 3
    good = [sample for sample in own if not sample.error]
    seeds = sorted({sample.seed for sample in own})
    of_seed = {
        seed: scored(task, [sample for sample in own if sample.seed == seed])
        for seed in (seeds if len(seeds) > 1 else ())
    }

    def mean(of: Callable[[Sample], float]) -> float:
        return sum(map(of, good)) / max(1, len(good))

    stages = list(dict.fromkeys(stage for sample in good for stage in sample.seconds))
    seconds = {stage: mean(lambda s, stage=stage: s.seconds.get(stage, 0.0)) for stage in stages}  # type: ignore[misc]
    return Row(
        method,
        metrics,
        len({(sample.user, sample.query) for sample in own}),
        sum(bool(sample.error) for sample in own),
        sum(sample.answer is None for sample in good),
        mean(lambda s: s.calls),
        mean(lambda s: s.tokens),
        mean(lambda s: s.llm_seconds),
        sum(time for stage, time in seconds.items() if stage != "llm"),
        seconds,
        mean(
            lambda s: prices.cost(
                Usage(
                    prompt_tokens=s.tokens - s.completion_tokens,
                    completion_tokens=s.completion_tokens,
                )
            )
        ),
        {
            seed: {name: metric.value for name, metric in found.items()}
            for seed, found in of_seed.items()
        },
    )


def cell(value: float, low: float, high: float) -> str:
    """A metric with its interval; one user alone has none."""
    if math.isnan(value):
        return "failed"
    return f"{value:.3f}" if math.isnan(low) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def as_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows for people: metrics with their intervals."""
    table = []
    for row in rows:
        cells: dict[str, Any] = {"method": row.method}
        for name, figures in row.metrics.items():
            cells[title(name)] = cell(*figures)
        cells |= {
            "queries": row.queries,
            "LLM calls": round(row.calls, 1),
            "LLM s": round(row.llm_seconds, 2),
        }
        cells |= {"failed": row.failed, "unparsable": row.unparsable}
        table.append(cells)
    return table
