"""API keys."""

import time
from collections import defaultdict
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hydra_llm.store import schema
from hydra_llm.store.database import Database, insert_new
from hydra_llm.store.values import Key

ONCE_MADE = {"name": "keys", "value": "were made"}
"""This row stays when the last key is deleted with its user: the server must not open by that."""


class Keys(Database):
    """The part of the store that holds API keys."""

    def add_key(self, key: Key) -> None:
        """Keep a new key."""
        row = asdict(key)
        users = [{"key": key.id, "name": name} for name in row.pop("users")]
        with self.writing() as connection:
            insert_new(connection, schema.serving, ONCE_MADE)
            connection.execute(sa.insert(schema.keys).values(row))
            if users:
                connection.execute(sa.insert(schema.key_users), users)

    def key(self, id: str) -> Key | None:
        """A key by its public id."""
        found = self.keys(id)
        return found[0] if found else None

    def keys(self, id: str | None = None) -> list[Key]:
        """Every key, or the one of an id; revoked ones too, oldest first."""
        keys, users = schema.keys.c, schema.key_users.c
        rows = sa.select(schema.keys).order_by(keys.created, keys.id)
        names = sa.select(schema.key_users).order_by(users.name)
        if id is not None:
            rows, names = rows.where(keys.id == id), names.where(users.key == id)
        with self.reading() as connection:
            found = connection.execute(rows).all()
            of_key = defaultdict[str, list[str]](list)
            for key, name in connection.execute(names):
                of_key[key].append(name)
        return [Key(**{**row._mapping, "users": tuple(of_key[row.id])}) for row in found]

    def has_keys(self) -> bool:
        """Whether any key was ever made: then every request needs one."""
        table = schema.serving.c
        return self.value(sa.select(table.value).where(table.name == "keys")) is not None

    def revoke_key(self, id: str) -> bool:
        """Refuse a key from the next request on; False if there is none of that id."""
        table = schema.keys
        valid = sa.update(table).where(table.c.id == id, table.c.revoked.is_(None))
        with self.writing() as connection:
            connection.execute(valid.values(revoked=time.time()))
            return connection.scalar(sa.select(table.c.id).where(table.c.id == id)) is not None


def of_user(connection: Connection, name: str) -> list[dict[str, Any]]:
    """Id and label of each key that names a user."""
    rows = sa.select(schema.keys.c.id, schema.keys.c.label).join(schema.key_users)
    found = connection.execute(rows.where(schema.key_users.c.name == name))
    return [dict(row) for row in found.mappings()]


def delete_of_user(connection: Connection, name: str) -> int:
    """Remove a user from all keys; returns how many keys named nobody else, and were deleted."""
    keys, users = schema.keys, schema.key_users
    named = set(connection.scalars(sa.select(users.c.key).where(users.c.name == name)))
    connection.execute(sa.delete(users).where(users.c.name == name))
    kept = set(connection.scalars(sa.select(users.c.key).where(users.c.key.in_(named))))
    unused = sa.delete(keys).where(keys.c.id.in_(named - kept), keys.c.admin.is_(False))
    return connection.execute(unused).rowcount
