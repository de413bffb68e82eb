"""Samples of all users share one limiter of the endpoint: against a real HTTP endpoint that answers
429 to more than it takes at once. A caller's own request is passed on, and so is its 429.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest

from hydra_llm.gateway.upstream import HttpUpstream
from hydra_llm.llm.endpoint import Endpoint
from hydra_llm.llm.limiter import START
from hydra_llm.store.store import Store
from tests.llm.conftest import Endpoint as Served
from tests.llm.conftest import Reply, completion, reply
from tests.waiting import FOREVER

from .conftest import TAGS, World, records_of, running

pytestmark = pytest.mark.anyio
CAPACITY, USERS = 3, 12
LONG = 100.0  # seconds; the longest wait that is heeded is 120
BUSY = {"error": {"message": "busy", "type": "requests", "code": "rate_limit_exceeded"}}


class Crowded:
    """Takes so many requests for samples at once, and refuses more; others it takes always."""

    def __init__(self, capacity: int, wait_ms: int):
        self.capacity, self.wait_ms, self.lock = capacity, wait_ms, threading.Lock()
        self.inside = self.refused = self.samples = 0

    def __call__(self, body: dict[str, Any], number: int) -> Reply:
        if "temperature" not in body:  # a caller's own
            return completion(*TAGS.labels[: body.get("n", 1)])
        with self.lock:
            if self.inside == self.capacity:
                self.refused += 1
                return reply(429, BUSY, Retry_After_Ms=str(self.wait_ms))
            self.inside += 1
        threading.Event().wait(0.05)  # so that some are there at the same time
        with self.lock:
            self.inside -= 1
            self.samples += 1
        return completion(*(TAGS.labels * 3)[: body["n"]])


@pytest.fixture
def served() -> Iterator[list[Served]]:
    started: list[Served] = []
    yield started
    for endpoint in started:
        endpoint.close()


def put_behind(world: World, behaviour: Any, served: list[Served]) -> HttpUpstream:
    served.append(Served(behaviour))
    upstream = HttpUpstream(Endpoint(served[-1].url, "k"), timeout=FOREVER)
    world.app.state.gateway.upstream = upstream
    return upstream


async def test_samples_of_many_users_are_not_lost_to_429(
    store: Store, bundles: dict[str, Path], served: list[Served]
) -> None:
    users = [f"user{number}" for number in range(USERS)]
    for user in users:
        store.add_records(user, records_of(user, 4))
    answers: list[httpx2.Response] = []
    async with running(store, bundles["tags"], samples=4) as world:
        crowded = Crowded(CAPACITY, wait_ms=20)
        upstream = put_behind(world, crowded, served)

        async def ask(user: str) -> None:
            more = {"personalization": {"explain": True}}
            answers.append(await world.ask("whales in spring", user, **more))

        async with anyio.create_task_group() as group:
            for user in users:
                group.start_soon(ask, user)
        assert {answer.status_code for answer in answers} == {200}
        assert crowded.refused > 0
        assert crowded.samples == USERS, "each user's samples came, in one request"
        assert upstream.limiter.limit < START
        await upstream.aclose()


async def test_a_429_of_a_callers_own_request_is_passed_on(
    store: Store, served: list[Served]
) -> None:
    async with running(store) as world:
        upstream = put_behind(world, lambda *_: reply(429, BUSY, Retry_After="7"), served)
        answer = await world.ask("whales in spring", user=None)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert len(served[0].bodies) == 1, "the caller's SDK does the retries"
        await upstream.aclose()


async def test_a_wait_beyond_the_deadline_costs_samples_alone(
    store: Store, bundles: dict[str, Path], served: list[Served]
) -> None:
    store.add_records("ada", records_of("ada", 4))
    async with running(store, bundles["tags"], samples=4, deadline=LONG / 2) as world:
        crowded = Crowded(0, wait_ms=int(1000 * LONG))
        upstream = put_behind(world, crowded, served)
        for _ in range(2):
            assert (await world.ask("whales in spring")).status_code == 200
        assert crowded.refused == 1, "none is sent while the endpoint asks to wait"
        assert len(served[0].bodies) == 3
        await upstream.aclose()
