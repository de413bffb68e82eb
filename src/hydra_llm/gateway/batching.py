"""Micro-batching: one thread for everything that scores. While it is busy jobs queue up; then the
texts, and the pairs of texts, that all of them need go through the encoder in one batch.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hydra_llm.errors import HydraError

R = TypeVar("R")
Encode = Callable[[Sequence[str]], Any]
Pairs = Sequence[tuple[str, str]]
EncodePairs = Callable[[Sequence[str], Sequence[str]], Any]
MAX_BATCH = 64  # jobs whose texts go into one batch
IDLE_JOB_EVERY = 8  # batches after which an idle job has its turn, however many wait


class Overloaded(HydraError):
    """There is more to score than there is time for."""


@dataclass(frozen=True, slots=True)
class _Job:
    do: Callable[[], Any]
    texts: Sequence[str] = ()
    pairs: Callable[[], Pairs] = tuple
    result: "Future[Any]" = field(default_factory=Future)


class MicroBatcher:
    """A thread that encodes and scores."""

    def __init__(self, encode: Encode | None, max_waiting: int, encode_pairs: EncodePairs | None):
        self._encode, self._encode_pairs, self._max_waiting = encode, encode_pairs, max_waiting
        self._waiting: deque[_Job] = deque()
        self._later: deque[_Job] = deque()
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    async def run(
        self,
        do: Callable[[], R],
        texts: Sequence[str] = (),
        *,
        pairs: Callable[[], Pairs] = tuple,
        must: bool = False,
        idle: bool = False,
    ) -> R:
        """Await `do()` in the scoring thread, after its texts, and then what `pairs()` gives there,
        were encoded together with those of other waiting jobs. An idle job begins when no other
        waits; it must be short. Raises `Overloaded` if the thread has ended, or too many wait for a
        job that is neither idle nor a `must`.
        """
        if len(self._waiting) >= self._max_waiting and not (must or idle):
            raise Overloaded("more requests wait to be scored than this machine can score")
        job = _Job(do, texts, pairs)
        with self._changed:
            if self._ended:
                raise Overloaded("these scorers are not in use any more")
            (self._later if idle else self._waiting).append(job)
            self._changed.notify()
        result: R = await asyncio.wrap_future(job.result)
        return result

    def close(self) -> None:
        """Finish what waits, then end the thread."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        batches = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._later or self._ended)
                size = min(len(self._waiting), MAX_BATCH)
                batch = [self._waiting.popleft() for _ in range(size)]
                if not batch and self._ended:
                    for job in self._later:
                        job.result.cancel()
                    return
                batches = batches + 1 if batch else 0
                idle = self._later and batches % IDLE_JOB_EVERY == 0 and not self._ended
                after = [self._later.popleft()] if idle else []
            self._do(batch)
            self._do(after)

    def _do(self, batch: Sequence[_Job]) -> None:
        jobs = [job for job in batch if job.result.set_running_or_notify_cancel()]
        texts = dict.fromkeys(text for job in jobs for text in job.texts)
        # An error of the encoder occurs again, and is reported, in the job that needs the text.
        if texts and self._encode is not None:
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
