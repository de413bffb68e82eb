"""Operating the gateway: who is let in without keys, browsers, HEAD, log lines, clients that hang
up.
"""

import asyncio
import io
import json
import logging
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from hydra_llm.errors import SettingsError
from hydra_llm.gateway.auth import Access, admin_key_given, caller_of, make_key
from hydra_llm.gateway.embedded import EmbeddedUpstream
from hydra_llm.gateway.middleware import is_local
from hydra_llm.gateway.request_log import Lines
from hydra_llm.gateway.schemas import ApiError
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.upstream import HttpUpstream, UpstreamError
from hydra_llm.llm.endpoint import Endpoint
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.store.store import Store
from tests.waiting import FOREVER, async_until

from .conftest import World, records_of, running

pytestmark = pytest.mark.anyio
ADA = "/v1/users/ada/records"


def lines(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://localhost:8000", True),
        ("http://LOCALHOST.", True),
        ("http://app.localhost", True),
        ("http://127.0.0.1:1", True),
        ("http://[::1]:8000", True),
        ("http://rebound.example:8000", False),
        ("http://localhost.rebound.example", False),
        ("http://192.168.1.5", False),
        ("http://0.0.0.0", False),
        ("http://[::1", False),
        ("null", False),
        ("", False),
    ],
)
def test_what_is_local(url: str, local: bool) -> None:
    assert is_local(url) == local


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "rebound.example:8000"},
        {"host": "192.168.1.5"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
    ],
)
async def test_without_keys_a_foreign_page_gets_nothing(
    store: Store, headers: dict[str, str]
) -> None:
    async with running(store) as world:
        one = {"records": [{"id": "1", "input": "diary", "output": "x"}]}
        assert (await world.http.post(ADA, json=one)).status_code == 200
        for method, path in (("GET", "export"), ("GET", "records"), ("POST", "records")):
            answer = await world.http.request(method, f"/v1/users/ada/{path}", headers=headers)
            assert answer.status_code == 403
            assert "diary" not in answer.text
        assert (await world.http.delete("/v1/users/ada", headers=headers)).status_code == 403
        assert (await world.http.get("/v1/models", headers=headers)).status_code == 403
        assert (await world.http.get("/metrics", headers=headers)).status_code == 403
        assert (await world.http.get("/health/liveness", headers=headers)).status_code == 200
        assert len(store.records("ada")[1]) == 1
        secret = make_key(store, admin=True)[1]
        with_key = headers | {"authorization": f"Bearer {secret}"}
        assert (await world.http.get(ADA, headers=with_key)).status_code == 200
        assert (await world.http.get("/metrics", headers=headers)).status_code == 200


async def test_browsers_need_a_setting(store: Store) -> None:
    page = {"origin": "https://app.example", "access-control-request-method": "POST"}
    asked = page | {"access-control-request-headers": "authorization,content-type"}
    allowed = "access-control-allow-origin"
    make_key(store, admin=True)
    async with running(store) as world:
        answer = await world.http.options("/v1/chat/completions", headers=asked)
        assert allowed not in answer.headers
    async with running(store, cors_origins="https://app.example, https://b.example") as world:
        answer = await world.http.options("/v1/chat/completions", headers=asked)
        assert (answer.status_code, answer.headers[allowed]) == (200, "https://app.example")
        refused = await world.http.get("/v1/models", headers={"origin": "https://app.example"})
        assert (refused.status_code, refused.headers[allowed]) == (401, "https://app.example")
        other = await world.http.options(
            "/v1/models", headers=asked | {"origin": "https://evil.example"}
        )
        assert allowed not in other.headers


async def test_an_allowed_page_needs_no_key_where_none_exists(store: Store) -> None:
    async with running(store, cors_origins="https://app.example") as world:
        answer = await world.http.get("/v1/models", headers={"origin": "https://app.example"})
        assert answer.status_code == 200


