"""What was spent gets tables: by day, key, user and model; the sums of limits; the limits."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

SHORT, TEXT, NUMBER = sa.String(16), sa.Text(), sa.BigInteger()


def upgrade() -> None:
    """Create the tables and their indexes."""
    spender = {"day": SHORT, "key": SHORT, "name": TEXT, "model": TEXT, "kind": SHORT}
    tokens = {"prompt_tokens": NUMBER, "completion_tokens": NUMBER}
    parts = {"estimated_tokens": NUMBER, "unpriced_tokens": NUMBER}
    _create("spend", calls=NUMBER, cost=NUMBER, **spender, **tokens, **parts)
    op.create_index("ix_spend_day", "spend", list(spender), unique=True)
    op.create_index("ix_spend_name_day", "spend", ["name", "day"])
    _create("totals", kind=SHORT, name=TEXT, period=SHORT, tokens=NUMBER, cost=NUMBER)
    op.create_index("ix_totals_kind_name_period", "totals", ["kind", "name", "period"], unique=True)
    op.create_index("ix_totals_period", "totals", ["period"])
    _create("limits", kind=SHORT, name=TEXT, value=TEXT)
    op.create_index("ix_limits_kind_name", "limits", ["kind", "name"], unique=True)


def _create(table: str, **kinds: Any) -> None:
    op.create_table(table, *(sa.Column(name, kind, nullable=False) for name, kind in kinds.items()))
