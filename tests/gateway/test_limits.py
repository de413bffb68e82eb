"""What keys and users may spend: money and tokens, per minute, day and month, of all servers of a
store together.
"""

import asyncio
from datetime import UTC, datetime
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hydra_llm.errors import SettingsError, StoreError
from hydra_llm.gateway import spend_limits
from hydra_llm.gateway.auth import make_key
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.spend import minute_of
from hydra_llm.gateway.spend_limits import Limit, parse_limits
from hydra_llm.store.store import Store
from hydra_llm.store.values import Spend, Total
from tests.waiting import FOREVER

from .conftest import World, records_of, running
from .test_processes import served

pytestmark = pytest.mark.anyio
NOW = datetime(2026, 11, 30, 23, 59, 30, tzinfo=UTC)


@pytest.mark.parametrize("text", ["", "none", " , "])
def test_no_limit(text: str) -> None:
    assert parse_limits(text) == ()


def test_a_limit_has_a_form() -> None:
    assert parse_limits("5/day, 2.5 / month,20000 tokens/minute") == (
        Limit(5.0, "money", "day"),
        Limit(2.5, "money", "month"),
        Limit(20000.0, "tokens", "minute"),
    )
    for wrong in ("5", "5/minute", "5/year", "-1/day", "tokens/day", "5/day none", "1e9/day"):
        with pytest.raises(ValueError, match="write 5/day"):
            parse_limits(wrong)
    with pytest.raises(SettingsError, match=r"serve\.key_limits.*write 5/day"):
        ServeSettings.checked({"key_limits": "5"})


def state(limit: str, spent: dict[str, int], now: datetime = NOW) -> Any:
    (one,) = parse_limits(limit)
    totals = {Total("key", "k", p): Spend(prompt_tokens=n, cost=n) for p, n in spent.items()}
    return spend_limits._state(("key", "k"), one, totals, now)


def test_days_and_months_begin_anew_in_utc() -> None:
    day, month = "2026-11-30", "2026-11"
    assert state("10 tokens/day", {day: 9, "2026-11-29": 99}).seconds == 0
    assert state("10 tokens/day", {day: 10}).seconds == 30
    assert state("10 tokens/month", {month: 10}).seconds == 30
    early = datetime(2026, 12, 1, tzinfo=UTC)
    assert state("10 tokens/month", {"2026-12": 10}, early).seconds == 31 * 86400
    assert state("0/day", {}).seconds == 30, "nothing may be spent"


@given(st.integers(0, 300), st.integers(0, 300), st.floats(0, 59.9), st.integers(1, 200))
@example(latest=0, before=1, second=0.0, most=1)
def test_after_the_wait_of_a_minutes_limit_there_is_room(
    latest: int, before: int, second: float, most: int
) -> None:
    """Not sooner, but for a rounding; it never takes two minutes."""
    start = datetime(2026, 11, 30, 12, tzinfo=UTC).timestamp()
    now = datetime.fromtimestamp(start + second, UTC)
    spent = {minute_of(now): latest, minute_of(now, 1): before}
    found = state(f"{most} tokens/minute", spent, now)
    assert (found.seconds > 0) == (found.spent >= most)
    assert found.seconds <= 120
    if found.seconds:
        later, sooner = (
            state(f"{most} tokens/minute", spent, datetime.fromtimestamp(at, UTC)).spent
            for at in (
                now.timestamp() + found.seconds + 0.01,
                max(now.timestamp(), now.timestamp() + found.seconds - 0.05),
            )
        )
        assert later < most + 1e-3
        assert sooner > most - 1e-3


async def test_a_user_has_what_the_settings_allow(store: Store) -> None:
    """Requests and streams pass until what was spent reaches it; others have their own."""
    store.add_records("ada", records_of("ada"))
    async with running(store, user_limits="150 tokens/day") as world:
        spent, streams = 0, [True, False, False]
        while spent < 150:
            stream = streams.pop(0) if streams else False
            assert (await world.ask("a storm", stream=stream)).status_code == 200
            before, spent = spent, store.spend(users=["ada"])[0].spend.tokens
            assert before < spent, "what was spent is written before the answer ends"
        answer = await world.ask("a storm")
        asked = len(world.upstream.bodies)
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (429, "rate_limit_error")
        assert error["code"] == "insufficient_quota"
        assert f"this user may spend 150 tokens per day and has spent {spent}" in error["message"]
        assert 1 <= int(answer.headers["retry-after"]) <= 86400
        sdk = world.sdk().with_options(max_retries=5)
        message = {"role": "user", "content": "x"}
        with pytest.raises(openai.RateLimitError) as raised:  # which it does not try again
            await sdk.chat.completions.create(model="m", messages=[message], user="ada")  # type: ignore[list-item]
        assert raised.value.code == "insufficient_quota"
        others: list[tuple[str, dict[str, Any]]] = [
            ("/v1/responses", {"model": "m", "input": "x"}),
            ("/v1/embeddings", {"model": "m", "input": "x"}),
            ("/v1/completions", {"model": "m", "prompt": "x"}),
            ("/v1/messages", {"model": "m", "max_tokens": 9, "messages": [message]}),
            ("/v1/other", {}),
        ]
        for path, body in others:
            sent = await world.http.post(path, json=body, headers={"x-hydra-user": "ada"})
            assert sent.status_code == 429, path
        assert len(world.upstream.bodies) == asked
        assert world.upstream.passed == []
        assert (await world.ask("a storm", "bob")).status_code == 200
        assert (await world.http.get("/v1/users/ada/records")).status_code == 200
        figures = (await world.http.get("/metrics")).text
        assert 'hydra_limited_total{of="user",per="day",unit="tokens"} 7.0' in figures


