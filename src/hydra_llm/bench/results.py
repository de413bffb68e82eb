"""Samples as figures: each method's metrics with intervals, and two methods on the same queries."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.special import stdtrit

from hydra_llm.bench.method import per_sample
from hydra_llm.bench.runlog import Sample, by_method
from hydra_llm.bench.stats import Metric, Paired, interval, paired, score
from hydra_llm.errors import LLMError
from hydra_llm.llm.meter import FREE, Prices
from hydra_llm.tasks.base import CHOICE_METRICS, Task, with_count

POWER = 2.8  # standard errors of a difference found with power 0.8 at the 5 % level: 1.96 + 0.84

Pair = tuple[Sample, Sample]


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
    tokens: float  # NaN, as the cost, where the LLM did not tell them
    llm_seconds: float  # of the LLM, as measured when it was called
    own_seconds: float  # of everything else in this run
    cost: float  # money at the given prices
    seconds: Mapping[str, float]  # per stage, in this run; `llm` is near 0 if cached
    seeds: Mapping[int, Mapping[str, float]]

    def to_json(self) -> dict[str, Any]:
        metrics = {name: rounded(values) for name, values in self.metrics.items()}
        seeds = {
            seed: dict(zip(own, rounded(own.values()), strict=True))
            for seed, own in self.seeds.items()
        }
        own = asdict(self) | {"metrics": metrics, "seeds": seeds}
        untold = [name for name in ("tokens", "cost") if math.isnan(own[name])]
        return own | dict.fromkeys(untold)


def rounded(values: Iterable[float]) -> list[float | None]:
    """Six decimals for JSON; NaN is null."""
    return [None if math.isnan(value) else round(value, 6) for value in values]


def scored(task: Task, samples: Sequence[Sample]) -> dict[str, Metric]:
    """The samples by every metric of the task."""
    answers = [LLMError(sample.error) if sample.error else sample.answer for sample in samples]
    metrics = score(task, answers, [sample.gold for sample in samples])
    for name in task.metric_specs.keys() & CHOICE_METRICS.keys():
        values = [sample.choice.get(name, math.nan) for sample in samples]
        rows = with_count(values) + np.array(values)[:, None] * 0  # none: NaN in both columns
        spec, sums = CHOICE_METRICS[name], np.nansum(rows, axis=0, keepdims=True)
        metrics[name] = Metric(spec, float(spec.statistic(sums)[0]), rows)
    return {name: metrics[name] for name in task.metric_specs}


def tabulate(task: Task, samples: Sequence[Sample], prices: Prices = FREE) -> list[MethodResult]:
    """One result per method, in the order in which methods first appear."""
    return [_result(task, own, prices) for own in by_method(samples).values()]


def _result(task: Task, own: Sequence[Sample], prices: Prices) -> MethodResult:
    answered = [sample for sample in own if not sample.error]

    def mean(values: Iterable[float]) -> float:
        return sum(values) / max(1, len(answered))

    users, seeds = [sample.user for sample in own], sorted({sample.seed for sample in own})
    metrics = {name: (m.value, *interval(m, users)) for name, m in scored(task, own).items()}
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
        tokens=mean(math.nan if s.tokens is None else s.tokens for s in answered),
        llm_seconds=mean(sample.llm_seconds for sample in answered),
        own_seconds=sum(time for stage, time in seconds.items() if stage != "llm"),
        cost=mean(prices.cost(sample.usage) for sample in answered),
        seconds=seconds,
        seeds=of_seeds,
    )


@dataclass(frozen=True)
class Comparison:
    """A method minus a baseline, on the queries that both answered.

    `needed`: metric → queries that would show the difference as it is; None if there is none.
    """

    metrics: Mapping[str, Paired]
    wins: int  # users whose mean gain is higher
    ties: int
    losses: int
    worst_tenth: float  # mean change of gain of the tenth of users who lose most (at least one)
    needed: Mapping[str, int | None]

    def to_json(self) -> dict[str, Any]:
        metrics = {name: change._asdict() for name, change in self.metrics.items()}
        return {**asdict(self), "metrics": metrics}


Answers = Sequence[Sample] | Mapping[str, Sequence[Sample]]
"""A method's samples, or by metric those that count for it; the first metric's for gains."""


def compare(task: Task, own: Answers, base: Answers) -> Comparison:
    """How the samples of one method differ from those of another."""
    pairs = pair(of_metric(task, own), of_metric(task, base))
    queries = len({(sample.user, sample.query) for sample, _ in pairs})
    metrics = {}
    for name, (ours, theirs, users) in scored_by_metric(task, own, base).items():
        metrics[name] = paired(ours, theirs, users)
    changes = np.sort(list(changes_by_user(task, pairs).values()))
    worst = changes[: max(1, len(changes) // 10)]
    return Comparison(
        metrics,
        wins=int((changes > 0).sum()),
        ties=int((changes == 0).sum()),
        losses=int((changes < 0).sum()),
        worst_tenth=float(worst.mean()) if len(worst) else math.nan,
        needed={name: queries_needed(change, queries) for name, change in metrics.items()},
    )


def of_metric(task: Task, answers: Answers, metric: str | None = None) -> Sequence[Sample]:
    """The samples that count for a metric, by default for the first one."""
    if isinstance(answers, Mapping):
        return answers.get(metric or next(iter(task.metric_specs)), ())
    return answers


def scored_by_metric(
    task: Task, own: Answers, base: Answers
) -> dict[str, tuple[Metric, Metric, list[str]]]:
    """Metric → both sides by it, and the user of each pair."""
    scores: dict[tuple[int, int], tuple[dict[str, Metric], dict[str, Metric], list[str]]] = {}
    found = {}
    for name in task.metric_specs:
        sides = of_metric(task, own, name), of_metric(task, base, name)
        key = id(sides[0]), id(sides[1])
        if key not in scores:
            scores[key] = scored_pairs(task, pair(*sides))
        ours, theirs, users = scores[key]
        found[name] = ours[name], theirs[name], users
    return found


def scored_pairs(
    task: Task, pairs: Sequence[Pair]
) -> tuple[dict[str, Metric], dict[str, Metric], list[str]]:
    """The metrics of both sides, and the user of each pair."""
    own, base = ([both[side] for both in pairs] for side in (0, 1))
    return scored(task, own), scored(task, base), [sample.user for sample in own]


def pair(own: Sequence[Sample], base: Sequence[Sample]) -> list[Pair]:
    """The samples of the same query and seed. Each is paired with each of the other side's if one
    side has a single seed, or answers once per sample and thus has no seeds.
    """
    sides: list[dict[tuple[str, str], dict[int, Sample]]] = []  # (user, query) → seed → sample
    for samples in (own, base):
        sides.append({})
        for sample in samples:
            sides[-1].setdefault((sample.user, sample.query), {})[sample.seed] = sample
    no_seeds = any(per_sample(samples[0].method) for samples in (own, base) if samples)
    pairs: list[Pair] = []
    for query, ours in sides[0].items():
        theirs = sides[1].get(query, {})
        if 1 in (len(ours), len(theirs)) or (no_seeds and ours.keys() != theirs.keys()):
            seeds = list(product(sorted(ours), sorted(theirs)))
        else:
            seeds = [(seed, seed) for seed in sorted(ours.keys() & theirs.keys())]
        pairs += [(ours[one], theirs[other]) for one, other in seeds]
    return pairs


def changes_by_user(task: Task, pairs: Sequence[Pair]) -> dict[str, float]:
    """User → mean change of gain, over the pairs in which neither call failed."""
    changes: dict[str, list[float]] = {}
    for own, base in pairs:
        if not own.error and not base.error:
            change = worth(task, own) - worth(task, base)
            changes.setdefault(own.user, []).append(change)
    # rounded, as 1/3 + 1/3 − 2/3 is no difference
    return {user: round(float(np.mean(values)), 12) for user, values in changes.items()}


def worth(task: Task, sample: Sample) -> float:
    """The gain of a sample's answer; of a recorded choice, whether it is the one that was taken."""
    if sample.choice:
        return sample.choice["choice_accuracy"]
    return task.gain(sample.answer, sample.gold)


def queries_needed(change: Paired, queries: int) -> int | None:
    """Queries, of more users, that show the difference with power 0.8; None without one."""
    if change.users < 2 or not change.difference:
        return None
    error = (change.high - change.low) / (2 * float(stdtrit(change.users - 1, 0.975)))
    needed = queries * (POWER * error / abs(change.difference)) ** 2
    return math.ceil(round(needed, 6)) if error > 0 else None
