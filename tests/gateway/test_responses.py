"""OpenAI's Responses API, through the official SDK: replies, events, tools, what is kept."""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from hydra_llm.gateway.auth import make_key
from hydra_llm.gateway.chunks import DONE, chunks_of, event, role_chunk
from hydra_llm.gateway.responses import ResponseWriter, messages_of, to_chat
from hydra_llm.gateway.upstream import UpstreamError
from hydra_llm.store.store import Store

from .conftest import Scripted, World, records_of, running

pytestmark = pytest.mark.anyio
QUESTION = "the battle for the bridge in winter"
URL = "data:image/png;base64,AA=="
STOCK: dict[str, Any] = {
    "type": "function",
    "name": "stock",
    "description": "How much of a tea there is",
    "parameters": {"type": "object", "properties": {"tea": {"type": "string"}}},
    "strict": True,
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "stock", "arguments": '{"a": 1}'}}
USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


class Calling(Scripted):
    """An upstream that calls the tools that it is given, until it has a result."""

    def message(self, body: Mapping[str, Any]) -> dict[str, Any]:
        called = any(message["role"] == "tool" for message in body["messages"])
        if body.get("tools") and not called:
            return {"role": "assistant", "content": None, "tool_calls": [CALL]}
        return {"role": "assistant", "content": "plenty", "reasoning_content": "hm"}

    async def complete(self, body: Mapping[str, Any]) -> Any:
        completion = await super().complete(body)
        message = self.message(body)
        end = "tool_calls" if "tool_calls" in message else "stop"
        choice = {"index": 0, "message": message, "finish_reason": end}
        return {**completion, "choices": [choice], "usage": USAGE}

    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[bytes]:
        completion = await self.complete(body)
        yield event(role_chunk("c", "m", 1))
        for chunk in chunks_of(completion, usage=True):
            yield event(chunk)
        yield DONE


def calling(world: World) -> World:
    world.upstream = world.app.state.gateway.upstream = Calling()
    return world


async def events_of(world: World, **asked: Any) -> list[dict[str, Any]]:
    """The events of a stream as they are sent."""
    body = {"model": "m", "stream": True, "user": "ada", **asked}
    text = (await world.http.post("/v1/responses", json=body)).text
    parts = [part.split("\n") for part in text.split("\n\n") if part.startswith("event:")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in parts]
    assert [name for name, _ in parts] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


async def test_a_response_is_as_personal_as_chat(either: Store) -> None:
    either.add_records("ada", records_of("ada"))
    async with running(either) as world:
        client = world.sdk()
        reply = await client.responses.with_raw_response.create(
            model="m", input=QUESTION, instructions="Be brief.", user="ada"
        )
        response: Any = reply.parse()
        chat = (await world.ask(QUESTION)).json()
        assert reply.headers["x-hydra-personalized"] == "true"
        assert response.id == f"resp_{reply.headers['x-hydra-request-id']}"
        assert response.output_text == chat["choices"][0]["message"]["content"]
        assert response.status == "completed"
        assert (response.usage.input_tokens, response.usage.output_tokens) == (10, 1)
        assert response.personalization["records"] == chat["personalization"]["records"]
        sent, of_chat = world.upstream.bodies
        assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
        assert sent["messages"][1:] == of_chat["messages"]
        assert sent["user"] == of_chat["user"] != "ada"
        assert not {"input", "instructions", "store"} & sent.keys()
        feedback = {"request_id": response.id, "edited": "loud"}
        assert (await world.http.post("/v1/feedback", json=feedback)).status_code == 200


async def test_a_conversation_goes_on_by_the_previous_response(either: Store) -> None:
    either.add_records("ada", records_of("ada"))
    async with running(either) as world:
        create = world.sdk().responses.create
        first = await create(model="m", input="one", instructions="Only here.", user="ada")
        second = await create(model="m", input="two", previous_response_id=first.id, user="ada")
        third = await create(model="m", input="three", previous_response_id=second.id, user="ada")
        said = [message["content"] for message in world.upstream.bodies[-1]["messages"]][-5:]
        assert said == ["one", first.output_text, "two", second.output_text, "three"]
        assert "Only here." not in json.dumps(world.upstream.bodies[-1])
        assert third.previous_response_id == second.id
        # of another user there is none, whoever asks
        for user in ("bob", None):
            with pytest.raises(openai.APIStatusError) as refused:
                await create(model="m", input="x", previous_response_id=first.id, user=user)
            assert refused.value.status_code == (404 if user else 400)
        await world.sdk().responses.delete(first.id)
        with pytest.raises(openai.NotFoundError, match="previous_response_id"):
            await create(model="m", input="x", previous_response_id=third.id, user="ada")


