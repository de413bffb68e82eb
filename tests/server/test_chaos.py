"""Upstreams that fail in every way, a database that is restarted under load, and a server that is told to stop."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import with_postgres

from hydra_llm.cli.main import run
from hydra_llm.server.upstream import HttpUpstream, open_upstream
from hydra_llm.store.store import Store

from .conftest import records_of, running

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


def whole(status: int, body: bytes, *headers: str) -> Answer:
    """A complete HTTP answer."""

    async def answer(out: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(body)}", *headers]
        out.write("\r\n".join([*lines, "", ""]).encode() + body)
        await out.drain()

    return answer


GOOD = json.dumps(
    {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "good"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
).encode()


async def hang(out: asyncio.StreamWriter) -> None:
    await asyncio.sleep(30)


async def hang_up(out: asyncio.StreamWriter) -> None:
    out.close()


async def half_an_answer(out: asyncio.StreamWriter) -> None:
    out.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n" + GOOD[:40])
    await out.drain()
    out.close()


async def half_a_stream(out: asyncio.StreamWriter) -> None:
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    delta = {**chunk, "choices": [{"index": 0, "delta": {"role": "assistant", "content": "half "}, "finish_reason": None}]}
    out.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    event = b"data: " + json.dumps(delta).encode() + b"\n\n"
    out.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
    await out.drain()
    out.close()


@asynccontextmanager
async def upstream_of(*answers: Answer) -> AsyncIterator[HttpUpstream]:
    """A real endpoint on loopback that gives these answers in turn, the last one for ever."""
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next((int(line[15:]) for line in head.decode().lower().split("\r\n") if line.startswith("content-length:")), 0)
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
    upstream = HttpUpstream(f"http://127.0.0.1:{port}/v1", "secret-of-the-server", timeout=1.0)
    yield upstream
    await upstream.aclose()
    server.close()


MESSAGES: list[Any] = [{"role": "user", "content": "the battle for the bridge"}]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (whole(429, b'{"error": {"message": "slow down"}}', "retry-after: 3", "retry-after-ms: 2900"), openai.RateLimitError),
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
@pytest.mark.parametrize("user", ["nobody", "ada"])
async def test_a_broken_upstream_is_the_sdks_own_error(
    store: Store, bundles: dict[str, Path], answer: Answer, error: type[Exception], user: str
) -> None:
    store.add_records("ada", records_of("ada"))
    async with upstream_of(answer) as upstream, running(store, bundles["tags"], candidates=2, deadline=2) as world:
        world.app.state.gateway.upstream = upstream
        with pytest.raises(error) as found:
            await world.sdk().chat.completions.create(model="m", messages=MESSAGES, user=user)
        assert "secret-of-the-server" not in str(found.value)
        if error is openai.RateLimitError:
            assert isinstance(found.value, openai.RateLimitError)
            assert found.value.response.headers["retry-after"] == "3"
            assert found.value.response.headers["retry-after-ms"] == "2900"


async def test_an_error_in_another_shape_goes_out_in_openais(store: Store) -> None:
    for said in (b'{"error": "no such model"}', b'{"error": ["no such model"]}', b'{"detail": "no such model"}', b'"no such model"'):
        async with upstream_of(whole(404, said)) as upstream, running(store) as world:
            world.app.state.gateway.upstream = upstream
            with pytest.raises(openai.NotFoundError, match="no such model") as found:
                await world.sdk().chat.completions.create(model="m", messages=MESSAGES)
            assert isinstance(found.value.body, dict)
            assert found.value.body["type"] == "not_found_error"
            assert "no such model" in found.value.body["message"]


async def test_one_good_candidate_is_enough(store: Store, bundles: dict[str, Path]) -> None:
    store.add_records("ada", records_of("ada"))
    for bad in (hang, hang_up, half_an_answer, whole(200, b"{}")):
        async with upstream_of(whole(200, GOOD), bad) as upstream, running(store, bundles["titles"], candidates=3, deadline=2) as world:
            world.app.state.gateway.upstream = upstream
            made = await world.sdk().chat.completions.create(model="m", messages=MESSAGES, user="ada")
            assert made.choices[0].message.content == "good"


async def test_half_a_stream_ends_with_an_error_that_the_sdk_raises(store: Store) -> None:
    async with upstream_of(half_a_stream) as upstream, running(store) as world:
        world.app.state.gateway.upstream = upstream
        stream = await world.sdk().chat.completions.create(model="m", messages=MESSAGES, stream=True)
        heard = []

        async def listen() -> None:
            async for chunk in stream:
                heard.append(chunk.choices[0].delta.content)

        with pytest.raises(openai.APIError, match="cannot be reached"):
            await listen()
        assert heard == ["half "]


def test_an_endpoints_url_and_key_come_from_the_server_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    upstream = open_upstream("openai:m@http://127.0.0.1:9/v1", None, timeout=1)
    assert isinstance(upstream, HttpUpstream)
    assert str(upstream._client.base_url) == "http://127.0.0.1:9/v1/"


@contextmanager
def postgresql() -> Iterator[tuple[Store, Path, str]]:
    """A store with ada in a PostgreSQL of this test alone, its programs, and where its data lie."""
    programs = with_postgres.binaries()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    with with_postgres.server(programs) as found:
        store = Store(found["TEST_POSTGRES_URL"])
        store.add_records("ada", records_of("ada"))
        yield store, programs, found["TEST_POSTGRES_DATA"]
        store.close()


async def test_a_database_restarted_under_load_costs_no_answer(bundles: dict[str, Path]) -> None:
    with postgresql() as (store, programs, data):
        async with running(store, bundles["tags"], candidates=2) as world:
            assert (await world.ask("x")).status_code == 200  # whoever comes in for the first time while it is down has to wait
            restarting = asyncio.create_task(asyncio.to_thread(with_postgres.restart, programs, data))
            personal, added = [], 0
            while not restarting.done() or len(personal) < 30:
                answer = await world.ask("the battle for the bridge")
                assert answer.status_code == 200, answer.text
                personal.append(answer.headers["x-hydra-personalized"])
                sent = {"records": [{"id": f"new{len(personal)}", "input": "a", "output": "calm"}]}
                written = await world.http.post("/v1/users/ada/records", json=sent)
                assert written.status_code in (200, 503)
                added += written.status_code == 200
            assert personal[-1] == "true", "it recovers by itself"
            assert len(store.records("ada")[1]) >= 20 + added, "nothing that was acknowledged is lost"


async def test_a_database_that_hangs_costs_some_seconds_once_and_no_answer(bundles: dict[str, Path]) -> None:
    """Stopped, not killed: the network still acknowledges, and no driver notices."""
    with postgresql() as (store, _, data):
        async with running(store, bundles["tags"], candidates=2, patience=1.0) as world:
            assert (await world.ask("x")).headers["x-hydra-personalized"] == "true"
            of_it = processes_of(data)
            for pid in of_it:
                os.kill(pid, signal.SIGSTOP)
            try:
                answers = await asyncio.wait_for(asyncio.gather(*(world.ask("x") for _ in range(60))), 20)
            finally:
                for pid in of_it:
                    os.kill(pid, signal.SIGCONT)
            assert {answer.status_code for answer in answers} == {200}
            assert {answer.headers["x-hydra-personalized"] for answer in answers} == {"false; reason=store-failure"}
            for _ in range(100):
                if (await world.ask("x")).headers["x-hydra-personalized"] == "true":
                    break
                await asyncio.sleep(0.1)
            else:
                raise AssertionError("it does not recover")


def processes_of(data: str) -> list[int]:
    """A PostgreSQL's first process and those that it has made."""
    first = (Path(data) / "postmaster.pid").read_text().split()[0]
    made = subprocess.run(["pgrep", "-P", first], capture_output=True, check=True).stdout.split()
    return [int(first), *map(int, made)]


