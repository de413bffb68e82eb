"""The official LaMP files: `{split}_questions.json` and `{split}_outputs.json`, for LaMP-1, 2N, 2M,
3, 4, 5 and 7.

Layout as published at lamp-benchmark.github.io: questions are a list of `{id, input, profile}`,
`input` carries the instruction in front of the text, profile entries have `id`, the task's fields
and, in the time split, `date`; outputs are `{task, golds: [{id, output}]}`. Each question is a user
of its own unless it names one (`user_id`). Train files give train users, dev files test users.
Files are hundreds of megabytes: they are read as a stream (ijson). What is unusable in them and
cannot be mended by their reader (an empty text, an id twice) is left out or renamed with a note;
all else is an error that names file and field. `datasets/fetch.py` gets the files.
"""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

import ijson

from hydra_llm.datasets.dataset import Builder, DataSet, Report, Split, stop
from hydra_llm.errors import DataError
from hydra_llm.tasks.base import Task
from hydra_llm.tasks.lamp import LAMP
from hydra_llm.text import text_fault

PARTS: Mapping[str, Split] = {"train": "train", "dev": "test", "test": "test"}
"""LaMP's split to ours. The golds of LaMP's own test split are not public."""

Question = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Shape:
    """How one LaMP task writes its profile, and what precedes the text in its questions."""

    input: str
    output: str
    before_text: str


_SHAPES: Mapping[str, _Shape] = {
    "LaMP-1": _Shape("abstract", "title", '"'),
    "LaMP-2N": _Shape("text", "category", "article: "),
    "LaMP-2M": _Shape("description", "tag", "description: "),
    "LaMP-3": _Shape("text", "score", "review: "),
    "LaMP-4": _Shape("text", "title", "article: "),
    "LaMP-5": _Shape("abstract", "title", ": "),
    "LaMP-7": _Shape("text", "text", ": "),
}
FREE_HISTORY = ("LaMP-1",)
"""Tasks whose records are not answers of the task: an author's papers, where the question is which
of two to cite.
"""


def is_official(path: Path) -> bool:
    """Whether a file or folder is LaMP's own layout."""
    return bool(_find(path))


def load(path: Path, limit_users: int | None = None, report: Report = stop) -> DataSet:
    """Read a folder (or its `train` and `dev` folders, or one questions file) in LaMP's layout; see
    `native.load`.
    """
    found = _find(path)
    named = {
        file: file.with_name(file.name.replace("_questions.json", "_outputs.json"))
        for _, file in found
    }
    usable = [(part, file) for part, file in found if part != "test" or named[file].is_file()]
    if not usable:
        raise DataError("LaMP's test questions have no public golds: take train and dev", file=path)
    reader = _Reader(report)
    if len(usable) < len(found):
        reader.notes.append("LaMP's test questions were left out: their golds are not public")
    for part, file in usable:
        reader.read(file, _read_golds(named[file], report), PARTS[part], limit_users)
    return reader.build(path)


def _find(path: Path) -> list[tuple[str, Path]]:
    """LaMP's splits and their questions files, in the order train, dev, test."""
    names = [(part, f"{part}_questions.json{zipped}") for part in PARTS for zipped in ("", ".gz")]
    if path.is_file():
        return [(part, path) for part, name in names if path.name == name]
    places = [(part, file) for part, name in names for file in (path / name, path / part / name)]
    return [(part, file) for part, file in places if file.is_file()]


# ---- files


@contextmanager
def _open(file: Path) -> Iterator[IO[bytes]]:
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            if stream.read(3) != b"\xef\xbb\xbf":  # a byte order mark
                stream.seek(0)
            yield cast(IO[bytes], stream)
    except (ijson.JSONError, EOFError, gzip.BadGzipFile) as error:
        detail = re.sub(r"\s+", " ", str(error)).strip()
        raise DataError(f"not JSON, or cut: {detail[:120]}", file=file) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", file=file) from None


def stream_questions(file: Path, prefix: str = "item") -> Iterator[Any]:
    """The questions of a file one by one (or what `prefix` names in each), without holding the file
    in memory.
    """
    with _open(file) as stream:
        yield from ijson.items(stream, prefix, use_float=True)


