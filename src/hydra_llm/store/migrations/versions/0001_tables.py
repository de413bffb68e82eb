"""The first tables: users, records, heads, requests, feedback, keys, jobs, what is served."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create all of them."""
    op.create_table(
        "users",
        sa.Column("key", KEY, autoincrement=True, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_users"),
        sa.UniqueConstraint("name", name="uq_users_name"),
        sqlite_autoincrement=True,
    )
    _create_of_users(
        "records",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("input", sa.Text(), nullable=False),
        sa.Column("output", sa.Text(), nullable=False),
        sa.Column("time", sa.Text(), nullable=False),
    )
    op.create_index("ix_records_user_id", "records", ["user", "id"], unique=True)
    op.create_index("ix_records_user_position", "records", ["user", "position"], unique=True)
    _create_of_users(
        "heads",
        sa.Column("bundle", sa.String(64), nullable=False),
        sa.Column("scorer", sa.String(16), nullable=False),
        sa.Column("known", sa.BigInteger(), nullable=False),
        sa.Column("delta", sa.LargeBinary(), nullable=False),
        sa.Column("updated", sa.Double(), nullable=False),
    )
    op.create_index("ix_heads_user_bundle", "heads", ["user", "bundle", "scorer"], unique=True)
    _create_of_users(
        "requests",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("bundle", sa.String(64), nullable=False),
        sa.Column("question", sa.Text(), nullable=False),
        sa.Column("content", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_requests"),
    )
    op.create_index("ix_requests_user", "requests", ["user"])
    op.create_index("ix_requests_created", "requests", ["created"])
    _create_of_users(
        "feedback",
        sa.Column("request", sa.String(64), nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("folded", sa.Boolean(), nullable=False),
        sa.Column("content", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("request", name="pk_feedback"),
    )
    op.create_index("ix_feedback_user", "feedback", ["user"])
    _create_of_users(
        "jobs",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("done", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.BigInteger(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("updated", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
    )
    op.create_index("ix_jobs_user", "jobs", ["user"])
    op.create_index("ix_jobs_state", "jobs", ["state"])
    op.create_table(
        "keys",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("admin", sa.Boolean(), nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("revoked", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
        sa.UniqueConstraint("hash", name="uq_keys_hash"),
    )
    op.create_table(
        "key_users",
        sa.Column("key", sa.String(16), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["key"], ["keys.id"], name="fk_key_users_key", ondelete="CASCADE"),
    )
    op.create_index("ix_key_users_key_name", "key_users", ["key", "name"], unique=True)
    op.create_index("ix_key_users_name", "key_users", ["name"])
    op.create_table(
        "serving",
        sa.Column("name", sa.String(16), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_serving"),
    )


def _create_of_users(name: str, *columns: sa.schema.SchemaItem) -> None:
    user = sa.Column("user", KEY, nullable=False)
    of_user = sa.ForeignKeyConstraint(
        ["user"], ["users.key"], name=f"fk_{name}_user", ondelete="CASCADE"
    )
    op.create_table(name, user, *columns, of_user)
