"""Reads with a timeout: a hanging database costs one request some seconds, the next ones none."""

import time
from collections.abc import Callable
from typing import TypeVar

import anyio
from anyio.to_thread import run_sync

from hydra_llm.errors import StoreError

R = TypeVar("R")
READS_AT_ONCE = 40
BACKOFF_SECONDS = 2.0  # how long reads fail at once after one has timed out


class TimedReads:
    """Reads that run in threads of their own, each for at most `timeout` seconds."""

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic):
        self._timeout, self._clock = timeout, clock
        self._limiter: anyio.CapacityLimiter | None = None
        self._failing_until = 0.0

    async def read(self, function: Callable[[], R]) -> R:
        """Await `function()` in a thread; `StoreError` if it, or one before, took too long."""
        if self._clock() < self._failing_until:
            raise StoreError("the store is silent")
        # It belongs to the loop that is running.
        limiter = self._limiter = self._limiter or anyio.CapacityLimiter(READS_AT_ONCE)
        try:
            with anyio.fail_after(self._timeout):
                # The thread goes on until its driver gives up, and is not waited for.
                return await run_sync(function, abandon_on_cancel=True, limiter=limiter)
        except TimeoutError:
            self._failing_until = self._clock() + BACKOFF_SECONDS
            raise StoreError("the store does not answer in time") from None
