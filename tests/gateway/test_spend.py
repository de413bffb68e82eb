"""What requests spend: counted as the upstream tells it, else estimated; by whom, for what, and
shown to whom it concerns.
"""

import asyncio
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from hydra_llm.errors import StoreError
from hydra_llm.gateway.auth import make_key
from hydra_llm.gateway.spend import BYTES_PER_TOKEN
from hydra_llm.gateway.telemetry import MOST_MODELS, ModelNames
from hydra_llm.gateway.upstream import HttpUpstream, UpstreamError
from hydra_llm.llm.endpoint import Endpoint
from hydra_llm.store.store import Store
from hydra_llm.store.values import NANO, Spend
from tests.waiting import async_until

from .conftest import World, records_of, running
from .test_operation import STREAM, hang_up, lines, silent_upstream

pytestmark = pytest.mark.anyio
EVENTS = {"content-type": "text/event-stream"}


async def spent(world: World, query: str = "", **headers: str) -> Any:
    return (await world.http.get(f"/v1/spend?{query}", headers=headers)).json()


def endpoint(answer: Callable[[httpx2.Request], httpx2.Response]) -> HttpUpstream:
    transport = httpx2.MockTransport(answer)
    return HttpUpstream(Endpoint("http://upstream/v1"), timeout=5, transport=transport)


async def test_samples_are_told_apart_from_the_callers_own(
    store: Store, bundles: dict[str, Path], log: io.StringIO
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], samples=3) as world:
        answer = (await world.ask("a storm", model="gpt-4o")).json()
        rows = await spent(world, "by=kind,model,user")
    told = {row["kind"]: row for row in rows["data"]}
    assert {row["model"] for row in rows["data"]} == {"gpt-4o"}
    assert {row["user"] for row in rows["data"]} == {"ada"}
    assert (told["request"]["calls"], told["request"]["completion_tokens"]) == (1, 1)
    assert told["samples"]["completion_tokens"] == 2
    total = rows["total"]
    assert total["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert total["completion_tokens"] == answer["usage"]["completion_tokens"]
    assert (total["estimated_tokens"], total["unpriced_tokens"]) == (0, 0)
    prompt, completion = total["prompt_tokens"], total["completion_tokens"]
    assert total["cost"] == pytest.approx((prompt * 2.5 + completion * 10) / 1e6)
    assert lines(log)[0]["cost"] == pytest.approx(total["cost"])


async def test_tokens_that_are_not_told_are_estimated(store: Store) -> None:
    async with running(store) as world:
        complete = world.upstream.complete

        async def untold(body: Any) -> Any:
            return {**await complete(body), "usage": None}

        world.upstream.complete = untold  # type: ignore[method-assign]
        world.upstream.rule = lambda body, index: "word " * 70
        await world.ask("x" * 350, user=None)
        row = (await spent(world))["total"]
    assert row["completion_tokens"] == 100
    assert row["prompt_tokens"] >= 100
    assert row["estimated_tokens"] == row["prompt_tokens"] + 100
    assert row["cost"] is None, "the model m has no price, which is not 0"
    assert row["unpriced_tokens"] == row["estimated_tokens"]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("user", ["ada", None])
async def test_streams(store: Store, told: bool, user: str | None) -> None:
    text = "ein Würfel \\u00fc {}" * 20
    chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]}
    untold = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    store.add_records("ada", records_of("ada"))
    async with running(store) as world:
        body = STREAM if told else untold
        world.app.state.gateway.upstream = endpoint(
            lambda request: httpx2.Response(200, text=body, headers=EVENTS)
        )
        await world.ask("hello", user=user, stream=True)
        row = (await spent(world, "by=user"))["data"][0]
    assert row["user"] == (user or "")
    if told:
        assert (row["prompt_tokens"], row["completion_tokens"]) == (7, 2)
        assert row["estimated_tokens"] == 0
    else:
        length = len(text.encode()) / BYTES_PER_TOKEN
        assert row["completion_tokens"] == pytest.approx(length, rel=0.15)
        assert row["estimated_tokens"] == row["prompt_tokens"] + row["completion_tokens"] > 0