async def test_a_response_is_read_listed_and_deleted(either: Store) -> None:
    either.add_records("ada", records_of("ada"))
    async with running(either) as world, running(either) as other:
        client = world.sdk().responses
        response = await client.create(model="m", input=QUESTION, user="ada", metadata={"a": "b"})
        read = await other.sdk().responses.retrieve(response.id)  # another server of the store
        assert read == response
        assert read.metadata == {"a": "b"}
        items = (await client.input_items.list(response.id)).data
        assert items[0].model_dump()["content"][0]["text"] == QUESTION
        assert either.request(response.id.removeprefix("resp_")) is not None
        await other.sdk().responses.delete(response.id)
        assert either.request(response.id.removeprefix("resp_")) is None
        for call in (client.retrieve, client.delete, client.input_items.list):
            with pytest.raises(openai.NotFoundError):
                await call(response.id)


async def test_a_response_that_has_ended_is_not_cancelled(either: Store) -> None:
    async with running(either) as world:
        client = world.sdk().responses
        response = await client.create(model="m", input=QUESTION, user="ada")
        with pytest.raises(openai.BadRequestError, match="this response has ended") as refused:
            await client.cancel(response.id)
        assert refused.value.code == "response_not_cancellable"
        assert (await client.retrieve(response.id)).status == "completed"
        with pytest.raises(openai.NotFoundError):
            await client.cancel("resp_none")


async def test_only_what_may_be_kept_is_kept(store: Store) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store) as world:
        create = world.sdk().responses.create
        for options in ({"user": "ada", "store": False}, {}):
            response: Any = await create(model="m", input="a secret", **options)
            assert response.store is False
            with pytest.raises(openai.NotFoundError):
                await world.sdk().responses.retrieve(response.id)
        assert store.counts()["responses"] == 0
        # a user without records is one whose data can be listed, exported and deleted
        kept = await create(model="m", input="a secret", user="eve")
        assert kept.store is True
        export = (await world.http.get("/v1/users/eve/export")).json()
        assert export["responses"][0]["id"] == kept.id
        deleted = (await world.http.delete("/v1/users/eve")).json()["deleted"]
        assert deleted["responses"] == 1
        with pytest.raises(openai.NotFoundError):
            await world.sdk().responses.retrieve(kept.id)


async def test_a_user_deleted_meanwhile_is_not_kept_again(store: Store) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store) as world:

        def rule(body: Mapping[str, Any], index: int) -> str:
            store.delete_user("ada")
            return "calm"

        world.upstream.rule = rule
        response = await world.sdk().responses.create(model="m", input=QUESTION, user="ada")
        assert response.store is False
        assert store.users() == []


async def test_old_responses_are_pruned(store: Store) -> None:
    async with running(store) as world:
        await world.sdk().responses.create(model="m", input="a", user="ada")
        assert store.prune(1.0) == (0, 0)
        assert store.prune(2e10) == (1, 0)
        assert store.counts()["responses"] == 0


@pytest.mark.parametrize("samples", [1, 3])
async def test_the_sdk_reads_the_stream(
    store: Store, bundles: dict[str, Any], samples: int
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], samples=samples) as world:
        async with world.sdk().responses.stream(model="m", input=QUESTION, user="ada") as stream:
            events = [event async for event in stream]
            final: Any = await stream.get_final_response()
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(deltas) == final.output_text != ""
        assert final.usage is not None
        assert final.personalization["candidates"] == samples
        assert final.store is True
        kept = await world.sdk().responses.retrieve(final.id)
        assert kept.output_text == final.output_text
        world.upstream.bodies.clear()
        await world.sdk().responses.create(
            model="m", input="more", previous_response_id=final.id, user="ada"
        )
        assert final.output_text in json.dumps(world.upstream.bodies[0]["messages"])


async def test_the_events_are_those_of_openai(store: Store) -> None:
    async with running(store) as world:
        events = await events_of(calling(world), input="x", tools=[STOCK])
        assert [event["type"] for event in events] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed",
        ]
        response = events[-1]["response"]
        assert response["output"] == [
            {
                "id": f"fc_{response['id'].removeprefix('resp_')}_0",
                "type": "function_call",
                "status": "completed",
                "arguments": '{"a": 1}',
                "call_id": "call_1",
                "name": "stock",
            }
        ]
        events = await events_of(world, input="x")
        assert [event["type"].removeprefix("response.") for event in events[2:-1]] == [
            *("output_item.added", "content_part.added", "reasoning_text.delta"),
            *("reasoning_text.done", "content_part.done", "output_item.done"),
            *("output_item.added", "content_part.added", "output_text.delta"),
            *("output_text.done", "content_part.done", "output_item.done"),
        ]
        places = {event.get("output_index") for event in events}
        assert places == {None, 0, 1}
        assert events[-1]["response"]["usage"]["total_tokens"] == 7


