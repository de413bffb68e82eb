"""One user inside a transaction: what `Store.change` gives. Knows no other user."""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hydra_llm.errors import StoreError
from hydra_llm.store import schema
from hydra_llm.store.database import in_parts, insert_new
from hydra_llm.store.values import Added, StoredFeedback, StoredHead
from hydra_llm.types import Record

FEEDBACK_ID = "feedback:"  # prefix of the id of a record made from feedback; the request's follows


class StaleVersion(StoreError):
    """The user has changed since the version that the caller read: read again."""


class NoSuchUser(StoreError):
    """The user is unknown, or was deleted."""


class UserChange:
    """A user inside a transaction. `changed`: whether anything that answers depend on has;
    `removed`: whether something is gone that servers may have in memory.
    """

    def __init__(self, connection: Connection, user: Any, name: str):
        """`user`: the locked row, or None; then raises NoSuchUser."""
        if user is None:
            raise NoSuchUser("no such user")
        self._execute, self._key, self.name = connection.execute, user.key, name
        self.changed = self.removed = False

    def add(self, records: Sequence[Record]) -> Added:
        """Add records, or replace those with a known id; of several with one id the last counts."""
        table = schema.records
        own = table.c.user == self._key
        sent = {record.id: record for record in records}
        known = self._known(sent)
        new = [record for id, record in sent.items() if id not in known]
        changed = [id for id in sent if id in known and known[id] != _content(sent[id])]
        if new:
            next_position = sa.func.coalesce(sa.func.max(table.c.position) + 1, 0)
            first = self._execute(sa.select(next_position).where(own)).scalar_one()
            rows = [
                {"user": self._key, "id": record.id, "position": position, **_content(record)}
                for position, record in enumerate(new, first)
            ]
            self._execute(sa.insert(table), rows)
        if changed:
            self._delete(schema.heads)  # they have learned from the texts that are replaced
        for id in changed:
            self._execute(sa.update(table).where(own, table.c.id == id).values(_content(sent[id])))
        self.changed |= bool(new or changed)
        self.removed |= bool(changed)
        before = [Record(self.name, id, known[id]["input"], known[id]["output"]) for id in changed]
        unchanged = len(sent) - len(new) - len(changed)
        return Added(len(new), len(changed), unchanged, tuple(before))

    def unknown(self, ids: Iterable[str]) -> set[str]:
        """Those of the ids that no record of the user has."""
        wanted = set(ids)
        return wanted - self._known(wanted).keys()

    def count_with(self, records: Sequence[Record]) -> int:
        """How many records the user would have with these."""
        rows = sa.select(sa.func.count()).where(schema.records.c.user == self._key)
        ids = {record.id for record in records}
        return self._execute(rows).scalar_one() + len(ids) - len(self._known(ids))

    def switch(self, *, off: bool) -> None:
        """Whether the user wants no personal answers."""
        users = schema.users
        own = sa.update(users).where(users.c.key == self._key)
        self._execute(own.values(off=off))
        self.changed = True

    def switch_record(self, id: str, *, off: bool) -> bool | None:
        """Whether answers and fits may not use a record; False if it is so already, None if there
        is no such id. Off: heads are forgotten, and its feedback moves none until it is on again.
        """
        table = schema.records
        own = (table.c.user == self._key) & (table.c.id == id)
        was = self._execute(sa.select(table.c.off).where(own)).scalar_one_or_none()
        if was is None or was == off:
            return None if was is None else False
        self._execute(sa.update(table).where(own).values(off=off))
        if off:
            self.forget_heads()
        self.changed = True
        return True

    def forget_heads(self) -> None:
        """Delete the user's heads, so that no feedback counts as learned."""
        self._delete(schema.heads)
        table = schema.feedback
        self._execute(sa.update(table).where(table.c.user == self._key).values(folded=False))
        self.changed = self.removed = True

    def remove(self, id: str, *, keep_feedback: bool = False) -> bool:
        """Delete a record, what it was made from unless `keep_feedback`, and the heads; False if
        there is no such id.
        """
        removed = self._delete(schema.records, schema.records.c.id == id)
        if removed:
            self.changed = self.removed = True
            self._delete(schema.heads)
            if not keep_feedback:  # it would bring the record back
                gone = self.forget_feedback([id])
                self._delete(schema.requests, schema.requests.c.id.in_(gone))
        return removed

    def forget_feedback(self, ids: Iterable[str]) -> list[str]:
        """Delete the feedback of which these records were made, or in whose place they are: they
        say something else now. Returns the requests.
        """
        table, gone = schema.feedback.c, list[str]()
        for part in in_parts(ids):
            made = [id.removeprefix(FEEDBACK_ID) for id in part if id.startswith(FEEDBACK_ID)]
            same = (table.user == self._key) & table.content["record"].as_string().in_(part)
            gone += [*made, *self._execute(sa.select(table.request).where(same)).scalars()]
        for part in in_parts(gone):
            self._delete(schema.feedback, table.request.in_(part))
        return gone

    def hand_over(self, id: str) -> bool:
        """Make a record that of the first other feedback in whose place it is; False if there is
        none.
        """
        table, records, heir = schema.feedback, schema.records.c, None
        own, same = table.c.user == self._key, table.c.content["record"].as_string() == id
        rows = sa.select(table.c.request, table.c.content).where(own, same)
        for request, content in self._execute(rows.order_by(table.c.created)).all():
            update = sa.update(table).where(own, table.c.request == request)
            self._execute(update.values(content={**content, "record": heir}))
            heir = heir or f"{FEEDBACK_ID}{request}"
        if heir:
            this = sa.update(schema.records).where(records.user == self._key, records.id == id)
            self._execute(this.values(id=heir))
            self.changed = True
        return heir is not None

    def put_heads(self, bundle: str, heads: Mapping[str, StoredHead]) -> None:
        """Keep the user's heads for a bundle, by scorer, in place of older ones."""
        self._delete(schema.heads, schema.heads.c.bundle == bundle)
        now = time.time()
        for scorer, head in heads.items():
            row = {"user": self._key, "bundle": bundle, "scorer": scorer, **asdict(head)}
            until = None if head.until == -math.inf else head.until
            self._execute(sa.insert(schema.heads).values(row | {"until": until, "updated": now}))
        self.changed = True

    def put_feedback(self, feedback: StoredFeedback) -> bool:
        """Keep feedback on a request, in the place of other feedback; False if the same is kept."""
        table, content = schema.feedback, json.loads(json.dumps(feedback.content))
        this = (table.c.user == self._key) & (table.c.request == feedback.request)
        kept = self._execute(sa.select(table.c.content).where(this)).scalar_one_or_none()
        if kept is not None and kept["said"] == content["said"]:
            return False
        self._delete(table, this)
        row = {"user": self._key, "folded": False, **asdict(feedback), "content": content}
        self._execute(sa.insert(table).values(row))
        self.changed = True
        return True

    def mark_learned(self, requests: Sequence[str]) -> None:
        """Mark the feedback on these requests as learned by the heads that are put with it."""
        table = schema.feedback
        own = sa.update(table).where(table.c.user == self._key).values(folded=True)
        for part in in_parts(requests):
            self._execute(own.where(table.c.request.in_(part)))

    def _known(self, ids: Iterable[str]) -> dict[str, dict[str, str]]:
        """Those of the ids that the user has, with the records' content."""
        table = schema.records.c
        columns = (table.id, table.input, table.output, table.time)
        own = sa.select(*columns).where(table.user == self._key)
        parts = (self._execute(own.where(table.id.in_(part))) for part in in_parts(ids))
        return {row.id: _content(row) for rows in parts for row in rows}

    def _delete(self, table: sa.Table, *where: sa.ColumnElement[bool]) -> bool:
        """Delete the user's rows of a table; whether there were any."""
        rows = sa.delete(table).where(table.c.user == self._key, *where)
        return self._execute(rows).rowcount > 0


def _content(record: Any) -> dict[str, str]:
    return {"input": record.input, "output": record.output, "time": record.time}


def locked_user(connection: Connection, name: str) -> Any:
    """The user's row, which no one else changes until the transaction ends; None if unknown."""
    rows = sa.select(schema.users.c.key, schema.users.c.version).where(schema.users.c.name == name)
    return connection.execute(rows.with_for_update()).one_or_none()


def known_or_new(connection: Connection, name: str) -> Any:
    """As `locked_user`; an unknown user is created."""
    users = schema.users
    user = locked_user(connection, name)
    if user is None:
        insert_new(connection, users, {"name": name, "version": 0, "created": time.time()})
        new = sa.update(users).where(users.c.name == name, users.c.version == 0)
        connection.execute(new.values(version=users.c.key * schema.VERSIONS_PER_KEY))
        user = locked_user(connection, name)
    return user


def check_version(user: Any, version: int | None) -> None:
    """Raise StaleVersion if a version is named and the user's row has another, or is not there."""
    now = user.version if user else "none"
    if version not in (None, now):
        raise StaleVersion(f"the user is at version {now}, not {version}: read again")
