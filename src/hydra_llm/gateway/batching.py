"""Micro-batching: one thread for everything that scores. While it is busy jobs queue up; then the
texts, and the pairs of texts, that all of them need go through the encoder in one batch.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hydra_llm.errors import HydraError

R = TypeVar("R")
Encode = Callable[[Sequence[str]], Any]
Pairs = Sequence[tuple[str, str]]
EncodePairs = Callable[[Sequence[str], Sequence[str]], Any]
MAX_BATCH = 16  # jobs whose texts go into one batch: more encode no faster, and all wait for it
QUIET_SECONDS = 0.02  # after a request was worked on, before an idle job begins
IDLE_SECONDS = 0.25  # after which an idle job has its turn, however many requests there are


class Overloaded(HydraError):
    """There is more to score than there is time for."""


@dataclass(frozen=True, slots=True)
class _Job:
    do: Callable[[], Any]
    texts: Callable[[], Sequence[str]] = tuple
    pairs: Callable[[], Pairs] = tuple
    result: "Future[Any]" = field(default_factory=Future)


class FairQueue:
    """Jobs by user. Users have turns, so that nobody waits behind all that another one has asked;
    where there is no room, whoever has most jobs here loses the last of them. "" is the server
    itself, which loses none and is always next: a deletion waits for no request.
    """

    def __init__(self, room: int):
        self._of_user: dict[str, deque[_Job]] = {}  # in the order of their turns
        self._room, self._size = room, 0

    def __len__(self) -> int:
        return self._size

    def put(self, user: str, job: _Job) -> None:
        """Add a job. Raises `Overloaded`: no room, and no other user has more jobs."""
        own = len(self._of_user.get(user, ()))
        if user and self._size >= self._room:
            most = max(filter(None, self._of_user), key=self._waiting_of, default="")
            if self._waiting_of(most) <= own + 1:
                raise _overloaded()
            last = self._of_user[most].pop()
            self._size -= 1
            if last.result.set_running_or_notify_cancel():
                last.result.set_exception(_overloaded())
        self._of_user.setdefault(user, deque()).append(job)
        self._size += 1

    def take(self) -> _Job:
        """The first job of the user whose turn it is."""
        user = "" if "" in self._of_user else next(iter(self._of_user))
        jobs = self._of_user.pop(user)
        job = jobs.popleft()
        if jobs:
            self._of_user[user] = jobs  # behind the others
        self._size -= 1
        return job

    def _waiting_of(self, user: str) -> int:
        return len(self._of_user.get(user, ()))


def _overloaded() -> Overloaded:
    return Overloaded("more requests wait to be scored than this machine can score")


class MicroBatcher:
    """A thread that encodes and scores."""

    def __init__(self, encode: Encode | None, max_waiting: int, encode_pairs: EncodePairs | None):
        self._encode, self._encode_pairs = encode, encode_pairs
        self._waiting, self._later = FairQueue(max_waiting), FairQueue(max_waiting)
        self._ended, self._attended, self._quiet_from = False, 0, 0.0
        self._idle_done = time.monotonic()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    async def run(
        self,
        do: Callable[[], R],
        *,
        user: str,
        texts: Callable[[], Sequence[str]] = tuple,
        pairs: Callable[[], Pairs] = tuple,
        idle: bool = False,
    ) -> R:
        """Await `do()` in the scoring thread, after what `texts()`, and then `pairs()`, give there
        was encoded together with those of other waiting jobs. An idle job begins when no request is
        worked on, here or in `attending`; it must be short. `user` is for whom it is done, "" for
        the server itself. Raises `Overloaded` if the thread has ended, or too many jobs of users
        wait.
        """
        job = _Job(do, texts, pairs)
        with self._changed:
            if self._ended:
                raise Overloaded("these scorers are not in use any more")
            (self._later if idle else self._waiting).put(user, job)
            self._changed.notify()
        result: R = await asyncio.wrap_future(job.result)
        return result

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Around what the server itself does for a request: idle jobs would take its processor."""
        with self._changed:
            self._attended += 1
        try:
            yield
        finally:
            with self._changed:
                self._attended -= 1
                self._quiet_from = time.monotonic() + QUIET_SECONDS
                self._changed.notify()

    def close(self) -> None:
        """Finish what waits, then end the thread."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._ended or (self._later and self._pause() <= 0)):
                    self._changed.wait(self._pause() if self._later else None)
                size = min(len(self._waiting), MAX_BATCH)
                batch = [self._waiting.take() for _ in range(size)]
                if not batch and self._ended:
                    while self._later:
                        self._later.take().result.cancel()
                    return
                idle = self._later and self._pause(bool(batch)) <= 0 and not self._ended
                after = [self._later.take()] if idle else []
            self._do(batch)
            self._do(after)
            if after:
                self._idle_done = time.monotonic()

    def _pause(self, busy: bool = False) -> float:
        """Seconds until an idle job may begin."""
        begin = self._idle_done + IDLE_SECONDS
        if not (busy or self._attended):
            begin = min(begin, self._quiet_from)
        return begin - time.monotonic()

    def _do(self, batch: Sequence[_Job]) -> None:
        jobs = [job for job in batch if job.result.set_running_or_notify_cancel()]
        # An error occurs again, and is reported, in the job that needs the text.
        if self._encode is not None:
            texts: dict[str, None] = {}
            for job in jobs:
                with suppress(Exception):
                    texts |= dict.fromkeys(job.texts())
            if texts:
                with suppress(Exception):
                    self._encode(list(texts))
        if self._encode_pairs is not None:
            pairs: dict[tuple[str, str], None] = {}
            for job in jobs:
                with suppress(Exception):
                    pairs |= dict.fromkeys(job.pairs())
            if pairs:
                with suppress(Exception):
                    self._encode_pairs([left for left, _ in pairs], [right for _, right in pairs])
        for job in jobs:
            try:
                job.result.set_result(job.do())
            except BaseException as error:
                job.result.set_exception(error)
