"""Records get a switch: one that is off is kept, and no answer and no fit uses it."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add the column; all records are on. Earlier versions do not know it, and use them all."""
    off: sa.Column[bool] = sa.Column("off", sa.Boolean(), nullable=False, server_default=sa.false())
    op.add_column("records", off)