@pytest.mark.parametrize("user", ["ada", None])
@pytest.mark.parametrize("wanted", [True, False])
async def test_streams_are_asked_for_their_tokens(
    store: Store, user: str | None, wanted: bool
) -> None:
    """With `stream_usage`; who has not asked for the event with them does not get it."""
    delta = {"index": 0, "delta": {"content": "calm"}, "finish_reason": "stop"}
    head = {"id": "c", "model": "m", "object": "chat.completion.chunk", "created": 1}
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    text, tells = ({**head, "choices": [delta]}, {**head, "choices": [], "usage": usage})

    def answer(request: httpx2.Request) -> httpx2.Response:
        asks = json.loads(request.content).get("stream_options", {}).get("include_usage")
        chunks = [text, tells] if asks else [text]
        events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
        return httpx2.Response(200, text="".join(events), headers=EVENTS)

    store.add_records("ada", records_of("ada"))
    options = {"stream_options": {"include_usage": True}} if wanted else {}
    async with running(store, stream_usage=True) as world:
        world.app.state.gateway.upstream = endpoint(answer)
        reply = await world.ask("hello", user=user, stream=True, **options)
        row = (await spent(world))["total"]
    assert (row["prompt_tokens"], row["completion_tokens"], row["estimated_tokens"]) == (7, 2, 0)
    assert reply.text.count('"total_tokens"') == int(wanted)
    assert reply.text.endswith("data: [DONE]\n\n")
    if user is None and not wanted:
        assert reply.text == f"data: {json.dumps(text)}\n\ndata: [DONE]\n\n"


async def test_cached_tokens_have_their_own_price(store: Store) -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010}
    usage |= {"prompt_tokens_details": {"cached_tokens": 800}}  # type: ignore[dict-item]
    message = {"role": "assistant", "content": "hi"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    whole = {"model": "gpt-4o-2024-08-06", "choices": [choice], "usage": usage}
    async with running(store) as world:
        world.app.state.gateway.upstream = endpoint(lambda _: httpx2.Response(200, json=whole))
        await world.ask("hello", user=None, model="our-name")
        (row,) = (await spent(world, "by=model"))["data"]
    assert row["model"] == "our-name"
    assert row["cost"] == pytest.approx((200 * 2.5 + 800 * 1.25 + 10 * 10) / 1e6)


async def test_an_error_costs_nothing_and_a_call_given_up_its_prompt(store: Store) -> None:
    async with running(store) as world:
        world.upstream.faults = [UpstreamError(500, "down")]
        assert (await world.ask("hello", user=None)).status_code == 500
        assert (await spent(world))["total"]["calls"] == 0
        seen, begun = silent_upstream(world)
        body = {"model": "m", "messages": [{"role": "user", "content": "y" * 350}]}
        await hang_up(world.app, body, begun)
        await async_until(lambda: "ended" in seen)
        row = (await spent(world))["total"]
        figures = (await world.http.get("/metrics")).text
    assert (row["calls"], row["completion_tokens"]) == (1, 0)
    assert row["estimated_tokens"] == row["prompt_tokens"] >= 100
    assert 'hydra_upstream_requests_total{model="other",status="500"} 1.0' in figures
    assert 'status="cancelled"} 1.0' in figures


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/completions", "/v1/other"])
async def test_passed_requests(store: Store, path: str) -> None:
    """Also where what they cost is behind a megabyte of numbers, and comes in pieces."""
    numbers = json.dumps([0.25] * 200_000).encode()
    usage = b'"model": "m", "usage": {"prompt_tokens": 9, "total_tokens": 9, "d": {"a": 1}}}'
    whole = b'{"data": [{"embedding": ' + numbers + b', "say": "\\"usage\\": {}"}], ' + usage
    async with running(store, passthrough="all") as world:
        world.upstream.pieces = [whole[i : i + 1000] for i in range(0, len(whole), 1000)]
        sent = {"model": "text-embedding-3-small", "input": "a text", "user": "eve"}
        answer = await world.http.post(path, json=sent)
        assert answer.content == whole
        (row,) = (await spent(world, "by=user,model"))["data"]
    assert (row["user"], row["model"]) == ("eve", "text-embedding-3-small")
    assert (row["prompt_tokens"], row["completion_tokens"], row["estimated_tokens"]) == (9, 0, 0)
    assert row["cost"] == pytest.approx(9 * 0.02 / 1e6)


async def test_an_embedded_models_stream_is_counted_without_asking(store: Store) -> None:
    """The engine knows its tokens; the stream tells them only to who asks."""
    async with running(store) as world:
        answer = await world.ask("hello", user=None, stream=True)
        assert "usage" not in answer.text
        row = (await spent(world))["total"]
    assert (row["calls"], row["estimated_tokens"]) == (1, 0)
    assert row["prompt_tokens"] > 0


async def test_a_key_sees_its_own_users_alone(store: Store) -> None:
    _, admin = make_key(store, admin=True)
    own, secret = make_key(store, users=["ada"])
    keys = {"authorization": f"Bearer {secret}"}
    root = {"authorization": f"Bearer {admin}"}
    async with running(store, user_limits="9/day") as world:
        for user, headers in (("ada", keys), ("bob", root), ("ada", root)):
            body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "x"}], "user": user}
            answer = await world.http.post("/v1/chat/completions", json=body, headers=headers)
            assert answer.status_code == 200
        mine = await spent(world, "by=user", **keys)
        assert [(row["user"], row["calls"]) for row in mine["data"]] == [("ada", 2)]
        assert mine["total"]["calls"] == 2
        (limit,) = mine["limits"]
        assert (limit["of"], limit["limit"], limit["per"]) == ("user", 9.0, "day")
        assert limit["spent"] == pytest.approx(mine["total"]["cost"])
        for query in ("user=bob", "by=key", f"key={own.id}x"):
            assert (await spent(world, query, **keys))["error"]["type"] == "permission_error"
        everyone = await spent(world, "by=key", **root)
        assert {row["key"]: row["calls"] for row in everyone["data"]}[own.id] == 1
        for method, sent in (("GET", None), ("PUT", {"user": "ada", "limits": "none"})):
            answer = await world.http.request(method, "/v1/limits", json=sent, headers=keys)
            assert answer.status_code == 403
        assert store.limits() == []


