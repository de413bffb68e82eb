"""Users, their records and their heads."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hydra_llm.history import parse_time
from hydra_llm.store import schema
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
        rows = self.rows(sa.select(version.scalar_subquery(), bundle.scalar_subquery()))
        return UserState(*rows[0])

    def users(self) -> list[str]:
        """Every user's name, in the order in which they came."""
        query = sa.select(schema.users.c.name).order_by(schema.users.c.key)
        return [name for (name,) in self.rows(query)]

    def records(self, name: str) -> tuple[int | None, list[Record]]:
        """The user's version and the records of that version, in order; (None, []) if unknown."""
        users, records = schema.users.c, schema.records.c
        columns = (records.id, records.input, records.output, records.time, records.position)
        query = sa.select(users.version, *columns).where(users.name == name)
        joined = query.join_from(schema.users, schema.records, isouter=True)
        rows = self.rows(joined.order_by(records.position))
        return (rows[0].version if rows else None), [
            Record(name, id, input, output, time, parse_time(time), position)
            for _, id, input, output, time, position in rows
            if id is not None
        ]

    def heads(self, name: str, bundle: str) -> dict[str, StoredHead]:
        """The user's heads for a bundle, by scorer; empty if none was fitted."""
        heads = schema.heads.c
        query = sa.select(heads.scorer, heads.known, heads.until, heads.delta).join(schema.users)
        rows = self.rows(query.where(schema.users.c.name == name, heads.bundle == bundle))
        return {
            scorer: StoredHead(known, -math.inf if until is None else until, delta)
            for scorer, known, until, delta in rows
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
            user = locked_user(connection, name)
            if user is None and create:
                insert_new(connection, users, {"name": name, "version": 0, "created": time.time()})
                new = sa.update(users).where(users.c.name == name, users.c.version == 0)
                connection.execute(new.values(version=users.c.key * schema.VERSIONS_PER_KEY))
                user = locked_user(connection, name)
            if user is None:
                raise NoSuchUser("no such user")
            _check_version(user, version)
            change = UserChange(connection, user.key, name)
            yield change
            if change.changed:
                own = sa.update(users).where(users.c.key == user.key)
                connection.execute(own.values(version=users.c.version + 1))

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
            user = locked_user(connection, name)
            _check_version(user, version)
            counts = {"keys": _delete_keys(connection, name)}
            if user is None:
                return counts if counts["keys"] else None
            for table in schema.OF_USERS:
                own = sa.delete(table).where(table.c.user == user.key)
                counts[table.name] = connection.execute(own).rowcount
            connection.execute(sa.delete(schema.users).where(schema.users.c.key == user.key))
        return counts

    def export_user(self, name: str) -> dict[str, Any] | None:
        """All that is kept about a user, as plain values (heads' numbers as bytes), or None."""
        users = sa.select(schema.users).where(schema.users.c.name == name)
        keys = sa.select(schema.keys.c.id, schema.keys.c.label).join(schema.key_users)
        queries = {"keys": keys.where(schema.key_users.c.name == name)}
        with self.reading() as connection:
            user = connection.execute(users).one_or_none()
            if user is None:
                return None
            for table in schema.OF_USERS:
                columns = [column for column in table.c if column.name != "user"]
                queries[table.name] = sa.select(*columns).where(table.c.user == user.key)
            export = {"user": name, "version": user.version, "created": user.created}
            for part, query in reversed(queries.items()):
                export[part] = [dict(row) for row in connection.execute(query).mappings()]
        return export


def locked_user(connection: Connection, name: str) -> Any:
    """The user's row, which nobody else changes until the transaction ends; None if unknown."""
    rows = sa.select(schema.users.c.key, schema.users.c.version).where(schema.users.c.name == name)
    return connection.execute(rows.with_for_update()).one_or_none()


def _check_version(user: Any, version: int | None) -> None:
    """Raise StaleVersion if a version is named and the user's row has another, or is not there."""
    now = user.version if user else "none"
    if version not in (None, now):
        raise StaleVersion(f"the user is at version {now}, not {version}: read again")


def _delete_keys(connection: Connection, name: str) -> int:
    """Remove a user from all keys; returns how many keys named no other user, and were deleted."""
    keys, users = schema.keys, schema.key_users
    named = set(connection.scalars(sa.select(users.c.key).where(users.c.name == name)))
    connection.execute(sa.delete(users).where(users.c.name == name))
    kept = set(connection.scalars(sa.select(users.c.key).where(users.c.key.in_(named))))
    unused = sa.delete(keys).where(keys.c.id.in_(named - kept), keys.c.admin.is_(False))
    return connection.execute(unused).rowcount
