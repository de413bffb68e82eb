"""Metrics of parsed answers, with confidence intervals and p-values over users.

A metric of a task kind (`tasks/`) is a function of sums over queries (sufficient statistics), for
its value as for its bootstrap values. An answer that cannot be parsed (None) counts as wrong. The
rows of a failed call are NaN, never 0: it is left out, in a comparison for both methods.

Bootstrap over users, not samples: one user's samples are correlated, and claims are about new
users. For few users the percentile interval is too narrow: its level is widened as Student's t is
against the normal (the expanded percentile interval; Hesterberg 2015, "What teachers should know
about the bootstrap").

Macro-F1 has Student's interval with the jackknife's standard error (Efron and Stein 1981), as a
resample lacks a third of the users, and with them whole labels; neither percentiles nor BCa correct
that bias. `benchmarks/interval_coverage.py` measures it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import compress
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from hydra_llm.errors import LLMError
from hydra_llm.tasks.base import CHOICE_METRICS, KINDS, Floats, MetricSpec, Statistic, Task

LEVEL = 0.95
MIN_USERS = 5
"""With fewer users nothing can be said: neither the interval nor the p-value is near its level."""
CELLS = 4_000_000  # draws times users in memory at once


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric's value and what it was computed from. Letters: N queries, S sums."""

    spec: MetricSpec
    value: float  # NaN where no query was scored
    rows: Floats  # [N, S] sufficient statistics of each query; NaN where its call failed


def score(
    task: Task, answers: Sequence[str | LLMError | None], golds: Sequence[str]
) -> dict[str, Metric]:
    """Score parsed answers, or the errors in their place, by every metric of the task in its order.
    DataError: a gold rating is not a number. ValueError: more answers than golds, or fewer.
    """
    pairs = list(zip(answers, golds, strict=True))
    failed = np.array([isinstance(answer, LLMError) for answer in answers], dtype=bool)
    scored = [(answer, gold) for answer, gold in pairs if not isinstance(answer, LLMError)]
    metrics = {}
    for name, spec in task.metric_specs.items():
        if name in CHOICE_METRICS:  # these are the samples', see results.py
            continue
        of_scored = task.strategy.metric_rows(name, scored)
        rows = np.full((len(pairs), of_scored.shape[1]), np.nan)
        rows[~failed] = of_scored
        sums = np.nansum(rows, axis=0, keepdims=True)
        metrics[name] = Metric(spec, float(spec.statistic(sums)[0]) if scored else np.nan, rows)
    return metrics


@cache
def title(name: str) -> str:
    """What tables and plots call a metric."""
    of_kinds = (spec for kind in KINDS.names() for spec in KINDS.load(kind).metrics)
    specs = (*of_kinds, *CHOICE_METRICS.values())
    return next((spec.title for spec in specs if spec.name == name), "") or name


Values = Sequence[float] | Floats | Metric
"""One number per sample (NaN if its call failed), of which the mean is taken; or a metric."""


class Interval(NamedTuple):
    """A 95 % confidence interval; NaN for fewer than `MIN_USERS`."""

    low: float
    high: float


NO_INTERVAL = Interval(math.nan, math.nan)


class Paired(NamedTuple):
    """The difference a − b on the samples that both methods have."""

    difference: float
    low: float
    high: float
    p: float  # two-sided; below 0.05 if the interval excludes 0
    samples: int
    users: int


class Relative(NamedTuple):
    """Mean relative improvement over others (HYDRA 4.2); negative if a method is worse."""

    change: float
    error: float  # standard error over users; NaN for fewer than two
    freedom: float  # degrees of freedom of the error
    parts: Mapping[str, float]  # user → part of the error, the root of their sum of squares

    def interval(self) -> Interval:
        known = len(self.parts) >= MIN_USERS
        return _students(self.change, self.error, self.freedom) if known else NO_INTERVAL


def interval(values: Values, users: Sequence[str], draws: int = 10_000, seed: int = 0) -> Interval:
    """The interval of a mean or a metric; `users` names the user of each sample."""
    metric = _as_metric(values)
    spec, sums = metric.spec, _per_user(metric.rows, users)
    return _inference(spec, spec.statistic, sums, draws, seed)[0]


def paired(
    values_a: Values, values_b: Values, users: Sequence[str], draws: int = 10_000, seed: int = 0
) -> Paired:
    """The difference a − b of two methods that answered the same samples, in the same order."""
    a, b = _as_metric(values_a), _as_metric(values_b)
    both, width = np.concatenate([a.rows, b.rows], axis=1), a.rows.shape[1]

    def difference(sums: Floats) -> Floats:
        return a.spec.statistic(sums[:, :width]) - a.spec.statistic(sums[:, width:])

    sums = _per_user(both, users)
    value = float(difference(sums.sum(axis=0, keepdims=True))[0]) if len(sums) else math.nan
    (low, high), p = _inference(a.spec, difference, sums, draws, seed)
    return Paired(value, low, high, p, samples=int(_known(both).sum()), users=len(sums))