@pytest.mark.parametrize(
    "query", ["by=", "by=day,day", "by=name", "since=x", "since=2026-02-30", "limit=0", "user=%0A"]
)
async def test_a_question_that_cannot_be_answered(store: Store, query: str) -> None:
    async with running(store) as world:
        answer = await world.http.get(f"/v1/spend?{query}")
        assert (answer.status_code, answer.json()["error"]["type"]) == (
            400,
            "invalid_request_error",
        )


async def test_a_deleted_users_spend_is_nobodys(store: Store) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store) as world:
        await world.ask("a storm", model="gpt-4o")
        before = (await spent(world))["total"]
        export = (await world.http.get("/v1/users/ada/export")).json()
        assert [row["calls"] for row in export["spend"]] == [1]
        seen, begun = silent_upstream(world)
        body = {"model": "m", "messages": [{"role": "user", "content": "a storm"}], "user": "ada"}
        left = asyncio.Event()
        asking = asyncio.create_task(hang_up(world.app, body, left))
        await begun.wait()  # while this request is under way
        deleted = (await world.http.delete("/v1/users/ada")).json()["deleted"]
        assert deleted["spend"] == 1
        left.set()
        await asking
        await async_until(lambda: "ended" in seen)
        rows = await spent(world, "by=user")
    assert {row["user"] for row in rows["data"]} == {""}
    assert rows["total"]["calls"] == before["calls"] + 1
    assert rows["total"]["cost"] == before["cost"]


async def test_what_the_store_does_not_take_is_written_later(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise StoreError("down")

    async with running(store) as world:
        with monkeypatch.context() as down:
            down.setattr(Store, "add_spend", fails)
            for _ in range(3):
                assert (await world.ask("x", user=None)).status_code == 200
            world.app.state.gateway.ledger.flush()
        assert store.spend()[0].spend == Spend()
    assert store.spend()[0].spend.calls == 3, "at the latest when the server ends"


async def test_ones_own_prices(store: Store, tmp_path: Path, monkeypatch: Any) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text(
        '[models]\nm = { input = 1000, output = 2000 }\n"*" = { input = 0, output = 0 }'
    )
    monkeypatch.setenv("HYDRA_PRICES", str(prices))
    async with running(store) as world:
        await world.ask("x", user=None)
        await world.ask("x", user=None, model="another")
        costs = {g.by["model"]: g.spend for g in await flushed(world, "model")}
    assert costs["m"].cost == (10 * 1000 + 1 * 2000) * NANO // 10**6
    assert costs["another"].money == 0


async def flushed(world: World, by: str) -> Any:
    world.app.state.gateway.ledger.flush()
    return world.store.spend(by)


def test_names_of_models_are_few() -> None:
    names = ModelNames()
    assert names.label("m", answered=False) == "other"
    assert [names.label(f"m{i}", answered=True) for i in range(2)] == ["m0", "m1"]
    labels = {names.label(f"n{i}", answered=True) for i in range(1000)}
    assert len(labels) <= MOST_MODELS
    assert names.label("m0", answered=False) == "m0"
    assert names.label({"a": 1}, answered=True) == "other"
    assert len(names.label("x" * 999, answered=True)) <= 100
