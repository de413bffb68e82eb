"""What users' last fits were made on, in memory: the next fit of a user goes on from there."""

from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING

from cachetools import LRUCache

if TYPE_CHECKING:
    from hydra_llm.training.refit import KeptFit

MOST_BYTES = 64 * 2**20  # about 1 MB for both scorers of a user with 200 records


class KeptFits:
    """Fits by user, those of the latest fits; safe for several threads."""

    def __init__(self, most: int = MOST_BYTES):
        def size(fit: "KeptFit") -> int:
            return sum(own.bytes for own in fit.values())

        self._lock = Lock()
        self._fits: LRUCache[str, KeptFit] = LRUCache(most, size)

    def of(self, user: str) -> "dict[str, KeptFit]":
        """As `fit` takes it."""
        with self._lock:
            return {user: self._fits[user]} if user in self._fits else {}

    def put(self, fits: "dict[str, KeptFit]") -> None:
        """Keep fits in the place of older ones, unless they are too large."""
        with self._lock, suppress(ValueError):
            for user, fit in fits.items():
                self._fits.pop(user, None)
                self._fits[user] = fit

    def drop(self, *users: str) -> None:
        with self._lock:
            for user in users:
                self._fits.pop(user, None)

    def clear(self) -> None:
        with self._lock:
            self._fits.clear()