def relative(pairs: Sequence[tuple[Metric, Metric, Sequence[str]]]) -> Relative | None:
    """Mean over metrics of (a − b) / |b|, with the sign such that more is better, for (a, b, users
    of the samples) of each metric; None if every b is 0, or nothing was scored.

    The error is the jackknife's: a user is left out of all metrics at once.
    """
    cases = [(a, b, np.hstack([a.rows, b.rows]), users) for a, b, users in pairs]
    scored = sorted({u for *_, rows, users in cases for u in compress(users, _known(rows))})
    changes = []
    for a, b, rows, users in cases:
        sums, width = _per_user(rows, users, scored), a.rows.shape[1]
        total = sums.sum(axis=0, keepdims=True)
        every = np.concatenate([total, total - sums])  # [1 + U]: all users, then without each one
        ours, theirs = a.spec.statistic(every[:, :width]), b.spec.statistic(every[:, width:])
        nan, gain = np.full(len(every), np.nan), a.spec.sign * (ours - theirs)
        change = np.divide(gain, abs(theirs), out=nan, where=theirs != 0)
        if not math.isnan(change[0]):
            changes.append(change)
    if not changes:
        return None
    means, count = np.array(changes), len(scored)
    without = means[:, 1:].mean(axis=0)
    shares = math.sqrt((count - 1) / count) * (without - without.mean())
    parts = dict(zip(scored, shares.tolist(), strict=True))
    return Relative(float(means[:, 0].mean()), _jackknife_error(without), count - 1, parts)


def over_tasks(tasks: Sequence[Relative]) -> Relative:
    """The mean over tasks. The parts of a user in several tasks are added before they are squared.

    Degrees of freedom by Welch and Satterthwaite, as for independent tasks, and at most the number
    of users minus 1.
    """
    parts: dict[str, float] = {}
    for task in tasks:
        for user, part in task.parts.items():
            parts[user] = parts.get(user, 0.0) + part / len(tasks)
    squares = [(task.error**2, task.freedom) for task in tasks if task.freedom > 0]
    known = len(squares) == len(tasks)
    error = math.sqrt(sum(part**2 for part in parts.values())) if known else math.nan
    below = sum(square**2 / freedom for square, freedom in squares)
    welch = sum(square for square, _ in squares) ** 2 / below if below > 0 else math.inf
    change = float(np.mean([task.change for task in tasks]))
    return Relative(change, error, min(welch, len(parts) - 1), parts)


def _as_metric(values: Values) -> Metric:
    if isinstance(values, Metric):
        return values
    column = np.asarray(values, dtype=np.float64)
    rows = np.column_stack([column, np.where(np.isnan(column), np.nan, 1.0)])
    return Metric(MetricSpec("mean"), math.nan, rows)


def _known(rows: Floats) -> np.ndarray:
    """[N] whether no call for the sample failed."""
    return np.asarray(~np.isnan(rows).any(axis=1))


def _per_user(rows: Floats, users: Sequence[str], names: Sequence[str] | None = None) -> Floats:
    """[N, S] → [U, S]: sums over the samples of each of `names`, or of each user that has one."""
    if len(rows) != len(users):
        raise ValueError(f"{len(rows)} samples, but {len(users)} users named for them")
    kept = _known(rows)
    owners = np.asarray(users, dtype=str)[kept]
    unique = np.unique(owners) if names is None else np.asarray(names, dtype=str)
    sums = np.zeros((len(unique), rows.shape[1]))
    np.add.at(sums, np.searchsorted(unique, owners), rows[kept])
    return sums


def _inference(
    spec: MetricSpec, statistic: Statistic, sums: Floats, draws: int, seed: int
) -> tuple[Interval, float]:
    """Interval and two-sided p-value of a statistic of the sums [U, S]: by the bootstrap, or the
    jackknife for a metric that cannot be resampled.
    """
    users = len(sums)
    if users < MIN_USERS:
        return NO_INTERVAL, math.nan
    if not spec.resamples:
        total = sums.sum(axis=0, keepdims=True)
        value, error = float(statistic(total)[0]), _jackknife_error(statistic(total - sums))
        p = 2 * float(stdtr(users - 1, -abs(value) / error)) if error > 0 else float(value == 0)
        return _students(value, error, users - 1), p
    rng, even, step = np.random.default_rng(seed), np.full(users, 1 / users), max(1, CELLS // users)
    sizes = [min(step, draws - start) for start in range(0, draws, step)]
    drawn = np.concatenate([statistic(rng.multinomial(users, even, size) @ sums) for size in sizes])
    # the expanded level; p is the level at which the interval would touch 0
    tail = float(ndtr(math.sqrt(users / (users - 1)) * stdtrit(users - 1, (1 - LEVEL) / 2)))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    at_zero = float(ndtri(min(0.5, (beyond + 1) / (len(drawn) + 1))))
    p = 2 * float(stdtr(users - 1, at_zero * math.sqrt((users - 1) / users)))
    return Interval(float(low), float(high)), p


def _students(value: float, error: float, freedom: float) -> Interval:
    reach = float(stdtrit(freedom, (1 + LEVEL) / 2)) * error
    return Interval(value - reach, value + reach)


def _jackknife_error(without: Floats) -> float:
    """Standard error of a statistic, from its values [U] without each user; NaN for one user."""
    users = len(without)
    if users < 2:
        return math.nan
    return math.sqrt((users - 1) / users * float(((without - without.mean()) ** 2).sum()))
