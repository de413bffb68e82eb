"""How sure a figure is: bootstrap over users, for one method and for the difference of two on the
same samples.

Users are drawn, not samples: one user's samples are alike, and a claim is about new users. Failed
samples (NaN) are left out; in a comparison, the sample is left out for both. With few users the
percentile interval is too narrow, so its level is widened as Student's t is against the normal
(Hesterberg 2015, "What teachers should know about the bootstrap", the expanded percentile
interval).

Macro-F1 takes Student's interval with the jackknife's standard error instead (Efron and Stein 1981;
one user is left out at a time): a third of the users are missing from a draw, and with them whole
labels, so that draws lie below what they are drawn from, and neither percentiles nor their
corrections (BCa) mend it. `benchmarks/interval_coverage.py` measures that. Knows neither tasks nor
LLMs.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from hydra_llm.bench.metrics import Metric
from hydra_llm.tasks.base import Floats, Statistic, mean

CELLS = 4_000_000
"""Draws times users held in memory at once."""

Values = Sequence[float] | Floats | Metric
"""One number for each sample, NaN where its call failed, whose mean is meant; or a metric."""


class Interval(NamedTuple):
    """A confidence interval; NaN where fewer than two users have samples."""

    low: float
    high: float


class Paired(NamedTuple):
    """How a differs from b on the samples that both have."""

    difference: float
    """a − b."""
    low: float
    high: float
    p: float
    """Two-sided: how often a difference this clear comes about when there is none; below 1 − level
    where the interval excludes 0.
    """
    samples: int
    """Samples that both have."""
    users: int
    """Users who have them."""


class Relative(NamedTuple):
    """By what share a method is better than others, metric by metric and task by task (HYDRA 4.2);
    negative where it is worse.
    """

    change: float
    error: float
    """Standard error over users; NaN where there are fewer than two."""
    freedom: float
    """Degrees of freedom of the error."""
    parts: Mapping[str, float]
    """User → the share of the error that stands on this user: the root of the sum of their squares
    is the error.
    """

    def interval(self, level: float = 0.95) -> Interval:
        """Student's."""
        reach = (
            float(stdtrit(self.freedom, (1 + level) / 2)) * self.error
            if self.freedom > 0
            else math.nan
        )
        return Interval(self.change - reach, self.change + reach)


def interval(
    values: Values, users: Sequence[str], draws: int = 10_000, seed: int = 0, level: float = 0.95
) -> Interval:
    """The interval of a mean or a metric; `users` names the user of each sample."""
    rows, statistic = _rows(values)
    sums = _per_user(rows, users)
    if not _drawable(values):
        return _jackknifed(statistic, sums, level)[0]
    return _quantiles(
        np.concatenate([statistic(part) for part in _resample(sums, draws, seed)]), len(sums), level
    )


