"""Stored responses: what the Responses API keeps of conversations. A response is about its user."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from hydra_llm.store import schema
from hydra_llm.store.change import known_or_new, locked_user
from hydra_llm.store.database import in_parts, mark_deletion
from hydra_llm.store.upkeep import Upkeep
from hydra_llm.store.values import StoredResponse


class Responses(Upkeep):
    """The part of the store that keeps responses."""

    def add_response(self, response: StoredResponse, *, version: int | None) -> bool:
        """Keep a response; False if its user was deleted since `version`. None: the user was
        unknown, and is created.
        """
        with self.writing() as connection:
            find = locked_user if version is not None else known_or_new
            user = find(connection, response.user)
            if user is None or (version is not None and schema.key_of(version) != user.key):
                return False
            row = asdict(response) | {"user": user.key}
            connection.execute(sa.insert(schema.responses).values(row))
        return True

    def response(self, id: str) -> StoredResponse | None:
        rows = self.rows(_named().where(schema.responses.c.id == id))
        return StoredResponse(*rows[0]) if rows else None

    def responses(self, user: str, ids: Sequence[str]) -> dict[str, StoredResponse]:
        """Those of a user's responses that have these ids, by id."""
        table, found = schema.responses.c, dict[str, StoredResponse]()
        for part in in_parts(dict.fromkeys(ids)):
            rows = self.rows(_named().where(schema.users.c.name == user, table.id.in_(part)))
            found |= {row.id: StoredResponse(*row) for row in rows}
        return found

    def conversation(self, user: str, id: str) -> list[StoredResponse]:
        """A user's response and those before it, oldest first; empty if there is none. The first
        names a `previous` one where that is not there any more.
        """
        table, users = schema.responses, schema.users.c
        key = sa.select(users.key).where(users.name == user).scalar_subquery()
        last = sa.select(table.c.id, table.c.previous, sa.literal(0).label("back"))
        turns = last.where(table.c.id == id, table.c.user == key).cte("turns", recursive=True)
        before = sa.select(table.c.id, table.c.previous, turns.c.back + 1)
        own = (table.c.id == turns.c.previous) & (table.c.user == key)
        turns = turns.union_all(before.join_from(table, turns, own))
        query = _named(table.join(turns, table.c.id == turns.c.id))
        return [StoredResponse(*row) for row in self.rows(query.order_by(turns.c.back.desc()))]

    def delete_response(self, user: str, id: str, *, request: str) -> bool:
        """Delete a user's response, and the answered request of that id; False if there is none."""
        key = sa.select(schema.users.c.key).where(schema.users.c.name == user).scalar_subquery()
        with self.writing() as connection:
            for table, own in ((schema.requests, request), (schema.responses, id)):
                rows = sa.delete(table).where(table.c.id == own, table.c.user == key)
                deleted = connection.execute(rows).rowcount
            mark_deletion(connection)
        return deleted > 0


def _named(rows: sa.FromClause = schema.responses) -> sa.Select[Any]:
    """Rows in the order of the value's fields, with the users' names."""
    table, users = schema.responses.c, schema.users.c
    columns = (table.id, users.name, table.created, table.previous, table.content)
    return sa.select(*columns).select_from(rows.join(schema.users, users.key == table.user))
