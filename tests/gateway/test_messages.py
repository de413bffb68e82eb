"""Anthropic's Messages API, through its official SDK: replies, events, tools, keys, errors."""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import anthropic
import httpx2
import pytest

from hydra_llm.gateway.auth import make_key
from hydra_llm.gateway.chunks import event, role_chunk
from hydra_llm.gateway.messages import MessageWriter, to_chat
from hydra_llm.gateway.schemas import ApiError
from hydra_llm.gateway.upstream import UpstreamError
from hydra_llm.llm.endpoint import Endpoint
from hydra_llm.prompt import PER_PART
from hydra_llm.store.store import Store

from .conftest import Scripted, World, records_of, running
from .test_responses import CALL, Calling, calling

pytestmark = pytest.mark.anyio
QUESTION = "the battle for the bridge in winter"
ASK: Any = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": QUESTION}]}
ADA: Any = {"metadata": {"user_id": "ada"}}
SCHEMA = {"type": "object", "properties": {"tea": {"type": "string"}}}
STOCK: Any = {"name": "stock", "description": "How much there is", "input_schema": SCHEMA}


def claude(world: World, key: str = "any", **headers: str) -> anthropic.AsyncAnthropic:
    transport = httpx2.ASGITransport(world.app, raise_app_exceptions=False)
    return anthropic.AsyncAnthropic(
        api_key=key,
        base_url="http://localhost",
        http_client=httpx2.AsyncClient(transport=transport),
        max_retries=0,
        default_headers=headers,
    )


async def test_a_message_is_as_personal_as_chat(either: Store) -> None:
    either.add_records("ada", records_of("ada"))
    async with running(either) as world:
        reply = await claude(world).messages.with_raw_response.create(
            **ASK, **ADA, system=[{"type": "text", "text": "Be brief."}], stop_sequences=["."]
        )
        message: Any = await reply.parse()
        chat = (await world.ask(QUESTION)).json()
        assert reply.headers["x-hydra-personalized"] == "true"
        assert message.id == f"msg_{reply.headers['x-hydra-request-id']}"
        assert message.content[0].text == chat["choices"][0]["message"]["content"]
        assert (message.stop_reason, message.usage.input_tokens) == ("end_turn", 10)
        assert message.personalization["records"] == chat["personalization"]["records"]
        sent, of_chat = world.upstream.bodies
        assert sent["messages"] == [
            {"role": "system", "content": "Be brief."},
            *of_chat["messages"],
        ]
        assert (sent["max_tokens"], sent["stop"]) == (9, ["."])
        assert "metadata" not in sent, "Claude's only"
        assert "ada" not in json.dumps(sent)
        feedback = {"request_id": message.id, "edited": "loud"}
        assert (await world.http.post("/v1/feedback", json=feedback)).status_code == 200


@pytest.mark.parametrize("samples", [1, 3])
async def test_the_sdk_reads_the_stream(
    store: Store, bundles: dict[str, Any], samples: int
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], samples=samples) as world:
        client = claude(world, **{"x-hydra-user": "ada"})
        async with client.messages.stream(**ASK) as stream:
            pieces = [text async for text in stream.text_stream]
            message: Any = await stream.get_final_message()
        assert "".join(pieces) == message.content[0].text != ""
        assert message.stop_reason == "end_turn"
        assert message.usage.output_tokens > 0
        assert message.id.startswith("msg_req_")


async def test_the_events_are_those_of_anthropic(store: Store) -> None:
    async with running(store) as world:
        body = {**ASK, "tools": [STOCK], "stream": True}
        text = (await calling(world).http.post("/v1/messages", json=body)).text
        events = [json.loads(part.split("data: ")[1]) for part in text.split("\n\n") if part]
        assert [event["type"] for event in events] == [
            *("message_start", "content_block_start", "content_block_delta"),
            *("content_block_stop", "message_delta", "message_stop"),
        ]
        block = {"type": "tool_use", "id": "call_1", "name": "stock", "input": {}}
        assert events[1]["content_block"] == block
        assert events[2]["delta"] == {"type": "input_json_delta", "partial_json": '{"a": 1}'}
        assert events[4]["delta"]["stop_reason"] == "tool_use"
        assert events[4]["usage"] == {"input_tokens": 5, "output_tokens": 2}


