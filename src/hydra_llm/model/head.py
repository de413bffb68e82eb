"""One user's numbers as a value: the gateway keeps and checks heads where no torch is installed.

    score(user, pair) = g(φ; θ₀ + δ)     θ₀: the shared head, δ: these numbers (paper, 3.1)

Letter: P numbers of a head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Self

import numpy as np

from hydra_llm.history import span_of
from hydra_llm.types import Query, Record

if TYPE_CHECKING:
    from torch import Tensor

FEEDBACK_WINDOW = 64  # the latest judged groups that an online update counts: bounds its time


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """One user's numbers, and what they were learned from."""

    numbers: np.ndarray  # [P] float32; read-only where `Head.of` made it
    records: int = 0  # how many of the user's records, oldest first, it has learned from
    until: float = -math.inf  # latest time of these, in seconds since 1970; -inf where unknown

    @classmethod
    def of(cls, numbers: "Tensor | np.ndarray", records: int = 0, until: float = -math.inf) -> Self:
        """A head with a read-only copy of these numbers."""
        plain = numbers if isinstance(numbers, np.ndarray) else numbers.detach().numpy()
        own = np.array(plain, dtype=np.float32)
        own.flags.writeable = False
        return cls(own, records, until)


def latest_time(records: Sequence[Record]) -> float:
    """The latest time at which one of these records begins; -inf where none has a time."""
    return max((span_of(record)[0] for record in records), default=-math.inf)


def usable_head(head: Head | None, query: Query, visible: int) -> tuple[Head | None, str]:
    """The head if it has learned only from what a query that sees `visible` records may know: time
    must not leak. Else None and the reason; a user without a head needs none.
    """
    if head is None:
        return None, ""
    learned = "the shared head answers: the user's own has learned from"
    if head.records > visible:
        return None, f"{learned} {head.records} records, and this query sees {visible}"
    if head.until > span_of(query)[1]:
        try:
            until = datetime.fromtimestamp(head.until, UTC).strftime("%Y-%m-%d")
        except (OverflowError, OSError, ValueError):  # no calendar has it
            until = f"{head.until:g}"
        return None, f"{learned} records until {until}, which is after this query"
    return head, ""
