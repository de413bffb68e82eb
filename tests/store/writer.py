"""A process that writes records until it is killed."""

import itertools
from multiprocessing.connection import Connection

from hydra_llm.store.store import Store
from hydra_llm.types import Record


def write(url: str, start: int, told: Connection) -> None:
    """Two records at a time; tells each number as soon as its records are written."""
    store = Store(url)
    for i in itertools.count(start):
        own = [Record("ada", f"r{i}", f"question {i}", "yes")]
        own.append(Record("ada", f"s{i}", f"other {i}", "no"))
        store.add_records("ada", own)
        told.send(i)
