"""A user's records in time: parse times, order records, and show a query only what precedes it.

No information leaks from the future: only records that `before` returns reach a query, and a head
answers no query that may see fewer records than the head has learned from.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache

from hydra_llm.errors import UserFault
from hydra_llm.types import ALWAYS, Choice, Query, Record, Span

_CALENDAR = re.compile(r"(\d{4})(?:[-/](\d{1,2})(?:[-/](\d{1,2}))?)?", re.ASCII)
_COMPACT = re.compile(r"((?:19|20|21)\d\d)(\d\d)(\d\d)", re.ASCII)
_WEEK = re.compile(r"\d{4}-?W\d\d", re.ASCII)
_NUMBER = re.compile(r"([+-]?\d+)(?:\.(\d*))?", re.ASCII)
_DAY = 86400.0
_MAX_SECONDS = 1e11  # the year 5138; larger numbers are milli-, micro- or nanoseconds


def parse_time(time: str | float) -> Span:
    """Parse a time as the interval in which it lies; ValueError if it is none.

    Accepts ISO 8601 (with or without time, zone, fraction), a year, a year and month, a day
    (`2020-01-31`, `2020/1/31`, `20200131`), and seconds since 1970, or milli-, micro- or
    nanoseconds; numbers may be numbers or texts. Times without a zone count as UTC. Empty means
    unknown (`ALWAYS`). Other numbers of 6 to 8 digits are refused: `202401` may be a month.
    """
    return _parse_text(str(time))


@lru_cache(maxsize=65536)
def _parse_text(text: str) -> Span:
    text = text.strip()
    if not text:
        return ALWAYS
    try:
        number = _NUMBER.fullmatch(text)
        whole = number[1] if number and not (number[2] or "").strip("0") else text  # 2020.0: 2020
        if match := _CALENDAR.fullmatch(whole) or _COMPACT.fullmatch(whole):
            return _parse_calendar(*(int(part) for part in match.groups() if part))
        if number is None:
            return _parse_iso(text)
    except (ValueError, OverflowError):
        wanted = "write ISO 8601, a year, or seconds since 1970"
        raise ValueError(f"'{text[:60]}' is no time: {wanted}") from None
    return _parse_number(text, len(number[1].lstrip("+-")))


def _parse_number(text: str, digits: int) -> Span:
    if 6 <= digits <= 8:
        fix = "write 2024-01 or 2024-01-31"
        raise ValueError(f"'{text}' may be a date or seconds since 1970: {fix}")
    seconds = float(text)
    if not math.isfinite(seconds):
        raise ValueError(f"'{text[:60]}' is no time: it is too large a number")
    while abs(seconds) >= _MAX_SECONDS:
        seconds /= 1000
    return seconds, seconds


def _parse_calendar(year: int, month: int | None = None, day: int | None = None) -> Span:
    start = datetime(year, 1 if month is None else month, 1 if day is None else day, tzinfo=UTC)
    if day is not None:
        return start.timestamp(), start.timestamp() + _DAY
    years, months = divmod(12 if month is None else month, 12)
    end = start.replace(year=year + years, month=months + 1)
    return start.timestamp(), end.timestamp()


def _parse_iso(text: str) -> Span:
    moment = datetime.fromisoformat(text.replace("/", "-"))
    start = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if _WEEK.fullmatch(text):
        return start, start + 7 * _DAY
    is_day = len(text) <= 10 and ":" not in text
    return (start, start + _DAY) if is_day else (start, start)


def precedes(earlier: Record, later: Record | Query) -> bool:
    """Whether `earlier` certainly precedes `later` in their user's order. Where the spans overlap
    (equal times, the same day, a time that is only a year, an unknown time) the position decides.
    """
    span, other = span_of(earlier), span_of(later)
    first, second = sorted((span, other))
    if first[0] == second[0] or second[0] < first[1]:
        return earlier.position < later.position
    return span == first


def span_of(entry: Record | Query) -> Span:
    """The entry's span, else that of its written time. Raises UserFault: no readable time."""
    if entry.span != ALWAYS or not entry.time:
        return entry.span
    try:
        return parse_time(entry.time)
    except ValueError as error:
        raise UserFault(f"the time of '{entry.id}' of user '{entry.user}': {error}") from None


def before(records: Iterable[Record], query: Record | Query) -> list[Record]:
    """The records of the query's user that certainly precede it, oldest first."""
    own = (record for record in records if record.user == query.user)
    return in_order(record for record in own if precedes(record, query))


def in_order(records: Iterable[Record]) -> list[Record]:
    """A user's records by time, then by position; one of unknown time stays behind those before."""
    given = list(records)
    if rising(given):
        return given
    last_known, keyed = -math.inf, list[tuple[float, int, Record]]()
    for record in sorted(given, key=lambda r: r.position):
        if (start := span_of(record)[0]) > -math.inf:
            last_known = start
        keyed.append((last_known, record.position, record))
    return [record for _, _, record in sorted(keyed, key=lambda item: item[:2])]


def rising(records: Sequence[Record]) -> bool:
    """Whether positions and known times rise: then the records are in order, and each certainly
    precedes those behind it, and no other.
    """
    time, place = -math.inf, -1
    for record in records:
        if record.position <= place:
            return False
        place, start = record.position, record.span[0]
        if start == -math.inf and record.time:
            start = span_of(record)[0]
        if start > -math.inf:
            if start < time:
                return False
            time = start
    return True


def with_pasts(records: Iterable[Record]) -> Iterator[tuple[Record, list[Record]]]:
    """A user's records, oldest first, each with those of `before`; in linear time where positions
    and known times rise.
    """
    own = in_order(records)
    in_turn = rising(own)
    for place, record in enumerate(own):
        yield record, own[:place] if in_turn else before(own, record)


def as_query(record: Record) -> Query:
    """A record as a query with a gold answer, which sees only what precedes it."""
    r, offered = record, record.candidates if isinstance(record, Choice) else ()
    return Query(r.user, r.id, r.input, r.output, r.time, r.span, r.position, offered)


def as_record(query: Query, id: str) -> Record:
    """A query with a gold answer as a record; ValueError if a choice's gold was not offered."""
    q, gold = query, query.gold or ""
    plain = (q.user, id, q.input, gold, q.time, q.span, q.position)
    return Choice(*plain, q.offered, q.offered.index(gold)) if q.offered else Record(*plain)
