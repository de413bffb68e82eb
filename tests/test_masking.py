"""Personal data leaves as placeholders, and is back in the answer."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hydra_llm.config import Settings
from hydra_llm.errors import SettingsError
from hydra_llm.gateway.chunks import event
from hydra_llm.gateway.masked import MaskedUpstream
from hydra_llm.llm.base import PartlyFailed, Sampling
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.masking import Mask, Restorer, detectors
from hydra_llm.pipeline import UserPipeline
from hydra_llm.plugins import DETECTORS
from hydra_llm.retrieve import Recent
from hydra_llm.tasks.base import Task
from hydra_llm.testing import check_detector
from hydra_llm.types import Generation, Message, Record

ALL = "email,phone,card,iban,name"
FOUND: Mapping[str, Sequence[str]] = {
    "email": ("ada.l+x@mail.example.org", "bob@localhost", "żaneta@firma.pl"),
    "phone": (
        "+49 (0)30 901820",
        "+1 415-555-2671",
        "(415) 555-2671",
        "030 1234567",
        "0041441234567",
    ),
    "card": ("4111 1111 1111 1111", "378282246310005", "5555-5555-5555-4444"),
    "iban": ("DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "NO9386011117947"),
    "name": ("Ada Lovelace", "O'Brien", "Łukasz"),
}
AROUND = {"name": ("Dear ", ","), "": ("write to ", ".")}
NOT: Mapping[str, Sequence[str]] = {
    "email": ("@ada", "a @ b", "3 @ 4"),
    "phone": ("2024-01-02", "02.01.2024", "in 1995", "12345678", "$1,299.00", "1.2.3"),
    "card": ("4111 1111 1111 1112", "1234567890"),
    "iban": ("DE88 3704 0044 0532 0130 00", "AB12 and more"),
    "name": ("Dear all", "Mr. and Mrs", "the Prime Minister"),
}


def mask(text: object, names: str = ALL) -> Mask:
    return Mask(detectors(names), text)


@pytest.mark.parametrize("kind", FOUND)
def test_what_each_rule_finds(kind: str) -> None:
    front, behind = AROUND.get(kind, AROUND[""])
    for value in FOUND[kind]:
        text = f"{front}{value}{behind}"
        hidden = mask(text, kind).hide(text)
        assert hidden == f"{front}[{kind.upper()}_1]{behind}", value
    for text in NOT[kind]:
        assert mask(text, kind).hide(text) == text
    check_detector(kind)


def test_equal_values_are_one_and_overlaps_too() -> None:
    text = "ada@x.org, bob@x.org, ada@x.org"
    assert mask(text).hide(text) == "[EMAIL_1], [EMAIL_2], [EMAIL_1]"
    assert mask(text).hide("nobody") == "nobody"
    both = Mask({"left": lambda text: [(0, 4)], "right": lambda text: [(2, 6)]}, "")
    assert both.hide("abcdefgh") == "[LEFT_1]gh", "nothing of either is left"


def test_what_looks_like_a_placeholder_already_stays() -> None:
    text = "[EMAIL_1] is not ada@x.org"
    own = mask(text)
    assert own.hide(text) == "[EMAIL_1] is not [EMAIL_2]"
    assert own.show("[EMAIL_1] [EMAIL_2] [EMAIL_3]") == "[EMAIL_1] ada@x.org [EMAIL_3]"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("ada@x.org", '{"body": "Call:\\nada@x.org"}'),
        ("+49 30 1234567", '{"body": "Call:\\n+49 30 1234567"}'),
        ("+49 30 1234567", json.dumps({"body": json.dumps({"text": "Call:\n+49 30 1234567"})})),
        ("jörg@x.org", json.dumps({"to": "jörg@x.org"})),  # with an escape within
        ("ada@x.org", '"ada\\u0040x.org"'),
        ("+1 415\u2011555\u20112671", "+1 415\u2011555\u20112671"),  # no-break hyphens
        ("+49\xa030\xa01234567", "call +49\xa030\xa01234567"),
        ("\uff10\uff13\uff10-\uff11\uff12\uff13\uff14\uff15\uff16\uff17",) * 2,
        ("+\u0664\u0669 \u0663\u0660 \u0661\u0662\u0663\u0664\u0665",) * 2,
    ],
)
def test_escapes_and_other_scripts_hide_nothing(value: str, text: str) -> None:
    own = mask(text, "email,phone")
    hidden = own.hide(text)
    assert [*own.values.values()] == [value]
    assert not {"ada", "rg@", "1234567", "2671"} & set(hidden.replace("[", " ").split())
    assert own.show("[EMAIL_1][PHONE_1]").count(value) == 1
    if text.startswith("{"):
        json.loads(hidden)


def test_names_of_arguments_are_hidden_too() -> None:
    call = {"arguments": '{"ada@x.org": {"bob@x.org": 1}}', "input": "to ada@x.org"}
    own = mask(call)
    hidden = own.hide_in(call)
    assert "@" not in str(hidden)
    assert own.show_in(hidden) == call


def test_many_values_take_no_longer_each() -> None:
    """A request of one megabyte with 50,000 addresses, whose answer says them all: by the number
    of addresses squared this would take minutes.
    """
    text = " ".join(f"u{i}@x.org" for i in range(50_000))
    own = mask(text, "email")
    assert len(own.values) == 0
    hidden = own.hide(text)
    assert len(own.values) == 50_000
    restorer, size = Restorer(own), 1000
    shown = [restorer.feed(hidden[at : at + size]) for at in range(0, len(hidden), size)]
    assert "".join(shown) + restorer.end() == text


values = st.sampled_from([value for own in FOUND.values() for value in own])
parts = st.one_of(
    values, st.text(max_size=8), st.sampled_from(["[EMAIL_1]", "[", "]", "_1]", " ", "Dear ", "\n"])
)
texts = st.lists(parts, max_size=8).map("".join)


@given(texts)
@example("[EMAIL_1]ada@x.org[EMAIL_2")
def test_a_text_comes_back_as_it_was(text: str) -> None:
    own = mask([text])
    hidden = own.hide(text)
    assert own.show(hidden) == text
    assert not [value for value in own.values.values() if "@" in value and value in hidden]


@given(texts, st.randoms(use_true_random=False))
def test_a_stream_comes_back_however_it_is_cut(text: str, dice: random.Random) -> None:
    own = mask([text])
    hidden, restorer, out = own.hide(text), Restorer(own), ""
    while hidden:
        size = dice.randint(1, 4)
        out, hidden = out + restorer.feed(hidden[:size]), hidden[size:]
    assert out + restorer.end() == text


json_values = st.recursive(
    st.one_of(texts, st.integers(), st.none()),
    lambda own: st.one_of(
        st.lists(own, max_size=3), st.dictionaries(st.text(max_size=3), own, max_size=3)
    ),
    max_leaves=5,
)


@given(json_values)
@example({"to": 'a "quoted" text\n of ada@x.org', "n": 1})
def test_arguments_of_a_tool_stay_json(value: Any) -> None:
    call = {"function": {"name": "send", "arguments": json.dumps({"value": value})}}
    own = mask([value])
    hidden = own.hide_in(call)
    shown = own.show_in(hidden)
    assert json.loads(shown["function"]["arguments"]) == {"value": value}
    assert shown["function"]["name"] == "send"


def quoted(text: str) -> Iterator[tuple[int, int]]:
    """A detector of one's own: what stands in angle quotes, with characters that JSON escapes."""
    start = text.find("«")
    if start >= 0 and (end := text.find("»", start)) >= 0:
        yield start, end + 1


