"""One user's part of a scorer, and which queries it may answer.

Knows no files and no LLM.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from hydra_llm.types import Query, Record


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """One user's numbers, and what they were learned from."""

    numbers: np.ndarray
    """[P] float32."""
    records: int = 0
    """How many of the user's records, oldest first, it has learned from."""
    until: float = -math.inf
    """Time of the latest of these records, in seconds since 1970; -inf where no time is known."""


def latest_time(records: Sequence[Record]) -> float:
    """The latest time at which one of these records begins; -inf where none has a time."""
    return max((record.span[0] for record in records), default=-math.inf)


def usable_head(head: Head | None, query: Query, visible: int) -> tuple[Head | None, str]:
    """The head if it may answer a query that sees `visible` records, else None and the reason.

    Time must not leak: a head that has learned from what the query may not see leaves the answer
    to the shared head. A user without a head needs no reason.
    """
    if head is None:
        return None, ""
    if head.records > visible:
        return None, (
            f"the shared head answers: the user's own has learned from {head.records} records, and"
            f" this query sees {visible}"
        )
    if head.until > query.span[1]:
        return None, (
            "the shared head answers: the user's own has learned from records until"
            f" {_date(head.until)}, which is after this query"
        )
    return head, ""


def _date(seconds: float) -> str:
    """A day, or the plain number where no calendar has it."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
    except (OverflowError, OSError, ValueError):
        return f"{seconds:g}"