def paired(
    values_a: Values,
    values_b: Values,
    users: Sequence[str],
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Paired:
    """The difference a − b of two methods that answered the same samples, in the same order."""
    (a, statistic), (b, _) = _rows(values_a), _rows(values_b)
    both = np.concatenate([a, b], axis=1)

    def difference(sums: Floats) -> Floats:
        return statistic(sums[:, : a.shape[1]]) - statistic(sums[:, a.shape[1] :])

    sums = _per_user(both, users)
    found = float(difference(sums.sum(axis=0, keepdims=True))[0]) if len(sums) else math.nan
    if _drawable(values_a):
        drawn = np.concatenate([difference(part) for part in _resample(sums, draws, seed)])
        (low, high), p = _quantiles(drawn, len(sums), level), _p_value(drawn, len(sums))
    else:
        (low, high), p = _jackknifed(difference, sums, level)
    return Paired(found, low, high, p, int((~np.isnan(both).any(axis=1)).sum()), len(sums))


def relative(pairs: Sequence[tuple[Metric, Metric, Sequence[str]]]) -> Relative | None:
    """Mean over metrics of (a − b) / |b|, turned so that more is better; each metric comes with its
    own b and the users of its samples.

    The error is the jackknife's: a user is left out of all metrics at once. None where every b is
    0, or nothing was scored.
    """
    everybody = sorted({user for each in pairs for user in _with_rows(*each)})
    changes = [_change(a, b, users, everybody) for a, b, users in pairs]
    known = np.array([row for row in changes if not math.isnan(row[0])])
    if not len(known):
        return None
    value, without, users = float(known[:, 0].mean()), known[:, 1:].mean(axis=0), len(everybody)
    parts = math.sqrt((users - 1) / users) * (without - without.mean())
    return Relative(
        value,
        _jackknife_error(without),
        users - 1,
        dict(zip(everybody, parts.tolist(), strict=True)),
    )


def over_tasks(found: Sequence[Relative]) -> Relative:
    """The mean over tasks. A user whom several tasks share is one and the same: what stands on him
    adds up before it is squared.

    Degrees of freedom as Welch and Satterthwaite have them for tasks of other users each, and never
    more than there are people.
    """
    parts: dict[str, float] = {}
    for each in found:
        for user, part in each.parts.items():
            parts[user] = parts.get(user, 0.0) + part / len(found)
    error = (
        math.sqrt(sum(part**2 for part in parts.values()))
        if all(each.freedom > 0 for each in found)
        else math.nan
    )
    squares = [(each.error**2, each.freedom) for each in found if each.freedom > 0]
    below = sum(square**2 / freedom for square, freedom in squares)
    welch = sum(square for square, _ in squares) ** 2 / below if below > 0 else math.inf
    return Relative(
        float(np.mean([each.change for each in found])), error, min(welch, len(parts) - 1), parts
    )


def _with_rows(a: Metric, b: Metric, users: Sequence[str]) -> set[str]:
    """The users who have a sample that neither method failed."""
    kept = ~np.isnan(np.concatenate([a.rows, b.rows], axis=1)).any(axis=1)
    return {user for user, has in zip(users, kept, strict=True) if has}


def _change(a: Metric, b: Metric, users: Sequence[str], everybody: Sequence[str]) -> Floats:
    """[1 + U]: the relative change with everybody, then without each; NaN where b is 0."""
    rows, width = np.concatenate([a.rows, b.rows], axis=1), a.rows.shape[1]
    kept = ~np.isnan(rows).any(axis=1)
    sums = np.zeros((len(everybody), rows.shape[1]))
    np.add.at(sums, np.searchsorted(everybody, np.asarray(users, dtype=str)[kept]), rows[kept])
    total = sums.sum(axis=0, keepdims=True)
    every = np.concatenate([total, total - sums])
    ours, theirs = (a.spec.statistic(every[:, :width]), b.spec.statistic(every[:, width:]))
    sign = a.spec.sign
    changes: Floats = np.divide(
        sign * (ours - theirs), abs(theirs), out=np.full(len(every), np.nan), where=theirs != 0
    )
    return changes


def _rows(values: Values) -> tuple[Floats, Statistic]:
    if isinstance(values, Metric):
        return values.rows, values.spec.statistic
    column = np.asarray(values, dtype=np.float64)
    return np.column_stack([column, np.where(np.isnan(column), np.nan, 1.0)]), mean


def _drawable(values: Values) -> bool:
    return not isinstance(values, Metric) or values.spec.resamples


def _per_user(rows: Floats, users: Sequence[str]) -> Floats:
    """[N, S] → [U, S]: sums over the samples of each user that has one."""
    if len(rows) != len(users):
        raise ValueError(f"{len(rows)} samples, but {len(users)} users named for them")
    kept = ~np.isnan(rows).any(axis=1)
    names, place = np.unique(np.asarray(users, dtype=str)[kept], return_inverse=True)
    sums = np.zeros((len(names), rows.shape[1]))
    np.add.at(sums, place, rows[kept])
    return sums


def _resample(sums: Floats, draws: int, seed: int) -> Iterator[Floats]:
    """[U, S] → parts of [draws, S]: sums over U users drawn with replacement."""
    users = len(sums)
    if users == 0:
        yield np.full((draws, sums.shape[1]), np.nan)
        return
    dice = np.random.default_rng(seed)
    step = max(1, CELLS // users)
    for start in range(0, draws, step):
        yield (
            dice.multinomial(users, np.full(users, 1 / users), size=min(step, draws - start)) @ sums
        )


def _quantiles(drawn: Floats, users: int, level: float) -> Interval:
    if users < 2:
        return Interval(math.nan, math.nan)
    tail = float(ndtr(math.sqrt(users / (users - 1)) * stdtrit(users - 1, (1 - level) / 2)))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _p_value(drawn: Floats, users: int) -> float:
    """The level at which the interval would just touch 0."""
    if users < 2:
        return math.nan
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    tail = min(0.5, (beyond + 1) / (len(drawn) + 1))
    return 2 * float(stdtr(users - 1, float(ndtri(tail)) * math.sqrt((users - 1) / users)))


def _jackknifed(statistic: Statistic, sums: Floats, level: float) -> tuple[Interval, float]:
    """Interval and p-value of a statistic of sums [U, S], by leaving each user out."""
    users = len(sums)
    if users < 2:
        return Interval(math.nan, math.nan), math.nan
    total = sums.sum(axis=0, keepdims=True)
    value, error = float(statistic(total)[0]), _jackknife_error(statistic(total - sums))
    reach = float(stdtrit(users - 1, (1 + level) / 2)) * error
    p = 2 * float(stdtr(users - 1, -abs(value) / error)) if error > 0 else float(value == 0)
    return Interval(value - reach, value + reach), p


def _jackknife_error(without: Floats) -> float:
    """Standard error of a statistic, from its values [U] without each user."""
    users = len(without)
    return (
        math.sqrt((users - 1) / users * float(((without - without.mean()) ** 2).sum()))
        if users > 1
        else math.nan
    )
