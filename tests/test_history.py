"""Time never leaks: held against an order that is worked out on whole seconds, without `parse_time`
and without spans.
"""

import calendar
import itertools
import math
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.errors import UserFault
from hydra_llm.history import as_query, before, in_order, parse_time, precedes, with_pasts
from hydra_llm.types import ALWAYS, Query, Record

Seconds = tuple[float, float]
"""The first and the last second at which something may have happened."""


def _second(*parts: int) -> int:
    return calendar.timegm((*parts, *(0,) * (6 - len(parts)), 0, 0, 0))


@st.composite
def written_times(
    draw: st.DrawFn, kinds: str = "moment zone epoch milli day month year unknown"
) -> tuple[str, Seconds]:
    """A time as people write it, and its seconds. Few values, so that equal and touching ones are
    common.
    """
    kind = draw(st.sampled_from(kinds.split()))
    year, month = draw(st.sampled_from([2019, 2020])), draw(st.sampled_from([1, 2, 12]))
    day, hour = draw(st.sampled_from([1, 2, 28])), draw(st.sampled_from([0, 1, 23]))
    at = _second(year, month, day, hour)
    match kind:
        case "moment":
            return f"{year}-{month:02}-{day:02}T{hour:02}:00:00", (at, at)
        case "zone":
            return f"{year}-{month:02}-{day:02} {hour:02}:00+02:00", (at - 7200, at - 7200)
        case "epoch":
            return str(at), (at, at)
        case "milli":
            return str(at * 1000), (at, at)
        case "day":
            start = _second(year, month, day)
            written = draw(
                st.sampled_from(
                    [
                        f"{year}-{month:02}-{day:02}",
                        f"{year}/{month}/{day}",
                        f"{year}{month:02}{day:02}",
                    ]
                )
            )
            return written, (start, start + 86400 - 1)
        case "month":
            days = calendar.monthrange(year, month)[1]
            return f"{year}-{month:02}", (
                _second(year, month, 1),
                _second(year, month, 1) + days * 86400 - 1,
            )
        case "year":
            return str(year), (_second(year, 1, 1), _second(year + 1, 1, 1) - 1)
    return "", (-math.inf, math.inf)


@st.composite
def histories(
    draw: st.DrawFn, kinds: str = "moment zone epoch milli day month year unknown"
) -> list[tuple[Record, Seconds]]:
    """Records of two users, in any order; positions are unique within a user and need not agree
    with the times.
    """
    times = draw(st.lists(written_times(kinds), max_size=12))
    positions = draw(st.permutations(range(len(times))))
    return [
        (
            Record(
                draw(st.sampled_from("ab")), f"r{at}", "x", "y", time, parse_time(time), position
            ),
            seconds,
        )
        for at, ((time, seconds), position) in enumerate(zip(times, positions, strict=True))
    ]


def comes_before(one: Seconds, one_position: int, other: Seconds, other_position: int) -> bool:
    """The order of the issue: time, then position where the times do not tell."""
    if one[1] < other[0] or other[1] < one[0]:
        return one[1] < other[0]
    return one_position < other_position


@given(histories(), written_times(), st.integers(0, 12))
def test_a_query_sees_exactly_what_precedes_it(
    history: list[tuple[Record, Seconds]], time: tuple[str, Seconds], position: int
) -> None:
    query = Query("a", "q", "x", time=time[0], span=parse_time(time[0]), position=position)
    allowed = {
        r.id
        for r, seconds in history
        if r.user == "a" and comes_before(seconds, r.position, time[1], position)
    }
    seen = before([record for record, _ in history], query)
    assert {record.id for record in seen} == allowed
    assert seen == in_order(seen)


@given(
    st.data(), st.sampled_from(["moment zone epoch milli day month year unknown", "day", "unknown"])
)
def test_pasts_are_what_each_record_sees(data: st.DataObject, kinds: str) -> None:
    """Whether positions and times rise together or not."""
    drawn = [record for record, _ in data.draw(histories(kinds)) if record.user == "a"]
    ordered = in_order(drawn)
    rising = [replace(record, position=place) for place, record in enumerate(ordered)]
    for records in (drawn, ordered, rising):
        pasts = list(with_pasts(records))
        assert [record for record, _ in pasts] == in_order(records) == in_order(records[::-1])
        for record, past in pasts:
            assert past == before(records, record)


@given(histories())
def test_a_record_as_query_never_sees_itself_or_later_records(
    history: list[tuple[Record, Seconds]],
) -> None:
    records = [record for record, _ in history]
    seen = {
        record.id: {other.id for other in before(records, as_query(record))} for record in records
    }
    for one, others in seen.items():
        assert one not in others
        assert all(one not in seen[other] for other in others)


@given(histories(), written_times(), st.integers(0, 12), st.integers(0, 12))
def test_a_later_place_sees_all_that_an_earlier_place_saw(
    history: list[tuple[Record, Seconds]], time: tuple[str, Seconds], one: int, other: int
) -> None:
    records = [record for record, _ in history]
    first, second = (
        Query("a", "q", "x", time=time[0], span=parse_time(time[0]), position=at)
        for at in sorted((one, other))
    )
    assert {r.id for r in before(records, first)} <= {r.id for r in before(records, second)}


