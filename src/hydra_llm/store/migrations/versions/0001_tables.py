"""The first tables: users, records, heads, requests, feedback, keys, jobs, what is served."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SHORT, NAME = sa.String(16), sa.String(64)
TEXT, NUMBER = sa.Text(), sa.BigInteger()
TIME: sa.Double[float] = sa.Double()


def upgrade() -> None:
    """Create all of them."""
    op.create_table(
        "users",
        sa.Column("key", KEY, autoincrement=True, nullable=False),
        *_required(name=TEXT, version=NUMBER, created=TIME),
        sa.PrimaryKeyConstraint("key", name="pk_users"),
        sa.UniqueConstraint("name", name="uq_users_name"),
        sqlite_autoincrement=True,
    )
    _create_of_users("records", id=TEXT, position=NUMBER, input=TEXT, output=TEXT, time=TEXT)
    op.create_index("ix_records_user_id", "records", ["user", "id"], unique=True)
    op.create_index("ix_records_user_position", "records", ["user", "position"], unique=True)
    data = sa.LargeBinary()
    _create_of_users("heads", bundle=NAME, scorer=SHORT, known=NUMBER, delta=data, updated=TIME)
    op.create_index("ix_heads_user_bundle", "heads", ["user", "bundle", "scorer"], unique=True)
    _create_of_users(
        "requests", "id", id=NAME, created=TIME, bundle=NAME, question=TEXT, content=sa.JSON()
    )
    op.create_index("ix_requests_user", "requests", ["user"])
    op.create_index("ix_requests_created", "requests", ["created"])
    _create_of_users(
        "feedback", "request", request=NAME, created=TIME, folded=sa.Boolean(), content=sa.JSON()
    )
    op.create_index("ix_feedback_user", "feedback", ["user"])
    progress: dict[str, Any] = {"done": NUMBER, "total": NUMBER, "error": TEXT}
    times = {"created": TIME, "updated": TIME}
    _create_of_users("jobs", "id", id=NAME, kind=SHORT, state=SHORT, **progress, **times)
    op.create_index("ix_jobs_user", "jobs", ["user"])
    op.create_index("ix_jobs_state", "jobs", ["state"])
    _create_keys()
    served = sa.PrimaryKeyConstraint("name", name="pk_serving")
    op.create_table("serving", *_required(name=SHORT, value=TEXT), served)


def _create_keys() -> None:
    op.create_table(
        "keys",
        *_required(id=SHORT, hash=NAME, label=TEXT, admin=sa.Boolean(), created=TIME),
        sa.Column("revoked", TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
        sa.UniqueConstraint("hash", name="uq_keys_hash"),
    )
    op.create_table(
        "key_users",
        *_required(key=SHORT, name=TEXT),
        sa.ForeignKeyConstraint(["key"], ["keys.id"], name="fk_key_users_key", ondelete="CASCADE"),
    )
    op.create_index("ix_key_users_key_name", "key_users", ["key", "name"], unique=True)
    op.create_index("ix_key_users_name", "key_users", ["name"])


def _required(**kinds: Any) -> list[sa.Column[Any]]:
    return [sa.Column(name, kind, nullable=False) for name, kind in kinds.items()]


def _create_of_users(table: str, primary: str | None = None, **kinds: Any) -> None:
    user = sa.ForeignKeyConstraint(
        ["user"], ["users.key"], name=f"fk_{table}_user", ondelete="CASCADE"
    )
    key = [sa.PrimaryKeyConstraint(primary, name=f"pk_{table}")] if primary else []
    op.create_table(table, *_required(user=KEY, **kinds), *key, user)
