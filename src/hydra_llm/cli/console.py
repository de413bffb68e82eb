"""What commands print: results on stdout, progress on stderr. Knows neither data sets nor LLMs.

Progress is a callable `report(stage, done, total)`, so that the library's functions can take one
without knowing this module.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from numbers import Integral, Real
from typing import Any

Report = Callable[[str, int, int | None], None]
"""`report(stage, done, total)`: `done` of `total` steps of `stage` are behind us; total None is
unknown.
"""

QUIET_SECONDS = 10.0
"""Where stderr is no terminal, a stage prints a line at most this often."""


def emit(data: Any, as_json: bool = False) -> None:
    """Print a result: JSON (one document, not a number is null), or for people: text as it is, a
    list of rows as a table, anything else as `name: value` lines.
    """
    if as_json:
        print(json.dumps(_plain(data), ensure_ascii=False, indent=2, allow_nan=False))
    elif isinstance(data, str):
        print(data)
    elif isinstance(data, Sequence):
        print_table([_plain(row) for row in data])
    else:
        for name, value in _plain(data).items():
            print(f"{name}: {_cell(value)}")


def print_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """Print rows of equal keys as a table on stdout; numbers stand right. Where stdout is no
    terminal no column is cut.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name in rows[0] if rows else ():
        numeric = all(isinstance(row[name], int | float) for row in rows if row[name] is not None)
        table.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def say(line: str) -> None:
    """A line for people on stderr: a path that was written, a thing that was cut."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(quiet: bool = False) -> Iterator[Report]:
    """Bars on stderr that disappear at the end; where stderr is no terminal a plain line every ten
    seconds; nothing if `quiet`.
    """
    if quiet:
        yield lambda stage, done, total: None
    elif sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield _Lines()


@contextmanager
def _bars() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


class _Lines:
    """A plain line when a stage begins to take long, every QUIET_SECONDS from then on, and when
    such a stage is done.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[str, float] = {}
        self._told: set[str] = set()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = self._clock()
        due = now - self._last.setdefault(stage, now) >= QUIET_SECONDS
        finished = done == total
        if due or (finished and stage in self._told):
            say(f"{stage}: {done}" + ("" if total is None else f"/{total}"))
            self._last[stage] = now
            self._told.add(stage)
        if finished:
            self._told.discard(stage)
            del self._last[stage]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return "" if value is None else str(value)


def _plain(value: Any) -> Any:
    """The value in JSON's types; a number that is none (NaN, infinite) is null, as an unscored
    result is not 0.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [
            _plain(item)
            for item in (sorted(value) if isinstance(value, set | frozenset) else value)
        ]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):  # numpy's numbers, too
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)
