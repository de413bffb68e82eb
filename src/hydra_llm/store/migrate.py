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
    found, has_tables = _look(engine)
    if found is None and not has_tables:
        upgrade(engine)
    elif found != latest():
        raise StoreError(_refusal(found))


def migrated(engine: Engine) -> tuple[str | None, str]:
    """`upgrade`; returns the versions before and after. StoreError for newer or foreign tables."""
    found, has_tables = _look(engine)
    if (has_tables or found is not None) and found not in _versions():
        raise StoreError(_refusal(found))
    return found, upgrade(engine)


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


def _look(engine: Engine) -> tuple[str | None, bool]:
    """The version of the tables, and whether there are tables with our names."""
    with engine.connect() as connection, connection.begin():
        names = set(inspect(connection).get_table_names())
        return revision(connection), not names.isdisjoint(schema.metadata.tables)


def _refusal(found: str | None) -> str:
    if found is None:
        names = "there are tables of these names that hydra-llm has not made"
        return f"store: {names}: take another database"
    version = f"store: its tables are of version {found}"
    if found in _versions():
        return f"{version}, this program needs {latest()}: run `hydra-llm store migrate`"
    return f"{version}, which a newer hydra-llm has made: this one knows {latest()}"


def revision(connection: Connection) -> str | None:
    """The version of the tables; None where there are none of ours."""
    found: str | None = MigrationContext.configure(connection).get_current_revision()
    return found


def latest() -> str:
    """The version that this program needs."""
    head = SCRIPTS.get_current_head()
    assert head is not None
    return head


def differences(connection: Connection) -> list[str]:
    """Where the tables are unlike the schema."""
    found = compare_metadata(MigrationContext.configure(connection), schema.metadata)
    return [f"unlike the schema: {' '.join(map(str, change))}" for change in found]


def _versions() -> set[str]:
    return {script.revision for script in SCRIPTS.walk_revisions()}
