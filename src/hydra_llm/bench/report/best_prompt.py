"""The best prompt-based method, per metric: chosen with hindsight, on the queries that it is judged
by, or, in a run with folds, on training users: those of the other folds.

A choice with hindsight takes the luckiest of many prompts; only the other one could be deployed.
Letter: F folds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from hydra_llm.bench.results import MethodResult, scored, tabulate
from hydra_llm.bench.runlog import Sample
from hydra_llm.bench.stats import Metric
from hydra_llm.llm.meter import Prices
from hydra_llm.tasks.base import Task

NAME = "best prompt (chosen on training users)"
Answers = Mapping[str, Sequence[Sample]]
"""Metric → the samples that count for it."""


def with_hindsight(task: Task, prompts: Sequence[MethodResult]) -> dict[str, str]:
    """Metric → the method that is best by it on these very queries."""
    best: dict[str, str] = {}
    for metric, spec in task.metric_specs.items():
        values = {row.method: spec.sign * row.metrics[metric][0] for row in prompts}
        if known := [name for name, value in values.items() if not math.isnan(value)]:
            best[metric] = max(known, key=values.__getitem__)
    return best


def on_training_users(task: Task, prompts: Mapping[str, Sequence[Sample]]) -> Answers:
    """Metric → in each fold the answers of the method with the best value over the users of the
    other folds, as samples of the method `NAME`; empty for a run without folds.
    """
    numbers = {sample.fold for own in prompts.values() for sample in own}
    folds = sorted(fold for fold in numbers if fold is not None)
    if len(folds) < 2:
        return {}
    figures = {method: scored(task, own) for method, own in prompts.items()}
    places = {m: np.array([sample.fold for sample in own]) for m, own in prompts.items()}
    chosen: dict[str, list[Sample]] = {metric: [] for metric in task.metric_specs}
    for metric, spec in task.metric_specs.items():
        for fold in folds:
            values = {
                method: spec.sign * _value(figures[method][metric], places[method] != fold)
                for method in prompts
            }
            if known := [method for method, value in values.items() if not math.isnan(value)]:
                best = prompts[max(known, key=values.__getitem__)]
                chosen[metric] += [replace(s, method=NAME) for s in best if s.fold == fold]
    return chosen


def _value(metric: Metric, rows: np.ndarray) -> float:
    """The metric over some of its rows; NaN where none was scored."""
    of_rows = metric.rows[rows]
    if not len(of_rows) or bool(np.isnan(of_rows).any(axis=1).all()):
        return math.nan
    return float(metric.spec.statistic(np.nansum(of_rows, axis=0, keepdims=True))[0])


def result(task: Task, answers: Answers, prices: Prices) -> MethodResult:
    """Its row of the table; calls and costs are those of the choice by the first metric."""
    of_metric = {name: tabulate(task, own, prices)[0] for name, own in answers.items()}
    first = next(iter(of_metric.values()))
    return replace(first, metrics={name: row.metrics[name] for name, row in of_metric.items()})
