"""The store's tables, as SQLAlchemy Core sees them; `migrations/` brings older databases to them.

Whatever is about a user references that user's row by its key, in a column `user`: deleting a user
is deleting by this key in each of `OF_USERS`. A user's `version` grows, in the same transaction,
with every change of what answers depend on (records, heads): a server with the user in its cache
compares this one number, and a writer that has read another one is refused. Times are seconds since
1970 (UTC).
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy import JSON, Boolean, Column, ForeignKey, Index, LargeBinary, Text

# A user's version starts at the key times this. Keys are never reused: a user who is deleted and
# comes again has no version of before.
VERSIONS_PER_KEY = 2**32
BEGINNING = 40  # characters of a text that its index has
# A migration can name every constraint.
NAMES = {kind: f"{kind}_%(table_name)s_%(column_0_name)s" for kind in ("fk", "uq", "ix")}
metadata = sa.MetaData(naming_convention={"pk": "pk_%(table_name)s", **NAMES})

Key = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # SQLite numbers only INTEGER keys
Short, Name, Number, Time = sa.String(16), sa.String(64), sa.BigInteger, sa.Double


def key_of(version: int) -> int:
    """The key of the user who has, or had, this version."""
    return version // VERSIONS_PER_KEY


def _table(name: str, primary: str | None = None, /, *parts: Any, **required: Any) -> sa.Table:
    columns = [
        Column(column, kind, nullable=False, primary_key=column == primary)
        for column, kind in required.items()
    ]
    return sa.Table(name, metadata, *parts, *columns)


def _of_users(name: str, primary: str | None = None, /, **required: Any) -> sa.Table:
    """A table about users. Those without a primary key have a unique index that begins with it."""
    owner = ForeignKey("users.key", ondelete="CASCADE")
    user = Column("user", Key, owner, nullable=False, index=primary is not None)
    return _table(name, primary, user, **required)


def beginning(column: "Column[Any]") -> sa.Function[str]:
    """What texts are found by: indexes of whole ones would double the database."""
    # literal, or SQLite would not match it to the index
    numbers = (sa.literal_column("1", sa.Integer), sa.literal_column(str(BEGINNING), sa.Integer))
    return sa.func.substr(column, *numbers, type_=sa.Text)


users = _table("users", "key", key=Key, name=Text, version=Number, created=Time)
users.append_column(Column("off", Boolean, nullable=False, server_default=sa.false()))
"""`off`: the user wants no personal answers."""
sa.UniqueConstraint(users.c.name)

records = _of_users("records", id=Text, position=Number, input=Text, output=Text, time=Text)
records.append_column(Column("off", Boolean, nullable=False, server_default=sa.false()))
"""`off`: the user has switched it off: it is kept, and no answer and no fit uses it."""
Index("ix_records_user_id", records.c.user, records.c.id, unique=True)
Index("ix_records_user_position", records.c.user, records.c.position, unique=True)

Index("ix_records_input", beginning(records.c.input))
Index("ix_records_output", beginning(records.c.output))

heads = _of_users("heads", bundle=Name, scorer=Short, known=Number, delta=LargeBinary, updated=Time)
heads.append_column(Column("until", Time))  # NULL: unknown (before version 0003), or none
Index("ix_heads_user_bundle", heads.c.user, heads.c.bundle, heads.c.scorer, unique=True)

requests = _of_users("requests", "id", id=Name, created=Time, bundle=Name, question=Text)
requests.append_column(Column("content", JSON, nullable=False))
Index("ix_requests_created", requests.c.created)
Index("ix_requests_question", beginning(requests.c.question))

_row = {"request": Name, "created": Time, "content": JSON}
feedback = _of_users("feedback", "request", **_row, folded=Boolean)
"""`folded`: a head that was fitted since has learned it."""

responses = _of_users("responses", "id", id=Name, created=Time, content=JSON)
responses.append_column(Column("previous", Name))
"""`previous`: the response before it in a conversation, which may be gone; NULL: there was none."""
Index("ix_responses_created", responses.c.created)

keys = _table("keys", "id", id=Short, hash=Name, label=Text, admin=Boolean, created=Time)
keys.append_column(Column("bound", Boolean, nullable=False, server_default=sa.false()))
"""`bound`: made for one user, so that a request need not name any. A key made for several stays
unbound when all but one are deleted.
"""
keys.append_column(Column("revoked", Time))
keys.append_column(Column("purposes", Name))  # with commas; NULL: every one
sa.UniqueConstraint(keys.c.hash)
Index("ix_keys_created", keys.c.created)

key_users = _table("key_users", key=Short, name=Text)
sa.ForeignKeyConstraint([key_users.c.key], ["keys.id"], ondelete="CASCADE")
Index("ix_key_users_key_name", key_users.c.key, key_users.c.name, unique=True)
Index("ix_key_users_name", key_users.c.name)

_progress = {"done": Number, "total": Number, "error": Text, "created": Time, "updated": Time}
jobs = _of_users("jobs", "id", id=Name, kind=Short, state=Short, **_progress)
Index("ix_jobs_state", jobs.c.state)
Index("ix_jobs_created", jobs.c.created)

serving = _table("serving", "name", name=Short, value=Text)
"""What all servers of this store share, such as the bundle in use."""

# A user is here by name, not by key: also those of whom nothing else is kept have spent, and what
# a deleted user has spent stays in the sums, as nobody's.
_tokens = {"prompt_tokens": Number, "completion_tokens": Number}
_parts = {"estimated_tokens": Number, "unpriced_tokens": Number}
_spender = {"day": Short, "key": Short, "name": Text, "model": Text, "kind": Short}
spend = _table("spend", calls=Number, cost=Number, **_spender, **_tokens, **_parts)
"""What was spent on a day (UTC) by a key for a user (''; nobody's). `cost`: in 1e-9 of money."""
Index("ix_spend_day", *(spend.c[name] for name in _spender), unique=True)
Index("ix_spend_name_day", spend.c.name, spend.c.day)

totals = _table("totals", kind=Short, name=Text, period=Short, tokens=Number, cost=Number)
"""What a key or user (`kind`) has spent in a day, month or minute: for limits, in one row each."""
Index("ix_totals_kind_name_period", *totals.c[("kind", "name", "period")], unique=True)
Index("ix_totals_period", totals.c.period)

limits = _table("limits", kind=Short, name=Text, value=Text)
"""What a key or user may spend, where it is not what the settings say."""
Index("ix_limits_kind_name", limits.c.kind, limits.c.name, unique=True)

_owner = ForeignKey("keys.id", ondelete="CASCADE")
_session_key = Column("key", Short, _owner, index=True)  # NULL: signed in without a stored key
sessions = _table("sessions", "id", _session_key, id=Name, proof=Name, expires=Time)
"""Who is signed in at the dashboard. `id` is the hash of what the browser holds."""
Index("ix_sessions_expires", sessions.c.expires)

activity = _table("activity", hour=Number, kind=Short, name=Name, count=Number)
"""How often something happened in an hour; `hour` is its beginning."""
Index("ix_activity_hour", *activity.c[("hour", "kind", "name")], unique=True)

audit = _table(
    "audit", "id", id=Name, created=Time, key=Short, purpose=Short, action=Name, person=Name
)
"""Who has read or deleted what. `person`: the keyed hash of a user's name; empty: of all."""
Index("ix_audit_created", audit.c.created)
Index("ix_audit_person", audit.c.person, audit.c.created)

OF_USERS = (feedback, requests, responses, jobs, heads, records)
"""Tables with a column `user`, in an order in which rows may be deleted."""
