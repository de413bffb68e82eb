"""One user inside a transaction: what `Store.change` gives. Knows no other user."""

import json
import math
import time
from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hydra_llm.store import schema
from hydra_llm.store.database import in_parts
from hydra_llm.store.values import Added, ConflictingFeedback, StoredFeedback, StoredHead
from hydra_llm.types import Record

FEEDBACK_ID = "feedback:"
"""Prefix of the id of a record that was made from feedback; the answered request's id follows."""


class UserChange:
    """A user inside a transaction, see `Store.change`. `changed`: whether anything has changed that
    answers depend on.
    """

    def __init__(self, connection: Connection, key: int, name: str):
        self._connection, self._key, self.name = connection, key, name
        self.changed = False

    def add(self, records: Sequence[Record]) -> Added:
        """Add records, or replace those whose id is known; new ones come last. Of several with one
        id the last one counts.
        """
        sent = {record.id: record for record in records}
        known = self._known(list(sent))
        new = [record for id, record in sent.items() if id not in known]
        changed = [
            record for id, record in sent.items() if id in known and known[id] != _content(record)
        ]
        if new:
            self._append(new)
        if changed:
            self._replace(changed)
        self.changed = self.changed or bool(new or changed)
        before = tuple(
            Record(self.name, record.id, known[record.id]["input"], known[record.id]["output"])
            for record in changed
        )
        return Added(len(new), len(changed), len(sent) - len(new) - len(changed), before)

    def _append(self, records: Sequence[Record]) -> None:
        table = schema.records
        last = sa.select(sa.func.max(table.c.position)).where(table.c.user == self._key)
        start = self._connection.scalar(last)
        rows = [
            {"user": self._key, "id": record.id, "position": position, **_content(record)}
            for position, record in enumerate(records, 0 if start is None else start + 1)
        ]
        self._connection.execute(sa.insert(table), rows)

    def _replace(self, records: Sequence[Record]) -> None:
        table = schema.records
        self._delete(schema.heads)  # they have learned from the texts that are replaced
        for record in records:
            at = (table.c.user == self._key) & (table.c.id == record.id)
            self._connection.execute(sa.update(table).where(at).values(_content(record)))

    def count(self) -> int:
        """How many records the user has."""
        rows = sa.select(sa.func.count()).where(schema.records.c.user == self._key)
        return self._connection.scalar(rows) or 0

    def count_new(self, records: Sequence[Record]) -> int:
        """How many of these records the user does not have."""
        ids = list(dict.fromkeys(record.id for record in records))
        return len(ids) - len(self._known(ids))

    def remove(self, id: str) -> bool:
        """Delete one record, what it was made from, and the heads, which have learned from it;
        False if there is none of that id.
        """
        removed = self._delete(schema.records, schema.records.c.id == id)
        if removed:
            self._delete(schema.heads)
        if removed and id.startswith(FEEDBACK_ID):  # else the feedback would bring it back
            request = id.removeprefix(FEEDBACK_ID)
            self._delete(schema.feedback, schema.feedback.c.request == request)
            self._delete(schema.requests, schema.requests.c.id == request)
        self.changed = self.changed or removed
        return removed

    def put_heads(self, bundle: str, heads: Mapping[str, StoredHead]) -> None:
        """Keep the user's heads for a bundle, in place of older ones. `heads`: by scorer."""
        self._delete(schema.heads, schema.heads.c.bundle == bundle)
        for_all = {"user": self._key, "bundle": bundle, "updated": time.time()}
        rows = [
            {
                **for_all,
                "scorer": scorer,
                "known": head.known,
                "until": None if head.until == -math.inf else head.until,
                "delta": head.delta,
            }
            for scorer, head in heads.items()
        ]
        if rows:
            self._connection.execute(sa.insert(schema.heads), rows)
        self.changed = True

    def put_feedback(self, feedback: StoredFeedback) -> bool:
        """Keep feedback on a request; False if the same is kept already.

        Raises:
            ConflictingFeedback: other feedback on this request is kept already.
        """
        table, content = schema.feedback, json.loads(json.dumps(feedback.content))
        kept = self._connection.scalar(
            sa.select(table.c.content).where(table.c.request == feedback.request)
        )
        if kept is not None:
            if kept["said"] != content["said"]:
                raise ConflictingFeedback("this request has other feedback already")
            return False
        row = {"request": feedback.request, "created": feedback.created, "content": content}
        self._connection.execute(sa.insert(table).values(user=self._key, folded=False, **row))
        self.changed = True
        return True

    def mark_learned(self, requests: Sequence[str]) -> None:
        """Mark the feedback on these requests as learned by the user's head: call it together with
        `put_heads`.
        """
        table = schema.feedback
        for part in in_parts(requests):
            at = (table.c.user == self._key) & table.c.request.in_(part)
            self._connection.execute(sa.update(table).where(at).values(folded=True))

    def _known(self, ids: Sequence[str]) -> dict[str, dict[str, str]]:
        """Those of the ids that the user has, with the records' content."""
        table, found = schema.records.c, {}
        for part in in_parts(ids):
            rows = sa.select(table.id, table.input, table.output, table.time).where(
                table.user == self._key, table.id.in_(part)
            )
            for row in self._connection.execute(rows):
                found[row.id] = {"input": row.input, "output": row.output, "time": row.time}
        return found

    def _delete(self, table: sa.Table, *where: sa.ColumnElement[bool]) -> bool:
        """Delete the user's rows of a table; whether there were any."""
        rows = sa.delete(table).where(table.c.user == self._key, *where)
        return self._connection.execute(rows).rowcount > 0


def _content(record: Record) -> dict[str, str]:
    return {"input": record.input, "output": record.output, "time": record.time}
