"""A store → a SQLite file, and back: all tables as of one moment, from either database."""

from contextlib import closing
from pathlib import Path

import sqlalchemy as sa

from hydra_llm.errors import StoreError
from hydra_llm.store import schema
from hydra_llm.store.store import Store


def backup(store: Store, file: Path) -> dict[str, int]:
    """Copy everything, as of one moment, into a new SQLite file, which is a store too.
    Returns rows per table. Raises StoreError: the file exists already, or cannot be written.
    """
    if file.exists():
        raise StoreError(f"{file}: exists already, name a new file")
    part = file.with_name(file.name + ".part")
    part.unlink(missing_ok=True)
    try:
        with closing(Store(f"sqlite:///{part}")) as copy:
            counts = _copy(store, copy)
            copy.truncate_log()
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)  # after a failure: a part of all users' texts
    return counts


def restore(store: Store, file: Path) -> dict[str, int]:
    """Fill an empty store from a backup; returns rows per table. Raises StoreError: there are rows
    already, or the file is no backup.
    """
    if any(count for table, count in store.counts().items() if table != "serving"):
        url = store.url.render_as_string(hide_password=True)
        raise StoreError(f"{url}: is not empty: restore into a new store")
    if not file.is_file():
        raise StoreError(f"{file}: no such file")
    with closing(Store(f"sqlite:///{file}")) as saved:
        return _copy(saved, store)


def _copy(source: Store, target: Store) -> dict[str, int]:
    with source.reading() as reading, target.writing() as writing:
        reading = reading.execution_options(yield_per=500)  # rows in memory
        for table in schema.metadata.sorted_tables:
            # An empty store may have a salt: the original's replaces it.
            writing.execute(sa.delete(table))
            for rows in reading.execute(sa.select(table)).mappings().partitions():
                writing.execute(sa.insert(table), list(map(dict, rows)))
        if not target.on_sqlite:  # its sequence does not know the keys that were copied
            last = sa.func.coalesce(sa.func.max(schema.users.c.key), 1)
            sequence = sa.func.pg_get_serial_sequence("users", "key")
            writing.execute(sa.select(sa.func.setval(sequence, sa.select(last).scalar_subquery())))
    return target.counts()
