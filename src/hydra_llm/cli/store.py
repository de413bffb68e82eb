"""`hydra-llm store`: look after the gateway's database."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hydra_llm.cli import console
from hydra_llm.cli.options import AsJson

if TYPE_CHECKING:
    from hydra_llm.store.store import Store

app = typer.Typer(add_completion=False, no_args_is_help=True)

URL = Annotated[
    str, typer.Option("--store", help="sqlite:///FILE, or postgresql+psycopg://USER@HOST/DATABASE.")
]


@app.command()
def migrate(store: URL, as_json: AsJson = False) -> None:
    """Bring the tables to this version; a new database gets them. Stop the servers and take a
    backup first.
    """
    from hydra_llm.store.database import Database, one_line_errors
    from hydra_llm.store.migrate import migrated

    database = Database(store)
    with one_line_errors(database.url):
        before, after = migrated(database.engine)
    console.emit({"from": before, "to": after}, as_json)


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="A new SQLite file.")],
    store: URL,
    as_json: AsJson = False,
) -> None:
    """Copy everything, as it is at one moment, into a file; servers may go on. The file is a store:
    `--store sqlite:///FILE`.
    """
    from hydra_llm.store.backup import backup as copied

    with opened(store) as found:
        counts = copied(found, file)
    console.say(f"wrote {file}: it holds users' texts")
    console.emit(counts, as_json)


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="A backup.")], store: URL, as_json: AsJson = False
) -> None:
    """Fill an empty store from a backup, of whichever database."""
    from hydra_llm.store.backup import restore as filled

    with opened(store) as found:
        console.emit(filled(found, file), as_json)


@app.command()
def check(store: URL, as_json: AsJson = False) -> None:
    """Count rows, and look for damage; exits with 1 where there is some."""
    with opened(store) as found:
        faults, counts = found.check(), found.counts()
    console.emit({"faults": faults, "rows": counts} if as_json else counts, as_json)
    for line in faults:
        console.say(line)
    if faults:
        raise typer.Exit(1)


@app.command()
def scrub(store: URL) -> None:
    """Rewrite the database's files, so that no byte of what was deleted is left; PostgreSQL's
    tables are locked meanwhile.
    """
    with opened(store) as found:
        found.scrub()
    console.say("nothing of what was deleted is left in the tables' files")


@contextmanager
def opened(url: str, timeout: float = 3600.0) -> "Iterator[Store]":
    """A store that is closed in the end; who looks after it has time."""
    from hydra_llm.store.store import Store

    store = Store(url, timeout=timeout)
    try:
        yield store
    finally:
        store.close()
