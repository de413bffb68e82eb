"""Keys get purposes, and the store an audit log of who has read or deleted what."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the column (NULL: every purpose) and the table. Earlier versions do not know purposes: to
    them such a key may do all.
    """
    op.add_column("keys", sa.Column("purposes", sa.String(64), nullable=True))
    op.create_table(
        "audit",
        sa.Column("id", sa.String(64), primary_key=True, nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("key", sa.String(16), nullable=False),
        sa.Column("purpose", sa.String(16), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("person", sa.String(64), nullable=False),
    )
    op.create_index("ix_audit_created", "audit", ["created"])
    op.create_index("ix_audit_person", "audit", ["person", "created"])
