"""Turns at an engine that answers few requests at once, shared fairly among users."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

asking: ContextVar[str] = ContextVar("asking", default="")
"""The user for whom the request is that is being answered; "" if nobody is named."""


class FairTurns:
    """A semaphore whose waiters have turns by user, so that nobody waits behind all that another
    one has asked.
    """

    def __init__(self, slots: int):
        self._free = slots
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # in the order of their turns

    def waiting(self, user: str) -> int:
        """How many requests of a user wait."""
        return len(self._waiting.get(user, ()))

    @asynccontextmanager
    async def turn(self, user: str) -> AsyncIterator[None]:
        """Wait for this user's turn; the slot is free again after the block."""
        if self._free:
            self._free -= 1
        else:
            await self._wait(user)
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, user: str) -> None:
        given = asyncio.get_running_loop().create_future()
        line = self._waiting.setdefault(user, deque())
        line.append(given)
        try:
            await given
        except asyncio.CancelledError:
            if given.cancelled():
                line.remove(given)
                if not line and self._waiting.get(user) is line:
                    del self._waiting[user]
            else:
                self._pass_on()  # its turn came as it left
            raise

    def _pass_on(self) -> None:
        """The slot goes to the next user's first request, or is free."""
        if not self._waiting:
            self._free += 1
            return
        user = next(iter(self._waiting))
        line = self._waiting.pop(user)
        line.popleft().set_result(None)
        if line:
            self._waiting[user] = line  # behind the others
