"""Statements that several of the store's methods have in common, and rows as values. For this
package alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from hydra_llm.history import parse_time
from hydra_llm.store import schema
from hydra_llm.store.values import Key, Stale
from hydra_llm.types import Record


def locked_user(connection: Connection, name: str) -> Any:
    """The user's row, which nobody else changes until the transaction ends."""
    rows = sa.select(schema.users.c.key, schema.users.c.version).where(schema.users.c.name == name)
    return connection.execute(rows.with_for_update()).one_or_none()


def check_version(found: Any, version: int | None) -> None:
    """That a user is at a version, if one was named.

    Raises:
        Stale: it is not.
    """
    if version is not None and (found is None or found.version != version):
        raise Stale(
            f"the user is at version {found.version if found else 'none'}, not {version}: read"
            " again"
        )


def insert_new(connection: Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows; those that are there already stay as they are."""
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    connection.execute(dialect.insert(table).on_conflict_do_nothing(), list(rows))


def delete_keys_of(connection: Connection, name: str) -> int:
    """Take a user out of all keys; how many keys were left with nobody, and are gone."""
    table = schema.key_users
    held = list(connection.scalars(sa.select(table.c.key).where(table.c.name == name)))
    connection.execute(sa.delete(table).where(table.c.name == name))
    left = set(connection.scalars(sa.select(table.c.key).where(table.c.key.in_(held))))
    empty = [key for key in held if key not in left]
    return connection.execute(
        sa.delete(schema.keys).where(schema.keys.c.id.in_(empty), schema.keys.c.admin.is_(False))
    ).rowcount


def rows_of(connection: Connection, table: sa.Table, user: int) -> list[dict[str, Any]]:
    """A user's rows of a table, as plain values."""
    rows = connection.execute(sa.select(table).where(table.c.user == user))
    return [{name: value for name, value in row._mapping.items() if name != "user"} for row in rows]


def select_jobs() -> "sa.Select[Any]":
    """Jobs, in the order of `Job`'s fields."""
    table = schema.jobs.c
    columns = (
        table.id,
        schema.users.c.name,
        table.kind,
        table.state,
        table.done,
        table.total,
        table.error,
        table.created,
        table.updated,
    )
    return sa.select(*columns).join_from(schema.jobs, schema.users)


def key_of(row: Any, users: Sequence[str]) -> Key:
    """A row of keys as a value."""
    return Key(
        row.id, row.hash, row.label, row.admin, tuple(users), row.created, row.revoked, row.bound
    )


def record_of(name: str, row: Any) -> Record:
    """A row of records as a value."""
    return Record(name, row.id, row.input, row.output, row.time, parse_time(row.time), row.position)
