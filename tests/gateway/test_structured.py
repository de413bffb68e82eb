"""Tools, schemas and token probabilities: such requests are personal too, in a form that fits, and
nothing is sampled that no adapter can score. Also what is no answer: reasoning, the prompt's words.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from hydra_llm.config import Settings
from hydra_llm.gateway.embedded import EmbeddedUpstream
from hydra_llm.gateway.structured import form_fault, form_of, question_of
from hydra_llm.gateway.upstream import HttpUpstream, UpstreamError
from hydra_llm.llm.endpoint import Endpoint
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.llm.gguf import smollm2
from hydra_llm.store.store import Store

from .conftest import TAGS, World, records_of, running

pytestmark = pytest.mark.anyio

QUESTION = "the battle for the bridge in winter"
USER = {"role": "user", "content": QUESTION}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
CALLED: list[dict[str, Any]] = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "it was cold"},
]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}


async def ask(world: World, messages: Sequence[Any] = (USER,), **more: Any) -> Any:
    body = {"model": "m", "user": "ada", "messages": list(messages), **more}
    answer = await world.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-hydra-personalized"] == "true"
    return answer


def answering(world: World, *messages: Mapping[str, Any]) -> None:
    """The upstream gives these messages in turn, the last one again and again."""
    left = list(messages)

    async def complete(body: Mapping[str, Any]) -> Any:
        world.upstream.bodies.append(dict(body))
        message = left.pop(0) if len(left) > 1 else left[0]
        count = body.get("n") or 1
        choices = [{"index": i, "message": dict(message)} for i in range(count)]
        return {"id": "c", "model": "m", "choices": choices}

    world.upstream.complete = complete  # type: ignore[method-assign]


FORMS: list[tuple[dict[str, Any], str]] = [
    ({}, "text"),
    ({"response_format": {"type": "text"}}, "text"),
    ({"tools": []}, "text"),
    ({"response_format": {"type": "json_object"}}, "fixed"),
    ({"response_format": SCHEMA, "tools": [TOOL]}, "fixed"),
    ({"logprobs": True}, "fixed"),
    ({"guided_json": {"type": "object"}}, "fixed"),
    ({"structured_outputs": {"regex": "a+"}}, "fixed"),
    ({"grammar": 'root ::= "x"'}, "fixed"),
    ({"modalities": ["text", "audio"]}, "fixed"),
    ({"tools": [TOOL]}, "tools"),
    ({"functions": [{"name": "f"}]}, "tools"),
    ({"messages": CALLED}, "tools"),
    ({"messages": [USER, {"role": "function", "name": "f", "content": "1"}]}, "tools"),
]


@pytest.mark.parametrize(("body", "form"), FORMS)
def test_the_form_of_an_answer(body: dict[str, Any], form: str) -> None:
    assert form_of({"messages": [USER], **body}) == form


def test_the_question_stands_before_the_calls_that_it_took() -> None:
    assert question_of(CALLED) == question_of([USER]) == QUESTION
    assert question_of([*CALLED, *CALLED[1:]]) == QUESTION
    for messages in ([], [USER, {"role": "assistant", "content": "so"}], CALLED[1:]):
        assert question_of(messages) == ""


@pytest.mark.parametrize("body", [body for body, form in FORMS if form != "text"])
async def test_records_are_a_system_message_and_one_call_is_paid(
    store: Store, bundles: dict[str, Path], body: dict[str, Any]
) -> None:
    store.add_records("ada", records_of("ada"))
    for bundle in (None, bundles["titles"]):
        async with running(store, bundle, candidates=4) as world:
            answering(world, {"role": "assistant", "content": None, "tool_calls": [CALL]})
            messages = body.get("messages", [USER])
            told = (await ask(world, **body)).json()
            (sent,) = world.upstream.bodies
            system, *rest = sent["messages"]
            assert rest == messages, "no turn is added or changed"
            assert system["role"] == "system"
            assert "This person wrote: " in system["content"]
            assert {**sent, **body, "messages": []} == {**sent, "messages": []}
            assert told["choices"][0]["message"]["tool_calls"] == [CALL]
            assert told["personalization"]["records"]
            assert told["personalization"]["request_id"] is None, "there is no text to judge"


async def test_records_follow_the_callers_own_instructions(store: Store) -> None:
    store.add_records("ada", records_of("ada"))
    parts = [{"type": "text", "text": "Be brief."}]
    async with running(store) as world:
        for content in ("Be brief.", parts):
            system = {"role": "developer", "content": content, "name": "x"}
            await ask(world, [system, USER], tools=[TOOL])
            first, *rest = world.upstream.bodies[-1]["messages"]
            assert rest == [USER]
            assert (first["role"], first["name"]) == ("developer", "x")
            if isinstance(content, str):
                assert first["content"].startswith("Be brief.\n\nHere is what this person wrote")
            else:
                assert first["content"][0] == parts[0]
                assert len(first["content"]) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_the_final_text_after_calls_is_picked_like_any(
    store: Store, bundles: dict[str, Path], stream: bool
) -> None:
    store.add_records("ada", records_of("ada"))
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    async with running(store, bundles["titles"], candidates=4) as world:
        texts = [{"role": "assistant", "content": text} for text in ("calm", "loud")]
        answering(world, texts[0], texts[1])
        answer = await ask(world, CALLED, tools=[TOOL], stream=stream)
        assert len(world.upstream.bodies) == 2, "its samples are drawn when it is seen to be a text"
        assert "n" not in world.upstream.bodies[0]
        assert world.upstream.bodies[1]["n"] == 3
        if not stream:
            told = answer.json()["personalization"]
            assert None not in told["scores"]
            assert told["candidates"] == 2
        answering(world, call)
        answer = await ask(world, CALLED, tools=[TOOL], stream=stream)
        if stream:
            events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
            deltas = [choice["delta"] for e in events for choice in json.loads(e)["choices"]]
            (calls,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
            assert calls == [{"index": 0, **CALL}], "the SDK puts calls together by their index"
        answering(world, texts[0], call)
        told = (await ask(world, CALLED, tools=[TOOL])).json()
        assert told["personalization"]["candidates"] == 1, "a call of a tool is no other text"


async def test_questions_outside_a_label_task_cost_one_call(
    store: Store, bundles: dict[str, Path]
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], candidates=4) as world:
        pipeline = world.app.state.gateway.deployment.pipeline
        object.__setattr__(pipeline, "task", replace(TAGS, prompt="Tag: {input}"))
        answering(world, {"role": "assistant", "content": "It is Paris."})
        told = (await ask(world)).json()["personalization"]
        assert (len(world.upstream.bodies), told["scores"]) == (1, [None])
        answering(world, {"role": "assistant", "content": "calm"})
        await ask(world, [{"role": "user", "content": f"Tag: {QUESTION}"}])
        await ask(world)
        assert len(world.upstream.bodies) == 1 + 2 + 2


# ---- what is no answer


@pytest.mark.parametrize(
    "said",
    [
        "<think>loud or odd?</think>\ncalm",
        [{"type": "thinking", "thinking": "loud"}, {"type": "text", "text": "calm"}],
    ],
)
async def test_reasoning_passes_and_is_not_read(
    store: Store, bundles: dict[str, Path], said: Any
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], candidates=3) as world:
        message = {"role": "assistant", "content": said, "reasoning_content": "loud"}
        answering(world, message)
        told = (await ask(world, personalization={"explain": True})).json()
        assert told["personalization"]["texts"][0] in ("calm", "loud", "odd")
        request = store.request(told["personalization"]["request_id"])
        assert request is not None
        assert "calm" in [item["said"] for item in request.content["candidates"]]
        answering(world, message)
        told = (await ask(world, personalization={"samples": 1})).json()
        assert told["choices"][0]["message"] == message
        (candidate,) = store.request(told["personalization"]["request_id"]).content["candidates"]  # type: ignore[union-attr]
        assert candidate["said"] == "calm"


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("This person wrote: a calm day", "a calm day"),
        ("**This person wrote:** a calm day", "a calm day"),
        ("This person wrote nothing", "This person wrote nothing"),
        ("This", "This"),
    ],
)
async def test_the_prompts_words_are_no_part_of_an_answer(
    store: Store, said: str, shown: str, size: int
) -> None:
    store.add_records("ada", records_of("ada"))

    async def stream(body: Mapping[str, Any]) -> AsyncIterator[bytes]:
        def chunk(**choice: Any) -> bytes:
            chunk = {"id": "c", "model": "m", "choices": [{"index": 0, **choice}]}
            return b"data: " + json.dumps(chunk).encode() + b"\n\n"

        yield chunk(delta={"role": "assistant"})
        for start in range(0, len(said), size):
            yield chunk(delta={"content": said[start : start + size]})
        yield chunk(delta={}, finish_reason="stop") + b"data: [DONE]\n\n"

    async with running(store, placement="block") as world:
        world.upstream.stream = stream  # type: ignore[method-assign]
        chunks = await world.sdk().chat.completions.create(
            model="m", messages=[{"role": "user", "content": QUESTION}], user="ada", stream=True
        )
        deltas = [choice.delta async for chunk in chunks for choice in chunk.choices]
        assert "".join(delta.content or "" for delta in deltas) == shown
        answering(world, {"role": "assistant", "content": f"<think>hm</think>\n{said}"})
        told = (await ask(world)).json()
        assert told["choices"][0]["message"]["content"] == f"<think>hm</think>\n{shown}"


# ---- bodies and upstreams


@pytest.mark.parametrize(
    ("content", "kind", "message", "param"),
    [
        (b'{"model": "m"', "application/json", "not valid JSON at character 13", None),
        (b"", "application/json", "the body", None),
        (b"[1]", "application/json", "must be a JSON object", None),
        (b'"x"', "application/json", "must be a JSON object", None),
        (b'{"model": "m", "messages": [', "text/plain", "content-type: application/json", None),
        (b'{"model": "\xff"}', "application/json", "UTF-8", None),
        (b"[" * 100_000, "application/json", "the body", None),
        (b'{"model": "m"}', "application/json", "messages: Field required", "messages"),
        (b'{"messages": [], "model": "m"}', "application/json", "messages: ", "messages"),
        (b'{"messages": "x", "model": "m"}', "application/json", "messages: ", "messages"),
    ],
)
async def test_a_bad_body_is_one_line(
    store: Store, content: bytes, kind: str, message: str, param: str | None
) -> None:
    async with running(store) as world:
        answer = await world.http.post(
            "/v1/chat/completions", content=content, headers={"content-type": kind}
        )
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert message in error["message"]
        assert error["param"] == param
        assert "\n" not in error["message"]


async def test_a_bad_field_is_named(store: Store) -> None:
    async with running(store) as world:
        for messages, place in (
            ([{"role": "user", "content": 5}], "messages.0.content"),
            ([USER, {"role": "user", "content": [5]}], "messages.1.content"),
            ([{"content": "x"}], "messages.0.role"),
            (["x"], "messages.0"),
        ):
            answer = await world.http.post(
                "/v1/chat/completions", json={"model": "m", "messages": messages}
            )
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == place
            assert answer.json()["error"]["message"].startswith(f"{place}: ")


async def test_an_upstreams_error_comes_in_openais_shape() -> None:
    key = "sk-made-up-0123456789"
    quoted = {"message": f"no {key}", "code": 429, "metadata": {"raw": [repr(key)]}}
    answers: dict[str, Any] = {"error": quoted, "user_id": "u"}
    asked = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(str(request.url))
        return httpx2.Response(200, json=answers, headers={"retry-after": "7", "x-request-id": key})

    upstream = HttpUpstream(
        Endpoint.of("x", "http://up/v1?api-version=1&sig=a%2Fb", key),
        timeout=1,
        transport=httpx2.MockTransport(answer),
    )
    with pytest.raises(UpstreamError) as raised:
        await upstream.complete({"model": "m", "messages": []})
    assert raised.value.status == 429
    error = raised.value.body["error"]
    assert (error["message"], error["type"], error["param"]) == ("no ***", "rate_limit_error", None)
    assert key not in str(raised.value.body)
    assert raised.value.headers == {"retry-after": "7", "x-request-id": "***"}
    with pytest.raises(UpstreamError):
        await upstream.models("a?b%c")
    await upstream.aclose()
    query = "api-version=1&sig=a%2Fb"
    assert asked == [
        f"http://up/v1/chat/completions?{query}",
        f"http://up/v1/models/a%3Fb%25c?{query}",
    ]


def schema_form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "p", "schema": schema}}


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ("json_object", "must be an object"),
        (["json_object"], "must be an object"),
        ({"json_schema": {}}, "type is one of text, json_object"),
        ({"type": "json_schema"}, "json_schema.schema"),
        (schema_form("x"), "json_schema.schema"),
        (schema_form({"items": {"not": {}}}), "not supported: not"),
        (schema_form({"anyOf": [{"pattern": "a"}, {"uniqueItems": True}]}), "pattern, uniqueItems"),
        (schema_form({"pattern": "^(?=a)$"}), "not supported: pattern"),
        (schema_form({"properties": {"not": {"pattern": "^a$"}}, "enum": [{"if": 1}]}), ""),
        ({"type": "text"}, ""),
    ],
)
def test_a_form_that_no_grammar_keeps_to_is_told(form: Any, named: str) -> None:
    assert named in form_fault(form)
    assert bool(named) == bool(form_fault(form))


@pytest.mark.slow
async def test_an_embedded_model_keeps_to_a_schema(store: Store) -> None:
    llm = smollm2("", Settings())
    upstream = EmbeddedUpstream(llm, max_tokens=40)
    body = {"model": llm.model, "messages": [{"role": "user", "content": "A person as JSON."}]}
    schema = {"properties": {"age": {"type": "integer"}}, "required": ["age"]}
    closed = {"type": "object", "additionalProperties": False, **schema}
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": closed}}
    answer = await upstream.complete({**body, "temperature": 0, "response_format": form})
    assert isinstance(json.loads(answer["choices"][0]["message"]["content"])["age"], int)
    broken = {"type": "json_schema", "json_schema": {"name": "p", "schema": {"type": "x"}}}
    fields = {"tools": [TOOL], "logprobs": True, "response_format": broken, "guided_json": closed}
    for name, value in [*fields.items(), ("response_format", {"type": "x"})]:
        with pytest.raises(UpstreamError) as raised:
            await upstream.complete({**body, name: value})
        assert raised.value.status == 400
        assert name in str(raised.value) or "schema" in str(raised.value)
    await llm.aclose()
    fake = EmbeddedUpstream(RuleLLM(lambda messages, index, rng: "x", name="m"))
    with pytest.raises(UpstreamError, match="response_format"):
        await fake.complete({**body, "model": "fake:m", "response_format": form})
