"""The native layout: a folder of task.json, users.jsonl, history.jsonl[.gz] and queries.jsonl[.gz]
(DESIGN 3).

`load` reads any data set that hydra-llm knows (the official LaMP files too, see `lamp.py`), `save`
writes the native layout. Files are read line by line; a broken line is an error that names file,
line and field. Fields beyond the known ones may be there.
"""

import gzip
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from hydra_llm.datasets.dataset import (
    FIELDS,
    Builder,
    DataSet,
    Part,
    Report,
    Split,
    check_split,
    stop,
)
from hydra_llm.errors import DataError
from hydra_llm.tasks.base import Task
from hydra_llm.text import text_fault

__all__ = ["DataSet", "load", "save"]


def load(path: Path | str, limit_users: int | None = None, report: Report = stop) -> DataSet:
    """Read a data set: a folder in the native layout, or a folder or file in LaMP's official one.

    `limit_users` takes only so many users of each split, the first of the file. `report` is what is
    done about each broken line; the default raises it.

    Raises:
        DataError: names file, line and field.
    """
    path = Path(path)
    if (path / "task.json").is_file():
        return _load_native(path, limit_users, report)
    from hydra_llm.datasets import lamp  # needs ijson, which few runs do

    if lamp.is_official(path):
        return lamp.load(path, limit_users, report)
    if not path.exists():
        raise DataError("no such folder", file=path)
    raise DataError(
        "no data set: neither task.json nor LaMP's {train,dev}_questions.json is here", file=path
    )


def _load_native(folder: Path, limit_users: int | None, report: Report) -> DataSet:
    task = _read_task(folder / "task.json")
    splits = _read_users(folder / "users.jsonl", report)
    kept = _first_users(splits, limit_users)
    builder = Builder(task, kept, report, ignored=frozenset(splits) - frozenset(kept))
    parts: tuple[Part, ...] = ("history", "queries")
    for part in parts:
        file = _find(folder, part)
        for number, entry in read_entries(file, FIELDS, report):
            builder.add(part, entry, file, number)
    return builder.build()


def _read_task(file: Path) -> Task:
    try:
        data = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", file=file) from None
    if not isinstance(data, dict):
        raise DataError("must be a JSON object", file=file)
    return Task.from_json(data, str(file))


def _read_users(file: Path, report: Report) -> dict[str, Split]:
    splits: dict[str, Split] = {}
    if not file.is_file():
        raise DataError("no such file", file=file)
    for number, entry in read_entries(file, ("user", "split"), report):
        user, split = entry["user"], check_split(entry["split"])
        if fault := text_fault(user):
            report(DataError(fault, file=file, line=number, field="user"))
        elif user in splits:
            report(DataError(f"'{user}' stands here twice", file=file, line=number, field="user"))
        elif split is None:
            report(
                DataError(
                    f"'{entry['split']}' is neither train nor test",
                    file=file,
                    line=number,
                    field="split",
                )
            )
        else:
            splits[user] = split
    return splits


def _first_users(splits: Mapping[str, Split], limit: int | None) -> dict[str, Split]:
    kept: dict[str, Split] = {}
    for user, split in splits.items():
        if limit is None or sum(its == split for its in kept.values()) < limit:
            kept[user] = split
    return kept


def _find(folder: Path, part: str) -> Path:
    found = [
        file for suffix in (".jsonl", ".jsonl.gz") if (file := folder / f"{part}{suffix}").is_file()
    ]
    if len(found) == 1:
        return found[0]
    what = (
        f"there is a {part}.jsonl.gz too: keep one of them"
        if found
        else "no such file (nor .jsonl.gz)"
    )
    raise DataError(what, file=folder / f"{part}.jsonl")


# ---- lines


def read_entries(
    file: Path, fields: Iterable[str], report: Report
) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and the named fields, all texts, of each line that has them; the other lines are
    reported.
    """
    names = tuple(fields)
    for number, line in read_lines(file, report):
        try:
            yield number, _entry(line, names, file, number)
        except DataError as fault:
            report(fault)


def read_lines(file: Path, report: Report) -> Iterator[tuple[int, str]]:
    """Stream a text file, zipped or not: numbers from 1 and lines. Takes a byte order mark; refuses
    what is not UTF-8.
    """
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                try:
                    yield (
                        number,
                        raw.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"")
                        .decode("utf-8")
                        .rstrip("\r\n"),
                    )
                except UnicodeDecodeError as error:
                    report(
                        DataError(
                            f"not UTF-8 at byte {error.start + 1} of the line",
                            file=file,
                            line=number,
                        )
                    )
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        report(DataError(f"the zipped file is damaged or cut: {error}", file=file, line=number + 1))
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", file=file) from None


def parse_object(line: str, file: Path, number: int) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        DataError: it is not one, or a field stands in it twice.
    """
    try:
        data = json.loads(line, object_pairs_hook=_no_twins, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"not JSON: {error}" if line.strip() else "empty line", file=file, line=number
        ) from None
    if not isinstance(data, dict):
        raise DataError("must be a JSON object", file=file, line=number)
    return data


def _entry(line: str, fields: tuple[str, ...], file: Path, number: int) -> dict[str, str]:
    data = parse_object(line, file, number)
    return {name: _text(data, name, file, number) for name in fields}


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError("a field stands twice in one object")
    return data


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _text(data: Mapping[str, Any], name: str, file: Path, number: int) -> str:
    value = data.get(name)
    if name == "time":  # may be missing, and seconds since 1970 are numbers by nature
        value = (
            ""
            if value is None
            else repr(value)
            if isinstance(value, int | float) and not isinstance(value, bool)
            else value
        )
    if name not in data and name != "time":
        raise DataError("is missing", file=file, line=number, field=name)
    if not isinstance(value, str):
        raise DataError(
            f"must be a text, not {json.dumps(value)[:40]}", file=file, line=number, field=name
        )
    return value


# ---- writing


def save(dataset: DataSet, folder: Path | str) -> None:
    """Write the native layout; the folder appears whole or not at all, and an existing data set is
    never overwritten.

    Raises:
        DataError: the folder exists and is not empty, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError("exists already: remove it or name another folder", file=folder)
    part = None
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        part = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
        _write(dataset, part)
        part.chmod(0o755)  # mkdtemp makes it private
        part.replace(folder)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror}", file=folder) from None
    finally:
        if part is not None and part.exists():
            shutil.rmtree(part, ignore_errors=True)


def _write(dataset: DataSet, folder: Path) -> None:
    (folder / "task.json").write_text(
        json.dumps(dataset.task.to_json(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
    _write_lines(
        folder / "users.jsonl",
        ({"user": user, "split": split} for user, split in dataset.splits.items()),
    )
    _write_lines(
        folder / "history.jsonl.gz",
        (
            {"user": r.user, "id": r.id, "time": r.time, "input": r.input, "output": r.output}
            for r in dataset.stream_history()
        ),
    )
    _write_lines(
        folder / "queries.jsonl.gz",
        (
            {"user": q.user, "id": q.id, "time": q.time, "input": q.input, "output": q.gold}
            for q in dataset.stream_queries()
        ),
    )


def _write_lines(file: Path, rows: Iterable[Mapping[str, str | None]]) -> None:
    with file.open("wb") as raw:
        # no name and no time inside: equal data sets are equal files
        stream = (
            gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0)
            if file.suffix == ".gz"
            else raw
        )
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        if stream is not raw:
            stream.close()
        raw.flush()
        os.fsync(raw.fileno())