@pytest.mark.parametrize("origins", ["app.example", "https://app.example/x", "ftp://a"])
def test_an_origin_has_a_form(origins: str) -> None:
    with pytest.raises(SettingsError, match=r"serve\.cors_origins"):
        ServeSettings.checked({"cors_origins": origins})


@pytest.mark.parametrize("path", ["/health/liveness", "/health/readiness", "/v1/models", ADA])
async def test_head_is_get_without_content(store: Store, path: str) -> None:
    store.add_records("ada", records_of("ada", 1))
    async with running(store) as world:
        answers = [await world.http.request(method, path) for method in ("GET", "HEAD")]
        assert answers[0].status_code == answers[1].status_code == 200
        assert answers[0].headers["content-length"] == answers[1].headers["content-length"]
        assert answers[1].content == b""
        assert (await world.http.head("/nothing")).status_code == 404


async def test_the_admin_key_of_the_environment(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_ADMIN_KEY", "  a-long-enough-secret\n")
    access = Access(on_loopback=True, admin_key=admin_key_given())
    assert "secret" not in repr(access)
    assert caller_of(store, "Bearer a-long-enough-secret", access).admin
    for wrong in (None, "Bearer ", "Bearer a-long-enough", "Basic a-long-enough-secret"):
        with pytest.raises(ApiError, match="not valid"):
            caller_of(store, wrong, access)
    with pytest.raises(ApiError, match="not valid"):
        caller_of(store, "Bearer ", Access(on_loopback=False))


@pytest.mark.parametrize("key", ["short", "with a blank in between", "tägliche-schlüssel-123"])
def test_an_admin_key_has_a_form(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_ADMIN_KEY", key)
    with pytest.raises(SettingsError, match="HYDRA_ADMIN_KEY is no key") as error:
        admin_key_given()
    assert key not in str(error.value)


async def test_a_line_for_each_request(
    store: Store, bundles: dict[str, Path], log: io.StringIO
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"]) as world:
        personal = await world.ask("a secret wish")
        await world.ask("a secret wish", user=None)
        await world.ask("a secret wish", user=None, stream=True)
        await world.ask("a secret wish", stream=True)
        await world.ask("a secret wish", n=0)
        await world.http.get("/v1/users/ada/export")
        await world.http.get("/nowhere/ada")
    written = lines(log)
    told = [(line["method"], line["route"], line["status"]) for line in written]
    chat = ("POST", "/v1/chat/completions")
    assert told == [
        *[(*chat, 200)] * 4,
        (*chat, 400),
        ("GET", "/v1/users/{user}/export", 200),
        ("GET", "unknown", 404),
    ]
    assert all(line["time"] and line["seconds"]["total"] >= 0 for line in written)
    assert written[0]["id"] == personal.json()["personalization"]["request_id"]
    assert [line.get("reason") for line in written[:4]][1:3] == ["no-user"] * 2
    assert written[0]["reason"] == written[3]["reason"] == "personal"
    assert written[0]["candidates"] == len(personal.json()["personalization"]["scores"])
    usage = personal.json()["usage"]
    assert written[0]["prompt_tokens"] == usage["prompt_tokens"]
    assert written[0]["completion_tokens"] == usage["completion_tokens"]
    assert {"retrieve", "rerank", "prepare", "upstream", "adapt"} <= written[0]["seconds"].keys()
    for content in ('"ada"', "/ada", "secret", "wish"):
        assert content not in log.getvalue()


async def test_a_line_as_text_and_none(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("hydra_llm.gateway.requests")
    with caplog.at_level(logging.INFO, logger.name):
        async with running(store) as world:
            await world.ask("hello", user=None)
    text = Lines(as_json=False).format(caplog.records[-1])
    assert " POST /v1/chat/completions 200 req_" in text
    assert "reason=no-user" in text
    assert " total=" in text
    with caplog.at_level(logging.WARNING, logger.name):
        async with running(store) as world:
            count = len(caplog.records)
            await world.ask("hello", user=None)
            assert len(caplog.records) == count


async def hang_up(app: FastAPI, body: dict[str, Any], when: asyncio.Event) -> None:
    """A request whose client hangs up once `when` is set."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        await when.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    path = "/v1/chat/completions"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode()}
    scope |= {"query_string": b"", "http_version": "1.1", "asgi": {"version": "3.0"}}
    scope |= {"headers": [(b"content-type", b"application/json")], "scheme": "http"}
    await asyncio.wait_for(app(scope | {"server": ("g", 80)}, receive, send), FOREVER)


def silent_upstream(world: World) -> tuple[list[str], asyncio.Event]:
    """Make the upstream answer nothing; what begins and ends there, and the event of a begin."""
    seen, begun = list[str](), asyncio.Event()

    async def complete(body: Any) -> Any:
        seen.append("begun")
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            seen.append("ended")

    world.upstream.complete = complete  # type: ignore[method-assign]
    return seen, begun


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("user", ["ada", None])
async def test_a_client_that_hangs_up_ends_its_calls(
    store: Store, bundles: dict[str, Path], log: io.StringIO, stream: bool, user: str | None
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"]) as world:
        seen, begun = silent_upstream(world)
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
        await hang_up(world.app, body | ({"user": user} if user else {}), begun)
        await async_until(lambda: seen.count("ended") == seen.count("begun") > 0)
    assert [line["status"] for line in lines(log)] == [499]


async def test_readiness_says_what_is_missing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_llm.gateway.health.CHECK_SECONDS", 0.0)
    monkeypatch.setattr("hydra_llm.gateway.health.PROBE_SECONDS", 1.0)
    async with running(store) as world:
        models = world.upstream.models

        async def ready() -> tuple[int, str]:
            answer = await world.http.get("/health/readiness")
            return answer.status_code, answer.json()["status"]

        assert await ready() == (200, "ok")
        for status, expected in ((502, 503), (503, 503), (504, 503), (404, 200), (401, 200)):
            monkeypatch.setattr(world.upstream, "models", failing(UpstreamError(status, "gone")))
            assert (await ready())[0] == expected
        monkeypatch.setattr(world.upstream, "models", asyncio.Event().wait)
        assert await ready() == (503, "the upstream does not answer")
        monkeypatch.setattr(world.upstream, "models", models)
        writer = sqlite3.connect(store.engine.url.database or "", isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")  # somebody else has the lock
        assert await ready() == (503, "the store takes no writes")
        assert (await world.http.get("/health/liveness")).status_code == 200
        writer.close()
        monkeypatch.setattr("hydra_llm.gateway.health.PROBE_SECONDS", FOREVER)
        assert await ready() == (200, "ok")


def failing(error: Exception) -> Any:
    async def fails(*_: Any) -> Any:
        raise error

    return fails


async def test_readiness_is_checked_once_for_all(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(store) as world:
        count, models = 0, world.upstream.models

        async def counted(id: str | None = None) -> Any:
            nonlocal count
            count += 1
            return await models(id)

        monkeypatch.setattr(world.upstream, "models", counted)
        await asyncio.gather(*(world.http.get("/health/readiness") for _ in range(5)))
        assert count == 1


async def test_a_long_question_is_cut_before_it_is_read(
    store: Store, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five megabytes: tokenized whole they would keep the scoring thread for many seconds."""
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["titles"], max_text=1000) as world:
        encoder = world.app.state.gateway.deployment.bundle.features.encoder
        lengths, tokenize = list[int](), encoder._tokenize

        def noted(texts: Any) -> Any:
            lengths.extend(len(text) for text in texts)
            return tokenize(texts)

        monkeypatch.setattr(encoder, "_tokenize", noted)
        text = "a storm at sea, " * 300_000
        assert (await world.ask(text)).json()["personalization"]["request_id"]
        assert world.upstream.bodies[0]["messages"][-1]["content"].endswith(text)
        world.upstream.rule = lambda body, index: f"{index} " * 1_000_000
        await world.ask("a storm at sea")
        assert max(lengths) <= 100 * encoder.max_length


async def test_a_user_has_one_waiting_job(store: Store) -> None:
    for user in ("ada", "bob"):
        store.add_records(user, records_of(user, 1))
    jobs = [store.add_job(f"a{i}", "ada", "fit") for i in range(50)]
    assert {job.id for job in jobs if job} == {"a0"}
    assert store.add_job("b0", "bob", "fit") is not None
    claimed = [store.claim_job() for _ in range(3)]
    assert [job and job.user for job in claimed] == ["ada", "bob", None]
    later = store.add_job("a50", "ada", "fit")  # the first one runs: what is new needs another
    assert later is not None
    assert later.id == "a50"


CHUNKS = (
    {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]},
    {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}},
)
STREAM = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in CHUNKS) + "data: [DONE]\n\n"


