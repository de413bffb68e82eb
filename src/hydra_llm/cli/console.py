"""Output of commands: results on stdout, progress on stderr."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from numbers import Integral, Real
from time import monotonic
from typing import Any

from hydra_llm.cli.table import as_cell, print_table
from hydra_llm.llm.limiter import present

Report = Callable[[str, int, int | None], None]
"""`report(stage, done, total)`: `done` of `total` steps of `stage` are done; None is unknown."""

QUIET_SECONDS = 10.0
"""Min seconds between two progress lines of a stage if stderr is not a terminal."""


def emit(data: Any, as_json: bool = False) -> None:
    """Print a result as JSON (NaN is null), or as text, a table of rows, or `name: value` lines."""
    from pydantic_core import PydanticSerializationError, to_json, to_jsonable_python

    options: Any = {"inf_nan_mode": "null", "fallback": _builtin}
    if as_json:
        unicode = "utf" in (sys.stdout.encoding or "utf-8").lower()
        try:
            print(to_json(data, indent=2, ensure_ascii=not unicode, **options).decode())
        except PydanticSerializationError:  # half of a surrogate pair, which it cannot escape
            print(json.dumps(to_jsonable_python(data, **options), indent=2))
        return
    match to_jsonable_python(data, **options):
        case str(text):
            print(text)
        case dict(values):
            print("\n".join(_lines_of(values)))
        case []:
            say("none")
        case rows:
            print_table(rows)


def day(seconds: float) -> str:
    """Seconds since 1970 as a date, UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def moment(seconds: float) -> str:
    """Seconds since 1970 as a date and time, UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(" ", timespec="seconds")


def say(line: str) -> None:
    """Print a message for people on stderr; a full disk under it is no reason to stop."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def say_logged(name: str) -> None:
    """Print what a logger tells from now on, as messages for people."""
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    logger.handlers, logger.propagate = [_Lines()], False


@contextmanager
def progress(quiet: bool = False) -> Iterator[Report]:
    """Transient progress bars on stderr, or plain lines if it is not a terminal."""
    if quiet or not sys.stderr.isatty():
        yield (lambda stage, done, total: None) if quiet else _lines()
        return
    from rich import progress as rich
    from rich.console import Console

    times = (rich.TextColumn("{task.fields[rate]}"), rich.TimeElapsedColumn())
    columns = ("{task.description}", rich.BarColumn(20), rich.MofNCompleteColumn(), *times)
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, rich.TaskID] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, rate="")
            task = bars.tasks[tasks[stage]]
            bars.update(
                tasks[stage], completed=done, total=total, rate=_rate(task.speed, done, total)
            )

        yield report


def _lines() -> Report:
    """A line per stage every QUIET_SECONDS, and when a stage that printed one is done."""
    last: dict[str, tuple[float, int]] = {}  # when a stage began or printed a line, and its count
    began: dict[str, float] = {}  # of the stages that printed a line

    def report(stage: str, done: int, total: int | None) -> None:
        now = monotonic()
        before, count = last.setdefault(stage, (now, done))
        steps = f"{stage}: {done}" + ("" if total is None else f"/{total}")
        if done == total:
            if stage in began:
                say(f"{steps}, took {_duration(now - began.pop(stage))}")
            del last[stage]
        elif now - before >= QUIET_SECONDS:
            rate = _rate((done - count) / (now - before), done, total)
            say(f"{steps}, {rate}" if rate else steps)
            last[stage] = now, done
            began.setdefault(stage, before)

    return report


def _rate(speed: float | None, done: int, total: int | None) -> str:
    """`2.5/s, 40 s left, 12 at once`, of the steps per second; empty where they are unknown."""
    if not speed:
        return ""
    left = "" if total is None else f"{_duration((total - done) / speed)} left"
    return ", ".join(filter(None, (f"{speed:.3g}/s", left, present())))


def _duration(seconds: float) -> str:
    """`40 s`, `12 min` or `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _lines_of(values: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """`name: value` lines; the values of a mapping are indented below its name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}:"
            yield from _lines_of(value, f"{indent}  ")
        else:
            yield f"{indent}{name}: {as_cell(value)}"


def _builtin(value: Any) -> Any:
    """A value that pydantic does not know, as one that it does."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Integral):  # numpy's
        return int(value)
    return float(value) if isinstance(value, Real) else str(value)
