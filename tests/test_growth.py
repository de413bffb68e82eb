"""The fit of growth laws in `benchmarks/power_law.py` recovers known laws from noisy repeats."""

from typing import Any

import numpy as np
import pytest

from tests.marks import slow_except

law: Any = pytest.importorskip("power_law", reason="the source package carries no benchmarks")

SIZES = (10, 20, 40, 80, 160)


def repeats(
    constant: float, factor: float, exponent: float, noise: float, seed: int = 0, runs: int = 7
) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return [
        [
            (constant + factor * x**exponent) * float(np.exp(noise * rng.standard_normal()))
            for _ in range(runs)
        ]
        for x in SIZES
    ]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5, 2.0])
def test_exact_law_gives_its_three_numbers_back(exponent: float) -> None:
    fit = law.growth(SIZES, repeats(0.3, 0.02, exponent, noise=0.0))
    assert fit.exponent == fit.low == fit.high == pytest.approx(exponent)
    assert fit.constant == pytest.approx(0.3, rel=1e-6)
    assert fit.factor == pytest.approx(0.02, rel=1e-6)
    assert fit.at(40) == pytest.approx(0.3 + 0.02 * 40**exponent)


@pytest.mark.parametrize("seed", slow_except(range(5), 0))
@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_noisy_power_gives_its_exponent_within_its_interval(exponent: float, seed: int) -> None:
    fit = law.growth(SIZES, repeats(0.0, 0.01, exponent, 0.03, seed))
    assert fit.exponent == pytest.approx(exponent, abs=0.2)
    assert fit.low - 0.05 <= exponent <= fit.high + 0.05
    assert fit.low <= fit.exponent <= fit.high


def test_fixed_cost_does_not_hide_a_linear_law() -> None:
    fit = law.growth(SIZES, repeats(1.0, 0.02, 1.0, 0.01))
    assert fit.exponent == pytest.approx(1.0, abs=0.15)
    assert fit.constant == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_constant_with_noise_gives_0(seed: int) -> None:
    fit = law.growth(SIZES, repeats(0.5, 0.0, 1.0, 0.05, seed))
    assert (fit.exponent, fit.factor) == (0.0, 0.0)
    assert fit.constant == pytest.approx(0.5, rel=0.05)


def test_falling_values_are_no_growth() -> None:
    assert law.growth(SIZES, [[1.0 / x] for x in SIZES]).exponent == 0.0


def test_threshold_of_constant_is_a_fifth() -> None:
    assert law.growth(SIZES, [[1.0 + 0.19 * (x - 10) / 150] for x in SIZES]).exponent == 0.0
    assert law.growth(
        SIZES, [[1.0 + 0.25 * (x - 10) / 150] for x in SIZES]
    ).exponent == pytest.approx(1.0, abs=0.05)


def test_unit_does_not_matter() -> None:
    values = repeats(0.1, 0.01, 1.0, 0.05)
    seconds, small = (
        law.growth(SIZES, values),
        law.growth(SIZES, [[1e-6 * value for value in row] for row in values]),
    )
    assert small.exponent == seconds.exponent
    assert (small.low, small.high) == (seconds.low, seconds.high)
    assert small.constant == pytest.approx(1e-6 * seconds.constant)


def test_wider_noise_gives_a_wider_interval() -> None:
    quiet, loud = (law.growth(SIZES, repeats(0.0, 0.01, 1.0, noise)) for noise in (0.01, 0.2))
    assert loud.high - loud.low > quiet.high - quiet.low


def test_zero_counts_are_constant() -> None:
    assert law.growth(SIZES, [[0.0, 0.0]] * 5).exponent == 0.0
