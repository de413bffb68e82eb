"""Pages of what is kept, for lists that people read: each begins behind the last row of the page
before (keyset), so that a page costs the same wherever it is.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import sqlalchemy as sa

from hydra_llm.store import schema
from hydra_llm.store.database import Database
from hydra_llm.store.values import PURPOSES, Job, Key, Request, UserCounts
from hydra_llm.types import Record

Place = tuple[float, str]
"""Of a row in a list, newest first: when it was created, and its id."""


class Pages(Database):
    """The part of the store that lists."""

    def user_counts(
        self,
        *,
        after: str = "",
        limit: int = 100,
        names: Sequence[str] | None = None,
        contains: str = "",
    ) -> list[UserCounts]:
        """How much is kept about each user (of `names`), by name from the first behind `after`.
        `contains`: a part of the name, in letters of either case.
        """
        users, requests, columns = schema.users.c, schema.requests.c, []
        for table in (schema.records, schema.feedback, schema.requests):
            rows = sa.select(sa.func.count()).where(table.c.user == users.key)
            columns.append(rows.correlate(schema.users).scalar_subquery())
        latest = sa.select(sa.func.max(requests.created)).where(requests.user == users.key)
        columns.append(latest.correlate(schema.users).scalar_subquery())
        # The page first: else PostgreSQL may count for all users before it takes some.
        page = sa.select(users.key).where(users.name > after)
        if names is not None:
            page = page.where(users.name.in_(names))
        if contains:
            name = sa.func.lower(users.name)
            page = page.where(name.contains(contains.lower(), autoescape=True))
        keys = page.order_by(users.name).limit(limit).subquery()
        query = sa.select(users.name, users.created, *columns).join(keys, keys.c.key == users.key)
        return [UserCounts(*row) for row in self.rows(query.order_by(users.name))]

    def record_page(
        self, name: str, *, before: int | None = None, limit: int = 50
    ) -> list[tuple[int, Record]]:
        """A user's records with their positions, the latest added first, from the first before a
        position.
        """
        records = schema.records.c
        query = _of_records().where(schema.users.c.name == name)
        if before is not None:
            query = query.where(records.position < before)
        rows = self.rows(query.order_by(records.position.desc()).limit(limit))
        return [(row.position, Record(*row[1:])) for row in rows]

    def some_records(self, name: str, ids: Sequence[str]) -> dict[str, Record]:
        """Those of a user's records that have these ids, by id."""
        query = _of_records().where(schema.users.c.name == name, schema.records.c.id.in_(ids))
        return {row.id: Record(*row[1:]) for row in self.rows(query)}

    def same_record(self, name: str, record: Record) -> str | None:
        """The id of another record of the user with this input and output; one that is on comes
        first.
        """
        records = schema.records.c
        equal = (records.input == record.input) & (records.output == record.output)
        query = _of_records().where(schema.users.c.name == name, equal, records.id != record.id)
        rows = self.rows(query.order_by(records.off, records.position).limit(1))
        return rows[0].id if rows else None

    def latest_requests(
        self, name: str, count: int, *, before: Place | None = None
    ) -> list[Request]:
        """A user's latest answered requests (`before` one), newest first."""
        rows = with_names(schema.requests, Request).where(schema.users.c.name == name)
        page = newest_first(rows, schema.requests, before, count)
        return [Request(*row) for row in self.rows(page)]

    def latest_jobs(self, count: int, *, before: Place | None = None) -> list[Job]:
        """The latest jobs of all users (`before` one), newest first."""
        page = newest_first(with_names(schema.jobs, Job), schema.jobs, before, count)
        return [Job(*row) for row in self.rows(page)]

    def latest_keys(
        self, count: int, *, before: Place | None = None, user: str | None = None
    ) -> list[Key]:
        """The latest keys (of a user, `before` one), newest first."""
        keys, users = schema.keys, schema.key_users.c
        query = sa.select(keys)
        if user is not None:
            query = query.where(keys.c.id.in_(sa.select(users.key).where(users.name == user)))
        with self.reading() as connection:
            page = newest_first(query, keys, before, count)
            rows = connection.execute(page).mappings().all()
            of = sa.select(users.key, users.name).where(users.key.in_([row["id"] for row in rows]))
            names = connection.execute(of.order_by(users.name)).all()
        found = [(row, tuple(name for id, name in names if id == row["id"])) for row in rows]
        return [key_of_row(row, own) for row, own in found]


def key_of_row(row: sa.RowMapping, users: Sequence[str]) -> Key:
    """A key of its row and its users."""
    purposes = tuple(row["purposes"].split(",")) if row["purposes"] else PURPOSES
    return Key(**{**row, "users": tuple(users), "purposes": purposes})


def with_names(table: sa.Table, kind: type[Job | Request]) -> sa.Select[Any]:
    """The table's rows in the order of the value's fields, with the users' names."""
    columns = {field.name: table.c[field.name] for field in fields(kind)}
    named = columns | {"user": schema.users.c.name}
    return sa.select(*named.values()).join_from(table, schema.users)


def _of_records() -> sa.Select[Any]:
    """Positions, and what a `Record` begins with."""
    records, users = schema.records.c, schema.users.c
    columns = (records.id, records.input, records.output, records.time)
    return sa.select(records.position, users.name, *columns).join_from(schema.records, schema.users)


def newest_first(
    query: sa.Select[Any], table: sa.Table, before: Place | None, count: int
) -> sa.Select[Any]:
    """A page of a query on a table with `created` and `id`."""
    created, id = table.c.created, table.c.id
    if before is not None:
        since, last = before
        # Said twice, so that the index of `created` alone finds the page's begin.
        query = query.where(created <= since)
        query = query.where((created < since) | ((created == since) & (id < last)))
    return query.order_by(created.desc(), id.desc()).limit(count)
