"""SQLite or PostgreSQL, with the same guarantees from both. Knows no table.

SQLite: a write-ahead log that is on the disk before a write returns, one writer at a time who takes
the lock when the transaction begins, deleted bytes overwritten. PostgreSQL: a connection is tested
before it is used, so that a restarted server is reached again. Nothing outlasts a transaction (no
session settings, no prepared statements), so that a pooler may stand between.
"""

import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Connection, Engine

from hydra_llm.erasure import Run, mark
from hydra_llm.errors import SettingsError, StoreError
from hydra_llm.store.urls import check_file, parse_url, shown
from hydra_llm.text import json_text

SNAPSHOT = "REPEATABLE READ"  # PostgreSQL's isolation level; SQLite always reads one moment
MAX_IN = 10_000 if sqlite3.sqlite_version_info >= (3, 32) else 500
"""Values of one IN (…), each a scan where no index helps; SQLite's limit was 999 before 3.32."""
PRAGMAS = ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON")

NAMED = re.compile(r'"(?:[^"]*\.)?([^".]+)": ')  # the table of a message of VACUUM
NUMBER = re.compile(r"\d+")


class Database:
    """One database and its transactions. Any number of threads and processes may use it."""

    def __init__(self, url: str | URL, *, timeout: float = 30.0):
        self.engine = create_engine(url, timeout=timeout)
        self.url = self.engine.url
        self.on_sqlite = self.engine.dialect.name == "sqlite"  # a file of this machine
        self.name = shown(self.url)  # of messages

    def close(self) -> None:
        self.engine.dispose()

    def check_file(self, *, create: bool) -> None:
        """As `urls.check_file`, where the database is a file of this machine that may change."""
        if self.on_sqlite and "uri" not in self.url.query:
            check_file(Path(str(self.url.database)), create=create)

    @contextmanager
    def _transaction(self, **options: Any) -> Iterator[Connection]:
        with (
            one_line_errors(self.url),
            self.engine.connect().execution_options(**options) as connection,
            connection.begin(),
        ):
            yield connection

    def reading(self) -> AbstractContextManager[Connection]:
        """A transaction whose statements all read the database as of one moment."""
        return self._transaction(**({} if self.on_sqlite else {"isolation_level": SNAPSHOT}))

    def writing(self) -> AbstractContextManager[Connection]:
        """A transaction that writes."""
        return self._transaction(writes=True)

    def rows(self, statement: sa.Select[Any]) -> Sequence[Any]:
        """The rows that one statement reads, as tuples with named fields."""
        with self._transaction(bare=True) as connection:  # one statement reads one moment anyway
            return connection.execute(statement).all()

    def run_outside_transaction(self, statement: str) -> Any:
        """Run a statement that no transaction may surround; the first value that it returns."""
        level = {"bare": True} if self.on_sqlite else {"isolation_level": "AUTOCOMMIT"}
        with self._transaction(**level) as connection:
            return first_value(connection, statement)

    @contextmanager
    def _running(self) -> Iterator[Run]:
        """`writing`, for plain statements."""
        with self.writing() as connection:
            yield partial(first_value, connection)

    def _rows_kept_by_vacuum(self) -> dict[str, int]:
        """Rewrite PostgreSQL's tables; how many deleted rows each had to keep for a snapshot."""
        told: list[tuple[str, str]] = []

        def read(notice: Any) -> None:
            told.append((notice.message_primary or "", notice.message_detail or ""))

        with self._transaction(isolation_level="AUTOCOMMIT") as connection:
            driver: Any = connection.connection.driver_connection
            driver.add_notice_handler(read)
            try:
                connection.exec_driver_sql("VACUUM (FULL, ANALYZE, VERBOSE)")
            finally:
                driver.remove_notice_handler(read)
        # INFO: "public.records": found 0 removable, 5 nonremovable row versions in 1 pages
        # DETAIL: 3 dead row versions cannot be removed yet. (in the language of the server)
        found = [(NAMED.match(text), NUMBER.search(detail)) for text, detail in told]
        return {table[1]: int(dead[0]) for table, dead in found if table and dead}


