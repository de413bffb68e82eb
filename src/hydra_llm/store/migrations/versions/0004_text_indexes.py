"""Texts get indexes by their beginning: what is deleted is looked up among all users' texts."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Create the indexes, as `schema.beginning` has them."""
    for table, column in (("records", "input"), ("records", "output"), ("requests", "question")):
        beginning = sa.text(f"substr({column}, 1, 40)")
        op.create_index(f"ix_{table}_{column}", table, [beginning])
