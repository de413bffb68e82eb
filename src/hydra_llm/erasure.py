"""Deleted bytes of SQLite files. `secure_delete` overwrites deleted rows, but not the copies that
SQLite leaves in a page from which rows were moved to another. So a deletion marks the file, and a
marked file is rewritten by VACUUM: with the deletion where it is small, else within a day.

The mark is SQLite's `user_version`: 0 for none, the minute of the first deletion, or a negative
number while the file is being rewritten.
"""

import math
import secrets
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

AT_ONCE = 64 * 2**20  # bytes: rewriting so many takes about a second
MINUTES = 24 * 60  # after which a larger file is rewritten
VERSION = "PRAGMA user_version"
Run = Callable[[str], Any]  # runs a statement and returns its first value


def mark(run: Run) -> None:
    """Mark the file, in the transaction that deletes."""
    if run(VERSION) <= 0:
        run(f"{VERSION} = {_minute()}")


def rewrite(run: Run, writing: Callable[[], AbstractContextManager[Run]], at_once: float) -> None:
    """Rewrite a marked file of at most `at_once` bytes, or whose mark is `MINUTES` old, and with
    `math.inf` any. `run` is outside of transactions, `writing` begins one that writes.
    """
    marked, size = run(VERSION), run("PRAGMA page_count") * run("PRAGMA page_size")
    overdue = marked < 0 or _minute() - marked >= MINUTES  # < 0: somebody was killed amid it
    if at_once < math.inf and (marked == 0 or not (overdue or size <= at_once)):
        return
    own = -1 - secrets.randbelow(2**31 - 1)
    run(f"{VERSION} = {own}")
    run("VACUUM")
    with writing() as inside:
        if inside(VERSION) == own:  # else something was deleted meanwhile
            inside(f"{VERSION} = 0")


def _minute() -> int:
    return int(time.time() // 60)
