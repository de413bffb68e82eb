"""How servers learn of deletions by others: a text in the store that changes with each of them, in
the same transaction, and on PostgreSQL a notification that says so at once. It names nobody: who
hears it compares whom it has in memory with the store. Knows no cache.
"""

import logging
import secrets
import threading
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from hydra_llm.store import schema
from hydra_llm.store.database import Database, mark_deletion

WATCHED = ("bundle", "removal")
"""Rows of `serving` that servers watch."""
CHANNEL = "hydra_llm_removal"
LISTEN_SECONDS = 0.5  # how soon a listener ends
RETRY_SECONDS = 1.0
log = logging.getLogger(__name__)


def tell_removal(connection: Connection) -> None:
    """Tell all servers, when the transaction ends, that something was deleted."""
    on_sqlite = connection.dialect.name == "sqlite"
    row = (sqlite if on_sqlite else postgresql).insert(schema.serving)
    row = row.values(name="removal", value=secrets.token_hex(8))
    value = {"value": row.excluded.value}
    connection.execute(row.on_conflict_do_update(index_elements=["name"], set_=value))
    if on_sqlite:
        mark_deletion(connection)
    else:
        connection.execute(sa.select(sa.func.pg_notify(CHANNEL, "")))


class Listener:
    """A thread with a connection of its own that waits for PostgreSQL's notifications."""

    def __init__(self, database: Database, heard: Callable[[], object]):
        """`heard` is called, in the thread, for each of them, and when the connection begins: some
        may have come before. SQLite has none, and no thread.
        """
        self._database, self._heard = database, heard
        self._ended, self._failed = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)
        if not database.on_sqlite:
            self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._listen()
            except Exception as error:  # the database is away: servers look by themselves meanwhile
                if not self._failed:
                    log.warning("no notifications of deletions: %s", type(error).__name__)
                self._failed = True
                self._ended.wait(RETRY_SECONDS)

    def _listen(self) -> None:
        options = {"isolation_level": "AUTOCOMMIT"}
        with self._database.engine.connect().execution_options(**options) as connection:
            driver: Any = connection.connection.driver_connection
            connection.detach()  # nobody else gets a connection that listens
            driver.execute(f"LISTEN {CHANNEL}")
            self._failed = False
            self._heard()
            while not self._ended.is_set():
                for _ in driver.notifies(timeout=LISTEN_SECONDS):
                    self._heard()
