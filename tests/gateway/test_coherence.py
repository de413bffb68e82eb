"""Servers of one store are as one: what is deleted at one of them leaves the memory of all, and
requests per minute are counted together.
"""

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from hydra_llm.gateway.middleware import RateLimiter
from hydra_llm.gateway.schemas import ApiError
from hydra_llm.gateway.user_cache import texts_of
from hydra_llm.store.removals import CHANNEL, Listener
from hydra_llm.store.store import Store
from hydra_llm.types import Record
from tests.waiting import FOREVER, async_until, until
from tools import with_postgres

from .conftest import World, records_of, running
from .test_chaos import postgresql
from .test_processes import served
from .test_workers import children

pytestmark = pytest.mark.anyio
QUESTION = "the battle for the bridge"


@asynccontextmanager
async def two(store: Store, bundle: Path) -> AsyncIterator[tuple[World, World]]:
    """Two servers of one store, which have ada in memory."""
    store.add_records("ada", records_of("ada"))
    other = Store(str(store.url.render_as_string(hide_password=False)))
    async with running(store, bundle) as first, running(other, bundle) as second:
        for world in (first, second):
            answer = await world.ask(QUESTION)
            assert answer.headers["x-hydra-personalized"] == "true"
            assert knows(world)
        yield first, second
    other.close()


def knows(world: World, records: list[Record] | None = None) -> bool:
    """Whether anything of ada's records, or of these, is in a server's memory."""
    deployment, wanted = world.app.state.gateway.deployment, records or records_of("ada")
    users, bundle = deployment.users, deployment.bundle
    held = [r for user in users._recent.values() for r in user.records]
    held += [r for own, _ in bundle.featurizer._own_words._kept.values() for r in own]
    indexed = deployment.pipeline.retriever._kept
    texts = {record.input for record in wanted}
    own = set(texts_of(wanted)) - {record.output for record in wanted}  # others answer the same
    vectors = len(own) - bundle.features.missing(list(own))
    return bool(texts & {r.input for r in held} or indexed or vectors)


@pytest.fixture(autouse=True)
def own_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HYDRA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def only_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers look at the store when it tells them to, and never by themselves."""
    monkeypatch.setattr("hydra_llm.gateway.app.WATCH_SECONDS", 10**6)


@pytest.mark.parametrize("how", ["the user", "a record", "a record's text"])
async def test_what_is_deleted_leaves_the_memory_of_all(
    either: Store, bundles: dict[str, Path], how: str
) -> None:
    async with two(either, bundles["titles"]) as (first, second):
        once = [
            r for r in records_of("ada") if [o.input for o in records_of("ada")].count(r.input) == 1
        ][:1]
        if how == "the user":
            answer = await first.http.delete("/v1/users/ada")
        elif how == "a record":
            answer = await first.http.delete(f"/v1/users/ada/records/{once[0].id}")
        else:
            sent = {"records": [{"id": once[0].id, "input": "another text", "output": "calm"}]}
            answer = await first.http.post("/v1/users/ada/records", json=sent)
        assert answer.status_code == 200, answer.text
        gone = records_of("ada") if how == "the user" else once
        await async_until(lambda: not knows(second, gone))
        reply = await second.ask(QUESTION)
        personal = reply.headers["x-hydra-personalized"]
        assert personal == ("false; reason=unknown-user" if how == "the user" else "true")


async def test_a_record_that_is_added_empties_no_memory(
    either: Store, bundles: dict[str, Path]
) -> None:
    async with two(either, bundles["titles"]):
        before = either.watched().removal
        either.add_records("ada", [Record("ada", "new", "a text", "calm")])
        either.add_records("ada", [Record("ada", "new", "a text", "calm")])
        assert either.watched().removal == before


@pytest.mark.slow
@pytest.mark.usefixtures("only_told")
async def test_a_listener_that_was_cut_off_misses_nothing(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, listen = threading.Event(), Listener._listen
    allowed.set()

    def when_allowed(self: Listener) -> None:
        assert allowed.wait(FOREVER)
        listen(self)

    monkeypatch.setattr(Listener, "_listen", when_allowed)
    monkeypatch.setattr("hydra_llm.store.removals.RETRY_SECONDS", 0.05)
    with postgresql() as (store, _, _):
        async with two(store, bundles["titles"]) as (first, second):
            await async_until(lambda: len(listeners(store)) == 2)
            allowed.clear()
            for pid in listeners(store):
                store.rows(sa.select(sa.func.pg_terminate_backend(pid)))
            await async_until(lambda: not listeners(store))
            assert (await first.http.delete("/v1/users/ada")).status_code == 200
            assert knows(second), "nobody has told it"
            allowed.set()
            await async_until(lambda: not knows(second))


@pytest.mark.slow
@pytest.mark.usefixtures("only_told")
async def test_notifications_come_again_after_a_restart_of_the_database(
    bundles: dict[str, Path],
) -> None:
    with postgresql() as (store, programs, data):
        async with two(store, bundles["titles"]) as (first, second):
            await asyncio.to_thread(with_postgres.restart, programs, data)
            end = time.monotonic() + FOREVER
            while (await first.http.delete("/v1/users/ada")).status_code != 200:
                assert time.monotonic() < end
            await async_until(lambda: not knows(second))
            await async_until(lambda: len(listeners(store)) == 2)


def listeners(store: Store) -> list[int]:
    """The database's processes that serve a listener."""
    query = sa.text("SELECT pid FROM pg_stat_activity WHERE query = :query")
    with store.reading() as connection:
        return list(connection.scalars(query, {"query": f"LISTEN {CHANNEL}"}))


