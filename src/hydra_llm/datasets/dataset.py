"""A data set in memory, and the one gate through which every entry comes into it.

Knows the task and the users' order, but no file layout: `native.py`, `lamp.py`, `tabular.py` and
`demo.py` read those and hand raw fields to the `Builder`, so that the same faults are found in all
of them. DESIGN 3.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

from hydra_llm.errors import DataError, SettingsError, UnknownUser
from hydra_llm.history import in_order, parse_time
from hydra_llm.tasks.base import Task
from hydra_llm.text import text_fault
from hydra_llm.types import Query, Record

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
Part = Literal["history", "queries"]
FIELDS = ("user", "id", "time", "input", "output")
Report = Callable[[DataError], None]
"""What is done about a fault: raise it (`stop`), or keep it in a list and go on (`data check`)."""


def stop(fault: DataError) -> None:
    """The first fault ends the reading."""
    raise fault


class DataSet:
    """A task, its users, and each user's history and queries. Made by a `Builder`; not changed
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
        self._records = records
        self._queries = queries

    @classmethod
    def from_records(
        cls,
        task: Task,
        splits: Mapping[str, Split],
        records: Iterable[Record],
        queries: Iterable[Query],
    ) -> "DataSet":
        """Check entries that are in memory already; each user's order is the order given.

        Raises:
            DataError: the first entry that is broken.
        """
        builder = Builder(task, splits)
        for record in records:
            builder.add(
                "history", _fields(record, record.output), place=f"{record.user}/{record.id}."
            )
        for query in queries:
            builder.add(
                "queries", _fields(query, query.gold or ""), place=f"{query.user}/{query.id}."
            )
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
        """The user's history and, as records, the queries whose answers are known; oldest first.
        For training users only.
        """
        known = [query for query in self.queries(user) if query.gold is not None]
        asked = [
            Record(q.user, f"query:{q.id}", q.input, q.gold or "", q.time, q.span, q.position)
            for q in known
        ]
        return in_order([*self.history(user), *asked])

    def stream_history(self) -> Iterator[Record]:
        """Every record, user by user, as the file orders them."""
        for user in self.splits:
            yield from self._records.get(user, ())

    def stream_queries(self) -> Iterator[Query]:
        """Every query, user by user, as the file orders them."""
        for user in self.splits:
            yield from self._queries.get(user, ())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content: the same task, users and entries give the same digest, whatever
        file they came from.
        """
        sha = hashlib.sha256()
        for part in self._content():
            sha.update(json.dumps(part, sort_keys=True).encode() + b"\n")
        return sha.hexdigest()

    def _content(self) -> Iterator[object]:
        yield self.task.to_json()
        for user, split in self.splits.items():
            yield "user", user, split
            yield from (
                ("history", *_fields(record, record.output).values())
                for record in self._records.get(user, ())
            )
            yield from (
                ("queries", *_fields(query, query.gold or "").values())
                for query in self._queries.get(user, ())
            )

    def _check_user(self, user: str) -> None:
        if user not in self.splits:
            raise UnknownUser(f"the data set '{self.task.name}' has no user '{user}'")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DataSet) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"DataSet({self.task.name!r}, {len(self.splits)} users, {self.digest[:12]})"


def _fields(entry: Record | Query, output: str) -> dict[str, str]:
    return {
        "user": entry.user,
        "id": entry.id,
        "time": entry.time,
        "input": entry.input,
        "output": output,
    }


class Builder:
    """Checks entries one by one and gives each its place in its user's order."""

    def __init__(
        self,
        task: Task,
        splits: Mapping[str, Split],
        report: Report = stop,
        ignored: frozenset[str] = frozenset(),
    ):
        self.task = task
        self.splits = dict(splits)
        self.report = report
        self.ignored = ignored
        """Users of the file who were not asked for: their entries are left out unread."""
        self._entries: dict[str, dict[str, list[Mapping[str, str]]]] = {
            "history": {},
            "queries": {},
        }
        self._ids: dict[str, set[tuple[str, str]]] = {"history": set(), "queries": set()}

    def add(
        self,
        part: Part,
        entry: Mapping[str, str],
        file: Path | None = None,
        line: int | None = None,
        place: str = "",
    ) -> None:
        """Take an entry (`user`, `id`, `time`, `input`, `output`; all texts) if nothing is wrong
        with it, else report it.

        `place` stands before the field's name where a line number cannot tell, e.g.
        `[3].profile[7].`.
        """
        if entry["user"] in self.ignored:
            return
        faults = list(self._faults(part, entry))
        for field, message in faults:
            self.report(DataError(message, file=file, line=line, field=place + field))
        if not faults:
            self._entries[part].setdefault(entry["user"], []).append(entry)
            self._ids[part].add((entry["user"], entry["id"]))

    def _faults(self, part: Part, entry: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        yield from (
            (name, fault)
            for name in FIELDS
            if (fault := text_fault(entry[name], may_be_empty=name == "time"))
        )
        if entry["user"] and entry["user"] not in self.splits:
            yield "user", f"'{entry['user']}' is not among the data set's users"
        if (entry["user"], entry["id"]) in self._ids[part]:
            yield "id", f"user '{entry['user']}' has the id '{entry['id']}' twice"
        if not readable_time(entry["time"]):
            yield (
                "time",
                f"'{entry['time']}' is no time: write ISO 8601, a year, or seconds since 1970",
            )
        if entry["output"] and not self._may_answer(part, entry["output"]):
            yield "output", f"'{entry['output'][:60]}' is not one of the task's labels"

    def _may_answer(self, part: Part, output: str) -> bool:
        return (part == "history" and self.task.free_history) or self.task.is_answer(output)

    def build(self, notes: Sequence[str] = ()) -> DataSet:
        """The data set of all that was taken. A user's queries come after all of its history."""
        records = {
            user: [_record(entry, at) for at, entry in enumerate(its)]
            for user, its in self._entries["history"].items()
        }
        queries = {
            user: [_query(entry, len(records.get(user, ())) + at) for at, entry in enumerate(its)]
            for user, its in self._entries["queries"].items()
        }
        return DataSet(self.task, self.splits, records, queries, notes)


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


def _record(entry: Mapping[str, str], position: int) -> Record:
    return Record(
        entry["user"],
        entry["id"],
        entry["input"],
        entry["output"],
        entry["time"],
        parse_time(entry["time"]),
        position,
    )


def _query(entry: Mapping[str, str], position: int) -> Query:
    return Query(
        entry["user"],
        entry["id"],
        entry["input"],
        entry["output"],
        entry["time"],
        parse_time(entry["time"]),
        position,
    )


def held_out(count: int, share: float = 0.2) -> int:
    """How many of a user's `count` records, the last ones, become queries: a share of them, 1 to
    10; none of a single record.
    """
    return min(10, max(1, int(count * share)), count - 1) if count > 1 else 0
