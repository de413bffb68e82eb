"""Users, their records and their heads."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hydra_llm.history import parse_time
from hydra_llm.store import keys, schema
from hydra_llm.store.change import UserChange
from hydra_llm.store.database import Database, insert_new
from hydra_llm.store.values import Added, NoSuchUser, StaleVersion, StoredHead, UserState
from hydra_llm.types import Record


class Users(Database):
    """The part of the store that holds users, records and heads."""

    def state(self, name: str) -> UserState:
        """The user's version and the bundle in use, in one statement."""
        users, serving = schema.users.c, schema.serving.c
        version = sa.select(users.version).where(users.name == name)
        bundle = sa.select(serving.value).where(serving.name == "bundle")
        found = self.rows(sa.select(version.scalar_subquery(), bundle.scalar_subquery()))
        return UserState(*found[0])

    def users(self) -> list[str]:
        """Every user's name, in the order in which they came."""
        rows = self.rows(sa.select(schema.users.c.name).order_by(schema.users.c.key))
        return [row.name for row in rows]

    def records(self, name: str) -> tuple[int | None, list[Record]]:
        """The user's version and the records of that version, in order; (None, []) if unknown."""
        users, records = schema.users.c, schema.records.c
        columns = (records.id, records.input, records.output, records.time, records.position)
        found = sa.select(users.version, *columns).where(users.name == name)
        joined = found.join_from(schema.users, schema.records, isouter=True)
        rows = self.rows(joined.order_by(records.position))
        return (rows[0].version if rows else None), [
            Record(name, id, input, output, time, parse_time(time), position)
            for _, id, input, output, time, position in rows
            if id is not None
        ]

    def heads(self, name: str, bundle: str) -> dict[str, StoredHead]:
        """The user's heads for a bundle, by scorer; empty if none was fitted."""
        table = schema.heads.c
        found = sa.select(table.scorer, table.known, table.until, table.delta)
        own = found.where(schema.users.c.name == name, table.bundle == bundle)
        return {
            scorer: StoredHead(known, -math.inf if until is None else until, delta)
            for scorer, known, until, delta in self.rows(own.join_from(schema.heads, schema.users))
        }

    @contextmanager
    def change(
        self, name: str, *, version: int | None = None, create: bool = False
    ) -> Iterator[UserChange]:
        """Change a user in one transaction, with the user's row locked.

        Raises StaleVersion if `version` is not the user's any more, NoSuchUser unless `create`.
        """
        users = schema.users
        with self.writing() as connection:
            found = locked_user(connection, name)
            if found is None and create:
                insert_new(connection, users, {"name": name, "version": 0, "created": time.time()})
                new = (users.c.name == name) & (users.c.version == 0)
                first = users.c.key * schema.VERSIONS_PER_KEY
                connection.execute(sa.update(users).where(new).values(version=first))
                found = locked_user(connection, name)
            if found is None:
                raise NoSuchUser("no such user")
            check_version(found, version)
            change = UserChange(connection, found.key, name)
            yield change
            if change.changed:
                of_user = sa.update(users).where(users.c.key == found.key)
                connection.execute(of_user.values(version=users.c.version + 1))

    def add_records(self, name: str, records: Sequence[Record]) -> Added:
        """Add records, and the user if unknown; the same records again change nothing."""
        with self.change(name, create=True) as user:
            return user.add(records)

    def delete_user(self, name: str, *, version: int | None = None) -> dict[str, int] | None:
        """Delete the user and everything about the user: rows per table; None for an unknown user.

        A key for this user only is deleted too: it names the user. SQLite overwrites the bytes, but
        its log keeps them until `truncate_log`; PostgreSQL's files keep them until `scrub`.

        Raises StaleVersion if `version` is not the user's any more; then nothing was deleted.
        """
        with self.writing() as connection:
            found = locked_user(connection, name)
            check_version(found, version)
            counts = {"keys": keys.delete_of_user(connection, name)}
            if found is None:
                return counts if counts["keys"] else None
            for table in schema.OF_USERS:
                of_user = sa.delete(table).where(table.c.user == found.key)
                counts[table.name] = connection.execute(of_user).rowcount
            connection.execute(sa.delete(schema.users).where(schema.users.c.key == found.key))
        return counts

    def export_user(self, name: str) -> dict[str, Any] | None:
        """All that is kept about a user, as plain values (heads' numbers as bytes), or None."""
        users = sa.select(schema.users).where(schema.users.c.name == name)
        with self.reading() as connection:
            row = connection.execute(users).one_or_none()
            if row is None:
                return None
            export = {"user": name, "version": row.version, "created": row.created}
            for table in reversed(schema.OF_USERS):
                columns = [column for column in table.c if column.name != "user"]
                rows = connection.execute(sa.select(*columns).where(table.c.user == row.key))
                export[table.name] = [dict(found) for found in rows.mappings()]
            return {**export, "keys": keys.of_user(connection, name)}


def locked_user(connection: Connection, name: str) -> Any:
    """The user's row, which nobody else changes until the transaction ends; None if unknown."""
    rows = sa.select(schema.users.c.key, schema.users.c.version).where(schema.users.c.name == name)
    return connection.execute(rows.with_for_update()).one_or_none()


def check_version(found: Any, version: int | None) -> None:
    """Raise StaleVersion if a version is named and the user's row has another, or is not there."""
    if version is not None and (found is None or found.version != version):
        now = found.version if found else "none"
        raise StaleVersion(f"the user is at version {now}, not {version}: read again")