async def test_calls_of_tools_and_their_results(store: Store) -> None:
    async with running(store) as world:
        client = claude(calling(world))
        asked = {**ASK, "tools": [STOCK]}
        first = await client.messages.create(**asked, tool_choice={"type": "any"})
        assert first.stop_reason == "tool_use"
        use: Any = first.content[0]
        assert (use.id, use.name, use.input) == ("call_1", "stock", {"a": 1})
        assert world.upstream.bodies[0]["tool_choice"] == "required"
        function = {"name": "stock", "description": "How much there is", "parameters": SCHEMA}
        assert world.upstream.bodies[0]["tools"] == [{"type": "function", "function": function}]
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "7", "is_error": True}
        asked["messages"] = [
            *ASK["messages"],
            {"role": "assistant", "content": [use.model_dump(exclude_none=True)]},
            {"role": "user", "content": [result, {"type": "text", "text": "Well?"}]},
        ]
        second = await client.messages.create(**asked)
        assert [block.type for block in second.content] == ["thinking", "text"]
        assert second.content[1].text == "plenty"  # type: ignore[union-attr]
        _, called, answer, question = world.upstream.bodies[-1]["messages"]
        assert called == {"role": "assistant", "content": None, "tool_calls": [CALL]}
        assert answer == {"role": "tool", "tool_call_id": "call_1", "content": "Error: 7"}
        assert question == {"role": "user", "content": "Well?"}
        # what the model thought goes back to the client, and not to the upstream
        asked["messages"].append({"role": "assistant", "content": second.content})
        asked["messages"].append({"role": "user", "content": "More?"})
        sent = json.loads(json.dumps(asked, default=lambda block: block.model_dump()))
        assert (await world.http.post("/v1/messages", json=sent)).status_code == 200
        assert world.upstream.bodies[-1]["messages"][-2]["content"] == "plenty"


async def test_a_key_may_be_in_the_header_of_anthropic(store: Store) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store) as world:
        _, secret = make_key(store, users=["ada"])
        reply = await claude(world, secret).messages.with_raw_response.create(**ASK)
        assert reply.headers["x-hydra-personalized"] == "true"
        with pytest.raises(anthropic.AuthenticationError) as refused:
            await claude(world, "hk-nope").messages.create(**ASK)
        error = refused.value.body
        assert isinstance(error, dict)
        assert error["type"] == "error"
        assert error["error"]["type"] == "authentication_error"
        _, of_two = make_key(store, users=["ada", "eve"])
        with pytest.raises(anthropic.PermissionDeniedError):
            await claude(world, of_two).messages.create(**ASK, metadata={"user_id": "bob"})
        # a proxy may send a key of its own in the other header: that one comes first
        both = {"x-api-key": secret, "authorization": "Bearer hk-nope"}
        answer = await world.http.post("/v1/messages", json=ASK, headers=both)
        assert answer.status_code == 401


async def test_errors_have_the_shape_of_anthropic(store: Store) -> None:
    class Cut(Scripted):
        async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[bytes]:
            yield event(role_chunk("c", "m", 1))
            raise UpstreamError(502, "the line was cut")

    async with running(store) as world:
        world.upstream.faults = [UpstreamError(429, "too many", {"retry-after": "7"})]
        with pytest.raises(anthropic.RateLimitError, match="too many") as refused:
            await claude(world).messages.create(**ASK)
        assert refused.value.response.headers["retry-after"] == "7"
        world.app.state.gateway.upstream = Cut()
        with pytest.raises(anthropic.APIStatusError, match="the line was cut"):
            async with claude(world).messages.stream(**ASK) as stream:
                await stream.get_final_message()
        for body in ({"model": "m"}, {**ASK, "max_tokens": 0}, []):
            answer = await world.http.post("/v1/messages", json=body)
            assert answer.status_code == 400
            assert answer.json()["type"] == "error"
            assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_tokens_are_counted_by_rule_of_thumb(store: Store) -> None:
    async with running(store) as world:
        asked: Any = {"model": "m", "messages": [{"role": "user", "content": "x" * 350}]}
        count = await claude(world).messages.count_tokens(**asked)
        assert count.input_tokens == 100 + 8
        with_tools = await claude(world).messages.count_tokens(**asked, tools=[STOCK])
        assert with_tools.input_tokens > count.input_tokens
        source = {"type": "base64", "media_type": "image/png", "data": "A" * 400_000}
        picture = [{"type": "image", "source": source}, {"type": "text", "text": "x" * 350}]
        asked["messages"] = [{"role": "user", "content": picture}]
        with_picture = await claude(world).messages.count_tokens(**asked)
        assert with_picture.input_tokens == count.input_tokens + PER_PART
        assert world.upstream.bodies == []


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"tools": [{"type": "web_search_20250305"}]}, "tools[0]: the tool 'web_search_20250305'"),
        ({"mcp_servers": [{}]}, "mcp_servers: this is not supported"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "hologram"}]}]},
            "messages[0].content[0]: a block of the type 'hologram'",
        ),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content"),
        ({"tools": [STOCK], "tool_choice": {"type": "best"}}, "tool_choice: this choice"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name: must be a text"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "c"}]}]},
            "messages[0].content[0]: a block of the type 'tool_use'",
        ),
        ({"temperature": 9}, "temperature"),
    ],
)
async def test_what_cannot_be_translated_is_named(
    store: Store, asked: dict[str, Any], named: str
) -> None:
    async with running(store) as world:
        answer = await world.http.post("/v1/messages", json={**ASK, **asked})
        assert answer.status_code == 400
        assert named in answer.json()["error"]["message"]
        assert world.upstream.bodies == []


