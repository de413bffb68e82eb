"""Drift. Of all users: whether they want the answers that they get less often than before, by
counts of feedback by the hour (activity.py). Of one user: whether the taste has changed, by the
losses of the user's head at the latest feedback (model/change.py). Knows no text.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hydra_llm.extras import require
from hydra_llm.gateway.activity import FEEDBACK, HOUR, WANTED
from hydra_llm.model.change import change_of
from hydra_llm.model.head import Head
from hydra_llm.store.store import Store
from hydra_llm.store.values import Happened, StoredFeedback

RECENT, BEFORE = 7 * 24 * HOUR, 28 * 24 * HOUR  # seconds of the two times that are compared
Z = 1.959964  # of a two-sided 95 % interval
CHANGED = "changed"
"""Name of what is kept beside a user's heads after a change: no numbers, and as `records` how many
of the user's records came before it.
"""
Interval = tuple[float, float, float]
"""A value and the two ends of its 95 % interval."""


@dataclass(frozen=True)
class Judged:
    """Feedback of some days: how much there was, and at how much of it the answer was wanted."""

    days: int
    count: int
    wanted: int

    @property
    def share(self) -> float | None:
        """None without feedback."""
        return self.wanted / self.count if self.count else None


@dataclass(frozen=True)
class Drift:
    """The last days beside those before them."""

    recent: Judged
    before: Judged

    @property
    def difference(self) -> Interval | None:
        """Of the shares, recent minus before; None without feedback in one of the two."""
        return difference(self.recent, self.before)

    @property
    def found(self) -> bool:
        """Answers are wanted less often than before: the interval is below 0."""
        return self.difference is not None and self.difference[2] < 0

    def as_json(self) -> dict[str, Any]:
        """As replies show it."""
        told = None if self.difference is None else [round(end, 4) for end in self.difference]
        sides = {"recent": self.recent, "before": self.before}
        shown = {
            name: {"days": own.days, "feedback": own.count, "wanted": own.wanted}
            for name, own in sides.items()
        }
        return {**shown, "difference": told, "drift": self.found}


def drift(happened: Iterable[Happened], now: float) -> Drift:
    """From what happened by hour, of at least RECENT + BEFORE seconds."""
    counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for own in happened:
        age = now - own.hour
        if own.kind == FEEDBACK and age < RECENT + BEFORE:
            counts[age >= RECENT][own.name] += own.count
    sides = zip((RECENT, BEFORE), counts, strict=True)
    return Drift(*(Judged(own // (24 * HOUR), c.total(), c[WANTED]) for own, c in sides))


def drift_of(store: Store, now: float) -> Drift:
    """From a store's feedback."""
    return drift(store.activity(int(now) - RECENT - BEFORE, HOUR, kind=FEEDBACK), now)


def difference(one: Judged, other: Judged) -> Interval | None:
    """Of two independent shares with its 95 % interval, from Wilson's intervals of each (Newcombe
    1998, method 10).
    """
    if not (one.count and other.count):
        return None
    (p, low, high), (q, least, most) = wilson(one), wilson(other)
    below, above = math.hypot(p - low, most - q), math.hypot(high - p, q - least)
    return p - q, p - q - below, p - q + above


def wilson(judged: Judged) -> Interval:
    """A share with Wilson's 95 % interval."""
    n, p = judged.count, judged.wanted / judged.count
    middle, wide = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    return p, (middle - wide) / scale, (middle + wide) / scale


def first_after_change(judged: Sequence[StoredFeedback]) -> StoredFeedback | None:
    """The first feedback, of a user's latest in order, after the user's taste has changed; None
    where it has not. Feedback of which no loss is known tells nothing.
    """
    known = [own for own in judged if own.content.get("rise") is not None]
    count = change_of([own.content["rise"] for own in known])
    return None if count is None else known[count]


def mark_of(first: StoredFeedback | None) -> dict[str, Head]:
    """What is kept beside the heads of a user whose first feedback after a change this is."""
    if first is None:
        return {}
    return {CHANGED: Head.of(np.zeros(0), first.content.get("visible", 0))}


def check_detector(*, wanted: bool) -> None:
    """Raise MissingExtra where changes are to be found and cannot be; imports now what the first
    feedback needs.
    """
    if wanted:
        require("drift", "the setting detect_changes")
        change_of([0.0])
