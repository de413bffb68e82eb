"""Run methods on the queries of users and score them. Knows the methods only by `aanswer`, the LLM not at all."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hydra_llm.bench.compare import interval
from hydra_llm.bench.methods import Answerer, Method, Parts
from hydra_llm.bench.metrics import Failed, score
from hydra_llm.bench.runlog import RunLog, Sample
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import BudgetExceeded, LLMError
from hydra_llm.llm.calls import StageProgress, map_calls
from hydra_llm.tasks.task import Task
from hydra_llm.types import Answer, Query


@dataclass(frozen=True)
class Row:
    """A method's line in the table."""

    method: str
    metrics: Mapping[str, tuple[float, float, float]]
    """Metric → value, lower and upper end of its 95 % interval (bootstrap over users); NaN where nothing was scored."""
    queries: int
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

    def to_json(self) -> dict[str, Any]:
        """JSON values; what was not scored is null."""
        plain = {name: [None if math.isnan(v) else round(v, 6) for v in values] for name, values in self.metrics.items()}
        rest = {name: getattr(self, name) for name in ("queries", "failed", "unparsable", "calls", "tokens", "llm_seconds", "own_seconds")}
        return {"method": self.method, "metrics": plain, **rest}


def chosen_queries(dataset: DataSet, users: Sequence[str], limit: int | None) -> list[Query]:
    """Each user's first `limit` queries whose gold answer is known."""
    return [query for user in users for query in [q for q in dataset.queries(user) if q.gold is not None][:limit]]


async def run_methods(
    methods: Sequence[Method], parts: Parts, queries: Sequence[Query], log: RunLog | None = None, progress: StageProgress | None = None
) -> list[Sample]:
    """Answer every query by every method; a sample that is in the log is taken from there. A failed call stays as a failed sample.

    All methods answer a query before the next query's turn: an embedded engine still holds the prompts that they share.

    Raises:
        LLMError: the budget is spent, or every call failed (the first one's error).
    """
    answerers = {method.name: method.build(parts) for method in methods}
    done = {} if log is None else dict(log.samples)
    faults: list[LLMError] = []
    todo = [(name, query) for query in queries for name in answerers if (name, query.user, query.id) not in done]

    async def one(case: tuple[str, Query]) -> Sample:
        sample = await _sample(case[0], answerers[case[0]], case[1], faults)
        if log is not None:
            log.add(sample)
        return sample

    told = None if progress is None else partial(progress, "answer")
    for found in await map_calls(one, todo, limit=parts.settings.concurrency, progress=told):
        assert isinstance(found, Sample)  # what fails is a failed sample
        done[found.key] = found
    if faults and not any(sample.calls for sample in done.values()):
        raise faults[0]  # no call at all came through: a wrong key or a dead endpoint, which a table would hide
    return [done[name, query.user, query.id] for name in answerers for query in queries]


async def _sample(method: str, answerer: Answerer, query: Query, faults: list[LLMError]) -> Sample:
    try:
        return _of_answer(method, query, await answerer.aanswer(query))
    except BudgetExceeded:
        raise
    except LLMError as error:
        faults.append(error)
        return Sample(method, query.user, query.id, query.gold or "", None, str(error))


def _of_answer(method: str, query: Query, answer: Answer) -> Sample:
    usage = answer.usage
    return Sample(
        method,
        query.user,
        query.id,
        query.gold or "",
        answer.candidates[answer.chosen].answer,
        calls=usage.calls + usage.cached,
        tokens=usage.prompt_tokens + usage.completion_tokens,
        llm_seconds=usage.seconds,
        seconds=dict(answer.seconds),
        notes=answer.proposal.notes,
    )


def tabulate(task: Task, samples: Sequence[Sample]) -> list[Row]:
    """One row per method, in the order in which methods first appear."""
    rows = []
    for method in dict.fromkeys(sample.method for sample in samples):
        own = [sample for sample in samples if sample.method == method]
        rows.append(_row(task, method, own))
    return rows


def _row(task: Task, method: str, own: Sequence[Sample]) -> Row:
    answers = [Failed(sample.error) if sample.error else sample.answer for sample in own]
    scored = score(task, answers, [sample.gold for sample in own])
    users = [sample.user for sample in own]
    metrics = {}
    for name, metric in scored.items():
        span = interval(metric, users) if not math.isnan(metric.value) else None
        metrics[name] = (metric.value, span.low, span.high) if span else (math.nan,) * 3
    good = [sample for sample in own if not sample.error]

    def mean(of: Callable[[Sample], float]) -> float:
        return sum(map(of, good)) / max(1, len(good))

    return Row(
        method,
        metrics,
        len(own),
        sum(bool(sample.error) for sample in own),
        sum(sample.answer is None for sample in good),
        mean(lambda s: s.calls),
        mean(lambda s: s.tokens),
        mean(lambda s: s.llm_seconds),
        mean(lambda s: sum(t for stage, t in s.seconds.items() if stage != "llm")),
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
            cells[name.upper() if name in ("mae", "rmse") else name] = cell(*figures)
        cells |= {"queries": row.queries, "LLM calls": round(row.calls, 1), "LLM s": round(row.llm_seconds, 2)}
        cells |= {"failed": row.failed, "unparsable": row.unparsable}
        table.append(cells)
    return table
