"""One user inside a transaction: what `Store.change` gives. Knows no other user."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hydra_llm.store import schema
from hydra_llm.store.values import Added, Contradiction, StoredFeedback, StoredHead
from hydra_llm.types import Record

FEEDBACK = "feedback:"
"""What the id of a record begins with that an answered request became."""
ASKED_AT_ONCE = 500
"""Values of one IN (…): SQLite's oldest limit is 999."""


class UserChange:
    """A user inside a transaction: see `Store.change`; `changed` tells whether anything that
    answers depend on did.
    """

    def __init__(self, connection: Connection, key: int, name: str):
        self._connection, self._key, self.name = connection, key, name
        self.changed = False

    def add(self, records: Sequence[Record]) -> Added:
        """Add or replace records by id, new ones behind those that are there. A later one of the
        same id in the list wins.
        """
        wanted = {record.id: record for record in records}
        known = self._known(list(wanted))
        new = [record for record in wanted.values() if record.id not in known]
        other = [
            record
            for record in wanted.values()
            if record.id in known and known[record.id] != _content(record)
        ]
        table = schema.records
        if new:
            last = self._connection.scalar(
                sa.select(sa.func.max(table.c.position)).where(table.c.user == self._key)
            )
            start = 0 if last is None else last + 1
            rows = [
                {"user": self._key, "id": r.id, "position": start + i, **_content(r)}
                for i, r in enumerate(new)
            ]
            self._connection.execute(sa.insert(table), rows)
        if other:  # heads hold traces of what is replaced
            self._connection.execute(
                sa.delete(schema.heads).where(schema.heads.c.user == self._key)
            )
        for record in other:
            at = (table.c.user == self._key) & (table.c.id == record.id)
            self._connection.execute(sa.update(table).where(at).values(_content(record)))
        self.changed = self.changed or bool(new or other)
        before = tuple(
            Record(self.name, record.id, known[record.id]["input"], known[record.id]["output"])
            for record in other
        )
        return Added(len(new), len(other), len(wanted) - len(new) - len(other), before)

    def count(self) -> int:
        """How many records the user has."""
        return (
            self._connection.scalar(
                sa.select(sa.func.count()).where(schema.records.c.user == self._key)
            )
            or 0
        )

    def new(self, records: Sequence[Record]) -> int:
        """How many of these records the user has not."""
        ids = list(dict.fromkeys(record.id for record in records))
        return len(ids) - len(self._known(ids))

    def remove(self, id: str) -> bool:
        """Delete one record; False if there is none of that id. Heads that knew it are deleted too:
        they hold traces of it.
        """
        table = schema.records
        gone = (
            self._connection.execute(
                sa.delete(table).where(table.c.user == self._key, table.c.id == id)
            ).rowcount
            > 0
        )
        if gone:
            self._connection.execute(
                sa.delete(schema.heads).where(schema.heads.c.user == self._key)
            )
        if gone and id.startswith(FEEDBACK):  # what it came from would bring it back
            request = id.removeprefix(FEEDBACK)
            self._connection.execute(
                sa.delete(schema.feedback).where(schema.feedback.c.request == request)
            )
            self._connection.execute(
                sa.delete(schema.requests).where(schema.requests.c.id == request)
            )
        self.changed = self.changed or gone
        return gone

    def put_heads(self, bundle: str, heads: Mapping[str, StoredHead]) -> None:
        """Keep the user's heads for a bundle, in place of older ones."""
        table = schema.heads
        self._connection.execute(
            sa.delete(table).where(table.c.user == self._key, table.c.bundle == bundle)
        )
        now = time.time()
        rows = [
            {
                "user": self._key,
                "bundle": bundle,
                "scorer": scorer,
                "known": head.known,
                "until": None if head.until == -math.inf else head.until,
                "delta": head.delta,
                "updated": now,
            }
            for scorer, head in heads.items()
        ]
        if rows:
            self._connection.execute(sa.insert(table), rows)
        self.changed = True

    def put_feedback(self, judged: StoredFeedback) -> bool:
        """Keep what was said of a request; False if exactly this was said before.

        Raises:
            Contradiction: something else was said of this request before.
        """
        table, content = schema.feedback, json.loads(json.dumps(judged.content))
        before = self._connection.execute(
            sa.select(table.c.content).where(table.c.request == judged.request)
        ).one_or_none()
        if before is None:
            values = {
                "request": judged.request,
                "user": self._key,
                "created": judged.created,
                "folded": False,
                "content": content,
            }
            self._connection.execute(sa.insert(table).values(values))
            self.changed = True
            return True
        if before.content["said"] != content["said"]:
            raise Contradiction("this request has other feedback already")
        return False

    def fold_feedback(self, requests: Sequence[str]) -> None:
        """From here on the feedback on these requests counts as known to the head: call it with the
        head that was fitted.
        """
        table = schema.feedback
        for part in parts(requests):
            at = (table.c.user == self._key) & table.c.request.in_(part)
            self._connection.execute(sa.update(table).where(at).values(folded=True))

    def _known(self, ids: Sequence[str]) -> dict[str, dict[str, str]]:
        table, found = schema.records.c, {}
        for part in parts(ids):
            rows = sa.select(table.id, table.input, table.output, table.time).where(
                table.user == self._key, table.id.in_(part)
            )
            for row in self._connection.execute(rows):
                found[row.id] = {"input": row.input, "output": row.output, "time": row.time}
        return found


def parts(values: Sequence[str]) -> Iterator[Sequence[str]]:
    """Values, as many at once as every database takes."""
    return (values[start : start + ASKED_AT_ONCE] for start in range(0, len(values), ASKED_AT_ONCE))


def _content(record: Record) -> dict[str, str]:
    return {"input": record.input, "output": record.output, "time": record.time}
