"""Upstreams that fail in every way; a database that is restarted under load, hangs or is down."""

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import with_postgres

from hydra_llm.errors import SettingsError, StoreError
from hydra_llm.gateway.auth import make_key
from hydra_llm.gateway.embedded import open_upstream
from hydra_llm.gateway.upstream import HttpUpstream
from hydra_llm.llm.endpoint import Endpoint
from hydra_llm.store.store import Store
from tests.waiting import FOREVER

from .conftest import World, records_of, running

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


def whole(status: int, body: bytes, *headers: str) -> Answer:
    """A complete HTTP answer."""

    async def answer(out: asyncio.StreamWriter) -> None:
        lines = [
            f"HTTP/1.1 {status} X",
            "content-type: application/json",
            f"content-length: {len(body)}",
            *headers,
        ]
        out.write("\r\n".join([*lines, "", ""]).encode() + body)
        await out.drain()

    return answer


GOOD = json.dumps(
    {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "good"},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
).encode()


async def hang(out: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def hang_up(out: asyncio.StreamWriter) -> None:
    out.close()


async def half_an_answer(out: asyncio.StreamWriter) -> None:
    out.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n"
        + GOOD[:40]
    )
    await out.drain()
    out.close()


def event(text: str, end: str | None = None) -> bytes:
    """An event of a stream."""
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": end}
    chunk = {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [choice],
    }
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def framed(*pieces: bytes) -> bytes:
    """Pieces of a body of unknown length; an empty one ends it."""
    return b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces)


def stream_that(*goes_on: bytes | Answer) -> Answer:
    """A stream that begins well and then sends these bytes, or does this."""

    async def answer(out: asyncio.StreamWriter) -> None:
        out.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding:"
            b" chunked\r\n\r\n" + framed(event("half "))
        )
        for then in goes_on:
            await out.drain()
            if isinstance(then, bytes):
                out.write(then)
            else:
                await then(out)
        await out.drain()

    return answer


PATIENCE = 5.0
"""Seconds that an upstream has to answer where it must be able to on a busy machine."""


@asynccontextmanager
async def upstream_of(*answers: Answer, patience: float = PATIENCE) -> AsyncIterator[HttpUpstream]:
    """A real endpoint on loopback that gives these answers in turn, the last one for ever."""
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(
                    (
                        int(line[15:])
                        for line in head.decode().lower().split("\r\n")
                        if line.startswith("content-length:")
                    ),
                    0,
                )
                await reader.readexactly(length)
                await (left.pop(0) if len(left) > 1 else left[0])(writer)
                if writer.is_closing():
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", "secret-of-the-server")
    upstream = HttpUpstream(endpoint, timeout=patience)
    yield upstream
    await upstream.aclose()
    server.close()


MESSAGES: list[Any] = [{"role": "user", "content": "the battle for the bridge"}]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (
            whole(
                429,
                b'{"error": {"message": "slow down"}}',
                "retry-after: 3",
                "retry-after-ms: 2900",
            ),
            openai.RateLimitError,
        ),
        (whole(500, b'{"error": {"message": "broken"}}'), openai.InternalServerError),
        (whole(500, b"<html>"), openai.InternalServerError),
        (whole(401, b'{"error": {"message": "wrong key"}}'), openai.AuthenticationError),
        (whole(302, b"", "location: http://127.0.0.1:1/"), openai.InternalServerError),
        (whole(200, b"garbage"), openai.InternalServerError),
        (whole(200, b"[]"), openai.InternalServerError),
        (whole(200, b'{"choices": []}'), openai.InternalServerError),
        (hang, openai.InternalServerError),
        (hang_up, openai.InternalServerError),
        (half_an_answer, openai.InternalServerError),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("user", [pytest.param("unknown", marks=pytest.mark.slow), "ada"])
async def test_a_broken_upstream_is_the_sdks_own_error(
    store: Store, bundles: dict[str, Path], answer: Answer, error: type[Exception], user: str
) -> None:
    store.add_records("ada", records_of("ada"))
    async with (
        # a hanging upstream is late however little time it has
        upstream_of(answer, patience=0.2 if answer is hang else PATIENCE) as upstream,
        running(store, bundles["tags"], candidates=2, deadline=FOREVER) as world,
    ):
        world.app.state.gateway.upstream = upstream
        with pytest.raises(error) as raised:
            await world.sdk().chat.completions.create(model="m", messages=MESSAGES, user=user)
        assert "secret-of-the-server" not in str(raised.value)
        if error is openai.RateLimitError:
            assert isinstance(raised.value, openai.RateLimitError)
            assert raised.value.response.headers["retry-after"] == "3"
            assert raised.value.response.headers["retry-after-ms"] == "2900"


