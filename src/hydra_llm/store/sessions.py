"""Who is signed in at the dashboard, and how often what happened: figures of all servers by hour.
Knows no users.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from hydra_llm.store import schema
from hydra_llm.store.database import Database
from hydra_llm.store.values import Happened, Session


class Sessions(Database):
    """The part of the store that keeps sessions and activity."""

    def add_session(self, session: Session) -> None:
        """Keep a session, and delete those that have ended."""
        table = schema.sessions
        with self.writing() as connection:
            connection.execute(sa.delete(table).where(table.c.expires < time.time()))
            connection.execute(sa.insert(table).values(asdict(session)))

    def session(self, id: str) -> Session | None:
        """The session of an id that has not expired."""
        table = schema.sessions.c
        columns = (table.id, table.key, table.proof, table.expires)
        rows = self.rows(sa.select(*columns).where(table.id == id, table.expires > time.time()))
        return Session(*rows[0]) if rows else None

    def end_session(self, id: str) -> None:
        with self.writing() as connection:
            connection.execute(sa.delete(schema.sessions).where(schema.sessions.c.id == id))

    def add_activity(self, counts: Mapping[tuple[int, str, str], int]) -> None:
        """Add to what happened, by hour, kind and name."""
        table = schema.activity
        dialect = sqlite if self.on_sqlite else postgresql
        with self.writing() as connection:
            # In one order for all servers: else two could wait for each other.
            for (hour, kind, name), count in sorted(counts.items()):
                row = dialect.insert(table).values(hour=hour, kind=kind, name=name, count=count)
                more = {"count": table.c["count"] + row.excluded["count"]}
                place = ["hour", "kind", "name"]
                connection.execute(row.on_conflict_do_update(index_elements=place, set_=more))

    def activity(self, since: int, step: int = 3600, kind: str = "") -> list[Happened]:
        """What happened since a time, in sums of `step` seconds, in order; `kind`: only that."""
        table = schema.activity.c
        begin = (table.hour - (table.hour - since) % step).label("begin")
        count = sa.cast(sa.func.sum(table["count"]), sa.BigInteger)
        query = sa.select(begin, table.kind, table.name, count).where(table.hour >= since)
        if kind:
            query = query.where(table.kind == kind)
        groups = (sa.text("begin"), table.kind, table.name)
        rows = self.rows(query.group_by(*groups).order_by(*groups))
        return [Happened(*row) for row in rows]

    def prune_activity(self, before: float) -> None:
        """Delete what happened before a time."""
        table = schema.activity
        with self.writing() as connection:
            connection.execute(sa.delete(table).where(table.c.hour < before))
