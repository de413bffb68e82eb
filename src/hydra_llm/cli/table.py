"""Tables and lines on stdout that fit the terminal; no name in them is ever broken.

Where not all columns fit, an interval is written as `±` half its width, parts become headings, and
the last columns are left out, which a line below the table says. A pipe gets everything.
"""

import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

PROSE = 30  # cells with blanks that are longer are wrapped between words
PROSE_WIDTH = 16  # the least of a column of prose
LONGEST_WORD = 40  # longer words of prose are folded: they are data, not names
GAP = 2  # blanks between two columns
PART = "part"  # the column that becomes headings
INTERVAL = re.compile(r" \[([+-]?[\d.]+)(%?), ([+-]?[\d.]+)%?\](?: p (?:< )?[\d.]+)?")
Cells = list[dict[str, str]]


def stdout_width(wide: bool = False) -> int | None:
    """Columns of stdout; None, no limit, for a pipe without COLUMNS, and if `wide`."""
    if wide or not (sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()):
        return None
    return shutil.get_terminal_size((80, 24)).columns


def print_text(text: str, indent: str = "", wide: bool = False) -> None:
    """Print a line, wrapped between words to the width of stdout."""
    width = stdout_width(wide)
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    lines = textwrap.wrap(text, width, subsequent_indent=indent, **options) if width else [text]
    print("\n".join(lines))


def print_table(
    rows: Sequence[Mapping[str, Any]], title: str | None = None, wide: bool | None = None
) -> None:
    """Print rows of equal keys as a table. `wide` prints all columns at any width; None: the
    command has no option `--wide`.
    """
    from rich.console import Console

    width = stdout_width(bool(wide))
    if title:
        print()
        print_text(title, wide=bool(wide))
    if not rows:
        return
    cells = [{name: as_cell(value) for name, value in row.items()} for row in rows]
    numeric = {
        name
        for name in rows[0]
        if all(isinstance(row[name], int | float) for row in rows if row[name] is not None)
    }
    shown, note = fitted(cells, width)
    needed = _width(shown)
    out = Console(width=max(width or 10_000, needed), highlight=False)
    out.print(_table(shown, numeric, width))
    if note:
        print_text(note + (" --wide shows all." if wide is False else " A pipe shows all."))


def fitted(cells: Cells, width: int | None) -> tuple[Cells, str]:
    """The rows as they fit `width`, and what was changed, as a sentence; empty if nothing was."""
    if width is None or _width(cells) <= width:
        return cells, ""
    cells, notes = _with_headings(cells), []
    if _width(cells) > width:
        short = [{name: INTERVAL.sub(_half, text) for name, text in row.items()} for row in cells]
        notes = ["± is half of the interval."] if short != cells else []
        cells = short
    names, dropped = list(cells[0]), list[str]()
    while len(names) > 1 and _width([{n: row[n] for n in names} for row in cells]) > width:
        dropped.insert(0, names.pop())
    if dropped:
        notes.append(f"Not shown: {', '.join(dropped)}.")
    return [{name: row[name] for name in names} for row in cells], " ".join(notes)


def as_cell(value: Any) -> str:
    """A value as text: four digits of a float, nothing for NaN and None."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return "" if value is None else str(value)


def _with_headings(cells: Cells) -> Cells:
    """Rows without the column PART: its values are rows of their own, in the first column."""
    if PART not in cells[0]:
        return cells
    rows, part = list[dict[str, str]](), None
    for row in cells:
        own = {name: text for name, text in row.items() if name != PART}
        if row[PART] != part:
            part = row[PART]
            rows.append({name: f"{part}:" if at == 0 else "" for at, name in enumerate(own)})
        rows.append(own)
    return rows


def _half(interval: re.Match[str]) -> str:
    """` [0.672, 0.935]` → ` ±0.132`."""
    low, percent, high = interval[1], interval[2], interval[3]
    digits = len(low.partition(".")[2])
    return f" ±{(float(high) - float(low)) / 2:.{digits}f}{percent}"


def _width(cells: Cells) -> int:
    return sum(_widths(cells).values()) + GAP * (len(cells[0]) - 1)


def _widths(cells: Cells) -> dict[str, int]:
    """The least width of each column in which no name is broken."""
    from rich.cells import cell_len

    widths = {}
    for name in cells[0]:
        least = max(map(cell_len, name.split()), default=0)
        for text in (row[name] for row in cells):
            own = max(map(cell_len, text.splitlines()), default=0)
            if own > PROSE and " " in text.strip():
                longest = max(map(cell_len, text.split()))
                own = max(PROSE_WIDTH, min(longest, LONGEST_WORD))
            least = max(least, own)
        widths[name] = least
    return widths


def _table(cells: Cells, numeric: set[str], width: int | None) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name, least in _widths(cells).items():
        head = name if width is None else textwrap.fill(name, least, break_long_words=False)
        side: Any = "right" if name in numeric else "left"
        table.add_column(Text(head), justify=side, overflow="fold", min_width=least)
    for row in cells:
        table.add_row(*map(Text, row.values()))
    return table
