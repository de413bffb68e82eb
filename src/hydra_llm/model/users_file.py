"""A bundle's users in one SQLite file: each user's heads by scorer, and records.

    parts    digest of the user's id, part (a scorer's name, or `records`) → slot
    slots    the bytes of one part of one user, padded with zeros
    free     slots that hold nothing but zeros, for whoever comes next

A user is read by an index: neither opening nor memory grows with the number of users. A write is
one transaction: a process that is killed leaves the old user or the new one. Deleted bytes are
overwritten. `secure_delete` alone does not ensure that: SQLite leaves copies where rows move
between pages. So a slot is written in place, never moved or deleted; the index, which moves, has
only keyed digests. Knows no bundle and no kind of head.
"""

import json
import sqlite3
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from secrets import token_bytes
from typing import Any, TypeVar

import numpy as np

from hydra_llm.errors import BundleError
from hydra_llm.model.head import Head
from hydra_llm.types import ALWAYS, Choice, Record

T = TypeVar("T")
RECORDS = "records"  # a part; all others are scorers
SCHEMA = (
    "CREATE TABLE salt (value BLOB NOT NULL)",
    "CREATE TABLE slots (id INTEGER PRIMARY KEY, value BLOB NOT NULL)",
    "CREATE TABLE free (capacity INTEGER, slot INTEGER, PRIMARY KEY (capacity, slot))"
    " WITHOUT ROWID",
    "CREATE TABLE parts (part TEXT, digest BLOB, slot INTEGER NOT NULL,"
    " PRIMARY KEY (digest, part)) WITHOUT ROWID",
)
PRAGMAS = "PRAGMA trusted_schema = OFF; PRAGMA synchronous = FULL; PRAGMA secure_delete = ON;"
PRAGMAS += "PRAGMA cache_size = -16384;"  # in KiB: all pages above the leaves, of a million users
NEW = "PRAGMA page_size = 16384; PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
NEW += "PRAGMA cache_size = -65536;"
"""Of a file that nobody knows yet: its writer makes it durable as a whole."""
CHANGES = 24  # offset of SQLite's change counter, 4 bytes
PREFIX = struct.Struct("<III")  # CRC-32 of all behind it, bytes of the user's id, of the content
LEARNED = struct.Struct("<4sqd")  # of a head: type of the numbers, records, latest time
FLOAT32 = b"<f4\0"
MOST = 500  # values of one statement
FIND = "SELECT value FROM parts JOIN slots ON slots.id = slot WHERE part = ? AND digest IN"


