"""Coverage of the intervals on simulated users, by `benchmarks/interval_coverage.py`."""

from typing import Any

import numpy as np
import pytest

from hydra_llm.bench.stats import interval, paired

coverage: Any = pytest.importorskip(
    "interval_coverage", reason="the source package carries no benchmarks"
)


def test_macro_f1_interval_covers_the_truth_with_missing_labels() -> None:
    """The percentile interval holds it in half of such benchmarks: draws of users lack whole
    labels, and lie too low.
    """
    truth = coverage.scored(
        coverage.TASKS[0], coverage.simulate(coverage.TASKS[0], 1000, 5, np.random.default_rng(99))
    )
    first, second = (result["macro_f1"].value for result in truth)
    dice, held, apart = np.random.default_rng(1), [], []
    for _ in range(60):
        answers = coverage.simulate(coverage.TASKS[0], 13, 5, dice)
        one, two = (result["macro_f1"] for result in coverage.scored(coverage.TASKS[0], answers))
        low, high = interval(one, answers.users)
        held.append(low <= first <= high)
        result = paired(two, one, answers.users)
        apart.append(result.low <= second - first <= result.high)
    assert np.mean(held) > 0.7
    assert np.mean(apart) > 0.87