async def test_a_key_has_a_limit_of_its_own(store: Store) -> None:
    key, secret = make_key(store, users=["ada", "bob"])
    _, admin = make_key(store, admin=True)
    root, own = ({"authorization": f"Bearer {k}"} for k in (admin, secret))

    async def ask(world: World, user: str) -> httpx2.Response:
        message = {"role": "user", "content": "x"}
        body = {"model": "gpt-4o", "messages": [message], "user": user}
        return await world.http.post("/v1/chat/completions", json=body, headers=own)

    async def limit(world: World, **sent: Any) -> httpx2.Response:
        return await world.http.put("/v1/limits", json=sent, headers=root)

    async with running(store) as world:
        assert (await ask(world, "ada")).status_code == 200
        world.app.state.gateway.ledger.flush()
        set_to = await limit(world, key=key.id, limits="0.00003/month")
        assert set_to.json() == {"key": key.id, "limits": "0.00003/month"}
        assert (await ask(world, "bob")).status_code == 429, "what was spent before counts"
        listed = (await world.http.get("/v1/limits", headers=root)).json()
        assert listed["data"] == [{"key": key.id, "limits": "0.00003/month"}]
        assert listed["default"] == {"key": "none", "user": "none"}
        assert (await limit(world, key=key.id, limits="1/month")).status_code == 200
        assert (await ask(world, "bob")).status_code == 200
        assert (await limit(world, key=key.id, limits=None)).status_code == 200
        assert store.limits() == []
        for sent, status in (
            ({"key": "none", "limits": "1/day"}, 404),
            ({"limits": "1/day"}, 400),
            ({"key": key.id, "user": "ada", "limits": "1/day"}, 400),
            ({"user": "ada", "limits": "much"}, 400),
            ({"user": "ada", "most": 1}, 400),
        ):
            assert (await limit(world, **sent)).status_code == status, sent
        await limit(world, user="ada", limits="0/day")
        assert (await ask(world, "ada")).status_code == 429
        deleted = await world.http.delete("/v1/users/ada", headers=root)
        assert deleted.status_code == 200
        assert store.limits() == []


async def test_tokens_per_minute(store: Store) -> None:
    async with running(store, user_limits="5 tokens/minute, 9/day") as world:
        assert (await world.ask("x")).status_code == 200
        answer = await world.ask("x")
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        assert "x-should-retry" not in answer.headers
        assert (await world.ask("x", None)).status_code == 200, "nobody has no limit"


async def test_without_the_store_nothing_is_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise StoreError("down")

    async with running(store, user_limits="1 tokens/day") as world:
        assert (await world.ask("x")).status_code == 200
        assert (await world.ask("x")).status_code == 429
        monkeypatch.setattr(Store, "spent", fails)
        assert (await world.ask("x")).status_code == 200
        figures = (await world.http.get("/metrics")).text
        assert 'hydra_failures_total{part="limits"} 1.0' in figures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "workers"), [("sqlite", "2"), ("postgresql", "1")], indirect=["url"]
)
async def test_servers_of_one_store_share_a_limit(url: str, workers: str) -> None:
    """Whichever server is asked: the sum counts, to the last token; so does a limit that is set at
    one of them. What has no limit is written at the end at the latest.
    """
    message = {"role": "user", "content": "count these words"}
    body = {"model": "fake:echo", "messages": [message], "user": "ada"}
    where = ["--llm", "fake:echo", "--store", url, "--workers", workers]
    limits = ["--set", "user_limits=60 tokens/day"]
    with served(*where, *limits) as (_, first, _), served(*where, *limits) as (_, second, _):

        def ask(server: str, user: str = "ada") -> httpx2.Response:
            sent = {**body, "user": user}
            return httpx2.post(f"{server}/v1/chat/completions", json=sent, timeout=FOREVER)

        used, refused = 0, []
        for turn in range(40):
            answer = ask((first, second)[turn % 2])
            if answer.status_code == 429:
                refused.append(turn % 2)
            else:
                assert used < 60, "the other server has let it pass"
                used += answer.json()["usage"]["total_tokens"]
        assert set(refused) == {0, 1}
        assert used >= 60
        row = httpx2.get(f"{second}/v1/spend?user=ada", timeout=FOREVER).json()
        assert row["total"]["prompt_tokens"] + row["total"]["completion_tokens"] == used
        set_to = {"user": "ada", "limits": "none"}
        assert httpx2.put(f"{first}/v1/limits", json=set_to, timeout=FOREVER).status_code == 200
        end = asyncio.get_running_loop().time() + FOREVER
        while ask(second).status_code == 429:
            assert asyncio.get_running_loop().time() < end
            await asyncio.sleep(0.1)
        for turn in range(6):
            assert ask((first, second)[turn % 2], "bob").status_code == 200
    store = Store(url)
    groups = {group.by["user"]: group.spend for group in store.spend("user")}
    assert groups["bob"].calls == 6
    store.close()
