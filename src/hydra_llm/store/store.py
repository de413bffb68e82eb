"""All that the gateway keeps, in SQLite or PostgreSQL. Only this package speaks SQL.

Every method is one transaction, which is on the disk when it returns. A database that fails raises
`StoreError`, and then nothing was kept. Methods block: a server calls them in threads. Knows no
HTTP, no LLM and no scorer.
"""

import math
import secrets
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL

from hydra_llm.history import in_order, parse_time
from hydra_llm.store import migrate, schema
from hydra_llm.store.audit import AuditLog
from hydra_llm.store.change import FEEDBACK_ID, UserChange, check_version, known_or_new, locked_user
from hydra_llm.store.database import in_parts, insert_new, mark_deletion, one_line_errors
from hydra_llm.store.pages import Pages, key_of_row, with_names
from hydra_llm.store.removals import WATCHED, tell_removal
from hydra_llm.store.sessions import Sessions
from hydra_llm.store.spend import Spending, forget_spender
from hydra_llm.store.values import (
    PURPOSES,
    Added,
    Job,
    Key,
    Request,
    StoredFeedback,
    StoredHead,
    UserState,
    Watched,
)
from hydra_llm.types import ARROW, UNREADABLE, Record, Span, as_one_text


class Store(Spending, Pages, Sessions, AuditLog):
    """All that the gateway keeps. Any number of threads and processes may use one database."""

    def __init__(self, url: str | URL, *, timeout: float = 30.0, create: bool = True):
        """An empty database gets its tables (`created`); without `create` it must have them, and
        nothing is written. Raises SettingsError for the URL, else StoreError.
        """
        super().__init__(url, timeout=timeout)
        self.check_file(create=create)
        with one_line_errors(self.url):
            self.created = migrate.prepare(self.engine, create=create)

    # ---- users, their records and heads

    def state(self, name: str) -> UserState:
        """The user's version and the bundle in use, in one statement."""
        users, serving = schema.users.c, schema.serving.c
        version = sa.select(users.version).where(users.name == name)
        bundle = sa.select(serving.value).where(serving.name == "bundle")
        rows = self.rows(sa.select(version.scalar_subquery(), bundle.scalar_subquery()))
        return UserState(*rows[0])

    def versions(self, names: Sequence[str]) -> dict[str, int]:
        """The version of each of these users that is there."""
        users = schema.users.c
        query = sa.select(users.name, users.version)
        parts = (self.rows(query.where(users.name.in_(part))) for part in in_parts(names))
        return {row.name: row.version for rows in parts for row in rows}

    def is_off(self, name: str) -> bool:
        """Whether the user wants no personal answers; the version grows when that changes."""
        rows = self.rows(sa.select(schema.users.c.off).where(schema.users.c.name == name))
        return bool(rows and rows[0].off)

    def users(self) -> list[str]:
        """Every user's name, in the order in which they came."""
        query = sa.select(schema.users.c.name).order_by(schema.users.c.key)
        return [name for (name,) in self.rows(query)]

    def records(self, name: str, *, off_too: bool = False) -> tuple[int | None, list[Record]]:
        """The user's version and its records, oldest first; (None, []) if unknown. Without
        `off_too` those that answers and fits may use.
        """
        users, records = schema.users.c, schema.records.c
        own = (records.user == users.key) & (sa.true() if off_too else records.off.is_(False))
        columns = (records.id, records.input, records.output, records.time, records.position)
        query = sa.select(users.version, *columns).where(users.name == name)
        joined = query.join_from(schema.users, schema.records, own, isouter=True)
        rows = self.rows(joined.order_by(records.position))
        found = (
            Record(name, id, input, output, time, _span(time), position)
            for _, id, input, output, time, position in rows
            if id is not None
        )
        return (rows[0].version if rows else None), in_order(found)

    def off_records(self, name: str) -> set[str]:
        """The ids of the user's records that are switched off."""
        query = sa.select(schema.records.c.id).join(schema.users)
        rows = self.rows(query.where(schema.users.c.name == name, schema.records.c.off))
        return {id for (id,) in rows}

    def heads(self, name: str, bundle: str) -> dict[str, StoredHead]:
        """The user's heads for a bundle, by scorer; empty if none was fitted."""
        heads = schema.heads.c
        query = sa.select(heads.scorer, heads.known, heads.until, heads.delta).join(schema.users)
        rows = self.rows(query.where(schema.users.c.name == name, heads.bundle == bundle))
        return {
            scorer: StoredHead(known, -math.inf if until is None else until, delta)
            for scorer, known, until, delta in rows
        }

    @contextmanager
    def change(
        self, name: str, *, version: int | None = None, create: bool = False
    ) -> Iterator[UserChange]:
        """Change a user in one transaction, with the row locked; the version grows with any change.
        Raises StaleVersion if `version` is not the user's any more, NoSuchUser unless `create`.
        """
        users = schema.users
        with self.writing() as connection:
            user = (known_or_new if create else locked_user)(connection, name)
            change = UserChange(connection, user, name)
            check_version(user, version)
            yield change
            if change.changed:
                own = sa.update(users).where(users.c.key == user.key)
                connection.execute(own.values(version=users.c.version + 1))
            if change.removed:
                tell_removal(connection)

    def add_records(self, name: str, records: Sequence[Record]) -> Added:
        """Add records, and the user if unknown; the same records again change nothing."""
        with self.change(name, create=True) as user:
            return user.add(records)

    def delete_user(self, name: str, *, version: int | None = None) -> dict[str, int] | None:
        """Delete the user and everything about the user: rows per table; None for an unknown user.

        A key for this user only is deleted too: it names the user. SQLite overwrites the rows, but
        its log and pages may keep copies until `erase`; PostgreSQL's files keep all until `scrub`.
        Raises StaleVersion if `version` is not the user's any more; then nothing was deleted.
        """
        keys, names = schema.keys.c, schema.key_users.c
        with self.writing() as connection:
            user = locked_user(connection, name)
            check_version(user, version)
            own = set(connection.scalars(sa.select(names.key).where(names.name == name)))
            connection.execute(sa.delete(schema.key_users).where(names.name == name))
            of_others = set(connection.scalars(sa.select(names.key).where(names.key.in_(own))))
            unused = keys.id.in_(own - of_others) & keys.admin.is_(False)
            gone = set(connection.scalars(sa.select(keys.id).where(unused)))
            connection.execute(sa.delete(schema.keys).where(keys.id.in_(gone)))
            counts = {"keys": len(gone), "spend": forget_spender(connection, name, gone)}
            mark_deletion(connection)
            if user is None:
                return counts if any(counts.values()) else None
            for table in schema.OF_USERS:
                rows = sa.delete(table).where(table.c.user == user.key)
                counts[table.name] = connection.execute(rows).rowcount
            connection.execute(sa.delete(schema.users).where(schema.users.c.key == user.key))
            tell_removal(connection)
        return counts

    def export_user(self, name: str) -> dict[str, Any] | None:
        """All that is kept about a user, as plain values (heads' numbers as bytes), or None."""
        own = sa.select(schema.users).where(schema.users.c.name == name)
        keys = sa.select(schema.keys.c.id, schema.keys.c.label).join(schema.key_users)
        queries = {"keys": keys.where(schema.key_users.c.name == name)}
        spent = [column for column in schema.spend.c if column.name != "name"]
        queries["spend"] = sa.select(*spent).where(schema.spend.c.name == name)
        limit = (schema.limits.c.kind == "user", schema.limits.c.name == name)
        queries["limits"] = sa.select(schema.limits.c.value).where(*limit)
        with self.reading() as connection:
            user = connection.execute(own).one_or_none()
            if user is None:
                return None
            for table in schema.OF_USERS:
                columns = [column for column in table.c if column.name != "user"]
                queries[table.name] = sa.select(*columns).where(table.c.user == user.key)
            export = {"user": name, "version": user.version, "created": user.created}
            export["off"] = user.off
            for part, query in reversed(queries.items()):
                export[part] = [dict(row) for row in connection.execute(query).mappings()]
        return export

    # ---- answered requests and the feedback on them

    def add_request(self, request: Request, *, version: int | None = None) -> bool:
        """Keep an answered request; False if the user is unknown, or deleted since that version."""
        users = schema.users.c
        key = sa.select(users.key).where(users.name == request.user)
        if version is not None:
            key = key.where(users.version // schema.VERSIONS_PER_KEY == schema.key_of(version))
        with self.writing() as connection:
            user = connection.scalar(key.with_for_update(read=True))
            if user is not None:
                row = asdict(request) | {"user": user}
                connection.execute(sa.insert(schema.requests).values(row))
        return user is not None

    def request(self, id: str) -> Request | None:
        rows = self.rows(with_names(schema.requests, Request).where(schema.requests.c.id == id))
        return Request(*rows[0]) if rows else None

    def unlearned_feedback(
        self,
        name: str,
        count: int | None = None,
        *,
        bundle: str | None = None,
        or_learned: bool = False,
    ) -> list[StoredFeedback]:
        """The user's latest feedback (`count`, or all) that no fitted head has learned, in order.
        `bundle`: only feedback of that bundle that a head can learn from: it has a group, and what
        it became is not switched off.
        `or_learned`: also what a fitted head has learned.
        """
        table = schema.feedback.c
        query = sa.select(table.request, table.created, table.content).join(schema.users)
        query = query.where(schema.users.c.name == name)
        if not or_learned:
            query = query.where(table.folded.is_(False))
        if bundle is not None:
            group = table.content["group"].as_string()
            query = query.where(table.content["bundle"].as_string() == bundle, group.is_not(None))
            made = sa.literal(FEEDBACK_ID, sa.Text).concat(table.request)
            off = (schema.records.c.user == schema.users.c.key) & schema.records.c.off
            ids = (made, table.content["record"].as_string())
            became = sa.select(schema.records.c.id).where(off, schema.records.c.id.in_(ids))
            query = query.where(~became.correlate(schema.users, schema.feedback).exists())
        latest = query.order_by(table.created.desc(), table.request.desc()).limit(count)
        return [StoredFeedback(*row) for row in self.rows(latest)][::-1]

    def texts_in_use(self, texts: Sequence[str], *, except_user: str | None = None) -> set[str]:
        """Those that occur in other users' records (input, output, both as one) or questions."""
        wanted, used = set(texts), set[str]()
        inputs = {text.partition(ARROW)[0] for text in wanted}
        records, requests = schema.records.c, schema.requests.c
        user = sa.select(schema.users.c.key).where(schema.users.c.name == except_user)
        with self.reading() as connection:
            key = connection.scalar(user) or -1  # keys begin at 1
            pairs = sa.select(records.input, records.output).where(records.user != key).distinct()
            outputs = sa.select(records.output).where(records.user != key).distinct()
            questions = sa.select(requests.question).where(requests.user != key).distinct()
            for part in in_parts(wanted | inputs):
                for row in connection.execute(pairs.where(*_one_of(records.input, part))):
                    used |= {row.input, as_one_text(row.input, row.output)}
                used.update(connection.scalars(outputs.where(*_one_of(records.output, part))))
                used.update(connection.scalars(questions.where(*_one_of(requests.question, part))))
        return used & wanted

    # ---- jobs

    def add_job(self, id: str, name: str, kind: str) -> Job | None:
        """A new job that waits, or the one that waits already, so that nobody's jobs come before
        everybody else's; None for an unknown user.
        """
        now, jobs = time.time(), schema.jobs.c
        job = Job(id, name, kind, "waiting", 0, 0, "", now, now)
        same = with_names(schema.jobs, Job).where(jobs.kind == kind, jobs.state == "waiting")
        with self.writing() as connection:
            user = locked_user(connection, name)
            if user is None:
                return None
            if row := connection.execute(same.where(jobs.user == user.key).limit(1)).one_or_none():
                return Job(*row)
            connection.execute(sa.insert(schema.jobs).values(asdict(job) | {"user": user.key}))
        return job

    def job(self, name: str, id: str) -> Job | None:
        """A user's job."""
        own = (schema.users.c.name == name, schema.jobs.c.id == id)
        rows = self.rows(with_names(schema.jobs, Job).where(*own))
        return Job(*rows[0]) if rows else None

    def claim_job(self, *, abandoned_after: float = 600.0) -> Job | None:
        """Take the oldest job that waits, or that has had no update for so many seconds."""
        table, now = schema.jobs.c, time.time()
        abandoned = (table.state == "running") & (table.updated < now - abandoned_after)
        ready = with_names(schema.jobs, Job).where((table.state == "waiting") | abandoned)
        first = ready.order_by(table.created, table.id).limit(1)
        locked = first.with_for_update(skip_locked=True, of=schema.jobs)
        with self.writing() as connection:
            row = connection.execute(locked).one_or_none()
            if row:
                claimed = sa.update(schema.jobs).where(table.id == row.id)
                connection.execute(claimed.values(state="running", updated=now))
        return Job(*row) if row else None

    def update_job(
        self, id: str, done: int, total: int, *, state: str = "running", error: str = ""
    ) -> bool:
        """Keep a job's progress or end; False if the job was deleted with its user."""
        values = {"done": done, "total": total, "state": state, "error": error}
        job = sa.update(schema.jobs).where(schema.jobs.c.id == id)
        with self.writing() as connection:
            return connection.execute(job.values(updated=time.time(), **values)).rowcount > 0

    # ---- API keys

    def add_key(self, key: Key) -> None:
        row = asdict(key)
        users = [{"key": key.id, "name": name} for name in row.pop("users")]
        row["purposes"] = None if set(PURPOSES) <= {*key.purposes} else ",".join(key.purposes)
        with self.writing() as connection:
            # This row stays when the last key is deleted with its user: that must not open the
            # server to everyone.
            insert_new(connection, schema.serving, {"name": "keys", "value": "were made"})
            connection.execute(sa.insert(schema.keys).values(row))
            if users:
                connection.execute(sa.insert(schema.key_users), users)

    def key(self, id: str) -> Key | None:
        """A key by its public id."""
        return next(iter(self.keys([id])), None)

    def keys(self, ids: Sequence[str] | None = None) -> list[Key]:
        """Every key, or those of some ids; revoked ones too, oldest first."""
        keys, users = schema.keys.c, schema.key_users.c
        rows = sa.select(schema.keys).order_by(keys.created, keys.id)
        names = sa.select(schema.key_users).order_by(users.name)
        if ids is not None:
            rows, names = rows.where(keys.id.in_(ids)), names.where(users.key.in_(ids))
        of_key = defaultdict[str, list[str]](list)
        with self.reading() as connection:
            stored = connection.execute(rows).mappings().all()
            for key, name in connection.execute(names):
                of_key[key].append(name)
        return [key_of_row(row, of_key[row["id"]]) for row in stored]

    def has_keys(self) -> bool:
        """Whether any key was ever made: then every request needs one."""
        return self._shared("keys") is not None

    def revoke_key(self, id: str) -> bool:
        """Refuse a key from the next request on; False if there is none of that id."""
        table = schema.keys
        valid = sa.update(table).where(table.c.id == id, table.c.revoked.is_(None))
        with self.writing() as connection:
            connection.execute(valid.values(revoked=time.time()))
            return connection.scalar(sa.select(table.c.id).where(table.c.id == id)) is not None

    # ---- what all servers share

    def set_bundle(self, folder: str | None) -> None:
        """Set the bundle that all servers use from their next request on."""
        table = schema.serving
        with self.writing() as connection:
            connection.execute(sa.delete(table).where(table.c.name == "bundle"))
            if folder is not None:
                connection.execute(sa.insert(table).values(name="bundle", value=folder))

    def bundle(self) -> str | None:
        """The bundle that all servers use; None if none was set."""
        return self._shared("bundle")

    def watched(self) -> Watched:
        """What every server looks at all the time, in one statement."""
        table = schema.serving.c
        rows = self.rows(sa.select(table.name, table.value).where(table.name.in_(WATCHED)))
        values = {row.name: row.value for row in rows}
        return Watched(*map(values.get, WATCHED))

    def salt(self) -> str:
        """What names are hashed with; drawn at the first call."""
        table, row = schema.serving, {"name": "salt", "value": secrets.token_hex(32)}
        with self.writing() as connection:
            insert_new(connection, table, row)
            salt = connection.scalars(sa.select(table.c.value).where(table.c.name == "salt")).one()
        return str(salt)

    def _shared(self, name: str) -> str | None:
        table = schema.serving.c
        rows = self.rows(sa.select(table.value).where(table.name == name))
        return rows[0].value if rows else None


def _span(time: str) -> Span:
    """A kept time's span; unknown for one that an earlier version took and this one refuses."""
    try:
        return parse_time(time)
    except ValueError:
        return UNREADABLE


def _one_of(column: Any, texts: Sequence[str]) -> tuple[sa.ColumnElement[bool], ...]:
    """That the column is one of the texts, found by the index of their beginnings."""
    beginning = schema.beginning(column)
    return beginning.in_({text[: schema.BEGINNING] for text in texts}), column.in_(texts)
