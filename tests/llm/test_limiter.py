"""The number of requests at once: by simulation of endpoints on a clock of its own, and against a
real HTTP endpoint with a hidden capacity.
"""

import heapq
import threading
from collections import Counter
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.config import Settings
from hydra_llm.errors import LLMError
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.concurrency import at_once, map_calls
from hydra_llm.llm.limiter import MOST, START, Gate, Limiter, Pace, retry_after
from hydra_llm.llm.openai import OpenAILLM, from_spec
from hydra_llm.llm.registry import wrap
from tests.waiting import FOREVER

Case = tuple[str, int]


class Simulated:
    """An endpoint of so many places, and the requests to it as a pace lets them be sent. What is
    too many is refused, or waits for a place.
    """

    def __init__(self, capacity: int, *, refuses: bool, noise: float = 0.0, wait: float = 1.0):
        self.capacity, self.refuses, self.noise, self.wait = capacity, refuses, noise, wait
        self.seconds, self.random = 1.0, Random(capacity)
        self.served: list[int] = []
        self.refused: list[float] = []  # when
        self.limits: list[int] = []  # at each answer
        self.starts: list[float] = []

    def run(self, pace: Pace, total: int) -> None:
        """Serve requests 0 to `total` - 1."""
        todo, events, numbers = list(range(total)), list[Any](), count()
        free, now, inside = [0.0] * self.capacity, 0.0, 0
        while todo or events:
            while todo and inside < pace.limit and now >= pace.until:
                inside += 1
                self.starts.append(now)
                sent, request = pace.sent(now, inside), todo.pop(0)
                if self.refuses and inside > self.capacity:
                    end, status = now + 0.05, 429
                else:
                    spread = self.random.lognormvariate(-(self.noise**2) / 2, self.noise)
                    place = free.index(min(free))
                    begin = now if self.refuses else max(now, free[place])
                    end, status = begin + self.seconds * spread, 200
                    free[place] = end
                heapq.heappush(events, (end, next(numbers), request, sent, status))
            if todo and inside < pace.limit and (not events or pace.until < events[0][0]):
                now = pace.until
                continue
            end, _, request, sent, status = heapq.heappop(events)
            now, inside = max(now, end), inside - 1
            if status == 200:
                self.served.append(request)
                pace.answered(sent, now)
            else:
                self.refused.append(now)
                todo.insert(0, request)
                pace.overloaded(sent, now, self.wait)
            self.limits.append(pace.limit)


