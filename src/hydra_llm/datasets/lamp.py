"""The official files of LaMP-1, 2N, 2M, 3, 4, 5 and 7: `{split}_{questions,outputs}.json`.

Layout as published at lamp-benchmark.github.io: questions are a list of `{id, input, profile}`;
`input` is the instruction and the text; profile entries have `id`, the task's fields and, in the
time split, `date`; outputs are `{task, golds: [{id, output}]}`. Each question is a user of its own
unless it names one (`user_id`). Train files give train users, dev files test users. Files are
hundreds of megabytes: they are read as a stream (ijson). Known flaws of the files (an empty text, a
repeated id) are left out or renamed with a note; all else is an error that names file and field.
"""

import gzip
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import ijson

from hydra_llm.datasets.dataset import Builder, DataSet, Place, Report, Split, as_fields, stop
from hydra_llm.datasets.native import open_binary, parse_json
from hydra_llm.errors import DataError
from hydra_llm.tasks.base import Task
from hydra_llm.tasks.lamp import LAMP
from hydra_llm.text import fold, text_fault

SPLITS: Mapping[str, Split] = {"train": "train", "dev": "test", "test": "test"}
"""LaMP's split to ours. The golds of LaMP's own test split are not public."""

Question = dict[str, Any]
LAYOUTS: Mapping[str, tuple[str, str, str]] = {
    "LaMP-1": ("abstract", "title", '"'),
    "LaMP-2N": ("text", "category", "article: "),
    "LaMP-2M": ("description", "tag", "description: "),
    "LaMP-3": ("text", "score", "review: "),
    "LaMP-4": ("text", "title", "article: "),
    "LaMP-5": ("abstract", "title", ": "),
    "LaMP-7": ("text", "text", ": "),
}
"""A profile's fields for input and output, and what precedes the text in a question."""
FREE_HISTORY = ("LaMP-1",)
"""Tasks whose records, an author's papers, are no answers of the task (which of two to cite)."""


def is_official(path: Path) -> bool:
    """Whether a file or folder has LaMP's own layout."""
    return bool(_find(path))


def load(path: Path, limit_users: int | None = None, report: Report = stop) -> DataSet:
    """Read a folder, its `train` and `dev` folders, or one questions file; see `native.load`."""
    found = _find(path)
    usable = [(part, file) for part, file in found if part != "test" or _outputs(file).is_file()]
    if not usable:
        raise DataError("LaMP's test questions have no public golds: take train and dev", file=path)
    reader = _Reader()
    if len(usable) < len(found):
        reader.notes.append("LaMP's test questions were left out: their golds are not public")
    for part, questions in usable:
        reader.read(questions, part, report, limit_users)
    return reader.build(path)


def _find(path: Path) -> list[tuple[str, Path]]:
    """LaMP's splits and their questions files, in the order train, dev, test."""
    names = [(part, f"{part}_questions.json{zipped}") for part in SPLITS for zipped in ("", ".gz")]
    if path.is_file():
        return [(part, path) for part, name in names if path.name == name]
    places = [(part, file) for part, name in names for file in (path / name, path / part / name)]
    return [(part, file) for part, file in places if file.is_file()]


def _outputs(questions: Path) -> Path:
    return questions.with_name(questions.name.replace("_questions.json", "_outputs.json"))


# ---- files


@contextmanager
def _open(file: Path) -> Iterator[BufferedIOBase]:
    try:
        with open_binary(file) as stream:
            if stream.read(3) != b"\xef\xbb\xbf":  # a byte order mark
                stream.seek(0)
            yield stream
    except (ijson.JSONError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"not JSON, or cut: {fold(str(error))[:120]}", file=file) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", file=file) from None


def stream_questions(file: Path, prefix: str = "item") -> Iterator[Any]:
    """The questions of a file one by one (or what `prefix` names in each)."""
    with _open(file) as stream:
        yield from ijson.items(stream, prefix, use_float=True)


