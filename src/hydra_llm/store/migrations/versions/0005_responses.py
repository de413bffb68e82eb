"""Responses get a table: what the Responses API keeps of conversations."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Create the table and its indexes."""
    key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "responses",
        sa.Column("user", key, nullable=False),
        sa.Column("id", sa.String(64), primary_key=True, nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("content", sa.JSON(), nullable=False),
        sa.Column("previous", sa.String(64), nullable=True),
        sa.ForeignKeyConstraint(["user"], ["users.key"], ondelete="CASCADE"),
    )
    op.create_index("ix_responses_user", "responses", ["user"])
    op.create_index("ix_responses_created", "responses", ["created"])
