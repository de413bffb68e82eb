"""Jobs: who waits, who works, how far."""

import time
from dataclasses import asdict, fields
from typing import Any

import sqlalchemy as sa

from hydra_llm.store import schema
from hydra_llm.store.database import Database
from hydra_llm.store.users import locked_user
from hydra_llm.store.values import Job


class Jobs(Database):
    """The part of the store that holds jobs."""

    def add_job(self, id: str, name: str, kind: str) -> Job | None:
        """A new job that waits; None for an unknown user."""
        now = time.time()
        job = Job(id, name, kind, "waiting", 0, 0, "", now, now)
        with self.writing() as connection:
            user = locked_user(connection, name)
            if user is None:
                return None
            connection.execute(sa.insert(schema.jobs).values(asdict(job) | {"user": user.key}))
        return job

    def job(self, id: str) -> Job | None:
        """A job as it is now."""
        rows = self.rows(_jobs().where(schema.jobs.c.id == id))
        return Job(*rows[0]) if rows else None

    def claim_job(self, *, abandoned_after: float = 600.0) -> Job | None:
        """Take the oldest job that waits, or that has had no update for so many seconds."""
        table, now = schema.jobs.c, time.time()
        abandoned = (table.state == "running") & (table.updated < now - abandoned_after)
        ready = _jobs().where((table.state == "waiting") | abandoned)
        first = ready.order_by(table.created, table.id).limit(1)
        locked = first.with_for_update(skip_locked=True, of=schema.jobs)
        with self.writing() as connection:
            row = connection.execute(locked).one_or_none()
            if row is None:
                return None
            claimed = sa.update(schema.jobs).where(table.id == row.id)
            connection.execute(claimed.values(state="running", updated=now))
        return Job(*row)

    def update_job(
        self, id: str, done: int, total: int, *, state: str = "running", error: str = ""
    ) -> bool:
        """Keep a job's progress or end; False if the job was deleted with its user."""
        values = {"done": done, "total": total, "state": state, "error": error}
        job = sa.update(schema.jobs).where(schema.jobs.c.id == id)
        return self.write(job.values(updated=time.time(), **values)) > 0

    def delete_jobs(self, before: float) -> int:
        """Delete jobs that ended before a time; returns how many."""
        table = schema.jobs.c
        ended = table.state.in_(["done", "failed"]) & (table.updated < before)
        return self.write(sa.delete(schema.jobs).where(ended))


def _jobs() -> sa.Select[Any]:
    """Jobs, in the order of `Job`'s fields."""
    columns = {field.name: schema.jobs.c[field.name] for field in fields(Job)}
    named = columns | {"user": schema.users.c.name}
    return sa.select(*named.values()).join_from(schema.jobs, schema.users)