def _read_golds(file: Path, report: Report) -> tuple[str, dict[str, str]]:
    """The task that an outputs file names, and its outputs by question id."""
    if not file.is_file():
        raise DataError("no such file: the golds stand there", file=file)
    with _open(file) as stream:
        data = parse_json(stream.read(), file)
    if not isinstance(data, dict) or not isinstance(data.get("golds"), list):
        raise DataError("must be a list of {id, output}", file=file, field="golds")
    outputs: dict[str, str] = {}
    for at, gold in enumerate(data["golds"]):
        place = Place(file, report, path=f"golds[{at}].")
        id, output = (_text(gold, name, place) for name in ("id", "output"))
        if id in outputs:
            place.fault(f"'{id}' stands there twice", "id")
        elif id is not None and output is not None:
            outputs[id] = output
    return str(data.get("task", "")), outputs


def read_gold_ids(file: Path) -> set[str]:
    """The question ids of an outputs file."""
    return set(_read_golds(file, stop)[1])


def read_question_ids(file: Path) -> set[str]:
    """The question ids of a questions file."""
    return {str(id) for id in stream_questions(file, "item.id")}


def _text(data: Any, name: str, place: Place) -> str | None:
    """A text or integer field as text; None, and reported, if there is none."""
    present = isinstance(data, dict) and name in data
    value = data[name] if present else None
    if isinstance(value, int | str) and not isinstance(value, bool):
        return str(value)
    place.fault("must be a text" if present else "is missing", name)
    return None


def _texts(data: Any, names: Iterable[str], place: Place) -> list[str] | None:
    """The fields as texts; None, and each one reported, if any is not usable."""
    values = [_text(data, name, place) for name in names]
    texts = [value for value in values if value is not None]
    return texts if len(texts) == len(values) else None


# ---- questions to entries


