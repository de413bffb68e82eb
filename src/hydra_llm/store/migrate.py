"""Tables of an older version → tables of this one, by Alembic. Knows no rows."""

from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect

from hydra_llm.errors import StoreError
from hydra_llm.store import schema

FOLDER = Path(__file__).parent / "migrations"
SCRIPTS = ScriptDirectory(str(FOLDER))


def prepare(engine: Engine) -> None:
    """Give an empty database its tables; StoreError if they are of another version, or not ours."""
    version = _version(engine)
    if version is None:
        upgrade(engine)
    elif version != latest():
        fix = f"this program needs {latest()}: run `hydra-llm store migrate`"
        raise StoreError(f"store: its tables are of version {version}, {fix}")


def migrated(engine: Engine) -> tuple[str | None, str]:
    """`upgrade`; returns the versions before and after. StoreError for newer or foreign tables."""
    return _version(engine), upgrade(engine)


def upgrade(engine: Engine, version: str = "head") -> str:
    """Bring the tables to a version in one transaction; returns this program's version. Of two
    processes at once the second finds nothing to do.
    """
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(4899264)")
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
        command.upgrade(config, version)
    return latest()


def _version(engine: Engine) -> str | None:
    """The version of the tables, None where there are none; StoreError if they are not ours, or of
    a newer version.
    """
    with engine.connect() as connection, connection.begin():
        version, names = revision(connection), inspect(connection).get_table_names()
    if version is None and not schema.metadata.tables.keys().isdisjoint(names):
        problem = "there are tables of these names that hydra-llm has not made"
        raise StoreError(f"store: {problem}: take another database")
    if version not in {None, *(script.revision for script in SCRIPTS.walk_revisions())}:
        newer = f"which a newer hydra-llm has made: this one knows {latest()}"
        raise StoreError(f"store: its tables are of version {version}, {newer}")
    return version


def revision(connection: Connection) -> str | None:
    """The version of the tables; None where there are none of ours."""
    return MigrationContext.configure(connection).get_current_revision()


def latest() -> str:
    """The version that this program needs."""
    return str(SCRIPTS.get_current_head())


def differences(connection: Connection) -> list[str]:
    """Where the tables are unlike the schema."""
    changes = compare_metadata(MigrationContext.configure(connection), schema.metadata)
    return [f"unlike the schema: {' '.join(map(str, change))}" for change in changes]
