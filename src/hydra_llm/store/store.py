"""All that the gateway keeps, in SQLite or PostgreSQL. Only this package speaks SQL.

    store.state(name)          the user's version: whether a server's cached copy is current
    with store.change(name)    one transaction with the user's row locked; the version grows if
                               anything changed

Every method is one transaction, which is on the disk when it returns. A database that fails raises
`StoreError`, and then nothing was kept. Methods block: a server calls them in threads. Knows no
HTTP, no LLM and no scorer.
"""

import secrets

import sqlalchemy as sa

from hydra_llm.errors import StoreError
from hydra_llm.store import migrate, schema
from hydra_llm.store.database import insert_new, one_line_errors
from hydra_llm.store.jobs import Jobs
from hydra_llm.store.keys import Keys
from hydra_llm.store.requests import Requests
from hydra_llm.store.users import Users


class Store(Users, Requests, Jobs, Keys):
    """All that the gateway keeps. Any number of threads and processes may use one database."""

    def __init__(self, url: str, *, timeout: float = 30.0):
        """Open the database and check its tables; an empty one gets them. `timeout`: seconds until
        a statement has failed.

        Raises SettingsError for the URL, StoreError for the database or its version.
        """
        super().__init__(url, timeout=timeout)
        with one_line_errors(self.url):
            migrate.prepare(self.engine)

    def set_bundle(self, folder: str | None) -> None:
        """Set the bundle that all servers use from their next request on."""
        table = schema.serving
        with self.writing() as connection:
            connection.execute(sa.delete(table).where(table.c.name == "bundle"))
            if folder is not None:
                connection.execute(sa.insert(table).values(name="bundle", value=folder))

    def bundle(self) -> str | None:
        """The bundle that all servers use; None if none was set."""
        table = schema.serving.c
        found: str | None = self.value(sa.select(table.value).where(table.name == "bundle"))
        return found

    def salt(self) -> str:
        """What names are hashed with; drawn at the first call."""
        table = schema.serving
        with self.writing() as connection:
            insert_new(connection, table, {"name": "salt", "value": secrets.token_hex(32)})
            salt = sa.select(table.c.value).where(table.c.name == "salt")
            found: str = connection.scalars(salt).one()
        return found

    def scrub(self) -> None:
        """Rewrite the database's files without the bytes of deleted rows; StoreError if SQLite's
        log was in use all the time.
        """
        self.run_outside_transaction("VACUUM" if self.on_sqlite else "VACUUM (FULL, ANALYZE)")
        if not self.truncate_log():
            raise StoreError("the log is in use, and still holds pages as they were: try again")

    def truncate_log(self) -> bool:
        """Write back and empty SQLite's log, which holds deleted pages; False if it was in use."""
        if not self.on_sqlite:
            return True
        return bool(self.run_outside_transaction("PRAGMA wal_checkpoint(TRUNCATE)") == 0)

    def counts(self) -> dict[str, int]:
        """Rows of each table."""
        with self.reading() as connection:
            return {
                table.name: connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
                for table in schema.metadata.sorted_tables
            }

    def check(self) -> list[str]:
        """A line for each fault: a damaged file, tables unlike the schema, rows without a user."""
        with self.reading() as connection:
            faults = migrate.differences(connection)
            if self.on_sqlite:
                lines = connection.scalars(sa.text("PRAGMA integrity_check"))
                faults += [f"damaged: {line}" for line in lines if line != "ok"]
            for table in schema.OF_USERS:
                orphan = table.c.user.not_in(sa.select(schema.users.c.key))
                rows = sa.select(sa.func.count()).select_from(table).where(orphan)
                if count := connection.scalar(rows):
                    faults.append(f"{table.name}: {count} rows of users who are not there")
        return faults