# ---- requests per minute


@pytest.mark.parametrize(("limit", "writes"), [(30, 40), (6000, 70)])
def test_a_limit_of_requests_is_that_of_all_servers(
    either: Store, monkeypatch: pytest.MonkeyPatch, limit: int, writes: int
) -> None:
    """However many ask at the same time: exactly so many pass, and few of them write."""
    now, asked = 1e9, 0
    servers = [RateLimiter(either, limit, clock=lambda: now) for _ in range(4)]
    take = Store.take_requests

    def counted(self: Store, *arguments: Any) -> Any:
        nonlocal asked
        asked += 1
        return take(self, *arguments)

    monkeypatch.setattr(Store, "take_requests", counted)

    def passing(server: RateLimiter) -> tuple[int, set[str]]:
        for count in range(limit + 1):
            try:
                server.check("key")
            except ApiError as error:
                return count, {error.headers["retry-after"]}
        raise AssertionError("nothing was refused")

    with ThreadPoolExecutor(len(servers)) as threads:
        results = list(threads.map(passing, servers))
    assert sum(count for count, _ in results) == limit
    assert asked <= writes
    now += 60 / limit * 2.5
    assert {wait for _, waits in results for wait in waits} == {str(-(-60 // limit))}
    assert sum(passing(server)[0] for server in servers) == 2, "the bucket fills evenly"
    assert sum(passes(server, "other") for server in servers) == 4, "others have their own"


def passes(server: RateLimiter, key: str) -> bool:
    server.check(key)
    return True


def test_what_a_server_does_not_use_it_does_not_keep(store: Store) -> None:
    now = 1e9
    one, other = (RateLimiter(store, 600, clock=lambda: now) for _ in range(2))
    one.check("key")  # which takes ten
    now += 1.5
    assert sum(passes(other, "key") for _ in range(600)) == 600, "the bucket is full again"
    for server in (one, other):
        with pytest.raises(ApiError):
            server.check("key")


@pytest.mark.slow
async def test_workers_count_requests_together_also_one_that_takes_a_killed_ones_place(
    url: str,
) -> None:
    limit = ["--set", "requests_per_minute=6"]
    with served("--llm", "fake:echo", "--store", url, "--workers", "2", *limit) as (process, at, _):
        until(lambda: len(children(process.pid)) == 2)
        begin = time.monotonic()

        def passed(times: int) -> int:
            answers = [httpx2.get(f"{at}/v1/models", timeout=FOREVER) for _ in range(times)]
            assert {answer.status_code for answer in answers} <= {200, 429}
            return sum(answer.status_code == 200 for answer in answers)

        let_in = passed(12)
        assert let_in >= 6
        before = children(process.pid)
        os.kill(before[0], signal.SIGKILL)
        until(lambda: len(now := children(process.pid)) == 2 and now != before)
        end = time.monotonic() + FOREVER
        while time.monotonic() < end:
            try:
                let_in += passed(12)
                break
            except httpx2.TransportError:  # one that the killed worker had accepted
                continue
        assert let_in <= 6 + (time.monotonic() - begin) * 6 / 60 + 1
