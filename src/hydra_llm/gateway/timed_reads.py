"""Reading the store with a limit of time: a database that hangs costs a request some seconds, and
the next ones nothing.

Knows nothing of what is read.
"""

import time
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

from hydra_llm.errors import StoreError

R = TypeVar("R")
READS_AT_ONCE = 40
SILENT_SECONDS = 2.0
"""After a read that took too long, how long nobody else tries."""


class TimedReads:
    """Reads that run in threads of their own, each for at most so many seconds."""

    def __init__(self, patience: float, clock: Callable[[], float] = time.monotonic):
        self._patience, self._clock = patience, clock
        self._limiter: anyio.CapacityLimiter | None = None
        self._silent_until = 0.0

    async def read(self, function: Callable[[], R]) -> R:
        """Await it.

        Raises:
            StoreError: it takes too long, or one a moment ago did; or what the function raises.
        """
        if self._clock() < self._silent_until:
            raise StoreError("the store is silent")
        self._limiter = self._limiter or anyio.CapacityLimiter(
            READS_AT_ONCE
        )  # it belongs to the loop that is running
        try:
            with anyio.fail_after(self._patience):
                # The thread goes on until its driver gives up; nobody waits for it.
                return await anyio.to_thread.run_sync(
                    function, abandon_on_cancel=True, limiter=self._limiter
                )
        except TimeoutError:
            self._silent_until = self._clock() + SILENT_SECONDS
            raise StoreError("the store does not answer in time") from None
