"""Keeping the database sound: checks, counts, deleting what is old, erasing deleted bytes."""

import math
import time
import warnings

import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from hydra_llm.erasure import AT_ONCE, rewrite
from hydra_llm.errors import StoreError
from hydra_llm.store import schema
from hydra_llm.store.database import Database, insert_new, mark_deletion

SCRUBS = 25
SCRUB_PAUSE = 0.2  # seconds: connections that start, and ANALYZE, hold a snapshot for a moment


class Upkeep(Database):
    """What an administrator does with the database as a whole."""

    def check_write(self) -> None:
        """Write a row to the disk; StoreError if that fails."""
        table, row = schema.serving, {"name": "written", "value": str(time.time())}
        with self.writing() as connection:
            insert_new(connection, table, row)
            connection.execute(sa.update(table).where(table.c.name == row["name"]).values(row))

    def prune(self, before: float) -> tuple[int, int]:
        """Delete what was answered (requests, responses) and jobs ended before a time; returns how
        many answers and jobs.
        """
        jobs, answered = schema.jobs, 0
        ended = jobs.c.state.in_(["done", "failed"]) & (jobs.c.updated < before)
        with self.writing() as connection:
            for table in (schema.requests, schema.responses):
                old = sa.delete(table).where(table.c.created < before)
                answered += connection.execute(old).rowcount
            if answered:
                mark_deletion(connection)
            return answered, connection.execute(sa.delete(jobs).where(ended)).rowcount

    def scrub(self) -> None:
        """Rewrite the files without deleted bytes; StoreError if others still read them."""
        if not self.on_sqlite:
            self._scrub_postgresql()
            return
        if not self.erase(at_once=math.inf):
            raise StoreError("the log is in use, and still holds pages as they were: try again")

    def _scrub_postgresql(self) -> None:
        # PostgreSQL keeps deleted rows that an older snapshot may read, be it of a connection that
        # is just being made. The statistics hold texts too.
        ours = {"pg_statistic", *schema.metadata.tables}
        for _ in range(SCRUBS):
            kept = self._rows_kept_by_vacuum()
            if not any(kept.get(table) for table in ours):
                return
            time.sleep(SCRUB_PAUSE)
        raise StoreError("an open transaction may still read deleted rows: end it, then try again")

    def erase(self, *, at_once: float = AT_ONCE) -> bool:
        """After a deletion: rewrite an SQLite file without what is left of deleted rows, if it has
        at most `at_once` bytes or has waited for a day; then `truncate_log`.
        """
        if self.on_sqlite:
            rewrite(self.run_outside_transaction, self._running, at_once)
        return self.truncate_log()

    def truncate_log(self) -> bool:
        """Write back and empty SQLite's log, which holds deleted pages; False if it was in use."""
        checkpoint = "PRAGMA wal_checkpoint(TRUNCATE)"
        return not self.on_sqlite or bool(self.run_outside_transaction(checkpoint) == 0)

    def counts(self) -> dict[str, int]:
        """Rows of each table."""
        with self.reading() as connection:
            return {
                table.name: connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
                for table in schema.metadata.sorted_tables
            }

    def user_and_job_counts(self) -> tuple[int, dict[str, int]]:
        """How many users there are, and jobs by state."""
        jobs, count = schema.jobs.c.state, sa.func.count()
        with self.reading() as connection:
            users = connection.scalar(sa.select(count).select_from(schema.users)) or 0
            states = connection.execute(sa.select(jobs, count).group_by(jobs)).all()
        return users, {row[0]: row[1] for row in states}

    def check(self) -> list[str]:
        """A line for each fault: a damaged file, tables unlike the schema, rows without a user."""
        with self.reading() as connection:
            with warnings.catch_warnings(action="ignore"):  # SQLite's indexes of expressions
                changes = compare_metadata(MigrationContext.configure(connection), schema.metadata)
            faults = [f"unlike the schema: {' '.join(map(str, change))}" for change in changes]
            if self.on_sqlite:
                lines = connection.scalars(sa.text("PRAGMA integrity_check"))
                faults += [f"damaged: {line}" for line in lines if line != "ok"]
            for table in schema.OF_USERS:
                orphan = table.c.user.not_in(sa.select(schema.users.c.key))
                rows = sa.select(sa.func.count()).select_from(table).where(orphan)
                if count := connection.scalar(rows):
                    faults.append(f"{table.name}: {count} rows of users who are not there")
        return faults