@dataclass
class _Reader:
    """Reads one file after the other. Queries wait until all are read, because the instruction is
    what all questions have in common.
    """

    notes: list[str] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)  # what was left out or renamed
    name: str = ""
    builder: Builder | None = None
    instruction: str | None = None
    queries: list[tuple[Place, dict[str, str]]] = field(default_factory=list)
    # (user, id) to input and output: the profiles of one user's questions overlap
    records: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)

    def read(self, questions: Path, part: str, report: Report, limit: int | None) -> None:
        """Read a file's questions, up to the first one of a user beyond the limit."""
        declared, golds = _read_golds(_outputs(questions), report)
        file, split = Place(questions, report), SPLITS[part]
        users, ids = dict[str, str](), set[str]()
        for at, question in enumerate(stream_questions(questions)):
            place = file.at(f"[{at}].")
            name = _user(question, place)
            if name is None:
                continue
            if limit is not None and name not in users and len(users) >= limit:
                return
            builder = self._builder_for(question, declared, file)
            if name not in users:
                users[name] = self._add_user(builder, name, split)
            ids.add(self._read_query(question, users[name], golds, place))
            self._read_profile(builder, question, users[name], place)
        if not ids:
            raise file.error("holds no question: a list of {id, input, profile} is expected")
        if spare := golds.keys() - ids:
            file.fault(f"{len(spare)} golds have no question, '{min(spare)}' for one", "id")

    def _builder_for(self, question: Question, declared: str, file: Place) -> Builder:
        name = _task_name(question, declared, file)
        if self.builder is None:
            self.name = name
            self.builder = Builder(_task(name, str(question.get("input", ""))), {})
        elif name != self.name:
            raise file.error(f"a question of {name} among those of {self.name}")
        return self.builder

    def _add_user(self, builder: Builder, name: str, split: Split) -> str:
        user = name
        if name in builder.splits:  # the time split has the same people in train and dev
            user = f"{name}@{split}"
            what = f"users stand in train and dev; here the latter's names end in @{split}"
            self.changes[what] += 1
        builder.splits[user] = split
        return user

    def _read_query(
        self, question: Question, user: str, golds: Mapping[str, str], place: Place
    ) -> str:
        """Keep a question for later; returns its id."""
        id, text = (_text(question, name, place) for name in ("id", "input"))
        if id is not None and id not in golds:
            place.fault(f"question '{id}' has no gold in the outputs file", "id")
        elif id is not None and text is not None:
            known = text if self.instruction is None else self.instruction
            self.instruction = _common_start(known, text)
            self.queries.append((place, _entry(question, user, id, text, golds[id])))
        return id or ""

    def _read_profile(self, builder: Builder, question: Question, user: str, place: Place) -> None:
        names, profile = ("id", *LAYOUTS[self.name][:2]), question.get("profile")
        if not isinstance(profile, list):
            place.fault("must be a list" if "profile" in question else "is missing", "profile")
            return
        for at, item in enumerate(profile):
            here = place.at(f"profile[{at}].")
            if texts := _texts(item, names, here):
                entry = _entry(item, user, *texts)
                if self._is_usable(entry, "profile entries") and self._is_new(entry):
                    builder.add("history", entry, here)

    def _is_usable(self, entry: Mapping[str, str], what: str) -> bool:
        fault = text_fault(entry["input"]) or text_fault(entry["output"])
        if fault:
            self.changes[f"{what} were left out: a text {fault.partition(':')[0]}"] += 1
        return not fault

    def _is_new(self, entry: dict[str, str]) -> bool:
        """Whether the user lacks this record; one with a used id but another text is renamed."""
        texts, number, id = (entry["input"], entry["output"]), 1, entry["id"]
        while (known := self.records.get((entry["user"], entry["id"]))) is not None:
            if known == texts:
                self.changes["profile entries stood there twice and were taken once"] += 1
                return False
            number += 1
            entry["id"] = f"{id}#{number}"
        if number > 1:
            self.changes["profile entries had the id of another one and were numbered"] += 1
        self.records[entry["user"], entry["id"]] = texts
        return True

    def build(self, path: Path) -> DataSet:
        if self.builder is None:
            raise DataError("holds no question", file=path)
        cut = self._instruction_end()
        prompt = (self.instruction or "")[:cut] + "{input}"
        self.builder.task = replace(self.builder.task, prompt=prompt)
        for place, entry in self.queries:
            query = {**entry, "input": entry["input"][cut:]}
            if self._is_usable(query, "questions"):
                self.builder.add("queries", query, place)
        changes = [f"{count} {what}" for what, count in self.changes.items()]
        return self.builder.build([*self.notes, *changes])

    def _instruction_end(self) -> int:
        """The length of the instruction before every text: up to LaMP's own mark, or else all that
        the questions have in common.
        """
        common, mark = self.instruction or "", LAYOUTS[self.name][2]
        if mark in common:
            return common.index(mark) + len(mark)
        self.notes.append(
            "the instruction was not found by LaMP's marks: it is what all questions have in common"
        )
        return common.rfind(" ") + 1 if len(self.queries) > 1 else 0


def _user(question: Any, place: Place) -> str | None:
    named = question if isinstance(question, dict) else {}
    name = next((name for name in ("user_id", "user") if name in named), "id")
    return _text(question, name, place)


def _common_start(one: str, other: str) -> str:
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _entry(data: Question, user: str, id: str, text: str, output: str) -> dict[str, str]:
    return as_fields(user, id, str(data.get("date") or ""), text, output)


def _task(name: str, question: str) -> Task:
    """LaMP's task; its labels as the file has them, where the question lists them in brackets."""
    listed = re.search(r"(?:categories|tags): \[([^\]]+)\]", question)
    task = LAMP[name]
    labels = tuple(label.strip() for label in listed[1].split(",")) if listed else task.labels
    free = {"free_history": True} if name in FREE_HISTORY else {}
    return replace(task, labels=labels, extra={**task.extra, **free})


def _task_name(question: Question, declared: str, file: Place) -> str:
    """Which LaMP task a question belongs to, by its profile's fields and its instruction."""
    profile, text = question.get("profile"), str(question.get("input", ""))
    first = profile[0] if isinstance(profile, list) and profile else None
    fields = set(first) if isinstance(first, dict) else set()
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
        raise file.error(f"no LaMP task that is known: {found}", "profile")
    return name