@pytest.fixture
def plugin() -> Iterator[None]:
    DETECTORS.add("quoted", quoted)
    yield
    del DETECTORS.added["quoted"]
    detectors.cache_clear()


@pytest.mark.usefixtures("plugin")
def test_a_detector_of_ones_own() -> None:
    assert Settings(mask="quoted, email").mask == "quoted,email"
    check_detector("quoted")
    value = '«a "b"\n»'
    own = mask(value, "quoted")
    hidden = own.hide(f"say {value}")
    assert hidden == "say [QUOTED_1]"
    assert json.loads(own.show('{"said": "[QUOTED_1]"}', in_json=True)) == {"said": value}


def test_faults_are_one_line() -> None:
    with pytest.raises(
        SettingsError, match=r"setting 'mask': unknown detector 'emial' \(did you mean 'email'"
    ):
        Settings.checked({"mask": "emial"})
    wrong = Mask({"wrong": lambda text: [(0, 99)]}, "")
    with pytest.raises(
        SettingsError, match="the detector 'wrong' found a span outside of the text"
    ):
        wrong.hide("short")


# ---- the library


class Echo(RuleLLM):
    """Says what it was asked; notes it."""

    def __init__(self) -> None:
        super().__init__(lambda messages, index, dice: messages[-1]["content"])
        self.asked = list[str]()

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        self.asked.append(str(messages))
        generation = await super().generate(messages, sampling)
        if sampling.n > 1:
            raise PartlyFailed("one is missing", generation)
        return generation


