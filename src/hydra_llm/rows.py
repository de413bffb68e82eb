"""Many users' records without all of them in memory: read when they are asked for.

    Rows    rows of JSON by user in a temporary file; memory holds where each user's stand
    Lazy    values of known users, made when they are asked for

Both keep the values of the latest users. Any thread may call. Knows no records and no models.
"""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from tempfile import SpooledTemporaryFile, gettempdir
from threading import RLock
from typing import Any, Generic, TypeVar

from cachetools import LRUCache

from hydra_llm.errors import UserFault

T = TypeVar("T")
MEMORY_BYTES = 32 * 2**20  # of rows, before they go to the disk
LATEST = 256  # users whose values stay in memory


class Lazy(Mapping[str, T], Generic[T]):
    """The value of each of these users by a function, in their order."""

    def __init__(self, users: Iterable[str], value: Callable[[str], T]):
        self._users = dict.fromkeys(users)
        self._value = value
        self._latest: LRUCache[str, T] = LRUCache(LATEST)
        self._lock = RLock()

    def __getitem__(self, user: str) -> T:
        if user not in self._users:
            raise KeyError(user)
        with self._lock:
            if user not in self._latest:
                self._latest[user] = self._made(user)
            return self._latest[user]

    def _made(self, user: str) -> T:
        return self._value(user)

    def __contains__(self, user: object) -> bool:
        return user in self._users

    def __iter__(self) -> Iterator[str]:
        return iter(self._users)

    def __len__(self) -> int:
        return len(self._users)


def _nothing(user: str) -> list[Any]:
    return []


class Rows(Lazy[list[T]], Generic[T]):
    """Each user's rows, in the order in which they were added; `parse` makes values of them."""

    def __init__(self, parse: Callable[[str, list[Any]], list[T]]):
        super().__init__((), _nothing)
        self._parse = parse
        self._file = SpooledTemporaryFile(MEMORY_BYTES)  # noqa: SIM115  # closed with its last user
        self._runs: dict[str, array[int]] = {}  # user → where runs of lines start and end, in turn
        self._counts: dict[str, int] = {}
        self._end = 0

    def add(self, user: str, row: Any) -> None:
        """Add a row, any JSON value."""
        self.add_line(user, json.dumps(row).encode())

    def add_line(self, user: str, line: bytes) -> None:
        """Add a row that is JSON already, in one line. Raises UserFault: the disk is full."""
        with self._lock:
            try:
                self._file.seek(self._end)
                written = self._file.write(line + b"\n")
            except OSError as error:
                fix = "free some space, or name another folder by TMPDIR"
                raise UserFault(f"{gettempdir()}: cannot keep records ({error}): {fix}") from None
            start, self._end = self._end, self._end + written
            runs = self._runs.setdefault(user, array("q"))
            if runs and runs[-1] == start:
                runs[-1] = self._end
            else:
                runs.extend((start, self._end))
            self._counts[user] = self._counts.get(user, 0) + 1
            self._users[user] = None
            self._latest.pop(user, None)

    def _made(self, user: str) -> list[T]:
        return self._parse(user, self.raw(user))

    def count(self, user: str) -> int:
        """How many rows a user has."""
        return self._counts.get(user, 0)

    def raw(self, user: str) -> list[Any]:
        """A user's rows as they were added."""
        with self._lock:
            runs, parts = self._runs.get(user, array("q")), list[bytes]()
            for start, end in zip(runs[::2], runs[1::2], strict=True):
                self._file.seek(start)
                parts.append(self._file.read(end - start))
        return [json.loads(line) for part in parts for line in part.splitlines()]
