"""Tables of an older version → tables of this one, by Alembic. Knows no rows."""

import time
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect
from sqlalchemy.exc import OperationalError

from hydra_llm.errors import StoreError
from hydra_llm.store import schema
from hydra_llm.store.urls import shown

FOLDER = Path(__file__).parent / "migrations"
SCRIPTS = ScriptDirectory(str(FOLDER))
LATEST = str(SCRIPTS.get_current_head())  # the version that this program needs

LOCK_MILLISECONDS = 500
"""How long a migration waits for a table, below PostgreSQL's `deadlock_timeout` (1 s by default):
in a deadlock with a server it is the migration that gives way.
"""
LOCK_TRIES, LOCK_PAUSE = 240, 0.5  # some minutes in all; seconds
LOCK_NOT_AVAILABLE = "55P03"


def prepare(engine: Engine, *, create: bool = True) -> bool:
    """Give an empty database its tables, if `create`; whether it got them. StoreError if they are
    not there, of another version, or not ours.
    """
    version = version_of(engine)
    if version is None:
        if not create:
            make = "`hydra-llm store migrate` makes them"
            raise StoreError(f"store {shown(engine.url)}: it has no tables of hydra-llm: {make}")
        upgrade(engine)
    elif version != LATEST:
        fix = f"this program needs {LATEST}: run `hydra-llm store migrate`"
        raise StoreError(f"store {shown(engine.url)}: its tables are of version {version}, {fix}")
    return version is None


def upgrade(engine: Engine, version: str = "head") -> None:
    """Bring the tables to a version in one transaction; a second process then has nothing to do.
    Servers may run: none waits behind a migration that waits for a table.
    """
    for _ in range(LOCK_TRIES):
        try:
            return _upgrade(engine, version)
        except OperationalError as error:
            if getattr(error.orig, "sqlstate", "") != LOCK_NOT_AVAILABLE:
                raise
        time.sleep(LOCK_PAUSE)
    fix = "end what holds them, then try again"
    raise StoreError(f"store {shown(engine.url)}: its tables are locked all the time: {fix}")


def _upgrade(engine: Engine, version: str) -> None:
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(4899264)")
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {LOCK_MILLISECONDS}")
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
        command.upgrade(config, version)


def version_of(engine: Engine) -> str | None:
    """The version of the tables; None if there are none. StoreError for newer or foreign tables."""
    store = f"store {shown(engine.url)}"
    with engine.connect() as connection, connection.begin():
        version = MigrationContext.configure(connection).get_current_revision()
        names = inspect(connection).get_table_names()
    if version is None and not schema.metadata.tables.keys().isdisjoint(names):
        problem = "there are tables of these names that hydra-llm has not made"
        raise StoreError(f"{store}: {problem}: take another database")
    if version not in {None, *(script.revision for script in SCRIPTS.walk_revisions())}:
        newer = f"which a newer hydra-llm has made: this one knows {LATEST}"
        raise StoreError(f"{store}: its tables are of version {version}, {newer}")
    return version
