"""What was answered, by hour: counted here, and added to the store now and then, where all servers'
figures come together. Never a user, never a text.
"""

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from hydra_llm.errors import HydraError
from hydra_llm.store.store import Store

HOUR = 3600
ACTIVITY_DAYS = 90
"""How long figures are kept."""
BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Of the classes in which seconds are counted; longer ones are in a last class."""
FEEDBACK, WANTED, UNWANTED = "feedback", "wanted", "unwanted"


class Activity:
    """What happened since it was last kept. Kinds: `answer` by reason, `pick` (`first` where the
    adapter left the first candidate, else `other`), `upstream` and `own` by class of seconds,
    `feedback` (`wanted` where the user wanted the answer that they got, else `unwanted`).
    """

    def __init__(self, clock: Callable[[], float] = time.time):
        self._clock, self._lock = clock, threading.Lock()
        self._counts: Counter[tuple[int, str, str]] = Counter()

    def answered(
        self, reason: str, seconds: Mapping[str, float], abstained: bool | None = None
    ) -> None:
        """Count an answer. `abstained`: None where no adapter has chosen."""
        happened = [("answer", reason[:64])]
        if abstained is not None:
            happened.append(("pick", "first" if abstained else "other"))
        if "upstream" in seconds:
            happened.append(("upstream", _class(seconds["upstream"])))
        if own := [seconds[stage] for stage in ("prepare", "adapt") if stage in seconds]:
            happened.append(("own", _class(sum(own))))
        self._count(happened)

    def judged(self, wanted: bool) -> None:
        """Count feedback: whether the user wanted the answer that they got."""
        self._count([(FEEDBACK, WANTED if wanted else UNWANTED)])

    def _count(self, happened: Iterable[tuple[str, str]]) -> None:
        hour = int(self._clock()) // HOUR * HOUR
        with self._lock:
            self._counts.update((hour, kind, name) for kind, name in happened)

    def keep(self, store: Store) -> None:
        """Add what was counted to the store; what it does not take is kept for the next time."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        if not counts:
            return
        try:
            store.add_activity(counts)
        except HydraError:
            with self._lock:
                self._counts.update(counts)


def _class(seconds: float) -> str:
    place = bisect_left(BOUNDS, seconds)
    return f"{BOUNDS[place]:g}" if place < len(BOUNDS) else "inf"


def quantile(classes: Mapping[str, int], share: float) -> float | None:
    """An upper bound of a quantile of seconds that were counted in classes; None without any,
    infinity beyond the last bound.
    """
    left = share * sum(classes.values())
    if not left:
        return None
    for bound in sorted(map(float, classes)):
        left -= classes[f"{bound:g}"]
        if left <= 1e-9:
            return bound
    return float("inf")