def started(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env={**os.environ, "OPENAI_API_KEY": "x"}, stderr=subprocess.PIPE)


def test_a_server_tells_which_port_it_took_and_which_bundle_it_does_not_use(tmp_path: Path, bundles: dict[str, Path]) -> None:
    for name in ("one", "other"):
        shutil.copytree(bundles["tags"], tmp_path / name)
    store = f"sqlite:///{tmp_path / 's.db'}"
    serve = [sys.executable, "-m", "hydra_llm", "serve", "--llm", "fake:echo", "--store", store]
    assert run(["bundles", "use", str(tmp_path / "one"), "--store", store]) == 0
    process = started([*serve, "--port", "0", "--bundle", str(tmp_path / "other")])
    try:
        assert process.stderr is not None
        lines = [process.stderr.readline().decode() for _ in range(3)]
        assert f"--bundle {tmp_path / 'other'} is not used: `hydra-llm bundles use` gave this store {tmp_path / 'one'}" in lines[1]
        port = int(lines[2].removeprefix("serving on http://127.0.0.1:").removesuffix("/v1\n"))
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            with suppress(httpx2.ConnectError):
                assert httpx2.get(f"http://127.0.0.1:{port}/health/readiness").status_code == 200
                break
            time.sleep(0.1)
        second = subprocess.run([*serve, "--port", str(port)], capture_output=True, text=True)
        assert (second.returncode, second.stdout) == (2, "")
        assert second.stderr.count("\n") == 1
        assert f"--host 127.0.0.1 --port {port}: Address already in use: take another" in second.stderr
    finally:
        process.terminate()
        assert process.wait(30) == 0


async def test_a_server_that_is_told_to_stop_ends_what_it_has_begun(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def slow(out: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1.0)
        await whole(200, GOOD)(out)

    async with upstream_of(slow) as upstream:
        spec = f"openai:m@{str(upstream._client.base_url).rstrip('/')}"
        command = [sys.executable, "-m", "hydra_llm", "serve", "--llm", spec, "--store", f"sqlite:///{tmp_path / 's.db'}"]
        process = started([*command, "--port", str(port)])
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            ends = time.monotonic() + 60
            while True:
                try:
                    assert (await http.get("/health/readiness")).status_code == 200
                    break
                except httpx2.ConnectError:
                    assert process.poll() is None
                    assert time.monotonic() < ends
                    await asyncio.sleep(0.1)
            asked = [asyncio.create_task(http.post("/v1/chat/completions", json={"model": "m", "messages": MESSAGES})) for _ in range(8)]
            await asyncio.sleep(0.4)
            process.send_signal(signal.SIGTERM)
            answers = await asyncio.gather(*asked)
            assert [answer.status_code for answer in answers] == [200] * 8
        assert await asyncio.to_thread(process.wait, 30) == 0
        assert process.stderr is not None
        said = process.stderr.read().decode()
        assert "requests in flight have ended" in said
        assert "Traceback" not in said
