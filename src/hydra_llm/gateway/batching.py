"""One thread for everything that scores, and requests that wait together are encoded together.

Work comes with the texts that it will need, and with a way to tell the pairs of texts. While the
thread is busy more of it gathers; then the texts, and the pairs, of all that wait go through the
encoder in one batch, and each piece of work runs on features that are there. Knows no users and no
HTTP.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from hydra_llm.errors import HydraError

R = TypeVar("R")
Encode = Callable[[Sequence[str]], Any]
Pairs = Sequence[tuple[str, str]]
EncodePairs = Callable[[Sequence[str], Sequence[str]], Any]
MOST_AT_ONCE = 64
"""Pieces of work whose texts go into one batch."""
ONE_LATER_IN = 8
"""Batches after which a piece of what is for later has its turn, however many wait."""


class Overloaded(HydraError):
    """There is more to score than there is time for."""


@dataclass(frozen=True, slots=True)
class _Work:
    texts: Sequence[str]
    pairs: Callable[[], Pairs]
    do: Callable[[], Any]
    result: "Future[Any]"


def no_pairs() -> Pairs:
    """Of work that needs none."""
    return ()


class MicroBatcher:
    """A thread that encodes and scores."""

    def __init__(
        self,
        encode: Encode | None,
        most_waiting: int = 256,
        encode_pairs: EncodePairs | None = None,
    ):
        self._encode, self._encode_pairs, self._most_waiting = encode, encode_pairs, most_waiting
        self._waiting: deque[_Work] = deque()
        self._later: deque[_Work] = deque()
        self._ended = False
        self._something = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    async def run(
        self,
        do: Callable[[], R],
        texts: Sequence[str] = (),
        *,
        pairs: Callable[[], Pairs] = no_pairs,
        must: bool = False,
    ) -> R:
        """Await `do()` in the scoring thread; its texts, and then what `pairs()` tells there, are
        encoded before, together with those of whoever else waits.

        Raises:
            Overloaded: too many wait already, which does not stop what `must` be done; or the
                thread has ended.
        """
        work = _Work(texts, pairs, do, Future())
        with self._something:
            if self._ended:
                raise Overloaded("these scorers are not in use any more")
            if len(self._waiting) >= self._most_waiting and not must:
                raise Overloaded("more requests wait to be scored than this machine can score")
            self._waiting.append(work)
            self._something.notify()
        return await asyncio.wrap_future(work.result)

    async def later(self, do: Callable[[], R]) -> R:
        """Await `do()` in the scoring thread when nobody waits: it must be short, since whoever
        comes meanwhile waits for it.

        Raises:
            Overloaded: the thread has ended.
        """
        work = _Work((), no_pairs, do, Future())
        with self._something:
            if self._ended:
                raise Overloaded("these scorers are not in use any more")
            self._later.append(work)
            self._something.notify()
        return await asyncio.wrap_future(work.result)

    def close(self) -> None:
        """Finish what waits, then end the thread."""
        with self._something:
            self._ended = True
            self._something.notify()
        self._thread.join()

    def _run(self) -> None:
        batches = 0
        while True:
            with self._something:
                self._something.wait_for(lambda: self._waiting or self._later or self._ended)
                batch = [
                    self._waiting.popleft() for _ in range(min(len(self._waiting), MOST_AT_ONCE))
                ]
                if not batch and self._ended:
                    for work in self._later:
                        work.result.cancel()
                    return
                batches = batches + 1 if batch else 0
                idle = (
                    self._later.popleft()
                    if self._later and batches % ONE_LATER_IN == 0 and not self._ended
                    else None
                )
            if batch:
                self._do(batch)
            if idle is not None:
                self._do([idle])

    def _do(self, batch: list[_Work]) -> None:
        batch = [work for work in batch if work.result.set_running_or_notify_cancel()]
        texts = list(dict.fromkeys(text for work in batch for text in work.texts))
        if texts and self._encode is not None:
            with contextlib.suppress(
                Exception
            ):  # whoever needs one of these texts meets the same fault, and it is told there
                self._encode(texts)
        if self._encode_pairs is not None:
            pairs = list(dict.fromkeys(pair for work in batch for pair in _told(work)))
            if pairs:
                with contextlib.suppress(Exception):
                    self._encode_pairs([left for left, _ in pairs], [right for _, right in pairs])
        for work in batch:
            try:
                work.result.set_result(work.do())
            except BaseException as error:
                work.result.set_exception(error)


def _told(work: _Work) -> Pairs:
    """The work's pairs; none where it cannot tell them: what is at fault there is told when the
    work is done.
    """
    try:
        return work.pairs()
    except Exception:
        return ()