@pytest.mark.parametrize("user", ["ada", "nobody"])
async def test_the_line_of_a_stream_has_its_tokens(
    store: Store, log: io.StringIO, user: str
) -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, text=STREAM, headers={"content-type": "text/event-stream"})

    store.add_records("ada", records_of("ada"))
    upstream = HttpUpstream(
        Endpoint("http://upstream/v1"), timeout=5, transport=httpx2.MockTransport(answer)
    )
    async with running(store) as world:
        world.app.state.gateway.upstream = upstream
        await world.ask("hello", user=user, stream=True)
    (line,) = lines(log)
    assert (line["prompt_tokens"], line["completion_tokens"], line["upstream"]) == (7, 2, 200)
    assert line["seconds"]["upstream"] >= 0
    assert line["reason"] == {"ada": "personal", "nobody": "unknown-user"}[user]


async def test_the_line_of_an_error_has_the_upstreams_status(
    store: Store, log: io.StringIO
) -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(429, json={"error": {"message": "slow down"}})

    upstream = HttpUpstream(
        Endpoint("http://upstream/v1"), timeout=5, transport=httpx2.MockTransport(answer)
    )
    async with running(store) as world:
        world.app.state.gateway.upstream = upstream
        await world.ask("hello", user=None)
    assert [(line["status"], line["upstream"]) for line in lines(log)] == [(429, 429)]


