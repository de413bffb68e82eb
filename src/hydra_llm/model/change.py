"""Whether a user's taste has changed: the loss of the user's head rises (ADWIN, of river).

Knows numbers alone: at each answer, the log-loss of the head before it learned from it, less that
of the shared head, so that a hard question is no change. ADWIN (Bifet and Gavaldà 2007) keeps a
window of the latest and tells where the means of two parts differ by more than chance explains; the
place of the change is then that of the best split in two means.
"""

from collections.abc import Sequence
from itertools import accumulate

from hydra_llm.extras import one_line_imports

# ADWIN's confidence. Its bounds are wide: at 1 users who never change give hardly any alarms
# (chosen on training users: docs/changing-taste.md)
DELTA = 1.0
MOST = 3.0  # nats at which a difference is cut: one surprise is no change
SCALE = 10.0  # ADWIN's bound has a term for values in 0 to 1, which would hide every change here


def change_of(rises: Sequence[float], delta: float = DELTA) -> int | None:
    """How many of the differences, oldest first, came before the latest change for the worse; None
    without one. Raises MissingExtra: river is not installed.
    """
    if not rises:
        return None
    with one_line_imports("detecting a change of taste"):
        from river.drift import ADWIN

    def fresh() -> ADWIN:
        return ADWIN(delta=delta, clock=1, grace_period=5, min_window_length=3)

    detector, start, changed = fresh(), 0, None
    values = [max(-MOST, min(rise, MOST)) for rise in rises]
    for count, value in enumerate(values, 1):
        detector.update(SCALE * value)
        if not detector.drift_detected:
            continue
        place, rise = _split(values[start:count])
        start, detector = start + place, fresh()
        changed = start if rise > 0 else changed
        for own in values[start:count]:
            detector.update(SCALE * own)
    return changed


def _split(values: Sequence[float]) -> tuple[int, float]:
    """The place that parts the values in two with the least squares around their means, and by how
    much the mean rises there.
    """
    total, size = sum(values), len(values)
    best, found = -1.0, (size, 0.0)
    for place, before in enumerate(accumulate(values[:-1]), 1):
        rise = (total - before) / (size - place) - before / place
        if (between := place * (size - place) * rise * rise) > best:
            best, found = between, (place, rise)
    return found
