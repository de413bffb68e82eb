"""Output of commands: results on stdout, progress on stderr."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from time import monotonic
from typing import Any

Report = Callable[[str, int, int | None], None]
"""`report(stage, done, total)`: `done` of `total` steps of `stage` are done; None is unknown."""

QUIET_SECONDS = 10.0
"""Min seconds between two progress lines of a stage if stderr is not a terminal."""


def emit(data: Any, as_json: bool = False) -> None:
    """Print a result as JSON (NaN is null), or as text, a table of rows, or `name: value` lines."""
    from pydantic_core import to_json, to_jsonable_python

    if as_json:
        unicode = "utf" in (sys.stdout.encoding or "utf-8").lower()
        options: Any = {"inf_nan_mode": "null", "fallback": _builtin}
        print(to_json(data, indent=2, ensure_ascii=not unicode, **options).decode())
        return
    match to_jsonable_python(data, inf_nan_mode="null", fallback=_builtin):
        case str(text):
            print(text)
        case dict(values):
            print("".join(f"{name}: {_cell(value)}\n" for name, value in values.items()), end="")
        case rows:
            print_table(rows)


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
    if quiet or not sys.stderr.isatty():
        yield (lambda stage, done, total: None) if quiet else _lines()
        return
    from rich import progress as rich
    from rich.console import Console

    times = (rich.TimeElapsedColumn(), rich.TimeRemainingColumn())
    columns = ("{task.description}", rich.BarColumn(), rich.MofNCompleteColumn(), *times)
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, rich.TaskID] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _lines() -> Report:
    """A line per stage every QUIET_SECONDS, and when a stage that printed one is done."""
    last: dict[str, float] = {}  # when a stage began, or printed its last line
    printed: set[str] = set()

    def report(stage: str, done: int, total: int | None) -> None:
        now = monotonic()
        due = now - last.setdefault(stage, now) >= QUIET_SECONDS
        if due or (done == total and stage in printed):
            say(f"{stage}: {done}" + ("" if total is None else f"/{total}"))
            last[stage] = now
            printed.add(stage)
        if done == total:
            printed.discard(stage)
            del last[stage]

    return report


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return "" if value is None else str(value)


def _builtin(value: Any) -> Any:
    """A value that pydantic does not know, as one that it does."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Integral):  # numpy's
        return int(value)
    return float(value) if isinstance(value, Real) else str(value)