@pytest.mark.parametrize("kinds", ["moment zone epoch milli", "day", "year", "unknown", "month"])
@given(st.data())
def test_times_of_one_precision_give_one_order(kinds: str, data: st.DataObject) -> None:
    records = [record for record, _ in data.draw(histories(kinds)) if record.user == "a"]
    ordered = in_order(records)
    for (i, one), (j, other) in itertools.product(enumerate(ordered), repeat=2):
        assert precedes(one, other) == (i < j)


@given(histories())
def test_order_never_turns_two_times_around_that_do_not_touch(
    history: list[tuple[Record, Seconds]],
) -> None:
    seconds = {record.id: its for record, its in history}
    ordered = in_order(record for record, _ in history)
    assert sorted(r.id for r in ordered) == sorted(seconds)
    for one, other in itertools.combinations(ordered, 2):
        assert not seconds[other.id][1] < seconds[one.id][0]


def test_where_no_time_is_known_the_file_decides() -> None:
    records = [Record("a", str(at), "x", "y", position=at) for at in (2, 0, 1)]
    assert [record.id for record in in_order(records)] == ["0", "1", "2"]
    assert [record.id for record in before(records, as_query(records[0]))] == ["0", "1"]


def test_an_unknown_time_keeps_its_place_between_known_ones() -> None:
    written = [("a", "2020"), ("b", ""), ("c", "2021"), ("d", "")]
    records = [
        Record("u", name, "x", "y", time, parse_time(time), at)
        for at, (name, time) in enumerate(written)
    ]
    assert [record.id for record in in_order(reversed(records))] == ["a", "b", "c", "d"]


def test_a_query_without_position_comes_last_for_its_user() -> None:
    records = [
        Record("a", "1", "x", "y", "2020", parse_time("2020"), 10**9),
        Record("b", "2", "x", "y"),
    ]
    assert [record.id for record in before(records, Query("a", "q", "x"))] == ["1"]


def test_the_last_records_are_those_in_time_not_in_the_file() -> None:
    written = ["2021-05-01", "2019-01-01", "2020-01-01"]
    records = [
        Record("u", time, "x", "y", time, parse_time(time), at) for at, time in enumerate(written)
    ]
    assert [record.id for record in in_order(records)[-2:]] == ["2020-01-01", "2021-05-01"]
    assert len(in_order(records)) == 3


def _utc(*parts: int) -> float:
    return datetime(*parts, tzinfo=UTC).timestamp()  # type: ignore[arg-type, misc]


@pytest.mark.parametrize(
    ("text", "first", "end"),
    [
        ("2020", _utc(2020, 1, 1), _utc(2021, 1, 1)),
        ("2020-02", _utc(2020, 2, 1), _utc(2020, 3, 1)),
        ("2020/12", _utc(2020, 12, 1), _utc(2021, 1, 1)),
        ("2020-2-29", _utc(2020, 2, 29), _utc(2020, 3, 1)),
        ("20200131", _utc(2020, 1, 31), _utc(2020, 2, 1)),
        ("2020-W01", _utc(2019, 12, 30), _utc(2020, 1, 6)),
        ("2020-W01-3", _utc(2020, 1, 1), _utc(2020, 1, 2)),
        (" 2020-01-31T10:00:00Z ", _utc(2020, 1, 31, 10), _utc(2020, 1, 31, 10)),
        (
            "2020-01-31 10:00:00.5-03:30",
            _utc(2020, 1, 31, 13, 30) + 0.5,
            _utc(2020, 1, 31, 13, 30) + 0.5,
        ),
        ("893214333", 893214333.0, 893214333.0),
        ("893214333.25", 893214333.25, 893214333.25),
        ("1580428800000", 1580428800.0, 1580428800.0),
        ("-86400", -86400.0, -86400.0),
        ("", *ALWAYS),
        (893214333, 893214333.0, 893214333.0),
        (1580428800000.0, 1580428800.0, 1580428800.0),
        (1580428800_000_000, 1580428800.0, 1580428800.0),
        (1580428800_000_000_000, 1580428800.0, 1580428800.0),
        (2020, _utc(2020, 1, 1), _utc(2021, 1, 1)),
        ("2020.0", _utc(2020, 1, 1), _utc(2021, 1, 1)),
        (20200131.0, _utc(2020, 1, 31), _utc(2020, 2, 1)),
    ],
)
def test_written_times(text: str | float, first: float, end: float) -> None:
    assert parse_time(text) == (first, end)


@pytest.mark.parametrize(
    "text",
    [
        "yesterday",
        "2020-13",
        "2020-00",
        "2020-0-1",
        "2021-02-29",
        "20201399",
        "0000",
        "nan",
        "inf",
        "12:30",
        "²²²²",
        "31.01.2020",
        "1" * 400,
        True,
    ],
)
def test_an_invalid_time_is_refused(text: str | float) -> None:
    with pytest.raises(ValueError, match="is no time"):
        parse_time(text)


@pytest.mark.parametrize("text", ["202401", 202401, "202401.0", "2024031", "31012024", -202401])
def test_a_number_that_may_be_a_date_or_seconds_is_refused(text: str | float) -> None:
    with pytest.raises(ValueError, match="may be a date or seconds since 1970: write 2024-01"):
        parse_time(text)


def test_a_written_time_counts_where_no_span_is_given() -> None:
    later = Record("u", "1", "a", "b", time="2024-05-01")
    assert before([later], Query("u", "q", "a", time="2020-01-01")) == []
    assert before([later], Query("u", "q", "a", time="2024-06-01")) == [later]
    with pytest.raises(UserFault, match="'q'"):
        before([later], Query("u", "q", "a", time="not a time"))
