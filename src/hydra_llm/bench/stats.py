"""Confidence intervals and p-values over users, for one method and for a paired difference.

Bootstrap over users, not samples: one user's samples are correlated, and claims are about new
users. Failed samples (NaN) are left out; in a comparison, for both methods. For few users the
percentile interval is too narrow: its level is widened as Student's t is against the normal (the
expanded percentile interval; Hesterberg 2015, "What teachers should know about the bootstrap").

Macro-F1 has Student's interval with the jackknife's standard error (Efron and Stein 1981), as a
resample lacks a third of the users, and with them whole labels; neither percentiles nor BCa correct
that bias. `benchmarks/interval_coverage.py` measures it. Knows neither tasks nor LLMs.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from hydra_llm.bench.metrics import Metric
from hydra_llm.tasks.base import Floats, Statistic, mean

CELLS = 4_000_000
"""Draws times users in memory at once."""

Values = Sequence[float] | Floats | Metric
"""One number per sample (NaN if its call failed), of which the mean is taken; or a metric."""


class Interval(NamedTuple):
    """A confidence interval; NaN for fewer than two users."""

    low: float
    high: float


class Paired(NamedTuple):
    """How a differs from b on the samples that both have."""

    difference: float
    """a − b."""
    low: float
    high: float
    p: float
    """Two-sided; below 1 − level if the interval excludes 0."""
    samples: int
    """Samples that both have."""
    users: int
    """Users who have them."""


class Relative(NamedTuple):
    """Mean relative improvement over others (HYDRA 4.2); negative if a method is worse."""

    change: float
    error: float
    """Standard error over users; NaN for fewer than two."""
    freedom: float
    """Degrees of freedom of the error."""
    parts: Mapping[str, float]
    """User → the user's part of the error, which is the root of their sum of squares."""

    def interval(self, level: float = 0.95) -> Interval:
        """Student's interval."""
        quantile = float(stdtrit(self.freedom, (1 + level) / 2)) if self.freedom > 0 else math.nan
        return Interval(self.change - quantile * self.error, self.change + quantile * self.error)


def interval(
    values: Values, users: Sequence[str], draws: int = 10_000, seed: int = 0, level: float = 0.95
) -> Interval:
    """The interval of a mean or a metric; `users` names the user of each sample."""
    rows, statistic = _rows(values)
    sums = _per_user(rows, users)
    if not _resamples(values):
        return _jackknife(statistic, sums, level)[0]
    return _bootstrap(statistic, _resample(sums, draws, seed), len(sums), level)[0]


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
    if _resamples(values_a):
        resampled = _resample(sums, draws, seed)
        (low, high), p = _bootstrap(difference, resampled, len(sums), level)
    else:
        (low, high), p = _jackknife(difference, sums, level)
    return Paired(found, low, high, p, int((~np.isnan(both).any(axis=1)).sum()), len(sums))


def relative(pairs: Sequence[tuple[Metric, Metric, Sequence[str]]]) -> Relative | None:
    """Mean over metrics of (a − b) / |b|, with the sign such that more is better; each metric comes
    with its own b and the users of its samples.

    The error is the jackknife's: a user is left out of all metrics at once. None if every b is 0,
    or nothing was scored.
    """
    everybody = sorted({user for each in pairs for user in _with_rows(*each)})
    changes = [_change(a, b, users, everybody) for a, b, users in pairs]
    known = np.array([row for row in changes if not math.isnan(row[0])])
    if not len(known):
        return None
    without, users = known[:, 1:].mean(axis=0), len(everybody)
    shares = math.sqrt((users - 1) / users) * (without - without.mean())
    parts = dict(zip(everybody, shares.tolist(), strict=True))
    return Relative(float(known[:, 0].mean()), _jackknife_error(without), users - 1, parts)


def over_tasks(found: Sequence[Relative]) -> Relative:
    """The mean over tasks. The parts of a user in several tasks are added before they are squared.

    Degrees of freedom by Welch and Satterthwaite, as for independent tasks, and at most the number
    of users minus 1.
    """
    parts: dict[str, float] = {}
    for each in found:
        for user, part in each.parts.items():
            parts[user] = parts.get(user, 0.0) + part / len(found)
    sure = all(each.freedom > 0 for each in found)
    error = math.sqrt(sum(part**2 for part in parts.values())) if sure else math.nan
    squares = [(each.error**2, each.freedom) for each in found if each.freedom > 0]
    below = sum(square**2 / freedom for square, freedom in squares)
    welch = sum(square for square, _ in squares) ** 2 / below if below > 0 else math.inf
    change = float(np.mean([each.change for each in found]))
    return Relative(change, error, min(welch, len(parts) - 1), parts)


def _with_rows(a: Metric, b: Metric, users: Sequence[str]) -> set[str]:
    """The users with a sample that neither method failed."""
    kept = ~np.isnan(np.concatenate([a.rows, b.rows], axis=1)).any(axis=1)
    return {user for user, has in zip(users, kept, strict=True) if has}


def _change(a: Metric, b: Metric, users: Sequence[str], everybody: Sequence[str]) -> Floats:
    """[1 + U]: the relative change of all users, then without each one; NaN where b is 0."""
    rows, width = np.concatenate([a.rows, b.rows], axis=1), a.rows.shape[1]
    kept = ~np.isnan(rows).any(axis=1)
    sums = np.zeros((len(everybody), rows.shape[1]))
    np.add.at(sums, np.searchsorted(everybody, np.asarray(users, dtype=str)[kept]), rows[kept])
    total = sums.sum(axis=0, keepdims=True)
    every = np.concatenate([total, total - sums])
    ours, theirs = a.spec.statistic(every[:, :width]), b.spec.statistic(every[:, width:])
    nan, gain = np.full(len(every), np.nan), a.spec.sign * (ours - theirs)
    changes: Floats = np.divide(gain, abs(theirs), out=nan, where=theirs != 0)
    return changes


def _rows(values: Values) -> tuple[Floats, Statistic]:
    if isinstance(values, Metric):
        return values.rows, values.spec.statistic
    column = np.asarray(values, dtype=np.float64)
    return np.column_stack([column, np.where(np.isnan(column), np.nan, 1.0)]), mean


def _resamples(values: Values) -> bool:
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
    users, rng = len(sums), np.random.default_rng(seed)
    step = max(1, CELLS // max(1, users))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        yield rng.multinomial(users, np.full(users, 1 / users), size=size) @ sums


def _bootstrap(
    statistic: Statistic, resampled: Iterator[Floats], users: int, level: float
) -> tuple[Interval, float]:
    """Expanded percentile interval and p-value, the level at which the interval would touch 0."""
    if users < 2:
        return Interval(math.nan, math.nan), math.nan
    drawn = np.concatenate([statistic(part) for part in resampled])
    tail = float(ndtr(math.sqrt(users / (users - 1)) * stdtrit(users - 1, (1 - level) / 2)))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    at_zero = float(ndtri(min(0.5, (beyond + 1) / (len(drawn) + 1))))
    p = 2 * float(stdtr(users - 1, at_zero * math.sqrt((users - 1) / users)))
    return Interval(float(low), float(high)), p


def _jackknife(statistic: Statistic, sums: Floats, level: float) -> tuple[Interval, float]:
    """Student's interval and p-value of a statistic of sums [U, S], by leaving each user out."""
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
    if users < 2:
        return math.nan
    return math.sqrt((users - 1) / users * float(((without - without.mean()) ** 2).sum()))