def create_engine(url: str | URL, *, timeout: float = 30.0) -> Engine:
    """An engine for a URL; nothing is opened yet. `timeout`: seconds until a statement has failed.
    Raises SettingsError: no URL, an unsupported database, or a missing driver.
    """
    parsed = parse_url(url) if isinstance(url, str) else url
    as_json = partial(json_text, ascii=True)  # else what a model or a caller says may not be stored
    try:
        if parsed.get_backend_name() == "sqlite":
            connect_to: Any = {"timeout": timeout}
            engine = sa.create_engine(parsed, connect_args=connect_to, json_serializer=as_json)
            sa.event.listen(engine, "connect", _set_up_sqlite)
            sa.event.listen(engine, "begin", _begin_sqlite)
            return engine
        pool: dict[str, Any] = {"pool_size": 10, "max_overflow": 20, "pool_timeout": timeout}
        # A server that answers reports its timeout; for one that does not, TCP's timers end.
        seconds, milliseconds = max(2, int(timeout)), int(timeout * 1000)
        connect = {"connect_timeout": seconds, "tcp_user_timeout": milliseconds}
        connect |= {"keepalives_idle": seconds, "keepalives_interval": 1, "keepalives_count": 3}
        # A pooler has no session of ours: nothing is prepared, and no start-up option is sent.
        text: dict[str, Any] = {"prepare_threshold": None, "client_encoding": "utf8"}
        pool |= {"pool_pre_ping": True, "json_serializer": as_json}
        engine = sa.create_engine(parsed, connect_args=connect | text, **pool)
    except ModuleNotFoundError as error:
        message = f"store: {error.name} is not installed: pip install 'hydra-llm[server]'"
        raise SettingsError(message) from None
    # Before SQLAlchemy's own first statements, which fail for some encodings.
    sa.event.listen(engine, "connect", _check_encoding, insert=True)
    limit = f"SET LOCAL statement_timeout = {milliseconds}"
    sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(limit))
    return engine


def _check_encoding(connection: Any, _: object) -> None:
    """Refuse a PostgreSQL database that cannot hold every text."""
    encoding = connection.info.parameter_status("server_encoding") or "UTF8"
    if encoding != "UTF8":
        name = connection.info.dbname
        connection.close()
        fix = "create one by CREATE DATABASE name ENCODING 'UTF8' TEMPLATE template0"
        raise StoreError(f"store: the database '{name}' has the encoding {encoding}: {fix}")


def _set_up_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # the driver would begin transactions by itself
    for line in PRAGMAS:
        connection.execute(f"PRAGMA {line}")


def _begin_sqlite(connection: Connection) -> None:
    """Lock at the start of a write: one that reads first and writes later would fail, not wait."""
    options = connection.get_execution_options()
    if not options.get("bare"):
        connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("writes") else "BEGIN")


@contextmanager
def one_line_errors(url: URL) -> Iterator[None]:
    """Database errors as a `StoreError` of one line, without passwords and written values."""
    try:
        yield
    except (sa.exc.SQLAlchemyError, sqlite3.Error) as error:
        cause = getattr(error, "orig", None) or error
        reason = f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}"
        raise StoreError(f"store {shown(url)}: {reason}") from None


def first_value(connection: Connection, statement: str) -> Any:
    """The first value that a statement returns, or None."""
    result = connection.exec_driver_sql(statement)
    return result.scalar() if result.returns_rows else None


def mark_deletion(connection: Connection) -> None:
    """Note, in the transaction that deletes, that copies of what it deletes may be in the file."""
    if connection.dialect.name == "sqlite":
        mark(partial(first_value, connection))


def insert_new(connection: Connection, table: sa.Table, row: Mapping[str, Any]) -> None:
    """Insert a row unless there is one with its key."""
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    connection.execute(dialect.insert(table).values(row).on_conflict_do_nothing())


def in_parts(values: Iterable[str]) -> Iterator[Sequence[str]]:
    """Values in lists that are short enough for IN (…)."""
    listed = list(values)
    return (listed[start : start + MAX_IN] for start in range(0, len(listed), MAX_IN))
