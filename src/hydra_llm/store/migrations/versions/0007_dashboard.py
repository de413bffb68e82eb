"""What the dashboard needs: sessions, answers by hour, users who have personalization off."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Create the tables, the column and the index of jobs by their time."""
    off: sa.Column[bool] = sa.Column("off", sa.Boolean(), nullable=False, server_default=sa.false())
    op.add_column("users", off)
    op.create_table(
        "sessions",
        sa.Column("key", sa.String(16), nullable=True),
        sa.Column("id", sa.String(64), primary_key=True, nullable=False),
        sa.Column("proof", sa.String(64), nullable=False),
        sa.Column("expires", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["key"], ["keys.id"], ondelete="CASCADE"),
    )
    op.create_index("ix_sessions_key", "sessions", ["key"])
    op.create_index("ix_sessions_expires", "sessions", ["expires"])
    op.create_table(
        "activity",
        sa.Column("hour", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
    )
    op.create_index("ix_activity_hour", "activity", ["hour", "kind", "name"], unique=True)
    op.create_index("ix_jobs_created", "jobs", ["created"])
    op.create_index("ix_keys_created", "keys", ["created"])
