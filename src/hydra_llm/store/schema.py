"""The gateway's tables, as SQLAlchemy Core sees them; `migrations/` brings an older database to
them.

Whatever is about a user hangs on that user's row and carries its key: deleting a user is deleting
by that key in each of `OF_USERS`. A user's `version` grows with every change of what answers depend
on (records, heads), in the same transaction: a server that has the user in memory asks for this one
number, and a writer that has read another one is refused. Times are seconds since 1970 (UTC). Knows
no statement: `store.py` alone speaks SQL.
"""

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
"""With names for constraints, so that a migration can name them on every database."""

Key = BigInteger().with_variant(Integer, "sqlite")
"""SQLite counts up INTEGER keys alone."""


LIFE = 2**32
"""A user's version is the key times this, and one more for each change: keys are given once, so a
name that was deleted and comes again has no version of before, whatever clocks say. (Databases
of earlier versions hold users whose versions began with a clock.)
"""


def _user() -> Column[int]:
    return Column("user", Key, ForeignKey("users.key", ondelete="CASCADE"), nullable=False)


users = Table(
    "users",
    metadata,
    Column("key", Key, primary_key=True, autoincrement=True),
    Column("name", Text, nullable=False, unique=True),
    Column("version", BigInteger, nullable=False),
    Column("created", Double, nullable=False),
    sqlite_autoincrement=True,  # a key is never given to another user
)

records = Table(
    "records",
    metadata,
    _user(),
    Column("id", Text, nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("input", Text, nullable=False),
    Column("output", Text, nullable=False),
    Column("time", Text, nullable=False),
    Index("ix_records_user_id", "user", "id", unique=True),
    Index("ix_records_user_position", "user", "position", unique=True),
)

heads = Table(
    "heads",
    metadata,
    _user(),
    Column("bundle", String(64), nullable=False),
    Column("scorer", String(16), nullable=False),
    Column("known", BigInteger, nullable=False),
    Column("until", Double, nullable=True),
    Column("delta", LargeBinary, nullable=False),
    Column("updated", Double, nullable=False),
    Index("ix_heads_user_bundle", "user", "bundle", "scorer", unique=True),
)
"""`until` is NULL where the time is unknown (heads from before version 0003) or is none."""

requests = Table(
    "requests",
    metadata,
    Column("id", String(64), primary_key=True),
    _user(),
    Column("created", Double, nullable=False),
    Column("bundle", String(64), nullable=False),
    Column("question", Text, nullable=False),
    Column("content", JSON, nullable=False),
    Index("ix_requests_user", "user"),
    Index("ix_requests_created", "created"),
)

feedback = Table(
    "feedback",
    metadata,
    Column("request", String(64), primary_key=True),
    _user(),
    Column("created", Double, nullable=False),
    Column("folded", Boolean, nullable=False),
    Column("content", JSON, nullable=False),
    Index("ix_feedback_user", "user"),
)

"""`folded`: a head was fitted since, which knows what it brought."""

keys = Table(
    "keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("hash", String(64), nullable=False, unique=True),
    Column("label", Text, nullable=False),
    Column("admin", Boolean, nullable=False),
    Column("bound", Boolean, nullable=False, server_default=false()),
    Column("created", Double, nullable=False),
    Column("revoked", Double, nullable=True),
)
"""`bound`: made for one user, so that a request need not name any. It stays false when all but one
of several are deleted.
"""

key_users = Table(
    "key_users",
    metadata,
    Column("key", String(16), ForeignKey("keys.id", ondelete="CASCADE"), nullable=False),
    Column("name", Text, nullable=False),
    Index("ix_key_users_key_name", "key", "name", unique=True),
    Index("ix_key_users_name", "name"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    _user(),
    Column("kind", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("done", BigInteger, nullable=False),
    Column("total", BigInteger, nullable=False),
    Column("error", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("updated", Double, nullable=False),
    Index("ix_jobs_user", "user"),
    Index("ix_jobs_state", "state"),
)

serving = Table(
    "serving",
    metadata,
    Column("name", String(16), primary_key=True),
    Column("value", Text, nullable=False),
)
"""What all servers of this store share: the bundle that they answer with."""

OF_USERS = (feedback, requests, jobs, heads, records)
"""Tables with a column `user`, in the order in which rows may be deleted."""
