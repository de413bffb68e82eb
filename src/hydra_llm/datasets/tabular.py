"""A JSONL or CSV file of a user's own as a data set: one record a line, with user, input, output,
and perhaps time and id.

Says nothing about LaMP. Kind and labels are guessed where they are not given. The last records of
each user become queries, so a query never comes before its history; users are split by a hash of
their name, so that more data does not move them.
"""

import csv
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hydra_llm.datasets.dataset import (
    Builder,
    DataSet,
    Report,
    Split,
    held_out,
    readable_time,
    stop,
)
from hydra_llm.datasets.native import parse_object, read_lines
from hydra_llm.errors import DataError
from hydra_llm.history import in_order, parse_time
from hydra_llm.tasks.base import KINDS, Task
from hydra_llm.tasks.rating import plain_number
from hydra_llm.types import Record

MOST_LABELS = 50
LONGEST_LABEL = 40
"""In characters."""
WIDEST_RATING = 10
"""Largest difference between two numbers that still looks like one scale."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which field of the file holds what. `time` and `id` may be missing unless they were named."""

    user: str = "user"
    input: str = "input"
    output: str = "output"
    time: str = "time"
    id: str = "id"


Row = tuple[int, dict[str, str]]
"""The line's number and its entry."""


def read_table(
    file: Path,
    columns: Columns = Columns(),
    *,
    kind: str | None = None,
    prompt: str | None = None,
    name: str = "",
    test_share: float = 0.33,
    query_share: float = 0.2,
    seed: int = 0,
    report: Report = stop,
) -> DataSet:
    """Make a data set of a user's own file; `notes` say what was guessed.

    Raises:
        DataError: names file, line and field of what is broken.
    """
    rows = list(_once(_rows(file, columns, report), file, columns, report))
    if kind:
        rows = list(_readable(rows, kind, file, columns, report))
    if not rows:
        raise DataError("holds no record", file=file)
    task, note = _task(rows, kind, prompt, name or re.sub(r"\..*", "", file.name), file)
    splits = {entry["user"]: _split(entry["user"], test_share, seed) for _, entry in rows}
    builder = Builder(task, splits, report)
    for of_user in _by_user(rows).values():
        ordered = _ordered(of_user)
        first_query = len(ordered) - held_out(len(ordered), query_share)
        for at, (line, entry) in enumerate(ordered):
            builder.add("history" if at < first_query else "queries", entry, file, line)
    missing = [
        f"no {split} user: give another seed or test share"
        for split in ("train", "test")
        if split not in splits.values()
    ]
    return builder.build([note, *missing])


def _once(rows: Iterator[Row], file: Path, columns: Columns, report: Report) -> Iterator[Row]:
    """Rows whose id is new to their user. Asked before the rows are dealt out, or one could be
    history and its twin a query.
    """
    seen: set[tuple[str, str]] = set()
    for line, entry in rows:
        if (key := (entry["user"], entry["id"])) in seen:
            report(
                DataError(
                    f"user '{key[0]}' has the id '{key[1]}' twice",
                    file=file,
                    line=line,
                    field=columns.id,
                )
            )
        else:
            seen.add(key)
            yield line, entry


def _readable(
    rows: list[Row], kind: str, file: Path, columns: Columns, report: Report
) -> Iterator[Row]:
    """Rows whose output the kind can read; an empty one is the builder's to report."""
    fault_of = KINDS.load(kind).output_fault
    for line, entry in rows:
        if (output := entry["output"].strip()) and (fault := fault_of(output)):
            report(DataError(fault, file=file, line=line, field=columns.output))
        else:
            yield line, entry


def _split(user: str, test_share: float, seed: int) -> Split:
    digest = hashlib.sha256(f"{seed}:{user}".encode(errors="replace")).digest()
    return "test" if int.from_bytes(digest[:8]) < test_share * 2**64 else "train"


def _by_user(rows: list[Row]) -> dict[str, list[Row]]:
    users: dict[str, list[Row]] = {}
    for row in rows:
        users.setdefault(row[1]["user"], []).append(row)
    return users