async def test_an_error_in_another_shape_goes_out_in_openais(store: Store) -> None:
    for content in (
        b'{"error": "no such model"}',
        b'{"error": ["no such model"]}',
        b'{"detail": "no such model"}',
        b'"no such model"',
    ):
        async with upstream_of(whole(404, content)) as upstream, running(store) as world:
            world.app.state.gateway.upstream = upstream
            with pytest.raises(openai.NotFoundError, match="no such model") as raised:
                await world.sdk().chat.completions.create(model="m", messages=MESSAGES)
            assert isinstance(raised.value.body, dict)
            assert raised.value.body["type"] == "not_found_error"
            assert "no such model" in raised.value.body["message"]


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(hang, id="hangs", marks=pytest.mark.slow),
        pytest.param(hang_up, id="hangs up"),
        pytest.param(half_an_answer, id="half an answer"),
        pytest.param(whole(200, b"{}"), id="no choices"),
    ],
)
async def test_one_good_candidate_is_enough(
    store: Store, bundles: dict[str, Path], bad: Answer
) -> None:
    store.add_records("ada", records_of("ada"))
    async with (
        upstream_of(whole(200, GOOD), bad) as upstream,
        running(store, bundles["titles"], candidates=3, deadline=FOREVER) as world,
    ):
        world.app.state.gateway.upstream = upstream
        completion = await world.sdk().chat.completions.create(
            model="m", messages=MESSAGES, user="ada"
        )
        assert completion.choices[0].message.content == "good"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_pooled_connection_closed_upstream_costs_no_answer(
    store: Store, stream: bool
) -> None:
    good = stream_that(framed(event("whole", "stop"), b"")) if stream else whole(200, GOOD)
    async with (
        upstream_of(good, hang_up, good, hang_up, hang_up, good) as upstream,
        running(store) as world,
    ):
        world.app.state.gateway.upstream = upstream

        async def ask() -> None:
            completion = await world.sdk().chat.completions.create(
                model="m", messages=MESSAGES, stream=stream
            )
            if stream:
                assert [chunk.choices[0].delta.content async for chunk in completion] == [
                    "half ",
                    "whole",
                ]

        await ask()
        await ask()  # the second one met a closed door, and was let in by another
        with pytest.raises(openai.APIError, match="cannot be reached"):  # twice is no coincidence
            await ask()
        await ask()


async def collect_stream(client: openai.AsyncOpenAI, texts: list[str | None]) -> None:
    """Append each chunk's text as it arrives."""
    async for chunk in await client.chat.completions.create(
        model="m", messages=MESSAGES, stream=True, user="ada"
    ):
        texts.append(chunk.choices[0].delta.content)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        pytest.param(stream_that(hang_up), "cannot be reached", id="hangs up"),
        pytest.param(
            stream_that(hang), "did not answer in time", id="hangs", marks=pytest.mark.slow
        ),
        pytest.param(stream_that(b"zz\r\ngarbage"), "cannot be reached", id="garbage for HTTP"),
        pytest.param(
            stream_that(framed(b"<html>garbage</html>\n\n", b"")),
            "ended before its answer",
            id="garbage for events",
        ),
        pytest.param(stream_that(framed(b"")), "ended before its answer", id="stops"),
    ],
)
async def test_half_a_stream_ends_with_an_error_that_the_sdk_raises(
    store: Store, answer: Answer, error: str
) -> None:
    """It is the last event, within the upstream's timeout, and the incomplete answer takes no
    feedback.
    """
    store.add_records("ada", records_of("ada"))
    async with upstream_of(answer) as upstream, running(store) as world:
        world.app.state.gateway.upstream = upstream
        texts: list[str | None] = []
        with pytest.raises(openai.APIError, match=error):
            await asyncio.wait_for(collect_stream(world.sdk(), texts), FOREVER)
        assert texts == ["half "]
        export = store.export_user("ada")
        assert export is not None
        assert export["requests"] == []


@pytest.mark.parametrize(
    "ending",
    [(event("whole", "stop"), b""), (event("whole"), b"data: [DO", b"NE]\n\n", b"")],
    ids=["finish", "DONE"],
)
async def test_a_stream_has_ended_with_a_reason_or_a_mark(
    store: Store, ending: tuple[bytes, ...]
) -> None:
    async with upstream_of(stream_that(framed(*ending))) as upstream, running(store) as world:
        world.app.state.gateway.upstream = upstream
        texts: list[str | None] = []
        await collect_stream(world.sdk(), texts)
        assert texts == ["half ", "whole"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"garbage", "something else than a stream"),
        (b"<html><title>Busy</title>", "a web page, 'Busy'"),
        (b'{"error": "no streams today"}', "no streams today"),
        (b"{}", "without choices"),
        (GOOD, "something else than a stream"),
    ],
)
async def test_an_upstream_reply_that_is_no_stream_is_an_error(
    store: Store, body: bytes, message: str
) -> None:
    async with upstream_of(whole(200, body)) as upstream, running(store) as world:
        world.app.state.gateway.upstream = upstream
        with pytest.raises(openai.InternalServerError, match=message):
            await collect_stream(world.sdk(), [])


