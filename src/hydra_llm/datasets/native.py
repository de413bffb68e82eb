"""The native layout: a folder of task.json, users.jsonl, history.jsonl[.gz] and queries.jsonl[.gz],
or choices.jsonl[.gz] in place of these two, or beside them (`choices.py`).

`load` reads any data set that hydra-llm knows (the official LaMP files too, see `lamp.py`), `save`
writes the native layout. Files are read line by line; a broken line is an error that names file,
line and field. Unknown fields are ignored.
"""

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from io import BufferedIOBase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra_llm.datasets import choices
from hydra_llm.datasets import dataset as data_set
from hydra_llm.datasets.dataset import (
    SPLITS,
    Builder,
    DataSet,
    Part,
    Place,
    Report,
    Row,
    Split,
    stop,
)
from hydra_llm.errors import DataError
from hydra_llm.tasks.base import CHOICE_METRICS, Task
from hydra_llm.text import text_fault

CHOICE_TEXTS = ("user", "id", "part", "time", "input")
MAX_DIGITS = 1000  # of a whole number


def load(path: Path | str, limit_users: int | None = None, report: Report = stop) -> DataSet:
    """Read a data set: a folder in the native layout, or a folder or file in LaMP's official one.

    `limit_users` takes only the first users of each split. `report` is called with each DataError,
    which names file, line and field; the default raises it.
    """
    path = Path(path)
    file = path / "task.json"
    if not file.is_file():
        from hydra_llm.datasets import lamp  # imports ijson, which few runs need

        if lamp.is_official(path):
            return lamp.load(path, limit_users, report)
        missing = "no data set: neither task.json nor LaMP's {train,dev}_questions.json is here"
        raise DataError(missing if path.exists() else "no such folder", file=path)
    given = parse_json(file.read_bytes(), file)
    task, chosen = Task.from_json(given, str(file)), _find(path, choices.NAME, optional=True)
    if chosen and not given.get("metrics"):
        asked = task.metrics if _find(path, "queries", optional=True) else ()
        task = replace(task, metrics=(*asked, *CHOICE_METRICS))
    splits = _read_users(path / "users.jsonl", report)
    of_splits = ([user for user in splits if splits[user] == split] for split in SPLITS)
    kept = {user for users in of_splits for user in users[:limit_users]}
    builder = Builder(task, {user: split for user, split in splits.items() if user in kept})
    for part in data_set.PARTS:
        if plain := _find(path, part, optional=chosen is not None):
            for place, entry in _read_entries(plain, data_set.FIELDS, report):
                if entry["user"] in kept or entry["user"] not in splits:
                    builder.add(part, entry, place)
    for part, place, entry in _read_choices(chosen, report) if chosen else ():
        if entry["user"] in kept or entry["user"] not in splits:
            builder.add(part, entry, place)
    return builder.build()


def parse_json(content: bytes, file: Path) -> Any:
    """The JSON value that is a file's content."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise DataError(f"not JSON: {error}", file=file) from None
    except RecursionError:
        raise DataError("not JSON that can be read: it is nested too deeply", file=file) from None


def _read_users(file: Path, report: Report) -> dict[str, Split]:
    splits: dict[str, Split] = {}
    if not file.is_file():
        raise DataError("no such file", file=file)
    for place, entry in _read_entries(file, ("user", "split"), report):
        user, split = entry["user"], entry["split"]
        if fault := text_fault(user):
            place.fault(fault, "user")
        elif user in splits:
            place.fault(f"'{user}' occurs twice", "user")
        elif split not in SPLITS:
            place.fault(f"'{split}' is neither train nor test", "split")
        else:
            splits[user] = split
    return splits


def user_columns(folder: Path) -> dict[str, dict[str, str | float]]:
    """User → what users.jsonl tells beside the split, texts and numbers; empty without the file."""
    columns: dict[str, dict[str, str | float]] = {}
    if (file := folder / "users.jsonl").is_file():
        for place, line in read_lines(file, stop):
            if line.strip():
                entry = parse_object(line, place)
                known = {name: own for name, own in entry.items() if name not in ("user", "split")}
                kept = {
                    name: own for name, own in known.items() if isinstance(own, str | float | int)
                }
                columns[_text(entry, "user", place)] = kept
    return columns


def _find(folder: Path, part: str, *, optional: bool = False) -> Path | None:
    plain, zipped = folder / f"{part}.jsonl", folder / f"{part}.jsonl.gz"
    if plain.is_file() and zipped.is_file():
        raise DataError(f"there is a {zipped.name} too: keep one of them", file=plain)
    if not plain.is_file() and not zipped.is_file():
        if optional:
            return None
        raise DataError("no such file (nor .jsonl.gz)", file=plain)
    return plain if plain.is_file() else zipped


def _read_choices(file: Path, report: Report) -> Iterator[tuple[Part, Place, dict[str, Any]]]:
    """The part, place and entry of each choice that is whole; the other lines are reported."""
    reader = choices.ChoiceReader()
    for place, line in read_lines(file, report):
        if not line.strip():
            continue
        try:
            data = parse_object(line, place)
            texts = {name: _text(data, name, place) for name in CHOICE_TEXTS}
            part, entry = reader.entry(data, texts, place)
        except DataError as fault:
            report(fault)
        else:
            yield part, place, entry


def _read_entries(file: Path, fields: Iterable[str], report: Report) -> Iterator[Row]:
    """The named fields, all texts, of each line that has them; the other lines are reported."""
    for place, line in read_lines(file, report):
        if not line.strip():
            continue
        try:
            data = parse_object(line, place)
            entry = {name: _text(data, name, place) for name in fields}
        except DataError as fault:
            report(fault)
        else:
            yield place, entry


def open_binary(file: Path) -> BufferedIOBase:
    """A file's bytes, unzipped if its name ends in `.gz`."""
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")