async def test_an_embedded_engine_is_not_given_a_prompt_of_megabytes() -> None:
    llm = RuleLLM(lambda messages, index, rng: "hi", name="small")
    llm.window = 1024  # type: ignore[attr-defined]
    upstream = EmbeddedUpstream(llm)
    for text, status in (("a storm " * 10, 200), ("a storm " * 20_000, 400)):
        body = {"model": "fake:small", "messages": [{"role": "user", "content": text}]}
        if status == 200:
            assert (await upstream.complete(body))["choices"]
            continue
        with pytest.raises(UpstreamError, match="more than 512 tokens") as error:
            await upstream.complete(body)
        assert error.value.status == 400
        assert error.value.body["error"]["code"] == "context_length_exceeded"
    assert len(llm.calls) == 1


@pytest.mark.parametrize("user", ["ada", "nobody"])
async def test_leaving_within_a_stream_ends_it_upstream(
    store: Store, log: io.StringIO, user: str
) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def stream(body: Any) -> AsyncIterator[bytes]:
        try:
            yield b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n'
            begun.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    store.add_records("ada", records_of("ada"))
    async with running(store) as world:
        world.upstream.stream = stream  # type: ignore[method-assign]
        messages = [{"role": "user", "content": "whales under the waves"}]
        body = {"model": "m", "user": user, "messages": messages, "stream": True}
        await hang_up(world.app, body, begun)
        await asyncio.wait_for(ended.wait(), FOREVER)
    assert [line["status"] for line in lines(log)] == [499]
