"""How many requests an endpoint gets at once: found by its answers, one number for a process.

`Pace` is the rule alone, without clock or event loop: slow start (doubled each round), then one
more each round; halved when the endpoint answers 429 or is overloaded, and when a larger number
mostly makes answers wait longer. `Gate` is a semaphore of changing capacity; `Limiter` joins both.
"""

import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import mktime_tz, parsedate_tz
from time import monotonic as clock
from time import time
from typing import Any, Literal

import anyio
import anyio.lowlevel

Concurrency = int | Literal["auto"]
START, MOST = 8, 256  # requests at once: at first, and at most
ROUND = 32  # min answers of a round, whose mean latency is compared with an earlier round's
STEP = 1.5  # how much larger a number must be than the one it is compared with
ADDED, QUEUED = 1 / 3, 2 / 3  # share of added load that became waiting: little, and too much
HELPED = 0.8  # halving has helped if answers take at most this share of what they took
OVERLOADED = (429, 503, 529)
MOST_HOLDS = 16  # rounds
LONGEST_WAIT = 120.0  # seconds; where an endpoint asks for more, its error is told (as by the SDK)
FIRST_WAIT, MOST_WAIT = 0.5, 8.0  # seconds, doubled each time, where it asks for none


class Gate:
    """A semaphore whose capacity may change, for several event loops and threads. Who waits gets in
    in order.
    """

    def __init__(self, capacity: Callable[[], int]):
        self.capacity, self.inside = capacity, 0
        self._waiting: deque[_Waiter] = deque()
        self._lock = threading.Lock()

    async def enter(self, *, first: bool = False) -> None:
        """Wait for a place; `first`: before those who wait already."""
        with self._lock:
            if self._has_room() and (first or not self._waiting):
                self.inside += 1
                return
            waiter = _Waiter()
            (self._waiting.appendleft if first else self._waiting.append)(waiter)
        try:
            await waiter.event.wait()
        except BaseException:
            with self._lock:
                if gone := waiter in self._waiting:
                    self._waiting.remove(waiter)
            if not gone:  # it had got a place
                self.leave()
            raise

    def leave(self) -> None:
        """Give the place back."""
        with self._lock:
            self.inside -= 1
            admitted = []
            while self._waiting and self._has_room():
                admitted.append(self._waiting.popleft())
                self.inside += 1
        for waiter in admitted:
            waiter.wake()

    async def __aenter__(self) -> None:
        await self.enter()

    async def __aexit__(self, *error: object) -> None:
        self.leave()

    def _has_room(self) -> bool:
        return self.inside < max(1, self.capacity())


class _Waiter:
    """A task that waits, in whatever event loop and thread it runs."""

    def __init__(self) -> None:
        self.event, self._thread = anyio.Event(), threading.get_ident()
        self._loop: Any = anyio.lowlevel.current_token().native_token

    def wake(self) -> None:
        if self._thread == threading.get_ident():
            self.event.set()
        else:  # asyncio's loop, or trio's token
            call = getattr(self._loop, "call_soon_threadsafe", None) or self._loop.run_sync_soon
            call(self.event.set)


@dataclass(frozen=True, slots=True)
class Sent:
    """A request on its way."""

    at: float
    round: int  # in which it was sent
    limit: int  # at once, when it was sent