def test_an_endpoints_url_and_key_come_from_the_server_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    upstream = open_upstream("openai:m@http://127.0.0.1:9/v1", None, timeout=1)
    assert isinstance(upstream, HttpUpstream)
    assert upstream.endpoint == Endpoint("http://127.0.0.1:9/v1", "k")
    upstream = open_upstream("openai:@cf/m@http://127.0.0.1:9/v1", None, timeout=1)
    assert isinstance(upstream, HttpUpstream)
    assert upstream.endpoint == Endpoint("http://127.0.0.1:9/v1", "k")
    monkeypatch.setenv("OPENAI_BASE_URL", "user:secret@host/v1")
    with pytest.raises(SettingsError, match="OPENAI_BASE_URL is no URL of an endpoint: it begins"):
        open_upstream("openai:m", None, timeout=1)


@contextmanager
def postgresql() -> Iterator[tuple[Store, Path, str]]:
    """A store with ada in a PostgreSQL of this test alone, its programs, and where its data lie."""
    programs = with_postgres.binaries()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    with with_postgres.server(programs) as environment:
        store = Store(environment["TEST_POSTGRES_URL"])
        store.add_records("ada", records_of("ada"))
        yield store, programs, environment["TEST_POSTGRES_DATA"]
        store.close()


async def recovery_of(world: World) -> None:
    """Ask until an answer is personal again, with nothing done to the gateway."""
    end = time.monotonic() + FOREVER
    while (await world.ask("x")).headers["x-hydra-personalized"] != "true":
        assert time.monotonic() < end, "it does not recover"
        await asyncio.sleep(0.1)


@pytest.mark.slow
async def test_a_database_restarted_under_load_costs_no_answer(bundles: dict[str, Path]) -> None:
    with postgresql() as (store, programs, data):
        async with running(store, bundles["tags"], candidates=2) as world:
            world.http.headers["authorization"] = f"Bearer {make_key(store, admin=True)[1]}"
            assert (
                await world.ask("x")
            ).status_code == 200  # whoever comes in for the first time while it is down has to wait
            restarting = asyncio.create_task(
                asyncio.to_thread(with_postgres.restart, programs, data)
            )
            requests, added = 0, 0
            while not restarting.done() or requests < 30:
                answer = await world.ask("the battle for the bridge")
                assert answer.status_code == 200, answer.text
                requests += 1
                sent = {"records": [{"id": f"new{requests}", "input": "a", "output": "calm"}]}
                written = await world.http.post("/v1/users/ada/records", json=sent)
                assert written.status_code in (200, 503)
                added += written.status_code == 200
            await restarting
            await recovery_of(world)  # the last answers may still be of before the database was up
            assert len(store.records("ada")[1]) >= 20 + added, (
                "nothing that was acknowledged is lost"
            )


@pytest.mark.slow
async def test_a_hanging_database_costs_seconds_once_and_no_answer(
    bundles: dict[str, Path],
) -> None:
    """Stopped, not killed: the network still acknowledges, and no driver notices."""
    with postgresql() as (store, _, data):
        async with running(store, bundles["tags"], candidates=2, store_timeout=1.0) as world:
            await recovery_of(world)  # the first answer may take longer than the store may
            of_it = processes_of(data)
            for pid in of_it:
                os.kill(pid, signal.SIGSTOP)
            try:
                answers = await asyncio.wait_for(
                    asyncio.gather(*(world.ask("x") for _ in range(60))), FOREVER
                )
            finally:
                for pid in of_it:
                    os.kill(pid, signal.SIGCONT)
            assert {answer.status_code for answer in answers} == {200}
            assert {answer.headers["x-hydra-personalized"] for answer in answers} == {
                "false; reason=store-failure"
            }
            await recovery_of(world)


async def test_keyless_caller_only_passes_through_while_store_is_down(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store) as world:
        assert (await world.ask("x")).headers["x-hydra-personalized"] == "true"
        _, secret = make_key(store, admin=True)
        with_key = {"authorization": f"Bearer {secret}"}
        assert (await world.http.get("/v1/users/ada/records", headers=with_key)).status_code == 200

        def down(*_: object) -> Any:
            raise StoreError("down")

        with monkeypatch.context() as outage:
            outage.setattr(store, "has_keys", down)
            outage.setattr(store, "key", down)
            answer = await world.ask("x")
            assert (answer.status_code, answer.headers["x-hydra-personalized"]) == (
                200,
                "false; reason=store-failure",
            )
            assert len(world.upstream.bodies[-1]["messages"]) == 1
            for method, path in (
                ("GET", "/users/ada/records"),
                ("DELETE", "/users/ada"),
                ("POST", "/feedback"),
            ):
                assert (await world.http.request(method, f"/v1{path}")).status_code == 503
            assert (await world.http.get("/v1/models")).status_code == 200
            assert (
                await world.http.get("/v1/models", headers={"authorization": "Bearer new"})
            ).status_code == 503
            assert (
                await world.http.get("/v1/users/ada/records", headers=with_key)
            ).status_code == 200, "known by a key of its own"
        assert (await world.ask("x")).status_code == 401
        assert store.users() == ["ada"]


def processes_of(data: str) -> list[int]:
    """A PostgreSQL's first process and those that it has made."""
    first = (Path(data) / "postmaster.pid").read_text().split()[0]
    children = subprocess.run(
        ["pgrep", "-P", first], capture_output=True, check=True
    ).stdout.split()
    return [int(first), *map(int, children)]
