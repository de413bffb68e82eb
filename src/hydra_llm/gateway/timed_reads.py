"""Reads of the store with a timeout: a database that hangs costs one request some seconds, and the
next ones nothing.
"""

import time
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

from hydra_llm.errors import StoreError

R = TypeVar("R")
READS_AT_ONCE = 40
BACKOFF_SECONDS = 2.0
"""How long reads fail at once after one has timed out."""


class TimedReads:
    """Reads that run in threads of their own, each for at most `timeout` seconds."""

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic):
        self._timeout, self._clock = timeout, clock
        self._limiter: anyio.CapacityLimiter | None = None
        self._failing_until = 0.0

    async def read(self, function: Callable[[], R]) -> R:
        """Await it.

        Raises:
            StoreError: it takes too long, or one a moment ago did; or what the function raises.
        """
        if self._clock() < self._failing_until:
            raise StoreError("the store is silent")
        self._limiter = self._limiter or anyio.CapacityLimiter(
            READS_AT_ONCE
        )  # it belongs to the loop that is running
        try:
            with anyio.fail_after(self._timeout):
                # The thread goes on until its driver gives up; nobody waits for it.
                return await anyio.to_thread.run_sync(
                    function, abandon_on_cancel=True, limiter=self._limiter
                )
        except TimeoutError:
            self._failing_until = self._clock() + BACKOFF_SECONDS
            raise StoreError("the store does not answer in time") from None
