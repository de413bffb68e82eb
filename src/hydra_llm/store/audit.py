"""Who has read or deleted what is kept about users: when, with which key, about whom, never what.

A user is here by a keyed hash (`gateway.auth.pseudonym`), so that a deleted user's name is nowhere.
"""

import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict, fields

import sqlalchemy as sa

from hydra_llm.store import schema
from hydra_llm.store.database import Database
from hydra_llm.store.pages import Place, newest_first
from hydra_llm.store.values import Accessed


class AuditLog(Database):
    """The part of the store that keeps the audit log."""

    def add_accesses(self, key: str, accesses: Iterable[tuple[str, str, str]]) -> None:
        """Note what was done now with a key (its public id): purpose, action, hash of the user."""
        now = time.time()
        rows = [Accessed(secrets.token_hex(12), now, key, *own) for own in accesses]
        with self.writing() as connection:
            connection.execute(sa.insert(schema.audit), list(map(asdict, rows)))

    def accesses(
        self,
        count: int,
        *,
        before: Place | None = None,
        key: str | None = None,
        person: str | None = None,
    ) -> list[Accessed]:
        """The latest entries (`before` one; of a key, about a user by the hash), newest first."""
        query = sa.select(*(schema.audit.c[field.name] for field in fields(Accessed)))
        for name, value in (("key", key), ("person", person)):
            if value is not None:
                query = query.where(schema.audit.c[name] == value)
        return [
            Accessed(*row) for row in self.rows(newest_first(query, schema.audit, before, count))
        ]

    def prune_accesses(self, before: float) -> None:
        """Delete the entries from before a time."""
        with self.writing() as connection:
            connection.execute(sa.delete(schema.audit).where(schema.audit.c.created < before))