async def test_a_stream_and_a_reply_say_the_same(store: Store) -> None:
    async with running(store) as world:
        calling(world)
        for asked in ({"input": "x"}, {"input": "x", "tools": [STOCK]}):
            body = {"model": "m", "user": "ada", **asked}
            whole = (await world.http.post("/v1/responses", json=body)).json()
            streamed = (await events_of(world, **asked))[-1]["response"]
            for response in (whole, streamed):
                text = json.dumps(response).replace(response["id"].removeprefix("resp_"), "ID")
                response |= json.loads(text) | {"created_at": 0}
            assert streamed == whole


async def test_calls_of_tools_and_their_results(store: Store) -> None:
    async with running(store) as world:
        client = calling(world).sdk().responses
        tools: Any = [STOCK]
        first = await client.create(model="m", input="Tea?", tools=tools, user="ada")
        call: Any = first.output[0]
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "7"}
        own = [{"role": "user", "content": "Tea?"}, call.model_dump(exclude_none=True), result]
        referred = [own[0], {"type": "item_reference", "id": call.id}, result]
        for more in (
            {"input": [result], "previous_response_id": first.id},
            {"input": own},
            {"input": referred},
        ):
            asked: Any = {"model": "m", "tools": tools, "user": "ada", **more}
            assert (await client.create(**asked)).output_text == "plenty"
            user, called, answer = world.upstream.bodies[-1]["messages"]
            assert user["content"] == "Tea?"
            assert called["tool_calls"] == [CALL]
            assert answer == {"role": "tool", "tool_call_id": "call_1", "content": "7"}
        for user in ("bob", None):  # an item of ada's
            with pytest.raises(openai.NotFoundError, match=r"input\[1\]: no such item"):
                await client.create(model="m", input=referred, user=user)  # type: ignore[arg-type]


async def test_a_form_of_the_sdk_is_a_response_format(store: Store) -> None:
    class Tea(BaseModel):
        name: str

    async with running(store) as world:
        world.upstream.rule = lambda body, index: '{"name": "mint"}'
        response = await world.sdk().responses.parse(model="m", input="x", text_format=Tea)
        assert response.output_parsed == Tea(name="mint")
        form = world.upstream.bodies[0]["response_format"]
        assert form["json_schema"]["name"] == "Tea"
        assert form["json_schema"]["strict"] is True
        assert form["json_schema"]["schema"]["properties"] == {
            "name": {"title": "Name", "type": "string"}
        }


async def test_an_upstream_that_fails_amid_a_stream(store: Store) -> None:
    class Cut(Scripted):
        async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[bytes]:
            yield event(role_chunk("c", "m", 1))
            raise UpstreamError(502, "the line was cut")

    async with running(store) as world:
        world.app.state.gateway.upstream = Cut()
        events = await events_of(world, input="x")
        assert [event["type"] for event in events][-1] == "response.failed"
        assert events[-1]["response"]["error"]["message"] == "the line was cut"
        assert store.counts()["responses"] == 0


async def test_a_refused_request_keeps_its_status(store: Store) -> None:
    async with running(store) as world:
        for stream in (False, True):
            world.upstream.faults = [UpstreamError(429, "too many", {"retry-after": "7"})]
            with pytest.raises(openai.RateLimitError) as refused:
                await world.sdk().responses.create(model="m", input="x", stream=stream)
            assert refused.value.response.headers["retry-after"] == "7"


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0]: the tool 'web_search'"),
        ({"tools": [STOCK, {"type": "mcp"}]}, "tools[1]: the tool 'mcp'"),
        ({"input": [{"type": "computer_call"}]}, "input[0]: an item of the type 'computer_call'"),
        ({"input": [{"role": "judge", "content": "x"}]}, "input[0].role: must be user"),
        (
            {"input": [{"role": "user", "content": [{"type": "hologram"}]}]},
            "input[0].content[0]: this part of the type 'hologram'",
        ),
        ({"input": []}, "input: give at least one item"),
        ({"conversation": "conv_1"}, "conversation is not supported here"),
        ({"background": True}, "background is not supported here"),
        ({"input": 7}, "input"),
        ({"tools": [STOCK], "tool_choice": {"type": "mcp"}}, "tool_choice: this choice"),
        ({"input": [{"type": "function_call_output", "output": "7"}]}, "input[0].call_id: must be"),
        (
            {"input": [{"type": "function_call_output", "call_id": "c"}]},
            "input[0].output: must be a text or a list",
        ),
        ({"input": [{"type": "function_call", "call_id": "c", "name": 5}]}, "input[0].name: must"),
        ({"input": [{"type": "function_call", "call_id": [], "name": "f"}]}, "input[0].call_id"),
        ({"text": {"format": {"type": 5}}}, "the format '5' is not known"),
        ({"temperature": 9}, "temperature"),
    ],
)
async def test_what_cannot_be_translated_is_named(
    store: Store, asked: dict[str, Any], named: str
) -> None:
    async with running(store) as world:
        body = {"model": "m", "input": "x", **asked}
        answer = await world.http.post("/v1/responses", json=body)
        assert answer.status_code == 400
        assert named in answer.json()["error"]["message"]
        assert world.upstream.bodies == []