class UsersFile:
    """An open file; any number of threads and processes may read and write it.

    Raises BundleError, in every method: the file is damaged or not one of these, or the disk is
    full or read-only.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise BundleError(f"{path}: missing from the bundle: copy it again")
        self.path, self._lock = path, threading.RLock()
        with self._reported():
            self._connection = _connect(path, PRAGMAS)
            schema = {sql for (sql,) in self._rows("SELECT sql FROM sqlite_master")}
            if schema != set(SCHEMA):
                raise sqlite3.DatabaseError("it has other tables")
            self._salt = bytes(self._rows("SELECT value FROM salt")[0][0])

    @classmethod
    def create(
        cls,
        path: Path,
        heads: Mapping[str, Mapping[str, Head]],
        records: Mapping[str, Sequence[Record]],
    ) -> None:
        """Write a new file, without waiting for the disk."""
        with _reported(path), closing(_connect(path, NEW, create=True)) as connection:
            for statement in SCHEMA:
                connection.execute(statement)
            connection.execute("INSERT INTO salt VALUES (?)", (token_bytes(16),))
        file = cls(path)
        with closing(file), file._reported():
            file._connection.executescript(NEW)
            with file._transaction():
                for scorer, of in heads.items():
                    for user, head in of.items():
                        file._insert(scorer, user, pack_head(head))
                for user, own in records.items():
                    file._insert(RECORDS, user, _pack_records(own))

    def close(self) -> None:
        self._connection.close()

    # ---- reading

    def heads(self, scorer: str) -> "StoredPart[Head]":
        """User → head of a scorer."""
        return StoredPart(self, scorer, head_of)

    def records(self) -> "StoredPart[list[Record]]":
        """User → records, oldest first."""
        return StoredPart(self, RECORDS, _records)

    def read(self, part: str, user: str) -> bytes | None:
        """What is kept of a user in a part."""
        with self._reported():
            rows = self._rows(f"{FIND} (?)", (part, self._digest(user)))
            owner, content = self._content(part, rows[0][0]) if rows else (user, None)
            if owner != user:
                raise sqlite3.DatabaseError("the index names another user")
            return content

    def read_many(self, part: str, users: Sequence[str]) -> dict[str, bytes]:
        """The same of many users at once; who has nothing there is left out."""
        digests, found = [self._digest(user) for user in dict.fromkeys(users)], []
        with self._reported():
            for start in range(0, len(digests), MOST):
                some = digests[start : start + MOST]
                found += self._rows(f"{FIND} ({', '.join('?' * len(some))})", (part, *some))
            return dict(self._content(part, value) for (value,) in found)

    def holds(self, part: str, user: str) -> bool:
        """Whether something is kept of a user in a part."""
        find = "SELECT 1 FROM parts WHERE part = ? AND digest = ?"
        with self._reported():
            return bool(self._rows(find, (part, self._digest(user))))

    def count(self, part: str) -> int:
        """How many users have a part."""
        with self._reported():
            return int(self._rows("SELECT count(*) FROM parts WHERE part = ?", (part,))[0][0])

    def users(self, part: str) -> Iterator[str]:
        """Who has a part, in the order of their digests."""
        find = (
            "SELECT digest, value FROM parts JOIN slots ON slots.id = slot"
            f" WHERE part = ? AND digest > ? ORDER BY digest LIMIT {MOST}"
        )
        last = b""
        while True:
            with self._reported():
                rows = self._rows(find, (part, last))
                names = [self._content(part, value)[0] for _, value in rows]
            yield from names
            if len(rows) < MOST:
                return
            last = rows[-1][0]

    # ---- writing

    def put(
        self,
        users: Iterable[str],
        heads: Mapping[str, Mapping[str, Head]],
        records: Mapping[str, Sequence[Record]],
    ) -> None:
        """Add or replace users, all of them or, where this fails, none."""
        with self._reported(), self._transaction():
            for user in users:
                new = {scorer: pack_head(of[user]) for scorer, of in heads.items() if user in of}
                if user in records:
                    new[RECORDS] = _pack_records(records[user])
                self._remove(user, but=new)
                for part, content in new.items():
                    self._put(part, user, content)

    def delete(self, user: str) -> int:
        """Overwrite all that is kept of a user; returns of how many parts."""
        with self._reported(), self._transaction():
            return self._remove(user)

    def _put(self, part: str, user: str, content: bytes) -> None:
        value, digest = _value(part, user, content), self._digest(user)
        size = len(value)
        fits = "capacity BETWEEN ? AND ? ORDER BY capacity LIMIT 1"
        own = self._rows(
            "SELECT slot, length(value) AS capacity FROM parts JOIN slots ON slots.id = slot"
            f" WHERE part = ? AND digest = ? AND {fits}",
            (part, digest, size, 2 * size),
        )
        if not own:
            self._release(part, digest)
            own = self._rows(f"SELECT slot, capacity FROM free WHERE {fits}", (size, 2 * size))
            self._connection.executemany("DELETE FROM free WHERE slot = ? AND capacity = ?", own)
        if not own:
            self._insert(part, user, content)
            return
        slot, capacity = own[0]
        self._overwrite(slot, value.ljust(capacity, b"\0"))
        self._connection.execute(
            "INSERT OR REPLACE INTO parts VALUES (?, ?, ?)", (part, digest, slot)
        )

    def _insert(self, part: str, user: str, content: bytes) -> None:
        """Into a new slot."""
        value = _value(part, user, content)
        step = 1 << max(6, len(value).bit_length() - 6)  # slots of many sizes would fit nobody
        value = value.ljust(-(-len(value) // step) * step, b"\0")
        insert = self._connection.execute
        slot = insert("INSERT INTO slots (value) VALUES (?)", (value,)).lastrowid
        insert("INSERT INTO parts VALUES (?, ?, ?)", (part, self._digest(user), slot))

    def _remove(self, user: str, but: Iterable[str] = ()) -> int:
        digest = self._digest(user)
        parts = self._rows("SELECT part FROM parts WHERE digest = ?", (digest,))
        return sum(self._release(part, digest) for (part,) in parts if part not in but)

    def _release(self, part: str, digest: bytes) -> bool:
        """Overwrite a user's slot with zeros; False if there is none."""
        find = "SELECT length(value), slot FROM parts JOIN slots ON slots.id = slot"
        rows = self._rows(f"{find} WHERE part = ? AND digest = ?", (part, digest))
        for capacity, slot in rows:
            self._overwrite(slot, bytes(capacity))
            self._connection.execute("INSERT INTO free VALUES (?, ?)", (capacity, slot))
        key = part, digest
        self._connection.execute("DELETE FROM parts WHERE part = ? AND digest = ?", key)
        return bool(rows)

    def _overwrite(self, slot: int, value: bytes) -> None:
        with self._connection.blobopen("slots", "value", slot) as blob:
            blob.write(value)

    # ---- the file

    def _digest(self, user: str) -> bytes:
        return blake2b(_bytes(user), digest_size=16, key=self._salt).digest()

    def _content(self, part: str, value: bytes) -> tuple[str, bytes]:
        """The user and the content of a slot; DatabaseError if they are not what was written."""
        crc, name, content = PREFIX.unpack_from(value)
        end = PREFIX.size + name
        written = value[PREFIX.size : end + content]
        if zlib.crc32(written, zlib.crc32(part.encode())) != crc:
            raise sqlite3.DatabaseError("a user's numbers are not what was written")
        owner = written[:name].decode("utf-8", "surrogatepass")
        return owner, value[end : end + content]

    def _rows(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            return self._connection.execute(statement, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, self._connection:  # commits, or rolls back
            self._connection.execute("BEGIN IMMEDIATE")
            yield

    def _reported(self) -> Any:
        return _reported(self.path)


class StoredPart(Mapping[str, T]):
    """User → one part of what a file keeps, read when it is asked for."""

    def __init__(self, file: UsersFile, part: str, unpack: Callable[[bytes], T]):
        self.file, self._part, self._unpack = file, part, unpack

    def __getitem__(self, user: str) -> T:
        content = self.file.read(self._part, user)
        if content is None:
            raise KeyError(user)
        return self._unpack(content)

    def many(self, users: Sequence[str]) -> list[T | None]:
        """Those of many users, such as a batch's, by one statement; None for who has none."""
        found = {
            user: self._unpack(content)
            for user, content in self.file.read_many(self._part, users).items()
        }
        return [found.get(user) for user in users]

    def __contains__(self, user: object) -> bool:
        return isinstance(user, str) and self.file.holds(self._part, user)

    def __iter__(self) -> Iterator[str]:
        return self.file.users(self._part)

    def __len__(self) -> int:
        return self.file.count(self._part)


def change_counter(path: Path) -> int:
    """Another one after every write to a file."""
    with path.open("rb") as file:
        file.seek(CHANGES)
        return int.from_bytes(file.read(4))


def _connect(path: Path, pragmas: str, *, create: bool = False) -> sqlite3.Connection:
    """An open file; a write waits 30 seconds for another process."""
    place = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
    connection = sqlite3.connect(
        place, uri=True, timeout=30.0, isolation_level=None, check_same_thread=False
    )
    connection.executescript(pragmas)
    return connection


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Faults of the file as a BundleError of one line."""
    try:
        yield
    except (sqlite3.Error, struct.error) as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        fault = "damaged, or no file of a bundle's users", "copy the bundle again"
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            fault = "another process is writing it", "wait for it"
        elif code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY):
            fault = "cannot be written", "its users are as they were"
        elif code == sqlite3.SQLITE_CANTOPEN:
            fault = "cannot be opened", "check who may read and write the folder"
        raise BundleError(f"{path}: {fault[0]} ({error}): {fault[1]}") from error


# ---- values as bytes


def _value(part: str, user: str, content: bytes) -> bytes:
    """What a slot holds."""
    name = _bytes(user)
    crc = zlib.crc32(name + content, zlib.crc32(part.encode()))
    return PREFIX.pack(crc, len(name), len(content)) + name + content


def _bytes(user: str) -> bytes:
    return user.encode("utf-8", "surrogatepass")


def pack_head(head: Head) -> bytes:
    """A head as the bytes that are kept."""
    return LEARNED.pack(FLOAT32, head.records, head.until) + head.numbers.astype("<f4").tobytes()


def head_of(content: bytes) -> Head:
    """The inverse of `pack_head`; BundleError for numbers of another type."""
    kind, records, until = LEARNED.unpack_from(content)
    if kind != FLOAT32:
        raise BundleError(f"heads of numbers {kind!r} are made by a newer hydra-llm; upgrade")
    return Head(np.frombuffer(content[LEARNED.size :], "<f4"), records, until)


def _pack_records(records: Iterable[Record]) -> bytes:
    values = [asdict(record) for record in records]
    for value in values:
        value["span"] = None if value["span"] == ALWAYS else value["span"]
    return zlib.compress(json.dumps(values).encode())


def _records(content: bytes) -> list[Record]:
    return [record_of(values) for values in json.loads(zlib.decompress(content))]


def record_of(values: dict[str, Any]) -> Record:
    """A record of the values that a file has."""
    start, end = values.pop("span") or ALWAYS
    if "candidates" not in values:
        return Record(**values, span=(start, end))
    candidates = tuple(values.pop("candidates"))
    return Choice(**values, span=(start, end), candidates=candidates)