def test_images_documents_and_schemas_are_translated() -> None:
    data = {"type": "base64", "media_type": "image/png", "data": "AA=="}
    pdf = {"type": "base64", "media_type": "application/pdf", "data": "BB=="}
    blocks = [
        {"type": "text", "text": "What is it?"},
        {"type": "image", "source": data},
        {"type": "image", "source": {"type": "url", "url": "https://a/b.png"}},
        {"type": "document", "source": pdf, "title": "a.pdf"},
    ]
    schema = {"type": "json_schema", "schema": SCHEMA}
    chat = to_chat(
        {
            "model": "m",
            "messages": [{"role": "user", "content": blocks}],
            "output_config": {"format": schema},
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "top_k": 3,
        }
    )
    assert chat == {
        "model": "m",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": SCHEMA},
        },
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is it?"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                    {"type": "image_url", "image_url": {"url": "https://a/b.png"}},
                    {
                        "type": "file",
                        "file": {
                            "filename": "a.pdf",
                            "file_data": "data:application/pdf;base64,BB==",
                        },
                    },
                ],
            }
        ],
    }


@pytest.mark.parametrize(
    ("end", "reason"),
    [("stop", "end_turn"), ("length", "max_tokens"), ("content_filter", "refusal")],
)
def test_the_end_of_an_answer(end: str, reason: str) -> None:
    writer = MessageWriter("msg_1", "m")
    message = {"role": "assistant", "content": "a"}
    writer.read({"model": "real", "choices": [{"message": message, "finish_reason": end}]})
    assert writer.message["stop_reason"] == reason
    assert writer.message["content"] == [{"type": "text", "text": "a"}]
    assert writer.message["model"] == "real"


def test_arguments_that_are_no_json_are_an_error() -> None:
    broken = {**CALL, "function": {"name": "stock", "arguments": "{"}}
    message = {"role": "assistant", "content": None, "tool_calls": [broken]}
    with pytest.raises(ApiError, match="no JSON object"):
        MessageWriter("msg_1", "m").read({"choices": [{"message": message}]})


async def test_the_limit_has_the_name_that_the_endpoint_knows(store: Store) -> None:
    from hydra_llm.gateway.upstream import HttpUpstream

    for url, name in (
        ("https://api.openai.com/v1", "max_completion_tokens"),
        ("https://a.openai.azure.com/openai/v1", "max_completion_tokens"),
        ("http://localhost:11434/v1", "max_tokens"),
    ):
        upstream, scripted = HttpUpstream(Endpoint(url, "k"), timeout=1), Calling()
        upstream.complete = scripted.complete  # type: ignore[method-assign]
        async with running(store) as world:
            world.app.state.gateway.upstream = upstream
            await claude(world).messages.create(**ASK)
            await world.sdk().responses.create(model="m", input="x", max_output_tokens=9)
        for body in scripted.bodies:
            assert {key: body[key] for key in body if key.startswith("max_")} == {name: 9}
