"""Which database a store is in: URLs, and names of files. Opens no database."""

import difflib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url

from hydra_llm.environment import expanded
from hydra_llm.errors import SettingsError, StoreError

EXPECTED_URL = "sqlite:///FILE or postgresql+psycopg://..."
SQLITE = ("sqlite:///", "sqlite+pysqlite:///")
POSTGRESQL = ("postgres", "postgresql", "postgresql+psycopg")


def parse_url(url: str) -> URL:
    """A store's URL. What follows `sqlite:///` is the name of a file as it is, `~` the home folder.
    Raises SettingsError: no URL, an unsupported database, a password that is not percent-encoded.
    """
    if prefix := next((prefix for prefix in SQLITE if url.startswith(prefix)), None):
        return file_url(Path(url.removeprefix(prefix)))
    scheme, _, rest = url.partition("://")
    try:
        parsed = make_url(url)
    except (sa.exc.ArgumentError, ValueError):  # ValueError: a port that is no number
        name = f"{scheme}://..." if rest else f"{url.split(':')[0]}"  # what follows may be a secret
        raise SettingsError(f"store '{name}': no database URL: {EXPECTED_URL}") from None
    if parsed.get_backend_name() == "sqlite":
        raise SettingsError("store: name a file: sqlite:///FILE")
    if scheme not in POSTGRESQL:
        raise SettingsError(f"store: {scheme} is not supported: take {EXPECTED_URL}")
    if "@" in (parsed.host or ""):
        raise SettingsError("store: write @ in a password or a user's name as %40")
    return parsed.set(drivername="postgresql+psycopg")


def file_url(file: Path, *, unchanged: bool = False) -> URL:
    """The URL of an SQLite file of any name. `unchanged`: only read, and by nobody else written,
    so that it may be in a folder that is read-only.
    """
    if str(file) in (".", ":memory:"):
        message = "store: a database in memory would be another one for each thread"
        raise SettingsError(f"{message}: name a file, sqlite:///FILE")
    if not unchanged:
        return URL.create("sqlite", database=str(expanded(file)))
    name, _, options = _read_only(file, unchanged).partition("?")
    query = dict(option.split("=") for option in options.split("&"))
    return URL.create("sqlite", database=name, query={"uri": "true", **query})


def _read_only(file: Path, unchanged: bool) -> str:
    """SQLite's own URI of a file. `unchanged`: no log and no lock are made beside it."""
    logged = file.with_name(f"{file.name}-wal").exists()  # then its latest rows are in there
    name = quote(os.fsencode(file.absolute()))
    return f"file://{name}?mode=ro" + ("&immutable=1" if unchanged and not logged else "")


def shown(url: URL) -> str:
    """A URL for messages, without passwords."""
    if url.get_backend_name() == "sqlite":
        return f"sqlite:///{url.database}".encode(errors="backslashreplace").decode()
    hidden = {name for name in url.query if "password" in name}
    return url.difference_update_query(hidden).render_as_string(hide_password=True)


def check_file(file: Path, *, create: bool = False, unchanged: bool = False) -> None:
    """Raise StoreError, with the nearest name there is, unless this is an SQLite file with the
    tables of a store; with `create` also if it is new or has no tables yet. Nothing is written, not
    even a file. `unchanged`: as of `file_url`.
    """
    name = f"store {shown(file_url(file))}"
    make = f"`hydra-llm store migrate --store {shown(file_url(file))}` makes a new one"
    if file.is_dir():
        raise StoreError(f"{name}: is a folder: name a file")
    if not file.exists():
        if not create:
            raise StoreError(f"{name}: there is no such file: {_nearest(file) or make}")
    elif not (tables := _tables(file, unchanged)):
        if not create:
            raise StoreError(f"{name}: it has no tables: {make}")
    elif "alembic_version" not in tables:
        raise StoreError(f"{name}: hydra-llm has not made its tables: take another database")


def _tables(file: Path, unchanged: bool) -> set[str]:
    if not file.stat().st_size:
        return set()
    try:
        with closing(sqlite3.connect(_read_only(file, unchanged), uri=True)) as connection:
            return {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    except sqlite3.Error as error:
        raise StoreError(f"store {shown(file_url(file))}: {error}") from None


def _nearest(file: Path) -> str:
    others = {other.stem: other for other in _sqlite_files(file.parent)}
    near = difflib.get_close_matches(file.stem, others, 1)
    return f"did you mean {shown(file_url(others[near[0]]))}?" if near else ""


def _sqlite_files(folder: Path) -> Iterator[Path]:
    for file in folder.glob("*") if folder.is_dir() else ():
        if file.is_file() and os.access(file, os.R_OK):
            with file.open("rb") as opened:
                if opened.read(6) == b"SQLite":
                    yield file
