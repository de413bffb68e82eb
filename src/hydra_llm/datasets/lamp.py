"""The official files of LaMP-1, 2N, 2M, 3, 4, 5 and 7: `{split}_{questions,outputs}.json`.

Layout as published at lamp-benchmark.github.io: questions are a list of `{id, input, profile}`;
`input` is the instruction and the text; profile entries have `id`, the task's fields and, in the
time split, `date`; outputs are `{task, golds: [{id, output}]}`. A question is a user of its own
unless it names one (`user_id`). Train files give train users, dev files test users; hundreds of
megabytes are read as a stream. Known flaws (an empty text, a repeated id) are left out or renamed
with a note; all else is an error that names file and field.
"""

import gzip
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedIOBase
from itertools import chain, count
from os.path import commonprefix
from pathlib import Path
from typing import Any

import ijson

from hydra_llm.datasets.dataset import Builder, DataSet, Place, Report, Row, Split, as_fields, stop
from hydra_llm.datasets.native import number_as_text, open_binary, parse_json
from hydra_llm.errors import DataError
from hydra_llm.tasks.lamp import LAMP
from hydra_llm.text import fold, text_fault

SPLITS: Mapping[str, Split] = {"train": "train", "dev": "test", "test": "test"}
"""LaMP's split to ours. The golds of LaMP's own test split are not public."""

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


def is_official(path: Path) -> bool:
    """Whether a file or folder has LaMP's own layout."""
    return bool(_find(path))


def load(path: Path, limit_users: int | None = None, report: Report = stop) -> DataSet:
    """Read a folder, its `train` and `dev` folders, or one questions file; see `native.load`."""
    files = _find(path)
    usable = [(part, file) for part, file in files if part != "test" or _outputs(file).is_file()]
    if not usable:
        raise DataError("LaMP's test questions have no public golds: take train and dev", file=path)
    of_files = (_read_file(file, SPLITS[part], report, limit_users) for part, file in usable)
    questions = chain.from_iterable(of_files)
    first = next(questions, None)
    if first is None:
        raise DataError("holds no question", file=path)
    reader = _Reader(first)
    if len(usable) < len(files):
        reader.notes.append("LaMP's test questions were left out: their golds are not public")
    for question in chain([first], questions):
        reader.add(question)
    return reader.build()


def _find(path: Path) -> list[tuple[str, Path]]:
    """LaMP's splits and their questions files, in the order train, dev, test."""
    names = [(part, f"{part}_questions.json{zipped}") for part in SPLITS for zipped in ("", ".gz")]
    if path.is_file():
        return [(part, path) for part, name in names if path.name == name]
    places = [(part, file) for part, name in names for file in (path / name, path / part / name)]
    return [(part, file) for part, file in places if file.is_file()]


def _outputs(questions: Path) -> Path:
    return questions.with_name(questions.name.replace("_questions.json", "_outputs.json"))


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


def read_golds(file: Path, report: Report = stop) -> tuple[str, dict[str, str]]:
    """The task that an outputs file names, and its outputs by question id."""
    if not file.is_file():
        raise DataError("no such file: it holds the gold answers", file=file)
    with _open(file) as stream:
        data = parse_json(stream.read(), file)
    if not isinstance(data, dict) or not isinstance(data.get("golds"), list):
        raise DataError("must be a list of {id, output}", file=file, field="golds")
    outputs: dict[str, str] = {}
    for at, gold in enumerate(data["golds"]):
        place = Place(file, report, path=f"golds[{at}].")
        if texts := _texts(gold, ("id", "output"), place):
            id, output = texts
            if id in outputs:
                place.fault(f"'{id}' occurs twice", "id")
            outputs.setdefault(id, output)
    return str(data.get("task", "")), outputs


def _texts(data: Any, names: Sequence[str], place: Place) -> list[str] | None:
    """The fields, texts or numbers, as texts; None, and each fault reported, if one is neither."""
    fields = data if isinstance(data, dict) else {}
    texts = []
    for name in names:
        value = number_as_text(fields.get(name))
        if isinstance(value, str):
            texts.append(value)
        else:
            place.fault("must be a text" if name in fields else "is missing", name)
    return texts if len(texts) == len(names) else None


@dataclass(frozen=True, slots=True)
class _Question:
    place: Place
    split: Split
    task: str  # LaMP's name of it
    user: str  # as the file names it
    data: Mapping[str, Any]
    golds: Mapping[str, str]  # of the whole file, by question id


def _read_file(file: Path, split: Split, report: Report, limit: int | None) -> Iterator[_Question]:
    """A file's questions, up to the first one of a user beyond the limit."""
    declared, golds = read_golds(_outputs(file), report)
    whole = Place(file, report)
    users, ids = set[str](), set[str]()
    for at, data in enumerate(stream_questions(file)):
        place = Place(file, report, path=f"[{at}].")
        fields = data if isinstance(data, dict) else {}
        named = next((name for name in ("user_id", "user") if name in fields), "id")
        for user in _texts(data, [named], place) or ():
            if limit is not None and user not in users and len(users) >= limit:
                return
            users.add(user)
            ids.add(str(data.get("id")))
            yield _Question(place, split, _task_name(data, declared, whole), user, data, golds)
    if not ids:
        raise whole.error("holds no question: a list of {id, input, profile} is expected")
    if spare := golds.keys() - ids:
        whole.fault(f"{len(spare)} golds have no question, '{min(spare)}' for one", "id")


