"""What the one reader of OpenAI's wire format makes of messages, errors and streams of events."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.llm.sse import Event, EventReader
from hydra_llm.llm.wire import (
    answer_of,
    content_fault,
    error_in,
    failure,
    json_of,
    place_of,
    text_of,
    tokens_of,
)

TEXT = {"type": "text", "text": "keep"}
THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("keep", "keep"),
        (None, ""),
        ([], ""),
        (TEXT, "keep"),
        ([THINKING, TEXT], "keep"),
        ([{"type": "reasoning", "text": "hm"}, TEXT], "keep"),
        ([{"type": "image_url", "image_url": {"url": "data:x"}}, TEXT], "keep"),
        ([{"type": "output_text", "text": "keep"}], "keep"),
        ([{"type": "text", "text": {"value": "keep", "annotations": []}}], "keep"),
        (["ke", "ep"], "keep"),
        ([{"type": "refusal", "refusal": "no"}], ""),
        ([{"type": "text", "text": None}, 5], ""),
        ("<think>maybe toss</think>\nkeep", "keep"),
        (["<think>maybe toss", "</think>\nkeep"], "keep"),
        ([{"type": "thought", "text": "toss"}, TEXT], "keep"),
        ([{"text": "toss", "thought": True}, {"text": "keep"}], "keep"),
        (7, ""),
    ],
)
def test_an_answer_is_read_from_any_content(content: object, text: str) -> None:
    reasoning = {"reasoning_content": "toss", "reasoning": "toss", "refusal": "no"}
    assert answer_of({"role": "assistant", "content": content, **reasoning}) == text


def test_parts_of_a_question_are_lines() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_image"}, {"text": "b"}]
    assert text_of({"role": "user", "content": parts}) == "a\nb"
    assert text_of({"role": "user"}) == ""


@pytest.mark.parametrize(
    ("content", "named"),
    [(None, ""), ("x", ""), ([TEXT, "x"], ""), (5, "list of parts"), ([5], "parts such as")],
)
def test_what_is_wrong_with_a_content_is_told(content: object, named: str) -> None:
    assert named in content_fault(content)
    assert bool(named) == bool(content_fault(content))


def test_tokens_that_are_not_told_are_not_zero() -> None:
    assert tokens_of({"prompt_tokens": 0, "completion_tokens": 2}) == (0, 2)
    for usage in (None, {}, "n/a", {"prompt_tokens": 3}, {"prompt_tokens": "many"}):
        assert tokens_of(usage) is None
    for count in (-1, True, None, 2.5):
        assert tokens_of({"prompt_tokens": count, "completion_tokens": 2}) is None


ERRORS: list[tuple[int, Any, str, int]] = [
    (200, {"error": {"message": "wait 20 s", "code": 429}, "user_id": "u"}, "wait 20 s", 429),
    (200, {"error": "boom"}, "boom", 502),
    (500, {"detail": "down"}, "down", 500),
    (200, {"detail": "Not authenticated"}, "Not authenticated", 502),
    (422, {"detail": [{"loc": ["body", "n"], "msg": "too big", "type": "x"}]}, "n: too big", 422),
    (200, {"object": "error", "message": "bad", "code": 400}, "bad", 400),
    (200, {"type": "error", "error": {"type": "overloaded_error", "message": "m"}}, "m", 503),
    (200, [{"error": {"code": 429, "message": "m", "status": "RESOURCE_EXHAUSTED"}}], "m", 429),
    (200, {"error": {"error": {"message": "m", "code": "rate_limit_exceeded"}}}, "m", 429),
    (200, {"error": True, "message": "down"}, "down", 502),
    (400, {"errors": [{"message": "m"}]}, "m", 400),
    (200, {"detail": "Too many requests, try later"}, "Too many requests, try later", 429),
    (200, {"message": "The model is overloaded"}, "The model is overloaded", 503),
    (404, {"title": "Not here", "status": 404}, "Not here", 404),
    (200, {"choices": [{"error": {"code": 502, "message": "m"}, "message": {}}]}, "m", 502),
    (200, {"choices": []}, "without choices", 502),
    (200, {"choices": [{"index": 0}]}, "without choices", 502),
    (200, {"choices": None}, "without choices", 502),
    (200, {}, "without choices", 502),
    (503, "<html><head><title>503\n Busy</title></head></html>", "a web page, '503 Busy'", 503),
    (200, "<html>hello", "a web page", 502),
    (200, "", "without content", 502),
    (502, "upstream connect error", "upstream connect error", 502),
    (200, "[" * 100_000, "not JSON", 502),
]


@pytest.mark.parametrize(("status", "body", "message", "told"), ERRORS)
def test_an_error_is_found_in_whatever_shape_it_comes(
    status: int, body: Any, message: str, told: int
) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    error = failure(status, content.encode())
    assert error is not None
    assert message in error.message
    assert error.status == told


@pytest.mark.parametrize(
    "body",
    [
        {"choices": [{"message": {"content": "fine"}}], "error": None},
        {"choices": [{"message": {"content": None, "refusal": "no"}}], "error": {}},
        {"choices": [{"message": {"content": "half"}}], "error": {"message": "cut"}},
        {"choices": [{"message": {"content": ""}}], "message": "of the day"},
    ],
)
def test_an_answer_is_no_error(body: Any) -> None:
    assert failure(200, json.dumps(body).encode()) is None


def test_a_list_of_models_is_no_error() -> None:
    for body in ({"object": "list", "data": []}, {"id": "m", "description": "a model"}):
        assert failure(200, json.dumps(body).encode(), needs="") is None
    error = failure(200, b'{"error": "no such thing"}', needs="")
    assert error is not None
    assert error_in({"data": []}) is None


# ---- streams of events

LINES = st.sampled_from(
    [
        "data: a",
        "data:b",
        "data",
        "data:  two",
        ": comment",
        "event: error",
        "id: 7",
        "x",
        "",
        "é茶😀",
    ]
)


def events_of(pieces: list[bytes]) -> list[Event]:
    reader = EventReader()
    return [event for piece in pieces for event in reader.feed(piece)] + reader.end()


@given(
    lines=st.lists(st.tuples(LINES, st.sampled_from(["\n", "\r\n", "\r"]))),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    size=st.integers(1, 9),
)
def test_events_are_the_same_however_the_bytes_are_cut(
    lines: list[tuple[str, str]], mark: bytes, size: int
) -> None:
    stream = mark + "".join(line + end for line, end in lines).encode()
    whole = events_of([stream])
    cut = events_of([stream[i : i + size] for i in range(0, len(stream), size)])
    assert b"".join(event.raw for event in whole) == b"".join(event.raw for event in cut) == stream
    said = [[(e.data, e.kind) for e in events if e.data is not None] for events in (whole, cut)]
    assert said[0] == said[1]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_events_have_data_of_several_lines_and_kinds(end: str) -> None:
    lines = ["\ufeffdata: one", "data:two", "", ": ping", "", "event: error", "data", "", "data: 3"]
    said = [(event.data, event.kind) for event in events_of([end.join(lines).encode()])]
    assert said == [("one\ntwo", ""), (None, ""), ("", "error"), ("3", "")]


def test_an_event_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydra_llm.llm.sse.LONGEST", 10)
    with pytest.raises(ValueError, match="longer than"):
        EventReader().feed(b"data: " + b"x" * 10)


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"\n "])
@pytest.mark.parametrize("said", ["keep", "gr\u00fcn"])
def test_an_answer_of_odd_bytes_is_read(before: bytes, said: str) -> None:
    body = json.dumps({"choices": [{"message": {"content": said}}]}, ensure_ascii=False)
    content = before + body.encode("latin-1")
    assert failure(200, content) is None
    assert answer_of(json_of(content)["choices"][0]["message"]) in (said, "gr\ufffdn")
    assert json_of(b"oops") is None


@pytest.mark.parametrize(("index", "place"), [(2, 2), ("1", 1), (None, 0), ("x", 0), (-1, 0)])
def test_the_place_of_a_choice(index: object, place: int) -> None:
    assert place_of({"index": index}) == place
