"""Counts what an LLM costs and stops a run before it costs more than was allowed (DESIGN 6). Wraps
any `ChatLLM`; knows no cache.

A failed call is counted and its error kept; it is raised to whoever asked, never turned into an
answer. A call that was stopped in the middle counts as failed too: it reached the LLM, though
nobody knows its tokens.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import anyio

from hydra_llm.errors import BudgetExceeded, LLMError
from hydra_llm.llm.base import ChatLLM, PartlyFailed, Sampling
from hydra_llm.types import Generation, Message, Usage


@dataclass(frozen=True, slots=True)
class Prices:
    """Money per million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, usage: Usage) -> float:
        return (usage.prompt_tokens * self.prompt + usage.completion_tokens * self.completion) / 1e6


FREE = Prices()


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may spend; None is no limit. Checked before each call, so tokens and cost can pass
    it by the calls in flight.

    Where an endpoint draws one text per call, the first answer tells; until then a request for n
    texts counts as one call.
    """

    max_calls: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None


class Meter:
    """Any LLM with calls counted, priced, limited in number at once and stopped at a budget."""

    def __init__(
        self,
        inner: ChatLLM,
        *,
        prices: Prices = FREE,
        budget: Budget = Budget(),
        concurrency: int = 8,
    ):
        self.inner, self.prices, self.budget = inner, prices, budget
        self.usage = Usage()
        """All that was spent, failed calls among it."""
        self.errors: Counter[str] = Counter()
        """How often each failure was met."""
        self.parallel = concurrency
        """Calls at once."""
        self._slots = anyio.Semaphore(concurrency)
        self._in_flight = 0
        self._one_by_one = False  # whether n texts were seen to be n calls

    @property
    def identity(self) -> Mapping[str, Any]:
        return self.inner.identity

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        """Pass the call on, and add what it cost to `usage`.

        Raises:
            BudgetExceeded: the budget is spent; the LLM was not asked.
            LLMError: as the inner LLM says.
        """
        async with self._slots:
            n = sampling.n
            calls = n if self._one_by_one else 1
            self._check_budget(calls)
            self._in_flight += calls
            started = time.perf_counter()
            try:
                made = await self.inner.generate(messages, sampling)
            except PartlyFailed as error:
                self.errors[str(error)] += 1
                raise PartlyFailed(
                    str(error), self._counted(error.made, n, time.perf_counter() - started)
                ) from None
            except (LLMError, anyio.get_cancelled_exc_class()) as error:
                self.usage += Usage(calls=1, failed=1, seconds=time.perf_counter() - started)
                self.errors[
                    str(error) if isinstance(error, LLMError) else "stopped before it answered"
                ] += 1
                raise
            finally:
                self._in_flight -= calls
            return self._counted(made, n, time.perf_counter() - started)

    async def aclose(self) -> None:
        await self.inner.aclose()

    def _counted(self, made: Generation, n: int, waited: float) -> Generation:
        self._one_by_one |= made.usage.calls >= n > 1
        # An engine whose calls queue knows better than we how long this one took.
        usage = replace(
            made.usage, cost=self.prices.cost(made.usage), seconds=made.usage.seconds or waited
        )
        self.usage += usage
        return Generation(made.texts, usage)

    def _check_budget(self, calls: int) -> None:
        """Whether there is room for so many calls more, beside those in flight."""
        tokens = self.usage.prompt_tokens + self.usage.completion_tokens
        for name, spent, limit in (
            ("max_calls", self.usage.calls + self._in_flight + calls - 1, self.budget.max_calls),
            ("max_llm_tokens", tokens, self.budget.max_tokens),
            ("max_cost", self.usage.cost, self.budget.max_cost),
        ):
            if limit is not None and spent >= limit:
                raise BudgetExceeded(
                    f"the LLM's budget {name}={limit} is spent: raise it and run again, what was"
                    " done is kept"
                )
