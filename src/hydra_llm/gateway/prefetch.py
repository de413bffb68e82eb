"""Prefetch: histories are encoded when no request waits, a few records at a time.

Vectors are written to disk in a transaction that locks the user: a deletion, by any server, comes
before it, and then nothing is written, or after it, and then it removes them too.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import anyio.to_thread

from hydra_llm.errors import HydraError
from hydra_llm.gateway.batching import MicroBatcher
from hydra_llm.gateway.user_cache import TimedReads, UserCache, UserSnapshot, texts_of
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.store.change import StaleVersion
from hydra_llm.store.store import Store

RECORDS_AT_ONCE = 2  # six texts, some hundredths of a second that a request has to wait


@dataclass(eq=False)
class Prefetcher:
    """Encodes the histories of given users, one task a user."""

    _store: Store
    _reads: TimedReads
    _users: UserCache
    _features: FeatureCache
    _batcher: MicroBatcher
    under_way: dict[str, asyncio.Task[None]] = field(default_factory=dict, init=False)

    def begin(self, user: str) -> None:
        """Encode the user's records that have no features yet."""
        if user not in self.under_way:
            task = self.under_way[user] = asyncio.create_task(self._walk(user))
            task.add_done_callback(lambda _: self.under_way.pop(user, None))

    async def stop(self, user: str) -> None:
        """Encode nothing more of the user; running work ends before later jobs of the thread."""
        if (task := self.under_way.get(user)) is not None:
            task.cancel()
            await asyncio.wait({task})  # then what it had in the queue is cancelled too

    async def _walk(self, user: str) -> None:
        start = 0
        with suppress(HydraError):  # the user's next request begins again
            while snapshot := await self._reads.read(partial(self._users.current, user)):
                if not (records := snapshot.records[start : start + RECORDS_AT_ONCE]):
                    return
                texts = texts_of(records)
                await self._batcher.run(partial(self._features.texts, texts, keep=False), idle=True)
                with suppress(StaleVersion):  # the user has changed: read again
                    await anyio.to_thread.run_sync(partial(self._write, snapshot, texts))
                    start += RECORDS_AT_ONCE

    def _write(self, snapshot: UserSnapshot, texts: list[str]) -> None:
        with self._store.change(snapshot.name, version=snapshot.version):
            self._features.texts(texts, keep=True)
