"""Reads of the store with a timeout, and its latest users in memory with their records and heads,
consistent with the store at every request. Knows no HTTP and no LLM.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import anyio
import numpy as np
from anyio.to_thread import run_sync
from cachetools import LRUCache

from hydra_llm.errors import StoreError
from hydra_llm.gateway.drift import CHANGED
from hydra_llm.model.head import Head
from hydra_llm.store.store import Store
from hydra_llm.store.values import StoredHead
from hydra_llm.types import Record, as_one_text

if TYPE_CHECKING:
    from hydra_llm.bundle import Bundle
    from hydra_llm.model.feature_cache import FeatureCache

R = TypeVar("R")
READS_AT_ONCE = 40
BACKOFF_SECONDS = 2.0  # how long reads fail at once after one has timed out
LOOK_FIRST = 64  # texts that are looked up before all others
MAX_MISSING = 24  # texts that a request may wait for: a few new records, not a whole history


class TimedReads:
    """Reads in threads of their own, each for at most `timeout` seconds: a hanging database costs
    one request some seconds, the next ones none.
    """

    def __init__(self, timeout: float):
        self._timeout, self._failing_until = timeout, 0.0
        self._limiter: anyio.CapacityLimiter | None = None

    async def read(self, function: Callable[[], R]) -> R:
        """Await `function()` in a thread; `StoreError` if it, or one before, took too long."""
        if time.monotonic() < self._failing_until:
            raise StoreError("the store is silent")
        # It belongs to the loop that is running.
        limiter = self._limiter = self._limiter or anyio.CapacityLimiter(READS_AT_ONCE)
        try:
            with anyio.fail_after(self._timeout):
                # The thread goes on until its driver gives up, and is not waited for.
                return await run_sync(function, abandon_on_cancel=True, limiter=limiter)
        except TimeoutError:
            self._failing_until = time.monotonic() + BACKOFF_SECONDS
            raise StoreError("the store does not answer in time") from None


@dataclass(frozen=True, slots=True)
class UserSnapshot:
    """One user as of a version."""

    name: str
    version: int
    records: tuple[Record, ...]  # oldest first
    heads: Mapping[str, Head]  # by scorer
    off: bool = False  # whether the user wants no personal answers


class UserCache:
    """An LRU cache of a store's users. Any thread may call."""

    def __init__(
        self,
        store: Store,
        bundle: "Bundle | None",
        size: int,
        features: "FeatureCache | None" = None,
    ):
        """`features`: where histories have to be encoded before they can be searched or scored."""
        self._store, self._bundle, self._features = store, bundle, features
        self.need_features = features is not None
        self._recent: LRUCache[str, UserSnapshot] = LRUCache(size)
        self._encoded: LRUCache[str, int] = LRUCache(size)  # user → version that was encoded
        self._lock, self._dropped = threading.Lock(), 0

    def current(self, name: str) -> UserSnapshot | None:
        """The user as of now; None if unknown. Reads the version, and more only where memory has
        another one: even a later one may be of another user.
        """
        version = self._store.state(name).version
        if version is None:
            return None
        with self._lock:
            user, dropped = self._recent.get(name), self._dropped
        if user and user.version == version:
            return user
        version, records = self._store.records(name)
        if version is None:
            return None
        off = self._store.is_off(name)  # behind the version: a later one is read again
        own, bundle = {}, self._bundle
        if bundle is not None:
            heads = from_stored(self._store.heads(name, bundle.weights))
            kept = {*bundle.scorers, CHANGED}
            own = {scorer: head for scorer, head in heads.items() if scorer in kept}
        user = UserSnapshot(name, version, tuple(records), own, off)
        with self._lock:
            if dropped == self._dropped:  # else this may be the user who was deleted meanwhile
                self._recent[name] = user
        return user

    def stale(self) -> list[UserSnapshot]:
        """Those in memory who are not so in the store any more."""
        with self._lock:
            held = list(self._recent.values())
        versions = self._store.versions([user.name for user in held])
        return [user for user in held if versions.get(user.name) != user.version]

    def drop(self, *names: str) -> None:
        """Forget users."""
        with self._lock:
            self._dropped += 1
            for name in names:
                self._recent.pop(name, None)
                self._encoded.pop(name, None)

    def is_warm(self, user: UserSnapshot, records: Sequence[Record]) -> bool:
        """Whether these records have been encoded, so that scoring need not wait for that."""
        if self._features is None:
            return True
        with self._lock:
            if self._encoded.get(user.name) == user.version:
                return True
        texts = texts_of(records)
        # Of a history that was never encoded the latest records tell that already.
        if any(self._features.missing(part) > MAX_MISSING for part in (texts[-LOOK_FIRST:], texts)):
            return False
        with self._lock:
            self._encoded[user.name] = user.version
        return True


def to_stored(heads: Mapping[str, Head]) -> dict[str, StoredHead]:
    """Heads by scorer, as the store keeps them."""
    return {
        scorer: StoredHead(head.records, head.until, head.numbers.astype("<f4").tobytes())
        for scorer, head in heads.items()
    }


def from_stored(heads: Mapping[str, StoredHead]) -> dict[str, Head]:
    """The inverse of `to_stored`."""
    return {
        scorer: Head(np.frombuffer(head.delta, "<f4"), head.known, head.until)
        for scorer, head in heads.items()
    }


def texts_of(records: Sequence[Record]) -> list[str]:
    """Every text of records of which features may be kept."""
    return [text for r in records for text in (r.input, r.output, as_one_text(r.input, r.output))]
