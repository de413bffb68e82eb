"""Heads get the time until which they have learned: no question before it may use them."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the column; for the heads that are there the time is unknown (NULL)."""
    op.add_column("heads", sa.Column("until", sa.Double(), nullable=True))
