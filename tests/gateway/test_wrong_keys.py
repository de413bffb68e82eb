"""Wrong keys are counted for each address: after too many there is 429 and no more 401."""

import time
from typing import Any

import httpx2
import pytest
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from hydra_llm.gateway.auth import make_key
from hydra_llm.gateway.middleware import LIMITED_KEYS, WrongKeys, address_of
from hydra_llm.gateway.schemas import ApiError
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.store.store import Store

from .conftest import running
from .dashboard import visiting

pytestmark = pytest.mark.anyio
MOST = ServeSettings().wrong_keys_per_minute


def from_address(app: Any, address: str) -> httpx2.AsyncClient:
    transport = httpx2.ASGITransport(app, client=(address, 1), raise_app_exceptions=False)
    return httpx2.AsyncClient(transport=transport, base_url="http://localhost")


async def tried(http: httpx2.AsyncClient, key: str, times: int = 1, **more: str) -> list[int]:
    headers = {"authorization": f"Bearer {key}"} | more
    return [(await http.get("/v1/users", headers=headers)).status_code for _ in range(times)]


@pytest.mark.parametrize("path", ["/v1/users", "/v1/models", "/mcp", "/v1/messages"])
async def test_wrong_keys_are_slowed_down_at_the_api(store: Store, path: str) -> None:
    _, key = make_key(store, admin=True)
    async with running(store) as world:
        for name, prefix in (("authorization", "Bearer "), ("x-api-key", "")):
            async with from_address(world.app, f"10.0.0.{len(name)}") as http:
                answers = [
                    await http.get(path, headers={name: f"{prefix}hk-wrong-{n}"})
                    for n in range(MOST + 3)
                ]
                assert [own.status_code for own in answers] == [401] * MOST + [429] * 3
                assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
                assert f"more than {MOST} wrong keys a minute" in answers[-1].text
                assert (await tried(http, key)) == [200], "who shares the address is not locked out"
                assert (await http.get("/v1/users")).status_code == 401, "no key is no wrong key"
                assert (await tried(http, "hk-other")) == [429]


async def test_addresses_are_counted_apart(store: Store) -> None:
    make_key(store, admin=True)
    async with running(store) as world:
        async with from_address(world.app, "10.0.0.1") as one:
            assert (await tried(one, "hk-x", MOST + 1))[-1] == 429
        async with from_address(world.app, "10.0.0.2") as other:
            assert await tried(other, "hk-x") == [401]
        for n in range(MOST + 1):  # one client may have all addresses of its network
            async with from_address(world.app, f"2001:db8::{n:x}") as one:
                statuses = await tried(one, "hk-x")
        assert statuses == [429]
        async with from_address(world.app, "2001:db8:1::1") as other:
            assert await tried(other, "hk-x") == [401]


async def test_behind_a_proxy_its_clients_are_counted(store: Store) -> None:
    """As the server is run with `--proxy 10.0.0.9`; others' headers are not believed."""
    make_key(store, admin=True)
    async with running(store) as world:
        app = ProxyHeadersMiddleware(world.app, trusted_hosts=["10.0.0.9"])
        async with from_address(app, "10.0.0.9") as proxy:
            one = {"x-forwarded-for": "192.0.2.1"}
            assert (await tried(proxy, "hk-x", MOST + 1, **one))[-1] == 429
            assert await tried(proxy, "hk-x", **{"x-forwarded-for": "192.0.2.2"}) == [401]
        async with from_address(app, "10.0.0.5") as client:
            for n in range(MOST + 1):
                statuses = await tried(client, "hk-x", **{"x-forwarded-for": f"192.0.2.{n}"})
            assert statuses == [429]


async def test_wrong_keys_are_slowed_down_at_the_sign_in(store: Store) -> None:
    _, key = make_key(store, admin=True)
    async with running(store, dashboard=True) as world, visiting(world) as visitor:
        await visitor.get("/sign-in")
        for _ in range(3):
            assert (await visitor.post("/sign-in", key="")).status_code == 401
        statuses = [
            (await visitor.post("/sign-in", key=f"hk-{n}")).status_code for n in range(MOST + 1)
        ]
        assert statuses == [401] * MOST + [429]
        answer = await visitor.post("/sign-in", key=key)
        assert answer.status_code == 429, "here nobody guesses on"
        assert answer.headers["content-type"].startswith("text/html")
        assert answer.headers["retry-after"]
        assert "wrong keys a minute" in answer.text


async def test_there_may_be_no_limit(store: Store) -> None:
    make_key(store, admin=True)
    async with running(store, wrong_keys_per_minute=0) as world:
        assert await tried(world.http, "hk-x", 50) == [401] * 50


def test_attempts_come_back_and_memory_is_bounded() -> None:
    now = [time.monotonic()]
    limit = WrongKeys(2, clock=lambda: now[0])
    for _ in range(2):
        limit.check("a")
    for _ in range(3):
        with pytest.raises(ApiError, match="wrong keys"):
            limit.check("a", count=False)
    now[0] += 31
    limit.check("a", count=False)
    limit.check("a")
    for n in range(LIMITED_KEYS + 10):
        limit.check(str(n))
    assert len(limit._left) <= LIMITED_KEYS


@pytest.mark.parametrize(
    ("client", "address"),
    [
        (("10.1.2.3", 9), "10.1.2.3"),
        (("::ffff:10.1.2.3", 9), "10.1.2.3"),
        (("fe80::1%eth0", 9), "fe80::/64"),
        (("testclient", 9), ""),
        (None, ""),
    ],
)
def test_an_address_is_one_client(client: Any, address: str) -> None:
    assert address_of({"type": "http", "client": client}) == address
