"""Opening SQLite or PostgreSQL so that both keep the same promises. Knows no table.

SQLite: a write-ahead log that is on the disk before a write is acknowledged, one writer at a time
who takes the lock at once, deleted bytes overwritten. PostgreSQL: connections are tried before they
are used, so that a server which was restarted is met again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url

from hydra_llm.errors import SettingsError, StoreError


def engine_of(url: str, *, patience: float = 30.0) -> Engine:
    """A database as SQLAlchemy sees it; nothing is opened yet. `patience`: seconds until a
    statement has failed.

    Raises:
        SettingsError: the URL is none, or of a database that is not supported, or its driver is
            missing.
    """
    return _engine(_checked(url), patience)


def _checked(url: str) -> URL:
    try:
        made = make_url(url)
    except sa.exc.ArgumentError:
        raise SettingsError(
            f"store '{url.split('@')[-1]}': no database URL: sqlite:///FILE or postgresql+psycopg://..."
        ) from None
    if made.get_backend_name() not in ("sqlite", "postgresql"):
        raise SettingsError(
            f"store: {made.get_backend_name()} is not supported: take sqlite:///FILE or postgresql+psycopg://..."
        )
    if made.get_backend_name() == "sqlite" and not made.database:
        raise SettingsError(
            "store: a database in memory would be another one for each thread: name a file, sqlite:///FILE"
        )
    return made.set(drivername="postgresql+psycopg") if made.drivername == "postgresql" else made


def _engine(url: URL, patience: float) -> Engine:
    try:
        if url.get_backend_name() != "sqlite":
            # A server that fails is told by an error, one that has gone silent by the network's own
            # clocks.
            limits = {
                "connect_timeout": max(2, int(patience)),
                "options": f"-c statement_timeout={int(patience * 1000)}",
                "tcp_user_timeout": int(patience * 1000),
                "keepalives_idle": max(1, int(patience)),
                "keepalives_interval": 1,
                "keepalives_count": 3,
            }
            return sa.create_engine(
                url,
                pool_pre_ping=True,
                pool_size=10,
                max_overflow=20,
                pool_timeout=patience,
                connect_args=limits,
            )
        engine = sa.create_engine(url, connect_args={"timeout": patience})
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"store: {error.name} is not installed: pip install 'hydra-llm[server]'"
        ) from None
    sa.event.listen(engine, "connect", _set_up_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # the driver would begin transactions where it thinks fit
    for line in (
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
        "secure_delete = ON",
    ):
        connection.execute(f"PRAGMA {line}")


def _begin_sqlite(connection: Connection) -> None:
    """A writer takes the lock at once: a transaction that reads first and writes later would fail
    instead of waiting.
    """
    options = connection.get_execution_options()
    if not options.get("bare"):
        connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("writes") else "BEGIN")


@contextmanager
def told(url: URL) -> Iterator[None]:
    """A failing database in one line, without its URL's password and without any value that was to
    be written.
    """
    try:
        yield
    except sa.exc.SQLAlchemyError as error:
        cause = getattr(error, "orig", None)
        said = str(cause if cause is not None else error).splitlines()
        raise StoreError(
            f"store {shown(url)}: {type(cause or error).__name__}: {said[0] if said else ''}"
        ) from None


def shown(url: URL) -> str:
    """The URL without its password."""
    return url.render_as_string(hide_password=True)
