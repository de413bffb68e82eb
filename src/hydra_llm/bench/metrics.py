"""Metrics of parsed answers against gold ones, kept so that a bootstrap can resample them.

A metric of a task kind (`tasks/`) is a function of sums over queries (sufficient statistics), for
its value as for its bootstrap values. An answer that cannot be parsed (None) counts as wrong; one
whose call failed (`Failed`) is NaN and counted, never 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from hydra_llm.tasks.base import KINDS, Floats, MetricSpec, Task


@dataclass(frozen=True, slots=True)
class Failed:
    """Stands for the answer of a call that failed."""

    error: str


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric's value and what it was computed from. Letters: N queries, S sums."""

    spec: MetricSpec
    value: float  # NaN where no query was scored
    rows: Floats  # [N, S] sufficient statistics of each query; NaN where its call failed
    failed: int = 0  # queries without an answer, not in `value`
    unparsable: int = 0  # queries whose answer could not be parsed, in `value` as wrong


def score(
    task: Task, answers: Sequence[str | Failed | None], golds: Sequence[str]
) -> dict[str, Metric]:
    """Score parsed answers by every metric of the task, in its order.

    Raises:
        DataError: a gold rating is not a number.
        ValueError: there are more answers than golds, or fewer.
    """
    pairs = list(zip(answers, golds, strict=True))
    failed = np.array([isinstance(answer, Failed) for answer, _ in pairs], dtype=bool)
    scored = [(answer, gold) for answer, gold in pairs if not isinstance(answer, Failed)]
    unparsable = sum(answer is None for answer, _ in scored)
    metrics = {}
    for spec in task.metric_specs.values():
        of_scored = task.strategy.metric_rows(spec.name, scored)
        rows = np.full((len(pairs), of_scored.shape[1]), np.nan)
        rows[~failed] = of_scored
        sums = np.nansum(rows, axis=0, keepdims=True)
        value = float(spec.statistic(sums)[0]) if scored else np.nan
        metrics[spec.name] = Metric(spec, value, rows, int(failed.sum()), unparsable)
    return metrics


@cache
def title(name: str) -> str:
    """What tables and plots call a metric."""
    specs = (spec for kind in KINDS.names() for spec in KINDS.load(kind).metrics)
    return next((spec.title for spec in specs if spec.name == name), "") or name