@dataclass
class Pace:
    """The number of requests at once, and until when none may be sent."""

    limit: int = START
    most: int = MOST
    until: float = 0.0
    _round: int = 0
    _doubles: bool = True
    _seconds: list[float] = field(default_factory=list)  # of this round's answers
    _full: bool = False  # whether as many as may be were on their way in this round
    _base: tuple[int, float] | None = None  # a limit, and the mean seconds of its answers
    _before: tuple[int, float] | None = None  # the same, before it was halved for its latency
    _refused: int = 0  # the limit at which the endpoint had too much to do last, 0: none yet
    _holds: int = 1  # rounds before that limit is tried again: doubled where it is refused again
    _held: int = 0
    _overloads: int = 0  # in a row

    def sent(self, now: float, inside: int) -> Sent:
        """A request is sent now, and so many are on their way with it."""
        self._full |= inside >= self.limit
        return Sent(now, self._round, self.limit)

    def answered(self, sent: Sent, now: float) -> None:
        """It was answered."""
        self._overloads = 0
        if sent.round != self._round:  # under another limit
            return
        self._seconds.append(now - sent.at)
        if len(self._seconds) >= max(ROUND, self.limit):
            self._judge(sum(self._seconds) / len(self._seconds))

    def overloaded(self, sent: Sent, now: float, wait: float | None = None) -> None:
        """The endpoint has too much to do, and may have said for how many seconds to wait."""
        if sent.round == self._round:  # else it was sent before the limit was lowered
            if wait is None:
                wait = min(FIRST_WAIT * 2**self._overloads, MOST_WAIT)
            again = self.limit == self._refused
            self._holds, self._held = min(2 * self._holds, MOST_HOLDS) if again else 1, 0
            self._overloads, self._refused = self._overloads + 1, self.limit
            self._base = self._before = None
            self._doubles = False
            self._begin(self.limit // 2)
        self.until = max(self.until, now + (wait or 0.0))

    def _judge(self, mean: float) -> None:
        """End a round: more at once, or half as many."""
        if not self._full:  # it says nothing about more
            self._begin(self.limit)
            return
        before, self._before = self._before, None
        if before and mean > HELPED * before[1]:  # the answers are longer, not the queue
            self._base = (before[0], mean)
            self._begin(before[0])
            return
        load, seconds = self._base or (self.limit, mean)
        if load > self.limit:
            load, seconds = self.limit, mean
        if self.limit >= STEP * load:
            added = self.limit / load - 1
            if mean > seconds * (1 + QUEUED * added):
                self._before, self._doubles = (self.limit, mean), False
                self._begin(self.limit // 2)
                return
            if mean <= seconds * (1 + ADDED * added):
                load, seconds = self.limit, mean
            else:  # a larger difference will tell
                self._doubles = False
        self._base = load, seconds
        more = max(1, (self._refused - 1 - self.limit) // 2)  # half of the way to what was refused
        if self.limit + 1 == self._refused and self._held < self._holds:
            self._held, more = self._held + 1, 0
        self._begin(self.limit * 2 if self._doubles else self.limit + more)

    def _begin(self, limit: int) -> None:
        self.limit, self._full = min(max(limit, 1), self.most), False
        self._round += 1
        self._seconds.clear()


class Limiter:
    """The requests to one endpoint, of all event loops and threads of this process."""

    def __init__(self, pace: Pace | None = None) -> None:
        self.pace, self._lock = pace or Pace(), threading.Lock()
        self.gate = Gate(lambda: self.pace.limit)

    @property
    def limit(self) -> int:
        return self.pace.limit

    def wait(self) -> float:
        """Seconds until a request may be sent, as far as the endpoint has said."""
        return max(0.0, self.pace.until - clock())

    def beside(self) -> Sent:
        """A request that takes no place, such as a caller's own: `saw` learns from its errors."""
        return Sent(clock(), self.pace._round, self.pace.limit)

    @asynccontextmanager
    async def request(self, *, again: bool = False) -> AsyncIterator[Sent]:
        """A place for a request, once it may be sent; `again`: before those that wait."""
        await self.gate.enter(first=again)
        try:
            while (wait := self.wait()) > 0:  # noqa: ASYNC110  # it may grow
                await anyio.sleep(wait)
            with self._lock:
                sent = self.pace.sent(clock(), self.gate.inside)
            yield sent
        finally:
            self.gate.leave()

    def saw(self, sent: Sent, status: int, headers: Mapping[str, str]) -> bool:
        """Learn from a response; whether the same request is to be sent again. A 429 to one of
        several requests at once says that they were too many: no retry is counted for it. One to a
        single request, one that ends only after minutes, or that forbids it, is an error.
        """
        wait, now = retry_after(headers), clock()
        too_long = wait is not None and wait > LONGEST_WAIT
        forbidden = too_long or headers.get("x-should-retry") == "false"
        with self._lock:
            if status in OVERLOADED and not forbidden:
                self.pace.overloaded(sent, now, wait)
            elif status < 400:
                self.pace.answered(sent, now)
        return status == 429 and sent.limit > 1 and not forbidden

    def timed_out(self, sent: Sent) -> None:
        """It was not answered in time."""
        with self._lock:
            self.pace.overloaded(sent, clock(), 0.0)


_LIMITERS: dict[object, Limiter] = {}


def limiter_of(endpoint: object) -> Limiter:
    """The limiter of an endpoint (anything hashable), the same one for the whole process."""
    return _LIMITERS.setdefault(endpoint, Limiter())


def present() -> str:
    """`12 at once` where requests are on their way, or ''."""
    limits = [limiter.limit for limiter in _LIMITERS.values() if limiter.gate.inside]
    return f"{' + '.join(map(str, limits))} at once" if limits else ""


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a response asks to wait; None where it asks for none that can be read."""
    for name, divisor in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            wait = float(headers.get(name, "")) / divisor
        except ValueError:
            continue
        if wait >= 0:  # not NaN
            return wait
    date = parsedate_tz(headers.get("retry-after", ""))
    try:
        return None if date is None else max(0.0, mktime_tz(date) - time())
    except (ValueError, OverflowError):
        return None