def test_the_library_masks_records_and_question() -> None:
    task, llm = Task("mail", "generation", "Answer: {input}"), Echo()
    record = Record("u", "r", "who is ada@x.org?", "call +1 415-555-2671")
    for names in ("", ALL):
        settings = Settings(mask=names, samples=3, gate="off")
        own = UserPipeline(task, Recent(), settings, llm=llm, records={"u": [record]})
        answer = own.answer("write to bob@x.org", user="u")
        assert "bob@x.org" in answer.text, "put back, in a call of which some texts are missing too"
    plain, hidden = llm.asked[:2], llm.asked[2:]
    for value in ("ada@x.org", "415-555-2671", "bob@x.org"):
        assert all(value in text for text in plain)
        assert not [text for text in hidden if value in text]
    assert "[EMAIL_2]" in hidden[0]


# ---- the gateway's upstream


class Said:
    """An upstream that streams the last message in pieces, and calls a tool with it."""

    limiter = None

    def __init__(self, size: int):
        self.size, self.body = size, dict[str, Any]()

    async def complete(self, body: Mapping[str, Any]) -> Any:
        self.body = dict(body)
        text = body["messages"][-1]["content"]
        call = {"id": "c", "type": "function", "function": {"name": "send", "arguments": text}}
        message = {"role": "assistant", "content": text, "tool_calls": [call]}
        return {"choices": [{"index": 0, "message": message}]}

    async def stream(self, body: Mapping[str, Any]) -> Any:
        self.body = dict(body)
        text = body["messages"][-1]["content"]
        cuts = [text[at : at + self.size] for at in range(0, len(text), self.size)]
        yield b": begun\n\n"
        for piece in cuts:
            call = {"index": 0, "function": {"arguments": piece}}
            delta = {"content": piece, "tool_calls": [call]}
            yield event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        yield b"data: [DONE]\n\n"


TEXT = '{"to": "ada@x.org", "from": "+1 415-555-2671", "note": "[EMAIL_"}['


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_a_stream_of_the_gateway_has_the_values_again(size: int) -> None:
    async def collected() -> tuple[str, str, list[bytes]]:
        inner = Said(size)
        body = {"model": "m", "messages": [{"role": "user", "content": TEXT}]}
        pieces = [piece async for piece in MaskedUpstream(inner, ALL).stream(body)]
        assert "ada@x.org" not in str(inner.body)
        chunks = [json.loads(own[6:]) for own in pieces if own.startswith(b"data: {")]
        deltas = [own["choices"][0]["delta"] for own in chunks]
        text = "".join(own.get("content") or "" for own in deltas)
        calls = [call for own in deltas for call in own.get("tool_calls", ())]
        return text, "".join(call["function"]["arguments"] for call in calls), pieces

    text, arguments, pieces = run_sync(collected)
    assert (text, arguments) == (TEXT, TEXT)
    assert (pieces[0], pieces[-1]) == (b": begun\n\n", b"data: [DONE]\n\n")


def test_a_completion_of_the_gateway_has_the_values_again() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,ada@x.org"}}
    parts = [{"type": "text", "text": "to ada@x.org"}, image]
    first = {"role": "user", "content": parts, "name": "ada"}
    messages = [first, {"role": "user", "content": TEXT}]
    inner = Said(9)
    body = {"model": "m", "messages": messages, "response_format": {"type": "json_object"}}
    completion: Any = run_sync(lambda: MaskedUpstream(inner, "email").complete(body))
    message = completion["choices"][0]["message"]
    assert message["content"] == message["tool_calls"][0]["function"]["arguments"] == TEXT
    sent = inner.body["messages"][0]
    assert sent["content"] == [{"type": "text", "text": "to [EMAIL_1]"}, image]
    assert body["messages"] is messages
    plain = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    run_sync(lambda: MaskedUpstream(inner, "email").complete(plain))
    assert inner.body == plain
