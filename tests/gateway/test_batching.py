"""The scoring thread's queues: turns for users, and a bound."""

import asyncio
import threading

import pytest

from hydra_llm.gateway.batching import MAX_BATCH, MicroBatcher, Overloaded
from tests.waiting import async_until

pytestmark = pytest.mark.anyio


async def served(room: int, users: list[str], idle: bool = False) -> tuple[list[str], list[str]]:
    """Jobs in the order in which they are done, and users whose jobs were refused, where all of
    them wait while the thread is busy.
    """
    batcher = MicroBatcher(None, room, None)
    begun, release = threading.Event(), threading.Event()
    done, refused = list[str](), list[str]()

    def busy() -> None:
        begun.set()
        release.wait()

    first = asyncio.create_task(batcher.run(busy, user=""))
    await async_until(begun.is_set)

    async def ask(user: str) -> None:
        try:
            await batcher.run(lambda: done.append(user), user=user, idle=idle)
        except Overloaded:
            refused.append(user)

    asking = [asyncio.create_task(ask(user)) for user in users]
    await asyncio.sleep(0)
    release.set()
    await asyncio.gather(first, *asking)
    batcher.close()
    return done, refused


@pytest.mark.parametrize("idle", [False, True])
async def test_nobody_waits_behind_all_of_another_user(idle: bool) -> None:
    done, refused = await served(1000, ["ada"] * 3 * MAX_BATCH + ["bob", "eve", "bob"], idle)
    assert refused == []
    assert done[:5] == ["ada", "bob", "eve", "ada", "bob"]


@pytest.mark.parametrize("idle", [False, True])
async def test_a_full_queue_has_room_for_others(idle: bool) -> None:
    done, refused = await served(10, ["ada"] * 20 + ["bob"] * 3 + ["eve"], idle)
    assert (done.count("bob"), done.count("eve"), len(done)) == (3, 1, 10)
    assert refused == ["ada"] * 14


async def test_the_servers_own_jobs_are_never_refused() -> None:
    done, refused = await served(5, ["ada"] * 5 + [""] * 20 + ["bob"])
    assert (done.count(""), done.count("bob"), done.count("ada")) == (20, 1, 4)
    assert refused == ["ada"]