def test_a_request_becomes_a_chat_request() -> None:
    image = {"type": "input_image", "image_url": URL, "detail": "low"}
    named: Any = {"mode": "required", "tools": [{"type": "function", "name": "stock"}]}
    body = {
        "model": "m",
        "stream": True,
        "temperature": 0.5,
        "top_k": 3,
        "tools": [STOCK, {**STOCK, "name": "other"}],
        "tool_choice": {"type": "allowed_tools", **named},
        "reasoning": {"effort": "low"},
        "text": {"verbosity": "low", "format": {"type": "json_object"}},
        "max_output_tokens": 9,
        "include": ["message.output_text.logprobs"],
        "metadata": {"a": "b"},
        "store": True,
    }
    part = {"type": "input_text", "text": "What is it?"}
    system = {"role": "developer", "content": "a"}
    chat = to_chat(body, [system, {"role": "user", "content": [part, image]}])
    assert chat == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "top_k": 3,
        "tools": [
            {
                "type": "function",
                "function": {name: STOCK[name] for name in STOCK if name != "type"},
            }
        ],
        "tool_choice": "required",
        "reasoning_effort": "low",
        "verbosity": "low",
        "response_format": {"type": "json_object"},
        "max_tokens": 9,
        "logprobs": True,
        "messages": [
            {"role": "system", "content": "a"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is it?"},
                    {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
                ],
            },
        ],
    }


def test_calls_before_a_result_are_one_message() -> None:
    calls = [
        {"type": "function_call", "call_id": id, "name": "f", "arguments": "{}"} for id in "ab"
    ]
    results = [{"type": "function_call_output", "call_id": id, "output": id} for id in "ab"]
    thought = {"type": "reasoning", "summary": []}
    said = {"type": "message", "role": "assistant", "content": "Let me see."}
    messages = messages_of([thought, said, *calls, *results])
    assert [message["role"] for message in messages] == ["assistant", "tool", "tool"]
    assert messages[0]["content"] == "Let me see."
    assert [call["id"] for call in messages[0]["tool_calls"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("end", "status", "details"),
    [
        ("stop", "completed", None),
        ("length", "incomplete", {"reason": "max_output_tokens"}),
        ("content_filter", "incomplete", {"reason": "content_filter"}),
    ],
)
def test_the_end_of_an_answer(end: str, status: str, details: Any) -> None:
    writer = ResponseWriter("resp_1", {"model": "m"})
    logprobs = {"content": [{"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": []}]}
    message = {"role": "assistant", "content": "a", "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": end, "logprobs": logprobs}
    writer.read({"model": "real", "choices": [choice]})
    response = writer.response
    assert (response["status"], response["incomplete_details"]) == (status, details)
    assert response["model"] == "real"
    assert response["usage"] is None, "tokens that nobody has told"
    assert response["output"][0]["content"] == [
        {"type": "output_text", "text": "a", "annotations": [], "logprobs": logprobs["content"]}
    ]


def test_calls_are_told_apart_by_their_ids() -> None:
    """Some endpoints give every call the index 0."""
    writer = ResponseWriter("resp_1", {"model": "m"})
    for id, text in (("a", "{"), ("", "}"), ("b", "[]")):
        function = {"name": "f", "arguments": text} if id else {"arguments": text}
        call = {"index": 0, "id": id, "function": function}
        writer.take({"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]})
    writer.close()
    assert [(item["call_id"], item["arguments"]) for item in writer.response["output"]] == [
        ("a", "{}"),
        ("b", "[]"),
    ]


async def test_a_key_reads_its_own_users_responses(store: Store) -> None:
    async with running(store) as world:
        ada, bob = (make_key(store, users=[user])[1] for user in ("ada", "bob"))
        response = await world.sdk(ada).responses.create(model="m", input="x")
        assert (await world.sdk(ada).responses.retrieve(response.id)).id == response.id
        for call in ("retrieve", "delete", "cancel"):
            with pytest.raises(openai.NotFoundError):
                await getattr(world.sdk(bob).responses, call)(response.id)
