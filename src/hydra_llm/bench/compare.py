"""How sure a figure is: bootstrap over users, for one method and for the difference of two on the same samples.

Users are drawn, not samples: one user's samples are alike, and a claim is about new users. Failed samples (NaN) are left
out; in a comparison, the sample is left out for both. With few users the percentile interval is too narrow, so its level
is widened as Student's t is against the normal (Hesterberg 2015, "What teachers should know about the bootstrap", the
expanded percentile interval). Knows neither tasks nor LLMs.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from hydra_llm.bench.metrics import Floats, Metric, Statistic, mean

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
    """Two-sided: how often a difference this clear comes about when there is none; below 1 − level where the interval excludes 0."""
    samples: int
    """Samples that both have."""


def interval(values: Values, users: Sequence[str], draws: int = 10_000, seed: int = 0, level: float = 0.95) -> Interval:
    """The interval of a mean or a metric; `users` names the user of each sample."""
    rows, statistic = _rows(values)
    sums = _per_user(rows, users)
    return _quantiles(np.concatenate([statistic(part) for part in _resample(sums, draws, seed)]), len(sums), level)


def paired(values_a: Values, values_b: Values, users: Sequence[str], draws: int = 10_000, seed: int = 0, level: float = 0.95) -> Paired:
    """The difference a − b of two methods that answered the same samples, in the same order."""
    (a, statistic), (b, _) = _rows(values_a), _rows(values_b)
    both = np.concatenate([a, b], axis=1)

    def difference(sums: Floats) -> Floats:
        return statistic(sums[:, : a.shape[1]]) - statistic(sums[:, a.shape[1] :])

    sums = _per_user(both, users)
    drawn = np.concatenate([difference(part) for part in _resample(sums, draws, seed)])
    found = float(difference(sums.sum(axis=0, keepdims=True))[0]) if len(sums) else math.nan
    low, high = _quantiles(drawn, len(sums), level)
    return Paired(found, low, high, _p_value(drawn, len(sums)), int((~np.isnan(both).any(axis=1)).sum()))


def _rows(values: Values) -> tuple[Floats, Statistic]:
    if isinstance(values, Metric):
        return values.rows, values.statistic
    column = np.asarray(values, dtype=np.float64)
    return np.column_stack([column, np.where(np.isnan(column), np.nan, 1.0)]), mean


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
        yield dice.multinomial(users, np.full(users, 1 / users), size=min(step, draws - start)) @ sums


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
