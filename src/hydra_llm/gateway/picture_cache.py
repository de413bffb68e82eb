"""Descriptions of pictures by the pictures' SHA-256, in a file of the cache folder. They go with
the records in which they stand. Knows no endpoint.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from hydra_llm.kv import CacheFile

FILE = "pictures.sqlite"
SCHEMA = """
CREATE TABLE IF NOT EXISTS pictures (key BLOB PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS pictures_by_text ON pictures (text);
"""
LINE = re.compile(r"^\[picture\] (.+)$", re.MULTILINE)


def line_of(description: str) -> str:
    """The line of a record's input that says what a picture shows."""
    return f"[picture] {description}"


def kept(file: Path, key: bytes) -> str | None:
    """The description of a picture; None if there is none."""
    if not file.exists():
        return None
    with closing(_open(file)) as cache:
        rows = cache.read("SELECT text FROM pictures WHERE key = ?", (key,))
    return str(rows[0][0]) if rows else None


def keep(file: Path, key: bytes, text: str) -> None:
    """Keep a description; of two at a time the first one stays."""
    with closing(_open(file)) as cache:
        cache.write(("INSERT OR IGNORE INTO pictures VALUES (?, ?)", [(key, text)]))


def forget_too(cache: Path, forget: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """`forget`, which deletes features of texts, and before it the descriptions in these texts."""

    def both(texts: list[str]) -> int:
        forget_pictures(cache / FILE, texts)
        return forget(texts)

    return both


def forget_pictures(file: Path, texts: Sequence[str]) -> None:
    """Delete the descriptions that stand in these texts; UserFault if they cannot be."""
    gone = {(text,) for own in texts for text in LINE.findall(own)}
    if gone and file.exists():
        with closing(_open(file)) as cache, cache.deleting() as database:
            database.executemany("DELETE FROM pictures WHERE text = ?", gone)


def _open(file: Path) -> CacheFile:
    return CacheFile(file, SCHEMA, "descriptions of pictures", erases=True)
