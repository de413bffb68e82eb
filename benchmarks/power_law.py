"""Fit time = a + b·x^p to measurements at several sizes, with an interval for p.

a, b and p minimize the squared relative errors, with a, b ≥ 0 and p from 0.1 to 3. The constant a
is needed because a fixed cost would hide how the rest grows. If the time rises by less than a fifth
from the smallest to the largest size, p cannot be estimated: the law is constant and p is 0. The
interval is a bootstrap over the repeats at each size; it covers timing noise, not whether the law
has this form. Letters: D draws, P exponents, S sizes, R repeats.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

EXPONENTS = np.round(np.arange(0.1, 3.0001, 0.01), 2)
FLAT = 1.2
"""The law is constant up to this ratio of largest to smallest time (as in scoring_users.py)."""
DRAWS = 1000


@dataclass(frozen=True)
class Growth:
    """The fitted law of one series."""

    exponent: float
    low: float
    """95 % interval of the exponent."""
    high: float
    constant: float
    """a, in the unit of the values."""
    factor: float
    """b."""

    def at(self, size: float) -> float:
        return self.constant + self.factor * size**self.exponent


def growth(sizes: Sequence[float], repeats: Sequence[Sequence[float]], seed: int = 0) -> Growth:
    """The law through the medians of the repeats [S][R] at each size."""
    medians = np.array([[np.median(values) for values in repeats]])
    p, a, b = (float(part[0]) for part in power_law(np.asarray(sizes, float), medians))
    drawn = power_law(np.asarray(sizes, float), _drawn(repeats, seed))[0]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Growth(p, min(p, float(low)), max(p, float(high)), a, b)


def _drawn(repeats: Sequence[Sequence[float]], seed: int) -> Floats:
    """[D, S]: medians of repeats drawn with replacement."""
    rng = np.random.default_rng(seed)
    return np.stack(
        [
            np.median(rng.choice(np.asarray(values, float), (DRAWS, len(values))), axis=1)
            for values in repeats
        ],
        axis=1,
    )


def power_law(sizes: Floats, values: Floats) -> tuple[Floats, Floats, Floats]:
    """Exponent, constant and factor [D] of each row of values [D, S]."""
    weight = 1 / np.where(values > 0, values, 1.0)[:, None]  # [D, 1, S]
    power = (sizes / sizes.max())[None] ** EXPONENTS[:, None]  # [P, S], at most 1
    a, b = _line(weight, power[None] * weight, values[:, None] * weight)
    errors = (
        (a[..., None] * weight + b[..., None] * power[None] * weight - values[:, None] * weight)
        ** 2
    ).sum(-1)
    rows, best = np.arange(len(values)), errors.argmin(1)
    a, b, p = a[rows, best], b[rows, best], EXPONENTS[best]
    rise = (a + b) / np.maximum(a + b * (sizes.min() / sizes.max()) ** p, np.finfo(float).tiny)
    flat = rise < FLAT
    return (
        np.where(flat, 0.0, p),
        np.where(flat, np.median(values, axis=1), a),
        np.where(flat, 0.0, b / sizes.max() ** p),
    )


def _line(one: Floats, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """a, b ≥ 0 [D, P] that minimize the squared distance of a·one + b·x to y."""
    oo, ox, xx, oy, xy = (
        (u * v).sum(-1) for u, v in ((one, one), (one, x), (x, x), (one, y), (x, y))
    )
    determinant = np.maximum(oo * xx - ox * ox, np.finfo(float).tiny)
    a, b = (xx * oy - ox * xy) / determinant, (oo * xy - ox * oy) / determinant
    a, b = np.where(b < 0, oy / oo, a), np.where(a < 0, xy / xx, b)
    return np.maximum(a, 0.0), np.maximum(b, 0.0)
