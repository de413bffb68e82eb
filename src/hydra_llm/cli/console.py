"""Output of commands: results on stdout, progress on stderr. Knows neither data sets nor LLMs."""

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
"""`report(stage, done, total)`: `done` of `total` steps of `stage` are done; None is unknown."""

QUIET_SECONDS = 10.0
"""Min seconds between two progress lines of a stage if stderr is not a terminal."""


def emit(data: Any, as_json: bool = False) -> None:
    """Print a result: as one JSON document (NaN is null), or as text, a table of rows, or
    `name: value` lines.
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
    """Print rows of equal keys as a table; columns are never cut if stdout is not a terminal."""
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
    """Print a message for people on stderr."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(quiet: bool = False) -> Iterator[Report]:
    """Transient progress bars on stderr, or plain lines if it is not a terminal."""
    if quiet:
        yield lambda stage, done, total: None
    elif sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield _Lines()


@contextmanager
def _bars() -> Iterator[Report]:
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, rich.TaskID] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


class _Lines:
    """A line per stage every QUIET_SECONDS, and when a stage that printed one is done."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[str, float] = {}
        self._shown: set[str] = set()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = self._clock()
        due = now - self._last.setdefault(stage, now) >= QUIET_SECONDS
        finished = done == total
        if due or (finished and stage in self._shown):
            say(f"{stage}: {done}" + ("" if total is None else f"/{total}"))
            self._last[stage] = now
            self._shown.add(stage)
        if finished:
            self._shown.discard(stage)
            del self._last[stage]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return "" if value is None else str(value)


def _plain(value: Any) -> Any:
    """The value in JSON's types; NaN and infinity are null: an unscored result is not 0."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [_plain(item) for item in items]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):  # including numpy's
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)
