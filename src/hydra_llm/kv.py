"""SQLite caches that processes share; a full or read-only disk costs the cache, not the run."""

import logging
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hydra_llm.erasure import AT_ONCE, Run, mark, rewrite
from hydra_llm.errors import UserFault

log = logging.getLogger(__name__)

WAL = "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;"
IN_MEMORY = Path(":memory:")  # a cache of this process
# A write waits 30 seconds for another process.
_connect = partial(sqlite3.connect, timeout=30.0, check_same_thread=False)


class CacheFile:
    """An open cache file. Where it cannot be written from the start, an empty one in memory takes
    its place and `keeps` is False. `schema`: `CREATE TABLE IF NOT EXISTS` statements. `what` it
    keeps, for messages: "answers". `erases`: overwrite what is deleted.

    Raises UserFault, in every method: the file is damaged, or `required` and cannot be opened.
    """

    def __init__(
        self, path: Path, schema: str, what: str, *, required: bool = False, erases: bool = False
    ):
        self.path, self.what, self.keeps = path, what, True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.connection = _connect(path)
        except (OSError, sqlite3.OperationalError) as error:
            if required:
                fix = "name another folder by HYDRA_CACHE or --set cache=FOLDER"
                message = f"{path}: cannot open the cache of {what} ({error}): {fix}"
                raise UserFault(message) from None
            self._stop_keeping(error)
            self.connection = _connect(IN_MEMORY)
        setup = f"{schema}PRAGMA secure_delete = ON;" if erases else schema
        try:
            self.connection.executescript(f"{WAL}{setup}")
        except sqlite3.OperationalError as error:  # a disk that is full or not writable
            self.connection.close()
            self._stop_keeping(error)
            self.connection = _connect(IN_MEMORY)
            self.connection.executescript(setup)
        except sqlite3.DatabaseError as error:
            self.connection.close()
            raise self.fault(error) from None

    def read(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            return self.connection.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise self.fault(error) from None

    def write(self, *statements: tuple[str, Iterable[Sequence[Any]]]) -> bool:
        """Run each statement for its rows, all in one transaction; False if the disk refused it."""
        try:
            with self.connection:
                for statement, rows in statements:
                    self.connection.executemany(statement, rows)
        except sqlite3.OperationalError as error:
            self._stop_keeping(error)
            return False
        except sqlite3.DatabaseError as error:
            raise self.fault(error) from None
        return True

    @contextmanager
    def deleting(self) -> Iterator[sqlite3.Connection]:
        """One transaction that deletes, then `erase`, or a `UserFault`."""
        try:
            with self._running() as run:
                before = self.connection.total_changes
                yield self.connection
                if self.connection.total_changes > before:
                    mark(run)
            self._erase(AT_ONCE)
        except sqlite3.Error as error:
            raise self.not_deleted(error) from error

    def erase(self, *, at_once: float = AT_ONCE) -> None:
        """Rewrite the file without what is left of deleted rows, if it has at most `at_once` bytes
        or has waited for a day; empty the write-ahead log.
        """
        try:
            self._erase(at_once)
        except sqlite3.Error as error:
            raise self.not_deleted(error) from error

    def _erase(self, at_once: float) -> None:
        rewrite(self._run, self._running, at_once)
        self._run("PRAGMA wal_checkpoint(TRUNCATE)")

    def _run(self, statement: str) -> Any:
        return next(iter(self.connection.execute(statement).fetchall()), (None,))[0]

    @contextmanager
    def _running(self) -> Iterator[Run]:
        with self.connection:
            self.connection.execute("BEGIN IMMEDIATE")
            yield self._run

    def not_deleted(self, error: Exception | str) -> UserFault:
        fix = "delete the file, it is made again"
        return UserFault(f"{self.path}: {self.what} could not be deleted ({error}): {fix}")

    def fault(self, error: sqlite3.Error | str) -> UserFault:
        """What is wrong with the file, and what helps; a text says what is damaged in it."""
        code = sqlite3.SQLITE_CORRUPT
        if isinstance(error, sqlite3.Error):  # an extended code says more in its higher bits
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_MISUSE) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            state, fix = ("is held by another process", "wait, or take another HYDRA_CACHE")
        elif code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
            state, fix = "is damaged", f"delete or move it, and the {self.what} are made again"
        else:
            state, fix = "cannot be read", "check the disk, or take another HYDRA_CACHE"
        return UserFault(f"{self.path}: the cache of {self.what} {state} ({error}): {fix}")

    def close(self) -> None:
        self.connection.close()

    def _stop_keeping(self, error: Exception) -> None:
        if self.keeps:
            message = "%s: cannot keep %s (%s): the run goes on without"
            log.warning(message, self.path, self.what, error)
        self.keeps = False
