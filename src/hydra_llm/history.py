"""One user's records: read written times, order them, and show a query only what came before it.

Knows no files and no torch. Time never leaks: `before` is the only door through which records reach
a query, and a head answers no query that may see fewer records than the head was fitted on
(`Scorer.serving_row`).
"""

import math
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import lru_cache

from hydra_llm.types import ALWAYS, Query, Record, Span

_CALENDAR = re.compile(r"(\d{4})(?:[-/](\d{1,2})(?:[-/](\d{1,2}))?)?", re.ASCII)
_COMPACT = re.compile(r"((?:19|20|21)\d\d)(\d\d)(\d\d)", re.ASCII)
_WEEK = re.compile(r"\d{4}-?W\d\d", re.ASCII)
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?", re.ASCII)
_DAY = 86400.0


@lru_cache(maxsize=65536)
def parse_time(text: str) -> Span:
    """Read a written time as the interval in which it lies.

    Takes ISO 8601 (with or without time, zone, fraction), a year, a year and month, a day
    (`2020-01-31`, `2020/1/31`, `20200131`), and seconds or milliseconds since 1970. Times without a
    zone count as UTC. Empty means unknown (`ALWAYS`).

    Raises:
        ValueError: the text is none of these.
    """
    text = text.strip()
    if not text:
        return ALWAYS
    if found := _CALENDAR.fullmatch(text) or _COMPACT.fullmatch(text):
        return _parse_calendar(*(int(part) for part in found.groups() if part))
    if _NUMBER.fullmatch(text):
        return _parse_epoch(float(text))
    return _parse_iso(text)


def _parse_calendar(year: int, month: int | None = None, day: int | None = None) -> Span:
    start = datetime(year, 1 if month is None else month, 1 if day is None else day, tzinfo=UTC)
    if day is not None:
        return _stamp(start), _stamp(start) + _DAY
    whole_year = month is None or month == 12
    return _stamp(start), _stamp(
        start.replace(year=year + 1, month=1)
        if whole_year
        else start.replace(month=start.month + 1)
    )


def _parse_epoch(number: float) -> Span:
    seconds = (
        number / 1000 if abs(number) >= 1e11 else number
    )  # 1e11 s is the year 5138: larger numbers are milliseconds
    return seconds, seconds


def _parse_iso(text: str) -> Span:
    moment = datetime.fromisoformat(text.replace("/", "-"))
    start = _stamp(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    if _WEEK.fullmatch(text):
        return start, start + 7 * _DAY
    is_day = len(text) <= 10 and ":" not in text
    return (start, start + _DAY) if is_day else (start, start)


def _stamp(moment: datetime) -> float:
    return moment.timestamp()


def precedes(earlier: Record, later: Record | Query) -> bool:
    """Whether `earlier` certainly came before `later` in their user's order.

    Where the spans touch (equal times, the same day, a time that is only a year, an unknown time)
    the position decides.
    """
    if _overlap(earlier.span, later.span):
        return earlier.position < later.position
    return earlier.span[1] <= later.span[0]


def _overlap(a: Span, b: Span) -> bool:
    if a[0] == a[1] or b[0] == b[1]:  # a moment: inside a longer span, or equal to another moment
        low, high = (a, b) if a[0] == a[1] else (b, a)
        return low == high or (high[0] <= low[0] < high[1])
    return a[0] < b[1] and b[0] < a[1]


def before(records: Iterable[Record], query: Record | Query) -> list[Record]:
    """The records of its user that certainly precede `query`, oldest first."""
    return in_order(
        record for record in records if record.user == query.user and precedes(record, query)
    )


def in_order(records: Iterable[Record]) -> list[Record]:
    """Sort a user's records oldest first: by time, then by position; unknown times keep their
    position's place.
    """
    known = -math.inf
    keyed: list[tuple[float, int, Record]] = []
    for record in sorted(records, key=lambda r: r.position):
        known = max(known, record.span[0]) if record.span == ALWAYS else record.span[0]
        keyed.append((known, record.position, record))
    return [record for _, _, record in sorted(keyed, key=lambda item: item[:2])]


def as_query(record: Record) -> Query:
    """The user's own record as a query whose gold answer is known: it sees only what came before
    it.
    """
    return Query(
        record.user,
        record.id,
        record.input,
        record.output,
        record.time,
        record.span,
        record.position,
    )


def latest(records: Sequence[Record], count: int) -> list[Record]:
    """The last `count` records of a user in order, oldest first."""
    return in_order(records)[-count:] if count > 0 else []
