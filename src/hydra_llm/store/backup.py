"""A store → a file of its own, and back: a copy of everything as it is at one moment, in either
database (DESIGN 2).
"""

from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from hydra_llm.errors import StoreError
from hydra_llm.store import schema
from hydra_llm.store.database import shown
from hydra_llm.store.store import Store

ROWS_AT_ONCE = 500
"""Rows that a copy holds in memory."""


def backup(store: Store, file: Path) -> dict[str, int]:
    """Copy everything, as it is at one moment, into a new SQLite file, which is a store too;
    returns rows per table.

    Raises:
        StoreError: the file exists already, or cannot be written.
    """
    if file.exists():
        raise StoreError(f"{file}: exists already, name a new file")
    part = file.with_name(file.name + ".part")
    part.unlink(missing_ok=True)
    other = Store(f"sqlite:///{part}")
    try:
        counts = _copy(store, other)
        other.shorten_log()
        other.close()
        part.replace(file)
    except BaseException:
        other.close()
        part.unlink(missing_ok=True)  # half of everybody's texts
        raise
    return counts


def restore(store: Store, file: Path) -> dict[str, int]:
    """Fill a store, which must be empty, from a backup; returns rows per table.

    Raises:
        StoreError: there are rows already, or the file is no backup.
    """
    if any(count for table, count in store.counts().items() if table != "serving"):
        raise StoreError(f"{shown(store.url)}: is not empty: restore into a new store")
    if not file.is_file():
        raise StoreError(f"{file}: no such file")
    other = Store(f"sqlite:///{file}")
    try:
        return _copy(other, store)
    finally:
        other.close()


def _copy(store: Store, other: Store) -> dict[str, int]:
    with store.snapshot() as source, other.writing() as target:
        counts = {
            table.name: _copy_table(source, target, table)
            for table in schema.metadata.sorted_tables
        }
        if not other.on_sqlite:  # keys were given, not drawn: the sequence must go on behind them
            last = sa.select(sa.func.max(schema.users.c.key)).scalar_subquery()
            target.execute(
                sa.select(
                    sa.func.setval(
                        sa.func.pg_get_serial_sequence("users", "key"), sa.func.coalesce(last, 1)
                    )
                )
            )
    return counts


def _copy_table(source: Connection, target: Connection, table: sa.Table) -> int:
    count = 0
    target.execute(
        sa.delete(table)
    )  # an empty store may have drawn a salt already: the copy has that of its original
    for part in (
        source.execution_options(yield_per=ROWS_AT_ONCE).execute(sa.select(table)).partitions()
    ):
        target.execute(sa.insert(table), [dict(row._mapping) for row in part])
        count += len(part)
    return count
