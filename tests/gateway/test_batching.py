"""The scoring thread's queues: turns for users, and a bound."""

import asyncio
import threading

import pytest

from hydra_llm.gateway import batching
from hydra_llm.gateway.batching import MAX_BATCH, MicroBatcher, Overloaded
from hydra_llm.gateway.deployment import CHARACTERS_AT_ONCE, _portions
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


async def test_the_servers_own_jobs_are_next() -> None:
    done, _ = await served(1000, ["ada", "bob", "eve"] * MAX_BATCH + ["", "bob", ""])
    assert done[:3] == ["", "", "ada"]


async def test_the_servers_own_jobs_are_never_refused() -> None:
    done, refused = await served(5, ["ada"] * 5 + [""] * 20 + ["bob"])
    assert (done.count(""), done.count("bob"), done.count("ada")) == (20, 1, 4)
    assert refused == ["ada"]


async def test_an_idle_job_waits_while_a_request_is_worked_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batching, "IDLE_SECONDS", 1e9)
    batcher, done = MicroBatcher(None, 10, None), list[str]()
    with batcher.attending():
        idle = asyncio.create_task(batcher.run(lambda: done.append("idle"), user="ada", idle=True))
        for _ in range(20):
            await batcher.run(lambda: done.append("asked"), user="bob")
        assert done == ["asked"] * 20
    await idle
    assert done[-1] == "idle"
    batcher.close()


async def test_an_idle_job_has_its_turn_among_any_number_of_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batching, "IDLE_SECONDS", 0.0)
    batcher, done = MicroBatcher(None, 10, None), list[str]()
    with batcher.attending():
        await batcher.run(lambda: done.append("idle"), user="ada", idle=True)
    assert done == ["idle"]
    batcher.close()


async def test_an_error_of_the_texts_of_one_job_is_that_jobs_alone() -> None:
    encoded = list[str]()
    batcher = MicroBatcher(encoded.extend, 10, None)

    def broken() -> list[str]:
        raise ValueError("no texts")

    def twice() -> None:
        broken()

    jobs = [
        batcher.run(twice, user="ada", texts=broken),
        batcher.run(lambda: "fine", user="bob", texts=lambda: ["a text"]),
    ]
    failed, fine = await asyncio.gather(*jobs, return_exceptions=True)
    assert (str(failed), fine, encoded) == ("no texts", "fine", ["a text"])
    batcher.close()


@pytest.mark.parametrize("sizes", [[], [5], [10**6], [100] * 9, [299, 1, 1, 300, 301, 2]])
def test_portions_keep_every_text_in_its_order(sizes: list[int]) -> None:
    texts = [str(place) * size for place, size in enumerate(sizes)]
    parts = list(_portions(texts))
    assert [text for part in parts for text in part] == texts
    assert all(len(part) == 1 or sum(map(len, part)) <= CHARACTERS_AT_ONCE for part in parts)
