"""Answered requests and the feedback on them."""

from collections.abc import Sequence
from dataclasses import asdict

import sqlalchemy as sa

from hydra_llm.store import schema
from hydra_llm.store.database import Database, in_parts
from hydra_llm.store.values import Request, StoredFeedback
from hydra_llm.types import ARROW, as_one_text


class Requests(Database):
    """The part of the store that holds answered requests and feedback."""

    def add_request(self, request: Request, *, version: int | None = None) -> bool:
        """Keep an answered request; False if the user is unknown, or deleted since that version."""
        users = schema.users.c
        key = sa.select(users.key).where(users.name == request.user)
        if version is not None:
            per_key = schema.VERSIONS_PER_KEY
            key = key.where(users.version // per_key == version // per_key)
        with self.writing() as connection:
            user = connection.scalar(key.with_for_update(read=True))
            if user is None:
                return False
            row = asdict(request) | {"user": user}
            connection.execute(sa.insert(schema.requests).values(row))
        return True

    def request(self, id: str) -> Request | None:
        """A kept request."""
        table = schema.requests.c
        columns = (table.created, table.bundle, table.question, table.content)
        found = sa.select(table.id, schema.users.c.name, *columns).where(table.id == id)
        rows = self.rows(found.join_from(schema.requests, schema.users))
        return Request(*rows[0]) if rows else None

    def delete_requests(self, before: float) -> int:
        """Delete requests that were answered before a time; returns how many."""
        return self.write(sa.delete(schema.requests).where(schema.requests.c.created < before))

    def unlearned_feedback(
        self, name: str, count: int | None = None, *, bundle: str | None = None
    ) -> list[StoredFeedback]:
        """The user's latest feedback that no fitted head has learned, oldest first; all of it
        without `count`.

        `bundle`: only feedback of that bundle that a head can learn from (it has a group).
        """
        table = schema.feedback.c
        rows = (
            sa.select(table.request, table.created, table.content)
            .join_from(schema.feedback, schema.users)
            .where(schema.users.c.name == name, table.folded.is_(False))
            .order_by(table.created.desc(), table.request.desc())
        )
        if bundle is not None:
            group = table.content["group"].as_string()
            rows = rows.where(table.content["bundle"].as_string() == bundle, group.is_not(None))
        return [StoredFeedback(*row) for row in self.rows(rows.limit(count))][::-1]

    def texts_in_use(self, texts: Sequence[str], *, except_user: str | None = None) -> set[str]:
        """Those that occur in other users' records (input, output, both as one) or questions."""
        wanted, found = set(texts), set[str]()
        inputs = {text.partition(ARROW)[0] for text in wanted}
        records, requests = schema.records.c, schema.requests.c
        named = sa.select(schema.users.c.key).where(schema.users.c.name == except_user)
        with self.reading() as connection:
            key = connection.scalar(named) if except_user is not None else None
            other = -1 if key is None else key
            pairs = sa.select(records.input, records.output).where(records.user != other)
            outputs = sa.select(records.output).where(records.user != other).distinct()
            questions = sa.select(requests.question).where(requests.user != other).distinct()
            for part in in_parts(wanted | inputs):
                for row in connection.execute(pairs.where(records.input.in_(part)).distinct()):
                    found |= {row.input, as_one_text(row.input, row.output)}
                found.update(connection.scalars(outputs.where(records.output.in_(part))))
                found.update(connection.scalars(questions.where(requests.question.in_(part))))
        return found & wanted
