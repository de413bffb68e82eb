"""Whether a user's taste has changed: the loss of the user's head rises (ADWIN, of river).

Knows numbers alone. ADWIN (Bifet and Gavaldà 2007) keeps a window of the latest losses and drops
its older part where the means of the two parts differ by more than chance explains.
"""

from collections.abc import Sequence

from hydra_llm.extras import one_line_imports

DELTA = 0.05  # ADWIN's: the chance of a false alarm; chosen on training users (docs)
MOST = 3.0  # nats at which a loss is cut: one surprise is no change


def change_of(losses: Sequence[float], delta: float = DELTA) -> int | None:
    """How many of the losses, oldest first, came before the latest change for the worse; None
    without one. A loss is that of an answer by the head before it learned from the answer.

    Raises MissingExtra: river is not installed.
    """
    if not losses:
        return None
    with one_line_imports("detecting a change of taste"):
        from river.drift import ADWIN

    detector, changed = ADWIN(delta=delta, clock=1, grace_period=5, min_window_length=3), None
    for count, loss in enumerate(losses, 1):
        before = detector.estimation
        detector.update(min(loss, MOST) / MOST)
        if detector.drift_detected and detector.estimation > before:
            changed = count - int(detector.width)
    return changed
