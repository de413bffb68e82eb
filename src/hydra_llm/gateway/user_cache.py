"""The latest users with their records and heads, consistent with the store at every request: it
reads the user's version, and more only where memory has another one. Knows no HTTP and no LLM.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
from cachetools import LRUCache

from hydra_llm.bundle import Bundle
from hydra_llm.gateway.timed_reads import TimedReads
from hydra_llm.model.heads import Head
from hydra_llm.store.store import Store
from hydra_llm.store.values import StoredHead
from hydra_llm.types import Record, as_one_text

MAX_MISSING = 24  # texts that a request may wait for: a few new records, not a whole history


@dataclass(frozen=True, slots=True)
class UserSnapshot:
    """One user as of a version."""

    name: str
    version: int
    records: tuple[Record, ...]  # oldest first
    heads: Mapping[str, Head]  # by scorer


class UserCache:
    """An LRU cache of a store's users. Any thread may call."""

    def __init__(self, store: Store, bundle: Bundle | None, size: int):
        self._store, self._bundle = store, bundle
        self._recent: LRUCache[str, UserSnapshot] = LRUCache(size)
        self._encoded: LRUCache[str, int] = LRUCache(size)  # user → version that was encoded
        self._lock, self._dropped = threading.Lock(), 0

    def at_hand(self, name: str, version: int) -> UserSnapshot | None:
        """The user as of exactly `version` if in memory; a later one may be of another user."""
        with self._lock:
            user = self._recent.get(name)
        return user if user and user.version == version else None

    async def current(self, reads: TimedReads, name: str) -> UserSnapshot | None:
        """The user as of now, from memory where the version is the store's; None if unknown."""
        version = (await reads.read(partial(self._store.state, name))).version
        if version is None:
            return None
        return self.at_hand(name, version) or await reads.read(partial(self.load, name))

    def load(self, name: str) -> UserSnapshot | None:
        """The user as the store has it; None for one who is not there."""
        dropped, bundle = self._dropped, self._bundle
        version, records = self._store.records(name)
        if version is None:
            return None
        own = {}
        if bundle is not None:
            heads = self._store.heads(name, bundle.weights).items()
            own = {scorer: to_head(head) for scorer, head in heads if scorer in bundle.scorers}
        user = UserSnapshot(name, version, tuple(records), own)
        with self._lock:
            if dropped == self._dropped:  # else this may be the user who was deleted meanwhile
                self._recent[name] = user
        return user

    def drop(self, name: str) -> None:
        """Forget a user."""
        with self._lock:
            self._dropped += 1
            self._recent.pop(name, None)
            self._encoded.pop(name, None)

    def is_warm(self, user: UserSnapshot, records: Sequence[Record]) -> bool:
        """Whether these records have been encoded, so that scoring need not wait for that."""
        if self._bundle is None or self._bundle.settings.features != "tower":
            return True
        with self._lock:
            if self._encoded.get(user.name) == user.version:
                return True
        if self._bundle.store.missing(texts_of(records)) > MAX_MISSING:
            return False
        with self._lock:
            self._encoded[user.name] = user.version
        return True


def to_head(stored: StoredHead) -> Head:
    """A head as the store keeps it."""
    return Head(np.frombuffer(stored.delta, "<f4"), stored.known, stored.until)


def to_stored(head: Head) -> StoredHead:
    """The inverse of `to_head`."""
    return StoredHead(head.records, head.until, head.numbers.astype("<f4").tobytes())


def texts_of(records: Sequence[Record]) -> list[str]:
    """Every text of records of which features may be kept."""
    texts = [(r.input, r.output, as_one_text(r.input, r.output)) for r in records]
    return list(chain.from_iterable(texts))
