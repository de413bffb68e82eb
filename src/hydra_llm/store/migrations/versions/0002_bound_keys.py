"""Whether a key was made for one user becomes a column: deleting other users must not change it."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column; existing keys with one user are bound, as they were until now."""
    # Not as a batch: SQLite's would make the table anew, and deleting the old one would delete the
    # keys' users.
    false = sa.false()
    op.add_column("keys", sa.Column("bound", sa.Boolean(), nullable=False, server_default=false))
    keys = sa.table("keys", sa.column("id"), sa.column("admin"), sa.column("bound"))
    users = sa.table("key_users", sa.column("key"))
    count = sa.select(sa.func.count()).select_from(users).where(users.c.key == keys.c.id)
    for_one = (count.scalar_subquery() == 1, keys.c.admin == false)
    op.execute(sa.update(keys).where(*for_one).values(bound=sa.true()))
