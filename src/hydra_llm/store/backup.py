"""A store → a SQLite file, and back: all tables as of one moment, from either database."""

from contextlib import closing
from pathlib import Path

import sqlalchemy as sa

from hydra_llm.errors import StoreError
from hydra_llm.store import schema
from hydra_llm.store.store import Store
from hydra_llm.store.urls import check_file, file_url


def backup(store: Store, file: Path) -> dict[str, int]:
    """Copy everything, as of one moment, into a new SQLite file, which is a store too.
    Returns rows per table. Raises StoreError: the file exists already, or cannot be written.
    """
    if file.exists() or file.is_symlink():
        what = "is a folder" if file.is_dir() else "exists already"
        raise StoreError(f"{file}: {what}, name a new file")
    part = file.with_name(file.name + ".part")
    _delete(part)
    try:
        with closing(Store(file_url(part))) as copy:
            counts = _copy(store, copy)
            copy.truncate_log()
        part.replace(file)
    finally:
        _delete(part)  # after a failure: a part of all users' texts
    return counts


def open_backup(file: Path) -> Store:
    """A backup as a store that is only read. Raises StoreError: there is no such file, it is no
    store, is of another version, or is damaged.
    """
    if not file.is_file():
        raise StoreError(f"{file}: no such file")
    check_file(file, unchanged=True)
    saved = Store(file_url(file, unchanged=True), create=False)
    if faults := saved.check():
        saved.close()
        raise StoreError(f"{file}: {faults[0]}: take another backup")
    return saved


def restore(store: Store, saved: Store) -> dict[str, int]:
    """Fill an empty store from a backup; returns rows per table. Raises StoreError: there are rows
    already.
    """
    if any(count for table, count in store.counts().items() if table != "serving"):
        raise StoreError(f"{store.name}: is not empty: restore into a new store")
    return _copy(saved, store)


def _delete(file: Path) -> None:
    for end in ("", "-wal", "-shm", "-journal"):
        file.with_name(file.name + end).unlink(missing_ok=True)


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
