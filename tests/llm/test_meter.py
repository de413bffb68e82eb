"""The meter: counts, prices, failures, budgets, and how many calls run at once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest

from hydra_llm.errors import BudgetExceeded, LLMError, LLMRefused
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.cache import CachedLLM
from hydra_llm.llm.concurrency import map_calls
from hydra_llm.llm.fake import FailingLLM, RuleLLM
from hydra_llm.llm.meter import Budget, Meter, Prices
from hydra_llm.types import Generation, Message, Usage

from .conftest import stored_rows

pytestmark = pytest.mark.anyio


def ask(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def four_words() -> RuleLLM:
    return RuleLLM(lambda messages, index, rng: "one two three four")


async def test_counts_tokens_and_prices_them_per_million() -> None:
    meter = Meter(four_words(), prices=Prices(prompt=2.0, completion=10.0))
    generation = await meter.generate(ask("a b c"), Sampling(n=2, temperature=1.0))
    await meter.generate(ask("a"), Sampling())
    assert generation.usage.cost == pytest.approx((3 * 2.0 + 8 * 10.0) / 1e6)
    assert (meter.usage.calls, meter.usage.prompt_tokens, meter.usage.completion_tokens) == (
        2,
        4,
        12,
    )
    assert meter.usage.cost == pytest.approx((4 * 2.0 + 12 * 10.0) / 1e6)


async def test_a_failed_call_is_counted_kept_with_its_error_and_raised() -> None:
    meter = Meter(FailingLLM(four_words(), "refused", every=2))
    await meter.generate(ask("a"), Sampling())
    with pytest.raises(LLMRefused):
        await meter.generate(ask("a"), Sampling())
    assert (meter.usage.calls, meter.usage.failed) == (2, 1)
    assert meter.errors == {"fake:fail=refused: call 2 failed as wished": 1}


@pytest.mark.parametrize(
    ("budget", "named"),
    [
        (Budget(max_calls=3), "max_calls=3"),
        (Budget(max_tokens=15), "max_llm_tokens=15"),
        (Budget(max_cost=15.0), "max_cost=15.0"),
    ],
)
async def test_a_budget_stops_before_the_call_that_would_pass_it(
    budget: Budget, named: str
) -> None:
    inner = four_words()  # each call: 1 token of prompt, 4 of completion
    meter = Meter(inner, prices=Prices(prompt=1e6, completion=1e6), budget=budget)
    for _ in range(3):
        await meter.generate(ask("a"), Sampling())
    for _ in range(2):
        with pytest.raises(BudgetExceeded, match=named):
            await meter.generate(ask("a"), Sampling())
    assert len(inner.calls) == 3
    assert (meter.usage.calls, meter.usage.failed) == (3, 0)


async def test_failed_calls_spend_the_budget_of_calls() -> None:
    meter = Meter(FailingLLM(four_words()), budget=Budget(max_calls=2))
    for expected in (LLMError, LLMError, BudgetExceeded):
        with pytest.raises(expected):
            await meter.generate(ask("a"), Sampling())


class Slow:
    """Counts how many calls are in it at once."""

    identity: Mapping[str, Any] = {"kind": "fake", "model": "slow", "constrains": False}

    def __init__(self) -> None:
        self.now = self.most = 0

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        self.now += 1
        self.most = max(self.most, self.now)
        await anyio.sleep(0.01)
        self.now -= 1
        return Generation(("fine",), Usage(calls=1))

    async def aclose(self) -> None:
        pass


@pytest.mark.parametrize("limit", [1, 3])
async def test_no_more_calls_than_the_limit_run_at_once(limit: int) -> None:
    meter = Meter(slow := Slow(), parallel=limit)
    async with anyio.create_task_group() as group:
        for i in range(9):
            group.start_soon(meter.generate, ask(str(i)), Sampling())
    assert (slow.most, meter.usage.calls) == (limit, 9)


async def test_the_budget_of_calls_holds_for_calls_in_flight() -> None:
    meter = Meter(Slow(), budget=Budget(max_calls=5))
    refused = 0

    async def one(i: int) -> None:
        nonlocal refused
        try:
            await meter.generate(ask(str(i)), Sampling())
        except BudgetExceeded:
            refused += 1

    async with anyio.create_task_group() as group:
        for i in range(9):
            group.start_soon(one, i)
    assert (meter.usage.calls, refused) == (5, 4)


class OneByOne:
    """Each text is a call of its own."""

    identity: Mapping[str, Any] = {"kind": "fake", "model": "one by one", "constrains": False}

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        await anyio.sleep(0.01)
        return Generation(("fine",) * sampling.n, Usage(calls=sampling.n))

    async def aclose(self) -> None:
        pass


async def test_the_budget_counts_each_text_where_texts_are_calls() -> None:
    meter = Meter(OneByOne(), budget=Budget(max_calls=20))
    await meter.generate(ask("first"), Sampling(n=4))
    with pytest.raises(BudgetExceeded):  # 4 + 4 × 4 = 20
        await map_calls(lambda i: meter.generate(ask(str(i)), Sampling(n=4)), range(9), limit=9)
    assert meter.usage.calls == 20


async def test_a_stopped_call_is_counted_as_one_that_failed() -> None:
    meter = Meter(FailingLLM(four_words(), "hang"))
    with anyio.move_on_after(0.02):
        await meter.generate(ask("a"), Sampling())
    assert (meter.usage.calls, meter.usage.failed) == (1, 1)
    assert meter.errors == {"stopped before it answered": 1}


async def test_calls_in_flight_at_the_budgets_end_are_kept(tmp_path: Path) -> None:
    llm = CachedLLM(Meter(Slow(), budget=Budget(max_calls=3)), tmp_path / "c.sqlite")
    with pytest.raises(BudgetExceeded):
        await map_calls(lambda i: llm.generate(ask(str(i)), Sampling()), range(8), limit=4)
    assert llm.usage.calls == len(stored_rows(llm)) == 3
    await llm.aclose()


def test_one_meter_serves_one_event_loop_after_another() -> None:
    meter = Meter(Slow(), parallel=2)

    async def crowd() -> None:
        async with anyio.create_task_group() as group:
            for i in range(5):
                group.start_soon(meter.generate, ask(str(i)), Sampling())

    for _ in range(3):
        anyio.run(crowd)
    assert meter.usage.calls == 15


async def test_kept_answers_cost_no_budget_and_a_stopped_run_resumes(tmp_path: Path) -> None:
    questions = [ask(str(i)) for i in range(4)]

    def opened(calls: int) -> CachedLLM:
        return CachedLLM(Meter(four_words(), budget=Budget(max_calls=calls)), tmp_path / "c.sqlite")

    first = opened(2)
    done = [(await first.generate(question, Sampling())).texts for question in questions[:2]]
    with pytest.raises(BudgetExceeded):
        await first.generate(questions[2], Sampling())
    await first.aclose()
    second = opened(2)
    assert [(await second.generate(question, Sampling())).texts for question in questions][
        :2
    ] == done
    assert (second.usage.calls, second.usage.cached) == (2, 2)


@dataclass
class Silent:
    """An LLM that tells no tokens."""

    identity: Mapping[str, Any] = field(default_factory=lambda: {"kind": "silent", "model": "m"})

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        return Generation(("text",) * sampling.n, Usage(calls=1, untold=1))

    async def aclose(self) -> None: ...


async def test_tokens_that_are_not_told_are_unknown_and_not_zero(tmp_path: Path) -> None:
    meter = Meter(Silent(), prices=Prices(prompt=2.0))
    llm = CachedLLM(meter, tmp_path / "llm.sqlite")
    for replayed in (False, True):
        usage = (await llm.generate(ask("a"), Sampling(n=2, temperature=1.0))).usage
        assert usage.tokens == (None, None)
        assert usage.to_json()["prompt_tokens"] is None
        if not replayed:
            assert usage.to_json()["cost"] is None
            assert math.isnan(meter.usage.cost)
    assert {row["completion_tokens"] for _, _, row in stored_rows(llm)} == {None}
    await llm.aclose()
    assert Prices().cost(Usage(untold=1)) == 0, "what is free is free"


async def test_a_budget_of_tokens_is_not_kept_by_silence() -> None:
    meter = Meter(Silent(), budget=Budget(max_tokens=100))
    await meter.generate(ask("a"), Sampling())
    with pytest.raises(BudgetExceeded, match="max_calls"):
        await meter.generate(ask("a"), Sampling())
