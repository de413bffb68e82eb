"""`hydra-llm store`: maintain the gateway's database."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument

from hydra_llm.cli import console
from hydra_llm.cli.options import AsJson, StoreURL, open_store

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def migrate(store: StoreURL, as_json: AsJson = False) -> None:
    """Migrate the tables to this version, or create them. Stop the servers and back up first."""
    from hydra_llm.store.database import Database, one_line_errors
    from hydra_llm.store.migrate import migrated

    database = Database(store)
    with one_line_errors(database.url):
        before, after = migrated(database.engine)
    console.emit({"from": before, "to": after}, as_json)


@app.command()
def backup(
    file: Annotated[Path, Argument(help="A new SQLite file.")],
    store: StoreURL,
    as_json: AsJson = False,
) -> None:
    """Write a consistent copy to a file, itself a store (`sqlite:///FILE`), while servers run."""
    from hydra_llm.store.backup import backup as copied

    with open_store(store) as found:
        counts = copied(found, file)
    console.say(f"wrote {file}: it holds users' texts")
    console.emit(counts, as_json)


@app.command()
def restore(
    file: Annotated[Path, Argument(help="A backup.")], store: StoreURL, as_json: AsJson = False
) -> None:
    """Fill an empty store, of either database, from a backup."""
    from hydra_llm.store.backup import restore as filled

    with open_store(store) as found:
        console.emit(filled(found, file), as_json)


@app.command()
def check(store: StoreURL, as_json: AsJson = False) -> None:
    """Count rows and check for damage; the exit code is 1 if there is any."""
    with open_store(store) as found:
        faults, counts = found.check(), found.counts()
    console.emit({"faults": faults, "rows": counts} if as_json else counts, as_json)
    for line in faults:
        console.say(line)
    if faults:
        raise typer.Exit(1)


@app.command()
def scrub(store: StoreURL) -> None:
    """Rewrite the database's files without the bytes of deleted rows; locks PostgreSQL's tables."""
    with open_store(store) as found:
        found.scrub()
    console.say("the tables' files hold no deleted data")
