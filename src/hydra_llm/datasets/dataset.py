"""A data set in memory, and the one class through which every entry gets into it.

Knows the task and the users' order, but no file layout: `native.py`, `lamp.py`, `tabular.py` and
`demo.py` read those and hand raw fields to the `Builder`, which finds the same faults in all of
them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

from hydra_llm.errors import DataError, SettingsError, UnknownUser
from hydra_llm.history import in_order, parse_time
from hydra_llm.tasks.base import Task
from hydra_llm.text import text_fault
from hydra_llm.types import Query, Record

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
Part = Literal["history", "queries"]
PARTS: tuple[Part, ...] = ("history", "queries")
FIELDS = ("user", "id", "time", "input", "output")
Report = Callable[[DataError], None]
"""What is done about a fault: raise it (`stop`), or keep it in a list and go on (`data check`)."""

Entry = TypeVar("Entry", Record, Query)


def stop(fault: DataError) -> None:
    """Raise the first fault."""
    raise fault


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a file, for the faults that are found there, and what is done about them."""

    file: Path | None = None
    report: Report = stop
    line: int | None = None
    path: str = ""
    """Precedes the field's name where there is no line number, e.g. `[3].profile[7].`."""

    def error(self, message: str, field: str = "") -> DataError:
        """A fault of this place, or of a field here."""
        named = f"{self.path}{field}" if field else None
        return DataError(message, file=self.file, line=self.line, field=named)

    def fault(self, message: str, field: str = "") -> None:
        """Report a fault of this place, or of a field here."""
        self.report(self.error(message, field))

    def at_line(self, number: int) -> "Place":
        """A line of this file."""
        return replace(self, line=number)

    def at(self, path: str) -> "Place":
        """A part of this place, e.g. `profile[7].`."""
        return replace(self, path=f"{self.path}{path}")


