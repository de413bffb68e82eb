"""Users, records, heads, feedback and keys in SQLite or PostgreSQL: only this package speaks SQL
(DESIGN 2).

    store.state(name)          one number per user: whether what a server holds in memory is still
                               true
    with store.change(name)    the user's row is locked, everything inside is one transaction, the
                               version grows if anything changed

Every method is one transaction, and has been written to the disk when it returns. A database that
fails raises `StoreError`, whatever it was: nothing was acknowledged then. Methods block: a server
calls them in threads. Knows no HTTP, no LLM and no scorer.
"""

import math
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hydra_llm.errors import StoreError
from hydra_llm.store import migrate, schema
from hydra_llm.store.change import UserChange, parts
from hydra_llm.store.database import engine_of, told
from hydra_llm.store.rows import (
    check_version,
    delete_keys_of,
    insert_new,
    key_of,
    locked_user,
    record_of,
    rows_of,
    select_jobs,
)
from hydra_llm.store.values import (
    Added,
    Job,
    Key,
    Request,
    StoredFeedback,
    StoredHead,
    Unknown,
    UserState,
)
from hydra_llm.types import ARROW, Record, as_one_text


class Store:
    """All that the gateway keeps. Any number of threads and processes may use one database."""

    def __init__(self, url: str, *, patience: float = 30.0):
        """Open the database and look at its tables; an empty one gets them. `patience`: seconds
        until a statement has failed.

        Raises:
            SettingsError: the URL is none, or of a database that is not supported, or its driver is
                missing. StoreError: the database cannot be reached, or its tables are of another
                version.
        """
        self.engine = engine_of(url, patience=patience)
        self.url = self.engine.url
        with told(self.url):
            migrate.prepare(self.engine)

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    @property
    def on_sqlite(self) -> bool:
        """Whether it is a file of this machine."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with told(self.url), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction, for this package."""
        with (
            told(self.url),
            self.engine.connect().execution_options(writes=True) as connection,
            connection.begin(),
        ):
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """All that is read inside is of one moment."""
        level: dict[str, Any] = {} if self.on_sqlite else {"isolation_level": "REPEATABLE READ"}
        with (
            told(self.url),
            self.engine.connect().execution_options(**level) as connection,
            connection.begin(),
        ):
            yield connection

    @contextmanager
    def _bare(self) -> Iterator[Connection]:
        """Outside of any transaction: what cleans up wants none."""
        options: dict[str, Any] = (
            {"bare": True} if self.on_sqlite else {"isolation_level": "AUTOCOMMIT"}
        )
        with told(self.url), self.engine.connect().execution_options(**options) as connection:
            yield connection

    # ---- a user

    def state(self, name: str) -> UserState:
        """The user's version and the bundle in use, in one statement."""
        version = (
            sa.select(schema.users.c.version).where(schema.users.c.name == name).scalar_subquery()
        )
        bundle = (
            sa.select(schema.serving.c.value)
            .where(schema.serving.c.name == "bundle")
            .scalar_subquery()
        )
        with self._read() as connection:
            found = connection.execute(sa.select(version, bundle)).one()
        return UserState(found[0], found[1])

    def users(self) -> list[str]:
        """Every user's name, in the order in which they came."""
        with self._read() as connection:
            return list(
                connection.scalars(sa.select(schema.users.c.name).order_by(schema.users.c.key))
            )

    def records(self, name: str) -> tuple[int | None, list[Record]]:
        """The user's version and the records that belong to it, oldest first; (None, []) for an
        unknown user.
        """
        table, users = schema.records.c, schema.users.c
        rows = sa.select(
            users.version, table.id, table.input, table.output, table.time, table.position
        )
        rows = (
            rows.join_from(schema.users, schema.records, isouter=True)
            .where(users.name == name)
            .order_by(table.position)
        )
        with self._read() as connection:
            found = connection.execute(rows).all()
        return (found[0].version if found else None), [
            record_of(name, row) for row in found if row.id is not None
        ]

    @contextmanager
    def change(
        self, name: str, *, version: int | None = None, create: bool = False
    ) -> Iterator[UserChange]:
        """Change a user: all or nothing, and nobody else at the same time.

        Raises:
            Stale: `version` was given and is not the user's any more.
            Unknown: no such user, unless `create`.
        """
        with self.writing() as connection:
            found = locked_user(connection, name)
            if found is None and create:
                insert_new(
                    connection, schema.users, [{"name": name, "version": 0, "created": time.time()}]
                )
                new = (schema.users.c.name == name) & (schema.users.c.version == 0)
                connection.execute(
                    sa.update(schema.users)
                    .where(new)
                    .values(version=schema.users.c.key * schema.LIFE)
                )
                found = locked_user(connection, name)
            if found is None:
                raise Unknown("no such user")
            check_version(found, version)
            change = UserChange(connection, found.key, name)
            yield change
            if change.changed:
                at = schema.users.c.key == found.key
                connection.execute(
                    sa.update(schema.users).where(at).values(version=schema.users.c.version + 1)
                )

    def add_records(self, name: str, records: Sequence[Record]) -> Added:
        """Add records, and the user with them; the same records again change nothing."""
        with self.change(name, create=True) as user:
            return user.add(records)

    def delete_user(self, name: str, *, version: int | None = None) -> dict[str, int] | None:
        """Delete the user and everything about the user: rows per table, or None for an unknown
        user.

        A key that spoke for this user alone is deleted too: it names the user. In SQLite the bytes
        are overwritten, and stay in its log until `shorten_log`; PostgreSQL's stay in its files
        until `scrub`.

        Raises:
            Stale: `version` was given and is not the user's any more; nothing was deleted.
        """
        counts: dict[str, int] = {}
        with self.writing() as connection:
            found = locked_user(connection, name)
            check_version(found, version)
            counts["keys"] = delete_keys_of(connection, name)
            if found is None:
                return counts if counts["keys"] else None
            for table in schema.OF_USERS:
                counts[table.name] = connection.execute(
                    sa.delete(table).where(table.c.user == found.key)
                ).rowcount
            connection.execute(sa.delete(schema.users).where(schema.users.c.key == found.key))
        return counts

    def export_user(self, name: str) -> dict[str, Any] | None:
        """All that is kept about a user, as plain values; heads as lists of bytes are the caller's
        to write.
        """
        with self._read() as connection:
            row = connection.execute(
                sa.select(schema.users).where(schema.users.c.name == name)
            ).one_or_none()
            if row is None:
                return None
            of_user = {
                table.name: rows_of(connection, table, row.key)
                for table in reversed(schema.OF_USERS)
            }
            named = (
                sa.select(schema.keys.c.id, schema.keys.c.label)
                .join(schema.key_users)
                .where(schema.key_users.c.name == name)
            )
            keys = [dict(each._mapping) for each in connection.execute(named)]
        return {
            "user": name,
            "version": row.version,
            "created": row.created,
            **of_user,
            "keys": keys,
        }

    # ---- heads

    def heads(self, name: str, bundle: str) -> dict[str, StoredHead]:
        """The user's heads for a bundle, by scorer; empty where none was fitted."""
        table = schema.heads.c
        rows = sa.select(table.scorer, table.known, table.until, table.delta).join_from(
            schema.heads, schema.users
        )
        with self._read() as connection:
            found = connection.execute(
                rows.where(schema.users.c.name == name, table.bundle == bundle)
            ).all()
        return {
            row.scorer: StoredHead(
                row.known, -math.inf if row.until is None else row.until, row.delta
            )
            for row in found
        }

    def judged(
        self, name: str, count: int | None = None, *, bundle: str | None = None
    ) -> list[StoredFeedback]:
        """The user's latest feedback that no fitted head knows yet, oldest first; without `count`
        all of it.

        `bundle`: of that bundle, and such as teaches (has a group); no other is read.
        """
        table = schema.feedback.c
        rows = sa.select(table.request, table.created, table.content).join_from(
            schema.feedback, schema.users
        )
        rows = rows.where(schema.users.c.name == name, table.folded.is_(False)).order_by(
            table.created.desc(), table.request.desc()
        )
        if bundle is not None:
            rows = rows.where(
                table.content["bundle"].as_string() == bundle,
                table.content["group"].as_string().is_not(None),
            )
        with self._read() as connection:
            return [StoredFeedback(*row) for row in connection.execute(rows.limit(count))][::-1]

    # ---- answered requests

    def keep_request(self, request: Request, *, version: int | None = None) -> bool:
        """Keep an answered request; False, and nothing is kept, of a user who is unknown, or was
        deleted since that version.
        """
        table = schema.requests
        key = sa.select(schema.users.c.key).where(schema.users.c.name == request.user)
        if version is not None:
            key = key.where(schema.users.c.version // schema.LIFE == version // schema.LIFE)
        with self.writing() as connection:
            user = connection.scalar(key.with_for_update(read=True))
            if user is not None:
                values = {
                    name: getattr(request, name)
                    for name in ("id", "created", "bundle", "question", "content")
                }
                connection.execute(sa.insert(table).values(user=user, **values))
        return user is not None

    def request(self, id: str) -> Request | None:
        """A kept request."""
        table = schema.requests.c
        rows = sa.select(
            table.id,
            schema.users.c.name,
            table.created,
            table.bundle,
            table.question,
            table.content,
        )
        with self._read() as connection:
            row = connection.execute(
                rows.join_from(schema.requests, schema.users).where(table.id == id)
            ).one_or_none()
        return None if row is None else Request(*row)

    def still_held(self, texts: Sequence[str], *, but: str | None = None) -> set[str]:
        """Those of the texts that stand in records (input, output, or `input → output`) or
        questions of anybody but that user.
        """
        wanted, held = set(texts), set()
        inputs = [text.partition(ARROW)[0] for text in wanted]
        records, asked = schema.records.c, schema.requests.c
        with self._read() as connection:
            own = (
                connection.scalar(sa.select(schema.users.c.key).where(schema.users.c.name == but))
                if but is not None
                else None
            )
            of_others = [
                column != (-1 if own is None else own) for column in (records.user, asked.user)
            ]
            pairs = sa.select(records.input, records.output).where(of_others[0]).distinct()
            answers, questions = (
                sa.select(records.output).where(of_others[0]),
                sa.select(asked.question).where(of_others[1]),
            )
            for part in parts(list({*wanted, *inputs})):
                for row in connection.execute(pairs.where(records.input.in_(part))):
                    held |= {row.input, as_one_text(row.input, row.output)}
                held |= set(connection.scalars(answers.where(records.output.in_(part)).distinct()))
                held |= set(
                    connection.scalars(questions.where(asked.question.in_(part)).distinct())
                )
        return held & wanted

    def drop_requests(self, before: float) -> int:
        """Forget requests that were answered before a time; returns how many."""
        with self.writing() as connection:
            return connection.execute(
                sa.delete(schema.requests).where(schema.requests.c.created < before)
            ).rowcount

    # ---- API keys

    def add_key(self, key: Key) -> None:
        """Keep a new key."""
        with self.writing() as connection:
            # For good: when the last key goes, with the user for whom it spoke, nobody is let in
            # for that.
            insert_new(connection, schema.serving, [{"name": "keys", "value": "were made"}])
            plain = {
                name: getattr(key, name)
                for name in ("id", "hash", "label", "admin", "bound", "created", "revoked")
            }
            connection.execute(sa.insert(schema.keys).values(plain))
            if key.users:
                connection.execute(
                    sa.insert(schema.key_users),
                    [{"key": key.id, "name": name} for name in key.users],
                )

    def keys(self) -> list[Key]:
        """Every key, oldest first, revoked ones among them."""
        with self._read() as connection:
            rows = connection.execute(
                sa.select(schema.keys).order_by(schema.keys.c.created, schema.keys.c.id)
            ).all()
            named = connection.execute(
                sa.select(schema.key_users).order_by(schema.key_users.c.name)
            ).all()
        return [key_of(row, [each.name for each in named if each.key == row.id]) for row in rows]

    def key(self, id: str) -> Key | None:
        """A key by its public id."""
        with self._read() as connection:
            row = connection.execute(
                sa.select(schema.keys).where(schema.keys.c.id == id)
            ).one_or_none()
            names = connection.scalars(
                sa.select(schema.key_users.c.name).where(schema.key_users.c.key == id)
            ).all()
        return None if row is None else key_of(row, sorted(names))

    def has_keys(self) -> bool:
        """Whether any key was ever made: then every request needs one."""
        mark = sa.select(schema.serving.c.value).where(schema.serving.c.name == "keys")
        with self._read() as connection:
            return connection.scalar(mark) is not None

    def revoke_key(self, id: str) -> bool:
        """Make a key useless from the next request on; False if there is none of that id."""
        at = schema.keys.c.id == id
        with self.writing() as connection:
            connection.execute(
                sa.update(schema.keys)
                .where(at, schema.keys.c.revoked.is_(None))
                .values(revoked=time.time())
            )
            return (
                connection.scalar(sa.select(sa.exists(sa.select(schema.keys.c.id).where(at))))
                is True
            )

    # ---- jobs

    def add_job(self, id: str, name: str, kind: str) -> Job | None:
        """A new job that waits; None for an unknown user."""
        now = time.time()
        with self.writing() as connection:
            found = locked_user(connection, name)
            if found is None:
                return None
            job = Job(id, name, kind, "waiting", 0, 0, "", now, now)
            values = {
                column: getattr(job, column)
                for column in (
                    "id",
                    "kind",
                    "state",
                    "done",
                    "total",
                    "error",
                    "created",
                    "updated",
                )
            }
            connection.execute(sa.insert(schema.jobs).values(user=found.key, **values))
        return job

    def drop_jobs(self, before: float) -> int:
        """Forget jobs that ended before a time; returns how many."""
        table = schema.jobs.c
        with self.writing() as connection:
            ended = table.state.in_(["done", "failed"]) & (table.updated < before)
            return connection.execute(sa.delete(schema.jobs).where(ended)).rowcount

    def job(self, id: str) -> Job | None:
        """A job as it stands."""
        with self._read() as connection:
            row = connection.execute(select_jobs().where(schema.jobs.c.id == id)).one_or_none()
        return None if row is None else Job(*row)

    def claim_job(self, *, abandoned_after: float = 600.0) -> Job | None:
        """The oldest waiting job, or one whose server has not been heard of for so many seconds; it
        is the caller's now.
        """
        table, now = schema.jobs.c, time.time()
        lost = (table.state == "running") & (table.updated < now - abandoned_after)
        first = (
            select_jobs()
            .where((table.state == "waiting") | lost)
            .order_by(table.created, table.id)
            .limit(1)
        )
        with self.writing() as connection:
            row = connection.execute(
                first.with_for_update(skip_locked=True, of=schema.jobs)
            ).one_or_none()
            if row is None:
                return None
            connection.execute(
                sa.update(schema.jobs)
                .where(table.id == row.id)
                .values(state="running", updated=now)
            )
        return Job(*row)

    def tell_job(
        self, id: str, done: int, total: int, *, state: str = "running", error: str = ""
    ) -> bool:
        """How far a job is, or how it ended; also the sign of life of whoever works on it. False
        where the job is gone, with its user.
        """
        values = {
            "done": done,
            "total": total,
            "state": state,
            "error": error,
            "updated": time.time(),
        }
        with self.writing() as connection:
            return (
                connection.execute(
                    sa.update(schema.jobs).where(schema.jobs.c.id == id).values(values)
                ).rowcount
                > 0
            )

    # ---- what all servers share

    def use_bundle(self, folder: str | None) -> None:
        """The bundle that all servers answer with from their next request on."""
        with self.writing() as connection:
            connection.execute(sa.delete(schema.serving).where(schema.serving.c.name == "bundle"))
            if folder is not None:
                connection.execute(sa.insert(schema.serving).values(name="bundle", value=folder))

    def bundle(self) -> str | None:
        """The bundle that was chosen for all servers."""
        with self._read() as connection:
            return connection.scalar(
                sa.select(schema.serving.c.value).where(schema.serving.c.name == "bundle")
            )

    def salt(self) -> str:
        """What names are hashed with; drawn when it is first asked for."""
        with self.writing() as connection:
            insert_new(
                connection, schema.serving, [{"name": "salt", "value": secrets.token_hex(32)}]
            )
            found: str = connection.scalars(
                sa.select(schema.serving.c.value).where(schema.serving.c.name == "salt")
            ).one()
        return found

    # ---- upkeep

    def scrub(self) -> None:
        """Give what was deleted back to the system, so that no byte of it is left in the database's
        files.

        Raises:
            StoreError: somebody read SQLite's log all the time.
        """
        with self._bare() as connection:
            connection.exec_driver_sql("VACUUM" if self.on_sqlite else "VACUUM (FULL, ANALYZE)")
        if not self.shorten_log():
            raise StoreError("the log is in use, and still holds pages as they were: try again")

    def shorten_log(self) -> bool:
        """SQLite's log still holds pages as they were: write it back and empty it. False where
        somebody reads it all the time.
        """
        if not self.on_sqlite:
            return True
        with self._bare() as connection:
            return bool(
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").scalar_one() == 0
            )

    def counts(self) -> dict[str, int]:
        """Rows of each table."""
        with self._read() as connection:
            return {
                table.name: connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
                for table in schema.metadata.sorted_tables
            }

    def check(self) -> list[str]:
        """A line for each thing that is wrong: a damaged file, tables unlike this version's, rows
        that hang on no user.
        """
        with self._read() as connection:
            faults = migrate.differences(connection)
            if self.on_sqlite:
                faults += [
                    f"damaged: {line}"
                    for line in connection.scalars(sa.text("PRAGMA integrity_check"))
                    if line != "ok"
                ]
            for table in schema.OF_USERS:
                orphans = sa.select(sa.func.count()).where(
                    table.c.user.not_in(sa.select(schema.users.c.key))
                )
                if count := connection.scalar(orphans.select_from(table)):
                    faults.append(f"{table.name}: {count} rows of users who are not there")
        return faults