class _Reader:
    """Takes the questions of all files. Queries wait for the last one, because the instruction is
    what all questions have in common.
    """

    def __init__(self, first: _Question):
        task = LAMP[first.task]
        if listed := re.search(r"(?:categories|tags): \[([^\]]+)\]", str(first.data.get("input"))):
            task = replace(task, labels=tuple(label.strip() for label in listed[1].split(",")))
        # the records, an author's papers, are no answers of LaMP-1: which of two to cite
        free = {"free_history": True} if first.task == "LaMP-1" else {}
        self.builder = Builder(replace(task, extra=free), {})
        self.name = first.task
        self.notes: list[str] = []
        self.changes = Counter[str]()  # what was left out or renamed
        self.users: dict[tuple[Path | None, str], str] = {}  # (file, its user) to user
        self.queries: list[Row] = []
        # (user, id) to input and output: the profiles of one user's questions overlap
        self.records: dict[tuple[str, str], tuple[str, str]] = {}

    def add(self, question: _Question) -> None:
        """Take a question's profile, and keep its query for later."""
        place, data, golds = question.place, question.data, question.golds
        if question.task != self.name:
            message = f"a question of {question.task} among those of {self.name}"
            raise DataError(message, file=place.file)
        user = self._user(question)
        if texts := _texts(data, ("id", "input"), place):
            id, text = texts
            if id in golds:
                query = replace(place, names={"time": "date", "output": "gold"})
                self.queries.append((query, _entry(data, user, id, text, golds[id])))
            else:
                place.fault(f"question '{id}' has no gold in the outputs file", "id")
        profile = data.get("profile")
        if not isinstance(profile, list):
            place.fault("must be a list" if "profile" in data else "is missing", "profile")
            return
        input, output, _ = LAYOUTS[self.name]
        names = {"time": "date", "input": input, "output": output}
        for at, item in enumerate(profile):
            here = replace(place, path=f"{place.path}profile[{at}].", names=names)
            if texts := _texts(item, ("id", *LAYOUTS[self.name][:2]), here):
                entry = _entry(item, user, *texts)
                if self._is_usable(entry, "profile entries") and self._is_new(entry):
                    self.builder.add("history", entry, here)

    def _user(self, question: _Question) -> str:
        user, split, splits = question.user, question.split, self.builder.splits
        key = question.place.file, user
        if key not in self.users:
            if user in splits:  # the time split has the same people in train and dev
                user = f"{user}@{split}"
                what = f"users are in train and dev; here the latter's names end in @{split}"
                self.changes[what] += 1
            splits[user] = split
            self.users[key] = user
        return self.users[key]

    def _is_usable(self, entry: Mapping[str, str], what: str) -> bool:
        fault = text_fault(entry["input"]) or text_fault(entry["output"])
        if fault:
            self.changes[f"{what} were left out: a text {fault.partition(':')[0]}"] += 1
        return not fault

    def _is_new(self, entry: dict[str, str]) -> bool:
        """Whether the user lacks this record; one with a used id but another text is renamed."""
        texts, id = (entry["input"], entry["output"]), entry["id"]
        for number in count(2):
            known = self.records.setdefault((entry["user"], entry["id"]), texts)
            if known is texts:
                break
            if known == texts:
                self.changes["profile entries occurred twice and were taken once"] += 1
                return False
            entry["id"] = f"{id}#{number}"
        if entry["id"] != id:
            self.changes["profile entries had the id of another one and were numbered"] += 1
        return True

    def build(self) -> DataSet:
        mark = LAYOUTS[self.name][2]
        common = commonprefix([entry["input"] for _, entry in self.queries])  # noqa: RUF071
        if mark in common:
            cut = common.index(mark) + len(mark)
        else:
            reason = "it is what all questions have in common"
            self.notes.append(f"the instruction was not found by LaMP's marks: {reason}")
            cut = common.rfind(" ") + 1 if len(self.queries) > 1 else 0
        self.builder.task = replace(self.builder.task, prompt=common[:cut] + "{input}")
        for place, entry in self.queries:
            entry["input"] = entry["input"][cut:]
            if self._is_usable(entry, "questions"):
                self.builder.add("queries", entry, place)
        changes = [f"{number} {what}" for what, number in self.changes.items()]
        return self.builder.build([*self.notes, *changes])


def _entry(data: Mapping[str, Any], user: str, id: str, text: str, output: str) -> dict[str, str]:
    return as_fields(user, id, str(data.get("date") or ""), text, output)


def _task_name(question: Mapping[str, Any], declared: str, file: Place) -> str:
    """Which LaMP task a question belongs to, by its profile's fields and its instruction."""
    profile, text = question.get("profile"), str(question.get("input", ""))
    first = profile[0] if isinstance(profile, list) and profile else None
    fields = set(first) if isinstance(first, dict) else set()
    signs = {
        "LaMP-2N": "category" in fields or "categories: [" in text,
        "LaMP-2M": "tag" in fields or "tags: [" in text,
        "LaMP-3": "score" in fields or "review: " in text,
        "LaMP-1": ("abstract" in fields or not fields) and "[1]" in text and "[2]" in text,
        "LaMP-5": "abstract" in fields or "abstract of a paper: " in text,
        "LaMP-4": {"text", "title"} <= fields or "headline for the following article: " in text,
        "LaMP-7": "text" in fields or "tweet" in text,
    }
    name = next((name for name, sign in signs.items() if sign), "")
    number = re.sub(r"\D", "", declared)
    if not name or (number and not name.startswith(f"LaMP-{number}")):
        of_profile = f"profile fields {', '.join(sorted(fields)) or '(none)'}"
        message = f"no LaMP task that is known: {of_profile}, outputs of '{declared}'"
        raise file.error(message, "profile")
    return name