def _ordered(rows: list[Row]) -> list[Row]:
    """One user's rows, oldest first; the file decides where times are equal. An unreadable time is
    the builder's to report.
    """
    spans = [parse_time(entry["time"] if readable_time(entry["time"]) else "") for _, entry in rows]
    records = [Record("", "", "", "", span=span, position=at) for at, span in enumerate(spans)]
    return [rows[record.position] for record in in_order(records)]


# ---- files


def _rows(file: Path, columns: Columns, report: Report) -> Iterator[Row]:
    lines = read_lines(file, report)
    first = next(lines, None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        raise DataError("is one JSON array: write one JSON object a line", file=file, line=first[0])
    raw = (
        _json_rows(first, lines, file, report)
        if first[1].lstrip().startswith("{")
        else _csv_rows(first, lines, file)
    )
    for number, data in raw:
        entry = {one.name: _cell(data, getattr(columns, one.name)) for one in fields(Columns)}
        if missing := [
            getattr(columns, name)
            for name, value in entry.items()
            if value is None and _needed(name, columns)
        ]:
            for name in missing:
                report(
                    DataError(
                        "is missing, or neither a text nor a number",
                        file=file,
                        line=number,
                        field=name,
                    )
                )
        else:
            texts = {name: value or "" for name, value in entry.items()}
            yield number, {**texts, "id": texts["id"] or f"line{number}"}


def _needed(name: str, columns: Columns) -> bool:
    return name in ("user", "input", "output") or getattr(columns, name) != name


def _cell(data: Mapping[str, Any], column: str) -> str | None:
    value = data.get(column)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value)
    return value if isinstance(value, str) else None


def _json_rows(
    first: tuple[int, str], rest: Iterator[tuple[int, str]], file: Path, report: Report
) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _again(first, rest):
        try:
            yield number, parse_object(line, file, number)
        except DataError as fault:
            report(fault)


def _csv_rows(
    first: tuple[int, str], rest: Iterator[tuple[int, str]], file: Path
) -> Iterator[tuple[int, dict[str, Any]]]:
    header = first[1]
    text = (
        line + "\n" for _, line in _again(first, rest)
    )  # a quoted field may go on over several lines
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(
        text, delimiter="\t" if "\t" in header and "," not in header else ",", strict=True
    )
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"the header names {len(reader.fieldnames or ())} fields, the line has others",
                    file=file,
                    line=reader.line_num,
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", file=file, line=reader.reader.line_num) from None


def _again(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


# ---- the task


def _task(
    rows: list[Row], kind: str | None, prompt: str | None, name: str, file: Path
) -> tuple[Task, str]:
    """The task, and a note on what was guessed. Labels and ratings are tidied in place: stripped,
    `4.0` becomes `4`.
    """
    outputs = {entry["output"].strip() for _, entry in rows} - {""}
    chosen = kind or guess_kind(outputs, len(rows))
    of_kind = KINDS.load(chosen)
    if of_kind.closed:
        outputs = {of_kind.tidy(output) for output in outputs}
        for _, entry in rows:
            entry["output"] = of_kind.tidy(entry["output"].strip())
    labels = of_kind.labels_of(outputs)
    text = prompt or of_kind.default_prompt(labels)
    data = {"name": name, "kind": chosen, "prompt": text, "labels": labels}
    task = Task.from_json(data, str(file))
    return task, f"kind {'given' if kind else 'guessed'}: {chosen}" + (
        f", labels: {', '.join(labels)}" if labels else ""
    )


def guess_kind(outputs: set[str], count: int) -> str:
    """Rating for at least three numbers of a small range, classification for few short answers that
    come again, else generation.
    """
    numbers = [plain_number(output) for output in outputs]
    known = [number for number in numbers if number is not None]
    if (
        len(known) == len(numbers) >= 3
        and max(known) - min(known) <= WIDEST_RATING
        and len(known) <= 2 * WIDEST_RATING + 1
    ):
        return "rating"
    few = 2 <= len(outputs) <= min(MOST_LABELS, count // 2)
    return "classification" if few and max(map(len, outputs)) <= LONGEST_LABEL else "generation"
