"""The store's tables, as SQLAlchemy Core sees them; `migrations/` brings older databases to them.

Whatever is about a user references that user's row by its key, in a column `user`: deleting a user
is deleting by this key in each of `OF_USERS`. A user's `version` grows, in the same transaction,
with every change of what answers depend on (records, heads): a server with the user in its cache
compares this one number, and a writer that has read another one is refused. Times are seconds since
1970 (UTC).
"""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    false,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)
"""Constraints have names, so that a migration can name them on every database."""

Key = BigInteger().with_variant(Integer, "sqlite")
"""SQLite numbers only INTEGER keys by itself."""

VERSIONS_PER_KEY = 2**32
"""A user's version starts at the key times this. Keys are never reused, so a user who is deleted
and comes again has no version of before.
"""


def _required(**kinds: Any) -> list[Column[Any]]:
    return [Column(name, kind, nullable=False) for name, kind in kinds.items()]


def _user() -> Column[int]:
    return Column("user", Key, ForeignKey("users.key", ondelete="CASCADE"), nullable=False)


users = Table(
    "users",
    metadata,
    Column("key", Key, primary_key=True, autoincrement=True),
    Column("name", Text, nullable=False, unique=True),
    *_required(version=BigInteger, created=Double),
    sqlite_autoincrement=True,  # a key is never reused
)

records = Table(
    "records",
    metadata,
    _user(),
    *_required(id=Text, position=BigInteger, input=Text, output=Text, time=Text),
    Index("ix_records_user_id", "user", "id", unique=True),
    Index("ix_records_user_position", "user", "position", unique=True),
)

heads = Table(
    "heads",
    metadata,
    _user(),
    *_required(bundle=String(64), scorer=String(16), known=BigInteger, delta=LargeBinary),
    Column("until", Double, nullable=True),
    *_required(updated=Double),
    Index("ix_heads_user_bundle", "user", "bundle", "scorer", unique=True),
)
"""`until` is NULL where the time is unknown (heads from before version 0003) or is none."""

requests = Table(
    "requests",
    metadata,
    Column("id", String(64), primary_key=True),
    _user(),
    *_required(created=Double, bundle=String(64), question=Text, content=JSON),
    Index("ix_requests_user", "user"),
    Index("ix_requests_created", "created"),
)

feedback = Table(
    "feedback",
    metadata,
    Column("request", String(64), primary_key=True),
    _user(),
    *_required(created=Double, folded=Boolean, content=JSON),
    Index("ix_feedback_user", "user"),
)
"""`folded`: a head that was fitted since has learned it."""

keys = Table(
    "keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("hash", String(64), nullable=False, unique=True),
    *_required(label=Text, admin=Boolean),
    Column("bound", Boolean, nullable=False, server_default=false()),
    *_required(created=Double),
    Column("revoked", Double, nullable=True),
)
"""`bound`: made for one user, so that a request need not name any. A key made for several stays
unbound when all but one are deleted.
"""

key_users = Table(
    "key_users",
    metadata,
    Column("key", String(16), ForeignKey("keys.id", ondelete="CASCADE"), nullable=False),
    *_required(name=Text),
    Index("ix_key_users_key_name", "key", "name", unique=True),
    Index("ix_key_users_name", "name"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    _user(),
    *_required(kind=String(16), state=String(16), done=BigInteger, total=BigInteger, error=Text),
    *_required(created=Double, updated=Double),
    Index("ix_jobs_user", "user"),
    Index("ix_jobs_state", "state"),
)

serving = Table(
    "serving", metadata, Column("name", String(16), primary_key=True), *_required(value=Text)
)
"""What all servers of this store share, such as the bundle in use."""

OF_USERS = (feedback, requests, jobs, heads, records)
"""Tables with a column `user`, in an order in which rows may be deleted."""
