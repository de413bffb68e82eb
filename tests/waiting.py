"""Waiting for a condition instead of for a time: on a busy machine a test is slower, not red."""

import asyncio
import time
from collections.abc import Callable

FOREVER = 300.0
"""Seconds after which a condition counts as one that never comes true."""


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    end = time.monotonic() + FOREVER
    while not condition():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.01)


async def async_until(condition: Callable[[], bool]) -> None:
    """As `until`, in an event loop."""
    end = time.monotonic() + FOREVER
    while not condition():
        assert time.monotonic() < end, "it does not come true"
        await asyncio.sleep(0.01)
