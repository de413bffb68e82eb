"""The first tables: users, records, heads, requests, feedback, keys, jobs, what is served."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SHORT, NAME, TEXT, JSON = sa.String(16), sa.String(64), sa.Text(), sa.JSON()
NUMBER, FLAG = sa.BigInteger(), sa.Boolean()
TIME: sa.Double[float] = sa.Double()


def upgrade() -> None:
    """Create all of them. Constraints get their names from the convention of `store/schema.py`."""
    name = sa.UniqueConstraint("name")
    users = {"key": KEY, "name": TEXT, "version": NUMBER, "created": TIME}
    _create("users", "key", users, name, sqlite_autoincrement=True)
    _create_of_users("records", id=TEXT, position=NUMBER, input=TEXT, output=TEXT, time=TEXT)
    op.create_index("ix_records_user_id", "records", ["user", "id"], unique=True)
    op.create_index("ix_records_user_position", "records", ["user", "position"], unique=True)
    data = sa.LargeBinary()
    _create_of_users("heads", bundle=NAME, scorer=SHORT, known=NUMBER, delta=data, updated=TIME)
    op.create_index("ix_heads_user_bundle", "heads", ["user", "bundle", "scorer"], unique=True)
    request = {"created": TIME, "bundle": NAME, "question": TEXT, "content": JSON}
    _create_of_users("requests", "id", id=NAME, **request)
    op.create_index("ix_requests_user", "requests", ["user"])
    op.create_index("ix_requests_created", "requests", ["created"])
    feedback = {"request": NAME, "created": TIME, "folded": FLAG, "content": JSON}
    _create_of_users("feedback", "request", **feedback)
    op.create_index("ix_feedback_user", "feedback", ["user"])
    progress = {"done": NUMBER, "total": NUMBER, "error": TEXT, "created": TIME, "updated": TIME}
    _create_of_users("jobs", "id", id=NAME, kind=SHORT, state=SHORT, **progress)
    op.create_index("ix_jobs_user", "jobs", ["user"])
    op.create_index("ix_jobs_state", "jobs", ["state"])
    revoked, secret = sa.Column("revoked", TIME), sa.UniqueConstraint("hash")
    key = {"id": SHORT, "hash": NAME, "label": TEXT, "admin": FLAG, "created": TIME}
    _create("keys", "id", key, revoked, secret)
    of_key = sa.ForeignKeyConstraint(["key"], ["keys.id"], ondelete="CASCADE")
    _create("key_users", None, {"key": SHORT, "name": TEXT}, of_key)
    op.create_index("ix_key_users_key_name", "key_users", ["key", "name"], unique=True)
    op.create_index("ix_key_users_name", "key_users", ["name"])
    _create("serving", "name", {"name": SHORT, "value": TEXT})


def _create(
    table: str, primary: str | None, kinds: dict[str, Any], *parts: Any, **options: Any
) -> None:
    columns = [
        sa.Column(name, kind, nullable=False, primary_key=name == primary)
        for name, kind in kinds.items()
    ]
    op.create_table(table, *columns, *parts, **options)


def _create_of_users(table: str, primary: str | None = None, /, **kinds: Any) -> None:
    user = sa.ForeignKeyConstraint(["user"], ["users.key"], ondelete="CASCADE")
    _create(table, primary, {"user": KEY, **kinds}, user)
