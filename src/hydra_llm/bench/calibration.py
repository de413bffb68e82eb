"""Calibration of the methods that give a probability, on the evaluated queries: what is held out of
everything that was learned.

Expected calibration error with bins of equally many answers (Nguyen and O'Connor 2015; Nixon et al.
2019, "Measuring calibration in deep learning"): bins of equal width are nearly empty where a method
is always sure.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hydra_llm.bench.runlog import Sample

BINS, LEAST = 10, 10  # bins, and answers in each; fewer bins for few answers


@dataclass(frozen=True)
class Calibration:
    """Mean probability of a method's picks, share of right ones, and the calibration error."""

    answers: int
    probability: float
    accuracy: float
    error: float
    bins: tuple[tuple[int, float, float], ...]  # answers, mean probability, share of right ones

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def calibration(probabilities: Sequence[float], right: Sequence[bool]) -> Calibration | None:
    """Calibration of picks, None if there are none."""
    if not len(probabilities):
        return None
    sure, correct = np.asarray(probabilities, dtype=float), np.asarray(right, dtype=float)
    count = max(1, min(BINS, len(sure) // LEAST))
    edges = np.unique(np.quantile(sure, np.arange(1, count) / count, method="higher"))
    places = np.searchsorted(edges, sure, side="right")  # equal probabilities share a bin
    parts = [places == place for place in np.unique(places)]
    bins = tuple((int(at.sum()), float(sure[at].mean()), float(correct[at].mean())) for at in parts)
    error = sum(size * abs(mean - share) for size, mean, share in bins) / len(sure)
    return Calibration(len(sure), float(sure.mean()), float(correct.mean()), error, bins)


def of_labels(samples: Sequence[Sample]) -> Calibration | None:
    """Of a method's answers to a task with labels: a pick is right if it is the user's answer."""
    known = [(s.probability, s.answer == s.gold) for s in samples if not s.error]
    picks = [(p, right) for p, right in known if p is not None]
    return calibration([p for p, _ in picks], [right for _, right in picks])