class DataSet:
    """A task, its users, and each user's history and queries. Made by a `Builder`, and not changed
    afterwards.
    """

    def __init__(
        self,
        task: Task,
        splits: Mapping[str, Split],
        records: Mapping[str, Sequence[Record]],
        queries: Mapping[str, Sequence[Query]],
        notes: Sequence[str] = (),
    ):
        self.task = task
        self.splits = dict(splits)
        """User to `train` or `test`, in the order of the file."""
        self.notes = tuple(notes)
        """One line for each thing that the reader changed or left out."""
        self._records, self._queries = records, queries

    @classmethod
    def from_records(
        cls,
        task: Task,
        splits: Mapping[str, Split],
        records: Iterable[Record],
        queries: Iterable[Query],
    ) -> "DataSet":
        """A data set of values in memory, checked; each user's order is the order given.

        Raises:
            DataError: the first entry that is broken.
        """
        builder = Builder(task, splits)
        for record in records:
            builder.add("history", fields_of(record), Place(path=f"{record.user}/{record.id}."))
        for query in queries:
            builder.add("queries", fields_of(query), Place(path=f"{query.user}/{query.id}."))
        return builder.build()

    def users(self, split: str | None = None) -> list[str]:
        """The users in file order, all or those of one split."""
        if split is not None and split not in SPLITS:
            raise SettingsError(f"unknown split '{split}': take train or test")
        return [user for user, its in self.splits.items() if split in (None, its)]

    def history(self, user: str) -> list[Record]:
        """The user's records, oldest first; empty if there are none.

        Raises:
            UnknownUser: the data set has no such user.
        """
        self._check_user(user)
        return in_order(self._records.get(user, ()))

    def queries(self, user: str) -> list[Query]:
        """The user's queries with their gold answers, in order.

        Raises:
            UnknownUser: the data set has no such user.
        """
        self._check_user(user)
        return list(self._queries.get(user, ()))

    def answered(self, user: str) -> list[Record]:
        """The user's history and, as records, the queries with a gold answer, oldest first. For
        training users only.
        """
        asked = [
            Record(q.user, f"query:{q.id}", q.input, q.gold, q.time, q.span, q.position)
            for q in self.queries(user)
            if q.gold is not None
        ]
        return in_order([*self.history(user), *asked])

    def stream_history(self) -> Iterator[Record]:
        """Every record, user by user, in file order."""
        return (record for user in self.splits for record in self._records.get(user, ()))

    def stream_queries(self) -> Iterator[Query]:
        """Every query, user by user, in file order."""
        return (query for user in self.splits for query in self._queries.get(user, ()))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content: equal for the same task, users and entries, whatever file they
        came from.
        """
        sha = hashlib.sha256()
        for part in self._content():
            sha.update(json.dumps(part, sort_keys=True).encode() + b"\n")
        return sha.hexdigest()

    def _content(self) -> Iterator[object]:
        yield self.task.to_json()
        for user, split in self.splits.items():
            yield "user", user, split
            for record in self._records.get(user, ()):
                yield "history", *fields_of(record).values()
            for query in self._queries.get(user, ()):
                yield "queries", *fields_of(query).values()

    def _check_user(self, user: str) -> None:
        if user not in self.splits:
            raise UnknownUser(f"the data set '{self.task.name}' has no user '{user}'")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DataSet) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"DataSet({self.task.name!r}, {len(self.splits)} users, {self.digest[:12]})"


def fields_of(entry: Record | Query) -> dict[str, str]:
    """An entry's `FIELDS`; a query's output is its gold answer."""
    output = entry.output if isinstance(entry, Record) else entry.gold or ""
    return dict(zip(FIELDS, (entry.user, entry.id, entry.time, entry.input, output), strict=True))


class Builder:
    """Checks entries one by one and gives each its position in its user's order."""

    def __init__(
        self, task: Task, splits: Mapping[str, Split], ignored: frozenset[str] = frozenset()
    ):
        self.task = task
        self.splits = dict(splits)
        self.ignored = ignored
        """Users of the file who were not asked for: their entries are left out unchecked."""
        self._entries: dict[Part, dict[str, list[Mapping[str, str]]]] = {part: {} for part in PARTS}
        self._ids: set[tuple[Part, str, str]] = set()

    def add(self, part: Part, entry: Mapping[str, str], place: Place = Place()) -> None:
        """Take an entry (`FIELDS`, all texts) if nothing is wrong with it, else report it."""
        user = entry["user"]
        if user in self.ignored:
            return
        faults = list(self._faults(part, entry))
        for field, message in faults:
            place.fault(message, field)
        if not faults:
            self._entries[part].setdefault(user, []).append(entry)
            self._ids.add((part, user, entry["id"]))

    def _faults(self, part: Part, entry: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        for name in FIELDS:
            if fault := text_fault(entry[name], may_be_empty=name == "time"):
                yield name, fault
        user, id, time, output = (entry[name] for name in ("user", "id", "time", "output"))
        if user and user not in self.splits:
            yield "user", f"'{user}' is not among the data set's users"
        if (part, user, id) in self._ids:
            yield "id", f"user '{user}' has the id '{id}' twice"
        if not readable_time(time):
            yield "time", f"'{time}' is no time: write ISO 8601, a year, or seconds since 1970"
        if output and not self._may_answer(part, output):
            yield "output", f"'{output[:60]}' is not one of the task's labels"

    def _may_answer(self, part: Part, output: str) -> bool:
        return (part == "history" and self.task.free_history) or self.task.is_answer(output)

    def build(self, notes: Sequence[str] = ()) -> DataSet:
        """The data set of all entries taken. A user's queries come after all of its history."""
        records = {
            user: [_made(Record, entry, position) for position, entry in enumerate(its)]
            for user, its in self._entries["history"].items()
        }
        queries = {
            user: [
                _made(Query, entry, position)
                for position, entry in enumerate(its, len(records.get(user, ())))
            ]
            for user, its in self._entries["queries"].items()
        }
        return DataSet(self.task, self.splits, records, queries, notes)


def _made(kind: type[Entry], entry: Mapping[str, str], position: int) -> Entry:
    user, id, time, input, output = (entry[name] for name in FIELDS)
    return kind(user, id, input, output, time, parse_time(time), position)


def readable_time(text: str) -> bool:
    """Whether `history.parse_time` can read it; an empty one means unknown."""
    try:
        parse_time(text)
    except (ValueError, OverflowError):
        return False
    return True


def check_split(value: str) -> Split | None:
    """`train` or `test`, or None for anything else."""
    return value if value in SPLITS else None


def held_out(count: int, share: float = 0.2) -> int:
    """How many of a user's `count` records, the last ones, become queries: a share of them, 1 to
    10; none of a single record.
    """
    return min(10, max(1, int(count * share)), count - 1) if count > 1 else 0