def _read_golds(file: Path, report: Report) -> tuple[str, dict[str, str]]:
    """The `task` of an outputs file and its golds by question id."""
    if not file.is_file():
        raise DataError("no such file: the golds stand there", file=file)
    try:
        with _open(file) as stream:
            data = json.loads(stream.read().decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", file=file) from None
    if not isinstance(data, dict) or not isinstance(data.get("golds"), list):
        raise DataError("must be a list of {id, output}", file=file, field="golds")
    golds: dict[str, str] = {}
    for at, gold in enumerate(data["golds"]):
        key, value = (_text(gold, name, file, f"golds[{at}].", report) for name in ("id", "output"))
        if key in golds:
            report(DataError(f"'{key}' stands there twice", file=file, field=f"golds[{at}].id"))
        elif key is not None and value is not None:
            golds[key] = value
    return str(data.get("task", "")), golds


def read_gold_ids(file: Path) -> tuple[str, set[str]]:
    """The task that an outputs file names and the ids of its golds."""
    task, golds = _read_golds(file, stop)
    return task, set(golds)


def _text(data: Any, name: str, file: Path, place: str, report: Report) -> str | None:
    """A field as text (numbers are written out); None, and reported, where it is missing or of
    another type.
    """
    value = data.get(name) if isinstance(data, dict) else None
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    there = isinstance(data, dict) and name in data
    report(DataError("must be a text" if there else "is missing", file=file, field=place + name))
    return None


# ---- questions to entries


@dataclass
class _Reader:
    """Takes one file after the other. Questions wait until all are known, for the instruction is
    what they have in common.
    """

    report: Report
    notes: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    name: str = ""
    builder: Builder | None = None
    instruction: str | None = None
    waiting: list[tuple[Path, str, dict[str, str]]] = field(default_factory=list)
    records: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    """(user, id) to the entry's texts: profiles of one user's questions overlap."""

    def read(
        self, file: Path, golds: tuple[str, dict[str, str]], split: Split, limit: int | None
    ) -> None:
        """Take a file's questions, up to the first one of a user beyond the limit."""
        declared, answers = golds
        users: dict[str, str] = {}
        seen: set[str] = set()
        for at, question in enumerate(stream_questions(file)):
            named = self._user(question, file, f"[{at}]")
            if named is None:
                continue
            if limit is not None and named not in users and len(users) >= limit:
                return
            builder = self._begin(question, declared, file)
            if named not in users:
                users[named] = self._new_user(builder, named, split)
            seen.add(self._question(question, users[named], answers, file, f"[{at}]."))
            self._profile(builder, question, users[named], file, f"[{at}].")
        if not seen:
            raise DataError(
                "holds no question: a list of {id, input, profile} is expected", file=file
            )
        if spare := answers.keys() - seen:
            self.report(
                DataError(
                    f"{len(spare)} golds have no question, '{min(spare)}' for one",
                    file=file,
                    field="id",
                )
            )

    def _user(self, question: Any, file: Path, place: str) -> str | None:
        name = next(
            (
                name
                for name in ("user_id", "user")
                if isinstance(question, dict) and name in question
            ),
            "id",
        )
        return _text(question, name, file, f"{place}.", self.report)

    def _new_user(self, builder: Builder, named: str, split: Split) -> str:
        user = named
        if (
            named in builder.splits
        ):  # in the time split the same people are in train and dev; a new user must be new
            user = f"{named}@{split}"
            self.left_out[
                f"users stand in train and dev; here the latter's names end in @{split}"
            ] += 1
        builder.splits[user] = split
        return user

    def _begin(self, question: Question, declared: str, file: Path) -> Builder:
        name = _which(question, declared, file)
        if self.builder is None:
            self.name = name
            self.builder = Builder(_task(name, str(question.get("input", ""))), {}, self.report)
        elif name != self.name:
            raise DataError(f"a question of {name} among those of {self.name}", file=file)
        return self.builder

    def _question(
        self, question: Question, user: str, answers: Mapping[str, str], file: Path, place: str
    ) -> str:
        key, text = (_text(question, name, file, place, self.report) for name in ("id", "input"))
        if key is not None and key not in answers:
            self.report(
                DataError(
                    f"question '{key}' has no gold in the outputs file",
                    file=file,
                    field=f"{place}id",
                )
            )
        elif key is not None and text is not None:
            self.instruction = text if self.instruction is None else _shared(self.instruction, text)
            entry = {
                "user": user,
                "id": key,
                "time": str(question.get("date") or ""),
                "input": text,
                "output": answers[key],
            }
            self.waiting.append((file, place, entry))
        return key or ""

    def _profile(
        self, builder: Builder, question: Question, user: str, file: Path, place: str
    ) -> None:
        shape, profile = _SHAPES[self.name], question.get("profile")
        if not isinstance(profile, list):
            self.report(
                DataError(
                    "must be a list" if "profile" in question else "is missing",
                    file=file,
                    field=f"{place}profile",
                )
            )
            return
        for at, item in enumerate(profile):
            where = f"{place}profile[{at}]."
            key, text, answer = (
                _text(item, name, file, where, self.report)
                for name in ("id", shape.input, shape.output)
            )
            if key is not None and text is not None and answer is not None:
                entry = {
                    "user": user,
                    "id": key,
                    "time": str(item.get("date") or ""),
                    "input": text,
                    "output": answer,
                }
                if self._usable(entry, "profile entries") and self._fresh(entry):
                    builder.add("history", entry, file, place=where)

    def _usable(self, entry: Mapping[str, str], what: str) -> bool:
        fault = text_fault(entry["input"]) or text_fault(entry["output"])
        if fault:
            self.left_out[f"{what} were left out: a text {fault.partition(':')[0]}"] += 1
        return not fault

    def _fresh(self, entry: dict[str, str]) -> bool:
        """False for a record that the user has already; one with a used id but another text gets an
        id of its own.
        """
        texts, number, key = (entry["input"], entry["output"]), 1, entry["id"]
        while (known := self.records.get((entry["user"], entry["id"]))) is not None:
            if known == texts:
                self.left_out["profile entries stood there twice and were taken once"] += 1
                return False
            number += 1
            entry["id"] = f"{key}#{number}"
        if number > 1:
            self.left_out["profile entries had the id of another one and were numbered"] += 1
        self.records[entry["user"], entry["id"]] = texts
        return True

    def build(self, path: Path) -> DataSet:
        if self.builder is None:
            raise DataError("holds no question", file=path)
        cut = self._instruction_end()
        self.builder.task = replace(
            self.builder.task, prompt=(self.instruction or "")[:cut] + "{input}"
        )
        for file, place, entry in self.waiting:
            asked = {**entry, "input": entry["input"][cut:]}
            if self._usable(asked, "questions"):
                self.builder.add("queries", asked, file, place=place)
        return self.builder.build(
            [*self.notes, *(f"{count} {what}" for what, count in self.left_out.items())]
        )

    def _instruction_end(self) -> int:
        """How long the instruction in front of every text is: up to LaMP's own mark, or else all
        that the questions share.
        """
        shared = self.instruction or ""
        at = shared.find(mark := _SHAPES[self.name].before_text)
        if at >= 0:
            return at + len(mark)
        self.notes.append(
            "the instruction was not found by LaMP's marks: it is what all questions have in common"
        )
        return shared.rfind(" ") + 1 if len(self.waiting) > 1 else 0


def _task(name: str, question: str) -> Task:
    """LaMP's task; its labels, where the question lists them in brackets, as the file has them."""
    listed = re.search(r"(?:categories|tags): \[([^\]]+)\]", question)
    task = LAMP[name]
    labels = tuple(label.strip() for label in listed[1].split(",")) if listed else task.labels
    return replace(
        task,
        labels=labels,
        extra={**task.extra, **({"free_history": True} if name in FREE_HISTORY else {})},
    )


def _shared(one: str, other: str) -> str:
    """What two texts begin with."""
    return one[
        : next(
            (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
            min(len(one), len(other)),
        )
    ]


def _which(question: Question, declared: str, file: Path) -> str:
    """Which LaMP task a question belongs to, by its profile's fields and its instruction."""
    profile, text = question.get("profile"), str(question.get("input", ""))
    fields = (
        set(profile[0])
        if isinstance(profile, list) and profile and isinstance(profile[0], dict)
        else set()
    )
    signs = (
        ("LaMP-2N", "category" in fields or "categories: [" in text),
        ("LaMP-2M", "tag" in fields or "tags: [" in text),
        ("LaMP-3", "score" in fields or "review: " in text),
        ("LaMP-1", ("abstract" in fields or not fields) and "[1]" in text and "[2]" in text),
        ("LaMP-5", "abstract" in fields or "abstract of a paper: " in text),
        ("LaMP-4", {"text", "title"} <= fields or "headline for the following article: " in text),
        ("LaMP-7", "text" in fields or "tweet" in text),
    )
    name = next((name for name, sign in signs if sign), "")
    number = re.sub(r"\D", "", declared)
    if not name or (number and not name.startswith(f"LaMP-{number}")):
        found = f"profile fields {', '.join(sorted(fields)) or '(none)'}, outputs of '{declared}'"
        raise DataError(f"no LaMP task that is known: {found}", file=file, field="profile")
    return name