def read_lines(file: Path, report: Report) -> Iterator[tuple[Place, str]]:
    """The lines of a text file, zipped or not, and their places; reports what is not UTF-8."""
    number = 0
    try:
        with open_binary(file) as stream:
            for number, raw in enumerate(stream, start=1):
                place = Place(file, report, number)
                raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                try:
                    yield place, raw.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    place.fault(f"not UTF-8 at byte {error.start + 1} of the line")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        Place(file, report, number + 1).fault(f"the zipped file is damaged or cut: {error}")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", file=file) from None


def parse_object(line: str, place: Place) -> dict[str, Any]:
    """The JSON object of a line; DataError if it is none, or has a field twice."""
    try:
        data = json.loads(
            line, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer
        )
    except ValueError as error:
        raise place.error(f"not JSON: {error}") from None
    except RecursionError:
        raise place.error("not JSON that can be read: it is nested too deeply") from None
    if not isinstance(data, dict):
        raise place.error("must be a JSON object")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError("a field occurs twice in one object")
    return data


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits: write it as a text")
    return int(digits)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _text(data: Mapping[str, Any], name: str, place: Place) -> str:
    value = data.get(name)
    if name == "time":  # may be missing; seconds since 1970 are numbers
        value = "" if value is None else number_as_text(value)
    elif name not in data:
        raise place.error("is missing", name)
    if not isinstance(value, str):
        raise place.error(f"must be a text, not {json.dumps(value)[:40]}", name)
    return value


def number_as_text(value: Any) -> Any:
    """A finite JSON number as text, a whole one without ".0"; anything else unchanged."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return value
    return str(int(value)) if value == int(value) else repr(value)


def save(
    dataset: DataSet,
    folder: Path | str,
    columns: Mapping[str, Mapping[str, str | float]] | None = None,
) -> None:
    """Write the native layout; the folder appears complete or not at all. `columns`: more of
    users.jsonl, by user (`user_columns` reads them). DataError if it is not empty, or cannot be
    written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError("exists already: remove it or name another folder", file=folder)
    task = json.dumps(dataset.task.to_json(), ensure_ascii=False, indent=1)
    more = columns or {}
    users = ({"user": u, "split": own, **more.get(u, {})} for u, own in dataset.splits.items())
    prefix, parent = f".{folder.name}.", folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as name:
            part = Path(name)
            (part / "task.json").write_text(task + "\n", encoding="utf-8")
            _write(part / "users.jsonl", users)
            chosen = list(choices.rows_of(dataset))
            for name, entries in dataset.plain_entries().items():
                if entries or not chosen:
                    _write(part / f"{name}.jsonl.gz", map(data_set.fields_of, entries))
            if chosen:
                _write(part / f"{choices.NAME}.jsonl.gz", chosen)
            part.chmod(0o755)  # a temporary folder is private
            part.replace(folder)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror}", file=folder) from None


def _write(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with file.open("wb") as raw:
        # no name and no time inside: equal data sets are equal files
        zipped = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if file.suffix == ".gz" else None
        with zipped or nullcontext(raw) as stream:
            for row in rows:
                stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        raw.flush()
        os.fsync(raw.fileno())
