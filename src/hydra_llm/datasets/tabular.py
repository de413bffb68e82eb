"""A JSONL or CSV file as a data set: a record a line (user, input, output, perhaps time and id).

Kind and labels are guessed unless given. The last records of each user become queries, so a query
never precedes its history. Users are split by a hash of their name: more data does not move them.
"""

import csv
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from hydra_llm.datasets import dataset
from hydra_llm.datasets.dataset import Builder, DataSet, Place, Row, Split
from hydra_llm.datasets.native import number_as_text, parse_object, read_lines
from hydra_llm.errors import DataError
from hydra_llm.history import in_order, parse_time
from hydra_llm.tasks.base import KINDS, Task
from hydra_llm.tasks.rating import plain_number
from hydra_llm.types import Record

MAX_LABELS = 50
MAX_LABEL_LENGTH = 40  # in characters
MAX_RATING_RANGE = 10  # largest difference between two numbers that still looks like one scale


@dataclass(frozen=True, slots=True)
class Columns:
    """Which field of the file holds what. `time` and `id` may be missing unless they were named."""

    user: str = "user"
    input: str = "input"
    output: str = "output"
    time: str = "time"
    id: str = "id"


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
) -> DataSet:
    """A data set of a user's own file; `notes` say what was guessed. DataError names file, line and
    field of what is broken.
    """
    rows = list(_rows(file, columns))
    if not rows:
        raise DataError("holds no record", file=file)
    chosen, labels = _tidy(rows, kind, columns.output)
    prompt = prompt or KINDS.load(chosen).default_prompt(labels)
    fields = {"name": name or re.sub(r"\..*", "", file.name), "kind": chosen, "labels": labels}
    task = Task.from_json({**fields, "prompt": prompt}, str(file))
    note = f"kind {'given' if kind else 'guessed'}: {chosen}"
    note += f", labels: {', '.join(labels)}" if labels else ""
    of_user: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        of_user[row[1]["user"]].append(row)
    splits: dict[str, Split] = {}
    for user in of_user:
        digest = hashlib.sha256(f"{seed}:{user}".encode(errors="replace")).digest()
        splits[user] = "test" if int.from_bytes(digest[:8]) < test_share * 2**64 else "train"
    builder = Builder(task, splits)
    for own in of_user.values():
        builder.add_user(_ordered(own), query_share)
    missing = [split for split in dataset.SPLITS if split not in splits.values()]
    advice = [f"no {split} user: give another seed or test share" for split in missing]
    return builder.build([note, *advice])


def _ordered(rows: list[Row]) -> list[Row]:
    """One user's rows, oldest first; in file order where times are equal."""
    records = []
    for at, (_, entry) in enumerate(rows):
        time = "" if dataset.time_fault(entry["time"]) else entry["time"]  # reported later
        records.append(Record("", "", "", "", span=parse_time(time), position=at))
    return [rows[record.position] for record in in_order(records)]


def _rows(file: Path, columns: Columns) -> Iterator[Row]:
    """The entries of a file; one whose id its user has already is an error."""
    names, seen = asdict(columns), set[tuple[str, str]]()
    required = {"user", "input", "output"} | {own for own, column in names.items() if column != own}
    for place, data in _cells(read_lines(file, dataset.stop)):
        entry = {"time": "", "id": ""}
        for name, column in names.items():
            value = number_as_text(data.get(column))
            if isinstance(value, str):
                entry[name] = value
            elif name in required:
                raise place.error("is missing, or neither a text nor a number", column)
        user, id = entry["user"], entry["id"] or f"line{place.line}"
        if (user, id) in seen:  # checked here, or one could be history and the other a query
            raise place.error(f"user '{user}' has the id '{id}' twice", columns.id)
        seen.add((user, id))
        yield place, {**entry, "id": id}


def _cells(lines: Iterator[tuple[Place, str]]) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The fields of each line, or of each row of a CSV file; the first line tells the format."""
    place, header = next(lines, (Place(), ""))
    lines = chain([(place, header)], lines)
    match header.lstrip()[:1]:
        case "[":
            raise place.error("is one JSON array: write one JSON object a line")
        case "{":
            yield from ((here, parse_object(line, here)) for here, line in lines)
            return
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if "\t" in header and "," not in header else ","
    text = (line + "\n" for _, line in lines)  # a quoted field may go on over several lines
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            here = replace(place, line=reader.line_num)
            if None in row or None in row.values():
                count = len(reader.fieldnames or ())
                raise here.error(f"the header names {count} fields, the line has others")
            yield here, row
    except csv.Error as error:
        here = replace(place, line=reader.reader.line_num)
        raise here.error(f"not CSV: {error}") from None


def _tidy(rows: list[Row], kind: str | None, field: str) -> tuple[str, list[str]]:
    """The kind and the labels. Labels and ratings are normalized in place: white space is stripped,
    `4.0` becomes `4`. Raises the first output that the kind cannot read.
    """
    outputs = {entry["output"].strip() for _, entry in rows} - {""}
    chosen = kind or guess_kind(outputs, len(rows))
    of_kind = KINDS.load(chosen)
    for place, entry in rows:
        output = entry["output"].strip()
        if output and (fault := of_kind.output_fault(output)):
            raise place.error(fault, field)
        if of_kind.closed:
            entry["output"] = of_kind.tidy(output)
    return chosen, of_kind.labels_of({of_kind.tidy(output) for output in outputs})


def guess_kind(outputs: set[str], count: int) -> str:
    """Rating: >= 3 numbers of a small range; classification: few short outputs; else generation."""
    numbers = [number for output in outputs if (number := plain_number(output)) is not None]
    all_numbers = 3 <= len(numbers) == len(outputs) <= 2 * MAX_RATING_RANGE + 1
    if all_numbers and max(numbers) - min(numbers) <= MAX_RATING_RANGE:
        return "rating"
    few = 2 <= len(outputs) <= min(MAX_LABELS, count // 2)
    return "classification" if few and max(map(len, outputs)) <= MAX_LABEL_LENGTH else "generation"
