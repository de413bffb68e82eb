"""Streams: what goes out before their end, and what is kept by then."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn

from hydra_llm.gateway.upstream import UpstreamError
from hydra_llm.store.store import Store

from .conftest import TAGS, records_of, running, streamed

pytestmark = pytest.mark.anyio

MESSAGES: list[Any] = [{"role": "user", "content": "the battle for the bridge in winter"}]
FEEDBACK = "/v1/feedback"


def sent(**more: Any) -> dict[str, Any]:
    return {"model": "m", "user": "ada", "stream": True, "messages": MESSAGES, **more}


def data_of(event: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(event.removeprefix("data: "))
    return data


@pytest.mark.parametrize("more", [{}, {"stream_options": {"include_usage": True}}])
async def test_a_true_stream_tells_of_itself_before_its_end(
    store: Store, more: dict[str, Any]
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store) as world:
        completions = world.sdk().chat.completions
        answer = await completions.with_raw_response.create(
            model="m", messages=MESSAGES, user="ada", stream=True, **more
        )
        chunks = [chunk async for chunk in answer.parse()]
        assert (
            "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            == "calm"
        )
        assert (chunks[-1].usage is not None) is bool(more), "what was asked to be last is last"
        (details,) = [
            chunk.model_extra["personalization"]
            for chunk in chunks
            if "personalization" in (chunk.model_extra or {})
        ]
        assert details["request_id"] == answer.headers["x-hydra-request-id"]
        assert (details["candidates"], details["scores_reason"]) == (1, "no-bundle")
        assert details["records"]
        assert (
            await world.http.post(FEEDBACK, json={"request_id": details["request_id"], "chosen": 0})
        ).json()["record"]
        async with completions.stream(
            model="m", messages=MESSAGES, user="ada"
        ) as helper:  # which puts the chunks together
            final = await helper.get_final_completion()
        assert (final.choices[0].message.content, final.choices[0].finish_reason) == (
            "calm",
            "stop",
        )
    async with running(store, personalization=False) as world:
        assert not any(
            "personalization" in event
            for event in [event async for event in streamed(world.app, sent())]
        )


async def test_feedback_works_after_leaving_at_the_end_of_a_stream(store: Store) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store) as world:
        id = ""
        async for event in streamed(world.app, sent()):
            if event == "data: [DONE]":
                assert store.request(id) is not None
            else:
                id = data_of(event).get("personalization", {}).get("request_id", "")


async def test_the_upstreams_own_bytes_pass_however_they_are_cut(store: Store) -> None:
    store.add_records("ada", records_of("ada"))
    chunk = {"id": "c7", "object": "chat.completion.chunk", "created": 7, "model": "other"}
    says = [
        {**chunk, "choices": [{"index": i, "delta": {"content": text}}]}
        for i, text in ((0, "für"), (1, "zwei"), (0, " eins"))
    ]
    whole = b": a comment\r\n\r\n" + b"".join(
        b"data:" + json.dumps(item).encode() + b"\r\n\r\n" for item in (*says, {"odd": []})
    )
    ends = b"data: [DONE]\n\n: and a comment\n\n"

    async with running(store) as world:
        for size in (1, 7, 10_000):

            async def cut(body: Mapping[str, Any], size: int = size) -> AsyncIterator[bytes]:
                for start in range(0, len(whole + ends), size):
                    yield (whole + ends)[start : start + size]

            world.upstream.stream = cut  # type: ignore[method-assign]
            plain = (
                await world.http.post("/v1/chat/completions", json=sent(user="unknown"))
            ).content
            assert plain == whole + ends
            answer = await world.http.post("/v1/chat/completions", json=sent())
            id = answer.headers["x-hydra-request-id"]
            # Only the id is the gateway's, so that feedback may name it.
            personal = answer.content.replace(f'"chatcmpl-{id}"'.encode(), b'"c7"')
            added = personal.removeprefix(whole).removesuffix(ends)
            assert personal == whole + added + ends
            last = data_of(added.decode())
            assert {name: last[name] for name in chunk} == chunk
            assert last["personalization"]["request_id"] == id
            request = store.request(id)
            assert request is not None
            assert [item["text"] for item in request.content["candidates"]] == ["für eins", "zwei"]


async def test_a_stream_without_an_end_is_kept_too(store: Store) -> None:
    store.add_records("ada", records_of("ada"))

    async def endless(body: Mapping[str, Any]) -> AsyncIterator[bytes]:
        yield (
            b'data: {"id": "c", "choices": [{"index": 0, "delta": {"content": "calm"}}]}\n\ndata: '
        )

    async with running(store) as world:
        world.upstream.stream = endless  # type: ignore[method-assign]
        answer = await world.http.post("/v1/chat/completions", json=sent())
        id = answer.headers["x-hydra-request-id"]
        own = answer.content.replace(f'"chatcmpl-{id}"'.encode(), b'"c"')
        assert own == b"".join([piece async for piece in endless({})])
        assert store.request(id) is not None


@pytest.mark.parametrize("user", ["ada", "unknown"])
async def test_an_empty_stream_is_an_error(store: Store, user: str) -> None:
    store.add_records("ada", records_of("ada"))

    async def empty(body: Mapping[str, Any]) -> AsyncIterator[bytes]:
        for piece in ():
            yield piece

    async with running(store) as world:
        world.upstream.stream = empty  # type: ignore[method-assign]
        assert (
            await world.http.post("/v1/chat/completions", json=sent(user=user))
        ).status_code == 502


async def test_a_pick_that_ended_in_plain_fallback_says_so(
    store: Store, bundles: dict[str, Path]
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], candidates=2) as world:
        world.upstream.faults = [UpstreamError(400, "too long"), UpstreamError(400, "too long")]
        answer = await world.sdk().chat.completions.with_raw_response.create(
            model="m", messages=MESSAGES, user="ada", stream=True
        )
        assert answer.headers["x-hydra-personalized"] == "true", (
            "the header was sent before the fallback"
        )
        chunks = [chunk async for chunk in answer.parse()]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) in TAGS.labels
        assert chunks[-1].model_extra is not None
        assert chunks[-1].model_extra["personalization"] == {
            "personalized": False,
            "reason": "upstream-refused",
        }


@asynccontextmanager
async def on_loopback(app: Any) -> AsyncIterator[str]:
    """An application behind the real server; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        task = asyncio.create_task(server.serve([listening]))
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        await task


@pytest.mark.parametrize("user", ["ada", "unknown"])
async def test_a_fault_within_a_stream_cuts_it_without_its_message(
    store: Store, caplog: pytest.LogCaptureFixture, user: str
) -> None:
    quoted = "".join(
        ["marm", "alade"]
    )  # a traceback shows lines of code, which may not say it here
    store.add_records("ada", records_of("ada"))

    async def breaks(body: Mapping[str, Any]) -> AsyncIterator[bytes]:
        yield b'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'
        raise RuntimeError(quoted)

    async with (
        running(store) as world,
        on_loopback(world.app) as url,
        httpx2.AsyncClient(base_url=url) as http,
    ):
        world.upstream.stream = breaks  # type: ignore[method-assign]
        with pytest.raises(httpx2.RemoteProtocolError):
            await http.post("/v1/chat/completions", json=sent(user=user))
        assert (await http.get("/health/liveness")).status_code == 200
    assert "RuntimeError" in caplog.text
    assert "Exception in ASGI application" in caplog.text, "the server's own log is looked at"
    assert quoted not in caplog.text