@pytest.mark.parametrize("capacity", [1, 2, 5, 20, 64])
def test_it_converges_to_a_capacity_that_refuses_more(capacity: int) -> None:
    endpoint, pace = Simulated(capacity, refuses=True), Pace()
    endpoint.run(pace, 3000)
    late = endpoint.limits[len(endpoint.limits) // 3 :]
    assert capacity // 2 <= min(late) <= max(late) <= capacity + 1
    assert mean(late) >= 0.7 * capacity
    assert sorted(endpoint.served) == list(range(3000))
    assert len(set(endpoint.served)) == len(endpoint.served)
    assert len(endpoint.refused) < 0.1 * 3000


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("capacity", [1, 3, 6, 20])
def test_it_converges_to_a_capacity_beyond_which_answers_wait(capacity: int, noise: float) -> None:
    endpoint, pace = Simulated(capacity, refuses=False, noise=noise), Pace()
    endpoint.run(pace, 6000)
    late = endpoint.limits[2000:]
    assert max(late) <= 3 * capacity + START
    assert capacity / 2 <= mean(late) <= 2 * capacity + 2
    assert sorted(endpoint.served) == list(range(6000))


def test_longer_answers_alone_are_not_taken_for_load() -> None:
    """Prompts of another stage take five times as long, whatever is sent at once."""
    endpoint, pace = Simulated(10_000, refuses=False), Pace(most=64)
    endpoint.run(pace, 500)
    assert pace.limit == 64
    pace.most = MOST
    endpoint.seconds = 5.0
    endpoint.run(pace, 3000)
    assert min(endpoint.limits[-1000:]) >= 64


def test_it_grows_only_as_far_as_it_is_used() -> None:
    pace = Pace()
    for now in range(1000):
        pace.answered(pace.sent(now, inside=5), now + 0.5)
    assert pace.limit == START
    for now in range(1000):
        pace.answered(pace.sent(now, inside=pace.limit), now + 0.5)
    assert pace.limit == MOST


@given(st.lists(st.tuples(st.sampled_from(["sent", "answered", "overloaded"]), st.floats(0, 9))))
def test_a_pace_stays_within_its_bounds(steps: list[tuple[str, float]]) -> None:
    pace, flying, now = Pace(), [], 0.0
    for step, seconds in steps * 20:
        now += seconds
        if step == "sent" and now >= pace.until:
            flying.append(pace.sent(now, len(flying) + 1))
        elif step == "answered" and flying:
            pace.answered(flying.pop(), now)
        elif step == "overloaded" and flying:
            before = pace.limit
            pace.overloaded(flying.pop(0), now, seconds)
            assert pace.limit in (before, max(1, before // 2))
            assert pace.until >= now + seconds
        assert 1 <= pace.limit <= MOST


def test_one_crowd_of_refusals_halves_it_once() -> None:
    pace = Pace(limit=16)
    crowd = [pace.sent(0.0, inside) for inside in range(1, 17)]
    for sent in crowd:
        pace.overloaded(sent, 1.0)
    assert pace.limit == 8
    pace.overloaded(pace.sent(9.0, 8), 10.0)
    assert pace.limit == 4


def test_no_request_is_sent_before_retry_after_has_passed() -> None:
    endpoint = Simulated(3, refuses=True, wait=7.0)
    endpoint.run(Pace(), 200)
    assert endpoint.refused
    for refused in endpoint.refused:
        assert not [start for start in endpoint.starts if refused < start < refused + 7.0]


def test_waits_without_retry_after_double_until_an_answer() -> None:
    pace, waits, now = Pace(limit=64), [], 0.0
    for _ in range(7):
        pace.overloaded(pace.sent(now, 1), now)
        waits.append(pace.until - now)
        now = pace.until
    assert waits == [0.5, 1, 2, 4, 8, 8, 8]
    pace.answered(pace.sent(now, 1), now)
    pace.overloaded(pace.sent(now, 1), now)
    assert pace.until - now == 0.5


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "-3"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


@pytest.mark.anyio
async def test_a_gate_lets_in_as_many_as_its_capacity_in_order() -> None:
    capacity, inside, most, order = 2, 0, Counter[int](), list[int]()
    gate = Gate(lambda: capacity)

    async def one(number: int) -> None:
        nonlocal inside, capacity
        async with gate:
            order.append(number)
            inside += 1
            most[capacity] = max(most[capacity], inside)
            await anyio.sleep(0.001)
            inside -= 1
            if number == 10:
                capacity = 5

    async with anyio.create_task_group() as group:
        for number in range(40):
            group.start_soon(one, number)
    assert order == list(range(40))
    assert most == {2: 2, 5: 5}
    assert gate.inside == 0


@pytest.mark.anyio
async def test_a_cancelled_wait_takes_no_place() -> None:
    gate = Gate(lambda: 1)
    await gate.enter()
    with anyio.move_on_after(0.01):
        await gate.enter()

    async def hold() -> None:
        async with gate:
            await anyio.sleep(FOREVER)

    for leaves in (False, True):  # or is let in, in the same moment
        async with anyio.create_task_group() as group:
            group.start_soon(hold)
            await anyio.lowlevel.checkpoint()
            if leaves:
                gate.leave()
            group.cancel_scope.cancel()
    assert gate.inside == 0
    await gate.enter()


def test_a_gate_serves_event_loops_of_several_threads() -> None:
    gate, lock, inside, most, done = Gate(lambda: 3), threading.Lock(), 0, 0, 0

    async def one() -> None:
        nonlocal inside, most, done
        async with gate:
            with lock:
                inside += 1
                most = max(most, inside)
            await anyio.sleep(0.001)
            with lock:
                inside, done = inside - 1, done + 1

    async def many() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(25):
                group.start_soon(one)

    threads = [threading.Thread(target=anyio.run, args=(many,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(FOREVER)
    assert (done, most, gate.inside) == (100, 3, 0)


class Crowded:
    """Behaviour of an endpoint that answers 429 beyond its capacity."""

    def __init__(self, wire: Any, capacity: int, barrier: int = 0):
        self.wire, self.capacity = wire, capacity
        self.lock, self.inside, self.most = threading.Lock(), 0, 0
        self.answered, self.refused = Counter[str](), 0

    def __call__(self, body: dict[str, Any], number: int) -> Any:
        text = body["messages"][0]["content"]
        with self.lock:
            if self.inside >= self.capacity:
                self.refused += 1
                return self.wire.reply(429, {"error": {"message": "busy"}}, Retry_After_Ms="20")
            self.inside += 1
            self.most = max(self.most, self.inside)
        threading.Event().wait(0.005)  # so that some are there at the same time
        with self.lock:
            self.inside -= 1
            self.answered[text] += 1
        return self.wire.completion(f"answer to {text}")


@pytest.mark.slow
@pytest.mark.anyio
async def test_no_call_is_lost_or_made_twice_or_out_of_order(
    serve: Any, wire: Any, tmp_path: Path
) -> None:
    crowded = Crowded(wire, capacity=6)
    endpoint = serve(crowded)
    settings = Settings(cache=tmp_path, retries=0)  # a 429 to a crowd needs none
    llms = [wrap(from_spec(f"{m}@{endpoint.url}", settings), settings) for m in ("a", "b")]
    ask = [partial(llm.generate, sampling=Sampling()) for llm in llms]

    async def one(number: int) -> str:
        message = {"role": "user", "content": str(number)}
        return (await ask[number % 2]([message])).texts[0]

    results = await map_calls(one, range(400), limit=at_once(llms[0]))
    assert results == [f"answer to {number}" for number in range(400)]
    assert set(crowded.answered.values()) == {1}
    assert len(crowded.answered) == 400
    assert crowded.refused > 0
    assert len(endpoint.bodies) == 400 + crowded.refused
    assert sum(llm.usage.calls for llm in llms) == 400
    assert sum(llm.usage.failed for llm in llms) == 0
    limits = {llm.parallel for llm in llms}
    assert len(limits) == 1, "both models are behind one limiter"
    assert 1 <= limits.pop() <= 4 * crowded.capacity  # some are on the wire
    for llm in llms:
        await llm.aclose()


@pytest.mark.anyio
async def test_an_endpoint_that_only_refuses_ends_in_an_error(serve: Any, wire: Any) -> None:
    endpoint = serve(
        lambda body, number: wire.reply(429, {"error": {"message": "no"}}, Retry_After_Ms="1")
    )
    llm = OpenAILLM("m", base_url=endpoint.url, retries=2)
    message = [{"role": "user", "content": "Hi"}]
    results = await map_calls(lambda _: llm.generate(message, Sampling()), range(3), limit=3)
    assert [str(result)[-11:] for result in results] == ["HTTP 429: no"[-11:]] * 3
    assert llm.parallel == 1
    await llm.aclose()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("code", "headers"),
    [("insufficient_quota", {}), ("", {"Retry_After": "8123"}), ("", {"x_should_retry": "false"})],
)
async def test_a_429_that_will_not_pass_is_an_error_at_once(
    serve: Any, wire: Any, code: str, headers: dict[str, str]
) -> None:
    error = {"error": {"message": "nothing left", "code": code}}
    endpoint = serve(lambda body, number: wire.reply(429, error, **headers))
    llm = OpenAILLM("m", base_url=endpoint.url, retries=0)
    with pytest.raises(LLMError, match="nothing left"):
        await llm.generate([{"role": "user", "content": "Hi"}], Sampling())
    assert len(endpoint.bodies) == 1
    await llm.aclose()


@pytest.mark.anyio
async def test_a_timeout_halves_the_number_at_once(serve: Any, wire: Any) -> None:
    endpoint: Any = None
    endpoint = serve(lambda body, number: endpoint.release.wait(FOREVER))
    llm = OpenAILLM("m", base_url=endpoint.url, retries=0, timeout=0.1)
    with pytest.raises(LLMError, match="no answer"):
        await llm.generate([{"role": "user", "content": "Hi"}], Sampling())
    assert llm.parallel == START // 2


def test_a_number_is_an_upper_bound() -> None:
    llm = OpenAILLM("m", base_url="http://127.0.0.1:9/v1", concurrency=3)
    other = OpenAILLM("n", base_url="http://127.0.0.1:9/v1")
    assert (llm.parallel, other.parallel) == (3, START)
    assert llm._limiter is other._limiter
    assert at_once(llm, 3)() == 3
    assert at_once(other)() == START
    assert at_once(object())() == 8


def test_limits_are_not_shared_by_endpoints_or_keys() -> None:
    places = [("http://127.0.0.1:9/v1", "a"), ("http://127.0.0.1:9/v1", "b")]
    places += [("http://127.0.0.1:10/v1", "a")]
    limiters = [OpenAILLM("m", base_url=url, api_key=key)._limiter for url, key in places]
    assert len({id(limiter) for limiter in limiters}) == 3
    assert all(one is not other for one, other in pairwise(limiters))
    assert Limiter().limit == START
