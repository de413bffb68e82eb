"""Counts what an LLM costs and stops a run at its budget. Knows no cache."""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import anyio

from hydra_llm.errors import BudgetExceeded, LLMError
from hydra_llm.llm.base import ChatLLM, PartlyFailed, Sampling
from hydra_llm.llm.concurrency import PARALLEL
from hydra_llm.llm.limiter import Gate
from hydra_llm.types import Generation, Message, Usage


@dataclass(frozen=True, slots=True)
class Prices:
    """Money per million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, usage: Usage) -> float:
        """Of what the LLM told; NaN where it did not tell all, and tokens have a price."""
        if usage.untold and self != FREE:
            return math.nan
        return (usage.prompt_tokens * self.prompt + usage.completion_tokens * self.completion) / 1e6


FREE = Prices()


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may spend; None is no limit.

    Checked before each call: calls in flight can exceed tokens and cost. A request for n texts is
    one call until the endpoint is seen to draw one text per call.
    """

    max_calls: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None


class Meter:
    """Any LLM with counted and priced calls, a budget, and no more calls at once than the LLM takes
    (its own `parallel`) or than `parallel`. `usage` is all that was spent, also by failed calls;
    `errors` counts their messages.
    """

    def __init__(
        self,
        inner: ChatLLM,
        *,
        prices: Prices = FREE,
        budget: Budget = Budget(),
        parallel: int | None = None,
    ):
        self.inner, self.prices, self.budget, self._most = inner, prices, budget, parallel
        self.usage = Usage()
        self.errors: Counter[str] = Counter()
        self._slots = Gate(lambda: self.parallel)
        self._in_flight = 0
        self._one_by_one = False  # whether n texts were seen to be n calls

    @property
    def parallel(self) -> int:
        """Calls at once, as of now."""
        own = getattr(self.inner, "parallel", None)
        if own is None:
            return self._most or PARALLEL
        return int(own) if self._most is None else min(self._most, own)

    @property
    def identity(self) -> Mapping[str, Any]:
        return self.inner.identity

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        """Add the call's cost to `usage`; BudgetExceeded before a call that the budget forbids."""
        async with self._slots:
            calls, spent = sampling.n if self._one_by_one else 1, self.usage
            tokens = spent.prompt_tokens + spent.completion_tokens
            for name, value, limit in (
                ("max_calls", spent.calls + self._in_flight + calls - 1, self.budget.max_calls),
                ("max_llm_tokens", tokens, self.budget.max_tokens),
                ("max_cost", spent.cost, self.budget.max_cost),
            ):
                if limit is not None and value >= limit:
                    fix = "raise it and run again, what was done is kept"
                    raise BudgetExceeded(f"the LLM's budget {name}={limit} is spent: {fix}")
            limited = (self.budget.max_tokens, self.budget.max_cost) != (None, None)
            if spent.untold and limited:
                fix = "take max_calls instead of max_llm_tokens and max_cost"
                raise BudgetExceeded(f"the LLM does not tell how many tokens it used: {fix}")
            self._in_flight += calls
            started = time.perf_counter()
            try:
                generation = await self.inner.generate(messages, sampling)
                return self._counted(generation, sampling.n, time.perf_counter() - started)
            except (LLMError, anyio.get_cancelled_exc_class()) as error:
                failed, waited = isinstance(error, LLMError), time.perf_counter() - started
                # A cancelled call counts as failed: it reached the LLM, its tokens are unknown.
                self.errors[str(error) if failed else "stopped before it answered"] += 1
                if isinstance(error, PartlyFailed):
                    error.partial = self._counted(error.partial, sampling.n, waited)
                else:
                    self.usage += Usage(calls=1, failed=1, seconds=waited)
                raise
            finally:
                self._in_flight -= calls

    async def aclose(self) -> None:
        await self.inner.aclose()

    def _counted(self, generation: Generation, n: int, waited: float) -> Generation:
        self._one_by_one |= generation.usage.calls >= n > 1
        # An engine whose calls queue tells its own seconds: waiting would count the queue.
        seconds = generation.usage.seconds or waited
        usage = replace(generation.usage, cost=self.prices.cost(generation.usage), seconds=seconds)
        self.usage += usage
        return replace(generation, usage=usage)
