"""Whether a key was made for one user is a property of the key: the deletion of others must not
make it so.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column; of the keys that there are those with one user are bound, as they were until
    now.
    """
    # Not as a batch: SQLite's would make the table anew, and its deletion would take the keys'
    # users along.
    op.add_column(
        "keys", sa.Column("bound", sa.Boolean(), nullable=False, server_default=sa.false())
    )
    keys, named = (
        sa.table("keys", sa.column("id"), sa.column("admin"), sa.column("bound")),
        sa.table("key_users", sa.column("key")),
    )
    count = (
        sa.select(sa.func.count())
        .select_from(named)
        .where(named.c.key == keys.c.id)
        .scalar_subquery()
    )
    op.execute(
        sa.update(keys).where(count == 1, keys.c.admin == sa.false()).values(bound=sa.true())
    )
