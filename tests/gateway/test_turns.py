"""Turns at an engine: fair among users, none lost, none given twice."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.gateway import embedded
from hydra_llm.gateway.embedded import EmbeddedUpstream
from hydra_llm.gateway.turns import FairTurns, asking
from hydra_llm.gateway.upstream import UpstreamError
from hydra_llm.llm.base import Sampling
from hydra_llm.types import Generation, Message, Usage

pytestmark = pytest.mark.anyio


async def order_of(asked: str, slots: int = 1, leaving: frozenset[int] = frozenset()) -> str:
    """Who has a turn when, of users who ask in this order while the slots are taken."""
    turns, order, begin = FairTurns(slots), [], asyncio.Event()

    async def hold() -> None:
        async with turns.turn("holder"):
            await begin.wait()

    async def work(user: str) -> None:
        async with turns.turn(user):
            order.append(user)
            await asyncio.sleep(0)

    holders = [asyncio.create_task(hold()) for _ in range(slots)]
    await asyncio.sleep(0)
    tasks = []
    for user in asked:
        tasks.append(asyncio.create_task(work(user)))
        await asyncio.sleep(0)
    for place in leaving:
        tasks[place].cancel()
    begin.set()
    await asyncio.gather(*holders, *tasks, return_exceptions=True)
    again = [asyncio.create_task(hold()) for _ in range(slots)]
    await asyncio.gather(*again)  # every slot is free again
    return "".join(order)


async def test_a_flood_of_one_user_does_not_come_before_the_others() -> None:
    assert await order_of("aaaaabcb") == "abcabaaa"
    assert await order_of("aaaaabcb", leaving=frozenset({0, 5})) == "abcaaa"


@given(st.text("abc", max_size=12), st.integers(1, 3), st.data())
def test_everybody_who_stays_has_one_turn(asked: str, slots: int, data: st.DataObject) -> None:
    places = st.sets(st.integers(0, max(0, len(asked) - 1)))
    leaving = frozenset(place for place in data.draw(places) if place < len(asked))
    order = asyncio.run(order_of(asked, slots, leaving))
    staying = [user for place, user in enumerate(asked) if place not in leaving]
    assert sorted(order) == sorted(staying)


async def test_the_turn_of_a_request_that_leaves_goes_on() -> None:
    turns = FairTurns(1)
    async with turns.turn("a"):
        first = asyncio.create_task(turns.turn("b").__aenter__())
        second = asyncio.create_task(turns.turn("c").__aenter__())
        await asyncio.sleep(0)
    first.cancel()  # its turn has come, but it has not run yet
    await asyncio.wait_for(second, timeout=60)
    with pytest.raises(asyncio.CancelledError):
        await first


class Waiting:
    """A fake that answers when it is told to."""

    parallel = 1

    def __init__(self) -> None:
        self.identity = {"kind": "fake", "model": "m", "constrains": False}
        self.go = asyncio.Event()

    async def generate(self, messages: list[Message], sampling: Sampling) -> Generation:
        await self.go.wait()
        return Generation(("yes",), Usage(calls=1))

    async def aclose(self) -> None:
        pass


async def test_one_users_waiting_requests_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "MAX_WAITING", 2)
    llm = Waiting()
    upstream = EmbeddedUpstream(llm)
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}

    async def ask(user: str) -> object:
        asking.set(user)
        return await upstream.complete(body)

    tasks = [asyncio.create_task(ask(user)) for user in "aaaab"]
    for _ in range(5):
        await asyncio.sleep(0)
    llm.go.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, UpstreamError)]
    assert [error.status for error in refused] == [429]
    assert len(answers) - len(refused) == 4
