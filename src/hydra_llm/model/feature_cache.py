"""Features by content and encoder, in memory and in a SQLite file: no text is encoded twice.

Knows no users: deleting a user's records includes calling `forget` with their texts.
Letters: B texts or pairs, H width.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from cachetools import FIFOCache

from hydra_llm.kv import CacheFile

if TYPE_CHECKING:
    from hydra_llm.model.encoder import Encoder

MEMORY_BYTES = 64 * 2**20  # how many bytes of vectors stay in memory; the oldest go first
PASSING = 4096  # vectors of texts that are not kept, such as queries: they evict no record's
KEYS_PER_QUERY = 500  # keys in one SQL query; SQLite's limit was 999 in old versions
SCHEMA = """
CREATE TABLE IF NOT EXISTS features (
    key BLOB PRIMARY KEY, first BLOB NOT NULL, second BLOB, value BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS features_first ON features (first);
CREATE INDEX IF NOT EXISTS features_second ON features (second) WHERE second IS NOT NULL;
"""
Item = tuple[str] | tuple[str, str]
Kept = tuple[np.ndarray, tuple[int, ...]]  # a vector, and `hash()` of each of its texts
_open = partial(CacheFile, schema=SCHEMA, what="features", erases=True)


class FeatureCache:
    """An encoder with a cache, safe for several threads, and for several processes on one file."""

    def __init__(self, encoder: "Encoder", path: Path | None = None):
        self.encoder, self.path = encoder, path
        self.keep = True  # whether vectors are written to the file, unless a call says otherwise
        self.progress: Callable[[int, int], None] | None = None  # of what is encoded at once
        self.hits = 0  # distinct texts or pairs that were cached
        self.misses = 0  # distinct texts or pairs that had to be encoded
        self._lock = Lock()
        self._memory: FIFOCache[bytes, Kept] = FIFOCache(MEMORY_BYTES, lambda kept: kept[0].nbytes)
        self._passing: FIFOCache[bytes, Kept] = FIFOCache(PASSING)
        self._file = _open(path) if path is not None else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the file itself; what is in memory stays here."""
        return FeatureCache, (self.encoder, self.path), {"keep": self.keep}

    def texts(self, texts: Sequence[str], *, keep: bool | None = None) -> np.ndarray:
        """As `Encoder.encode`. `keep`: the file gets all of them or none; by default the new."""
        return self._rows([(text,) for text in texts], keep)

    def missing(self, texts: Sequence[str]) -> int:
        """How many of these texts would have to be encoded."""
        return len(self.absent(texts))

    def absent(self, texts: Sequence[str]) -> list[str]:
        """Those of these texts that would have to be encoded, each once."""
        keys = dict(
            zip(_keys(self.encoder.digest, [(text,) for text in texts]), texts, strict=True)
        )
        with self._lock:
            known = self._recall(list(keys))
        return [text for key, text in keys.items() if key not in known]

    def add(self, texts: Sequence[str], vectors: np.ndarray) -> None:
        """Keep the vectors [B, H] of distinct texts that were encoded elsewhere."""
        items: list[Item] = [(text,) for text in texts]
        keys = _keys(self.encoder.digest, items)
        with self._lock:
            self.misses += len(keys)
            for key, item, vector in zip(keys, items, vectors, strict=True):
                self._memory[key] = (vector, tuple(map(hash, item)))
            if self.keep:
                self._store(
                    dict(zip(keys, vectors, strict=True)), dict(zip(keys, items, strict=True))
                )

    def holds(self, count: int) -> bool:
        """Whether so many vectors stay: in the file, or else in memory."""
        in_file = self.keep and self._file is not None and self._file.keeps
        return in_file or count * 4 * self.encoder.width <= MEMORY_BYTES

    def pairs(self, left: Sequence[str], right: Sequence[str]) -> np.ndarray:
        """As `Encoder.encode_pairs`: [B, H] float32."""
        return self._rows(list(zip(left, right, strict=True)))

    def forget(self, texts: Iterable[str]) -> int:
        """Delete every feature of these texts, alone or in pairs, of any encoder; returns how many.
        Raises UserFault: they could not be deleted from the file.
        """
        texts = set(texts)
        marks, gone = set(map(hash, texts)), set[bytes]()
        with self._lock:
            for memory in (self._memory, self._passing):
                for key in [key for key, kept in memory.items() if not marks.isdisjoint(kept[1])]:
                    gone.add(key)
                    del memory[key]
            if self._file is not None:
                gone |= _delete(self._file, texts)
            return len(gone)

    def forget_passing(self) -> None:
        """Drop from memory what was encoded of texts that are not kept, such as questions."""
        with self._lock:
            self._passing.clear()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = None

    def _rows(self, items: Sequence[Item], keep: bool | None = None) -> np.ndarray:
        """The features of items, [B, H]; those that are missing are encoded once each."""
        keys = _keys(self.encoder.digest, items)
        wanted = dict(zip(keys, items, strict=True))
        with self._lock:
            vectors = self._recall(list(wanted))
        missing = {key: item for key, item in wanted.items() if key not in vectors}
        if missing:
            left = [item[0] for item in missing.values()]
            right = [item[-1] for item in missing.values()]
            how: Any = {} if self.progress is None else {"progress": self.progress}
            single, encoder = len(items[0]) == 1, self.encoder
            rows = (
                encoder.encode(left, **how) if single else encoder.encode_pairs(left, right, **how)
            )
            vectors.update(zip(missing, rows, strict=True))
        with self._lock:
            self.hits += len(wanted) - len(missing)
            self.misses += len(missing)
            by_default = missing if self.keep else {}
            by_call = wanted if keep else {}
            kept = by_default if keep is None else by_call
            passing = missing.keys() - kept.keys()
            for key, item in wanted.items():
                memory = self._passing if key in passing else self._memory
                if key not in self._passing and key not in memory:
                    memory[key] = (vectors[key], tuple(map(hash, item)))  # the oldest make room
            self._store(vectors, kept)
        if not keys:
            return np.empty((0, self.encoder.width), np.float32)
        return np.stack([vectors[key] for key in keys])

    def _recall(self, keys: list[bytes]) -> dict[bytes, np.ndarray]:
        vectors: dict[bytes, np.ndarray] = {}
        for memory in (self._passing, self._memory):
            vectors.update((key, memory[key][0]) for key in keys if key in memory)
        if self._file is not None:
            rest = [key for key in keys if key not in vectors]
            for start in range(0, len(rest), KEYS_PER_QUERY):
                vectors.update(self._read(self._file, rest[start : start + KEYS_PER_QUERY]))
        return vectors

    def _read(self, file: CacheFile, keys: list[bytes]) -> dict[bytes, np.ndarray]:
        marks = ",".join("?" * len(keys))
        rows = file.read(f"SELECT key, value FROM features WHERE key IN ({marks})", keys)
        size = 4 * self.encoder.width
        if any(not isinstance(value, bytes) or len(value) != size for _, value in rows):
            raise file.fault("a vector has the wrong length")
        return {key: np.frombuffer(value, "<f4").astype(np.float32) for key, value in rows}

    def _store(self, vectors: dict[bytes, np.ndarray], new: dict[bytes, Item]) -> None:
        if self._file is None or not self._file.keeps or not new:
            return
        present = self._read(self._file, list(new)) if len(new) <= KEYS_PER_QUERY else {}
        rows = []
        for key, item in new.items():
            if key not in present:
                second = _hash(item[1]) if len(item) == 2 else None
                rows.append((key, _hash(item[0]), second, vectors[key].astype("<f4").tobytes()))
        if rows:
            self._file.write(("INSERT OR IGNORE INTO features VALUES (?, ?, ?, ?)", rows))


def forget_features(path: Path, texts: Iterable[str]) -> int:
    """Delete every feature of these texts from a file; the count, or UserFault if it cannot be."""
    if not path.exists():
        return 0
    with closing(_open(path)) as file:
        if not file.keeps:
            raise file.not_deleted("it cannot be written")
        return len(_delete(file, texts))


def erase_features(path: Path, *, at_once: float) -> None:
    """As `CacheFile.erase`, of a file of features; UserFault if it cannot be written."""
    if path.exists():
        with closing(_open(path)) as file:
            file.erase(at_once=at_once)


def _delete(file: CacheFile, texts: Iterable[str]) -> set[bytes]:
    """The keys of what was deleted."""
    hashes, gone = [(_hash(text),) for text in texts], set[bytes]()
    with file.deleting() as database:
        for column in ("first", "second"):
            for parameters in hashes:
                rows = database.execute(f"SELECT key FROM features WHERE {column} = ?", parameters)
                gone.update(key for (key,) in rows)
            database.executemany(f"DELETE FROM features WHERE {column} = ?", hashes)
    return gone


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _keys(digest: str, items: Sequence[Item]) -> list[bytes]:
    """Of each item; a text that is in many pairs is hashed once."""
    hashes = {text: _hash(text) for text in {text for item in items for text in item}}
    parts = (b"".join([digest.encode(), *(hashes[text] for text in item)]) for item in items)
    return [hashlib.sha256(part).digest() for part in parts]
