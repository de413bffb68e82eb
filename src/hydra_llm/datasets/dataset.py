"""A data set, whose users' entries are read when they are asked for, and the `Builder` that checks
every entry, whatever file it came from.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

from cachetools import LRUCache

from hydra_llm.errors import DataError, SettingsError, UnknownUser
from hydra_llm.history import as_record, in_order, parse_time, precedes
from hydra_llm.rows import Lazy, Rows
from hydra_llm.tasks.base import Task
from hydra_llm.text import text_fault
from hydra_llm.types import Choice, Query, Record

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
Part = Literal["history", "queries"]
PARTS: tuple[Part, ...] = ("history", "queries")
FIELDS = ("user", "id", "time", "input", "output")
Fields = Mapping[str, Any]  # the `FIELDS` of an entry, all texts; of a choice `candidates` too
KNOWN_IDS = 10_000  # users whose ids stay in memory while entries are added
Report = Callable[[DataError], None]  # raises a fault (`stop`), or keeps it (`data check`)

Entry = TypeVar("Entry", Record, Query)


def stop(fault: DataError) -> None:
    """Raise the first fault."""
    raise fault


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a file, and what is done about the faults that are found there."""

    file: Path | None = None
    report: Report = stop
    line: int | None = None
    path: str = ""  # precedes the field's name where there is no line, e.g. `[3].profile[7].`
    names: Mapping[str, str] = field(default_factory=dict)  # what the file calls our `FIELDS`

    def error(self, message: str, field: str = "") -> DataError:
        """A fault of this place, or of a field here."""
        named = f"{self.path}{self.names.get(field, field)}" if field else ""
        return DataError(message, file=self.file, line=self.line, field=named)

    def fault(self, message: str, field: str = "") -> None:
        """Report a fault of this place, or of a field here."""
        self.report(self.error(message, field))


Row = tuple[Place, dict[str, Any]]  # an entry and its place


@dataclass(frozen=True, eq=False, repr=False)
class DataSet:
    """A task, its users, and each user's history and queries."""

    task: Task
    splits: Mapping[str, Split]  # user to `train` or `test`, in the order of the file
    _records: Mapping[str, Sequence[Record]]  # of users who have some
    _queries: Mapping[str, Sequence[Query]]
    notes: Sequence[str] = ()  # one line for each thing that the reader changed or left out

    @staticmethod
    def from_records(
        task: Task, splits: Mapping[str, Split], records: Iterable[Record], queries: Iterable[Query]
    ) -> "DataSet":
        """A data set of values in memory; each user's order is the order given. Raises DataError
        for the first entry that is broken.
        """
        builder = Builder(task, splits)
        for entry in chain[Record | Query](records, queries):
            part: Part = "history" if isinstance(entry, Record) else "queries"
            builder.add(part, fields_of(entry), Place(path=f"{entry.user}/{entry.id}."))
        return builder.build()

    def users(self, split: str | None = None) -> list[str]:
        """The users in file order, all or those of one split."""
        if split is not None and split not in SPLITS:
            raise SettingsError(f"unknown split '{split}': take train or test")
        return [user for user, own in self.splits.items() if split in (None, own)]

    def with_records(self, split: str | None = None) -> list[str]:
        """The users, all or those of one split, who have records; none of these is read."""
        return [user for user in self.users(split) if user in self._records]

    def history(self, user: str) -> list[Record]:
        """The user's records, oldest first. Raises UnknownUser."""
        return in_order(self._own(self._records, user))

    def queries(self, user: str) -> list[Query]:
        """The user's queries with their gold answers, in order. Raises UnknownUser."""
        return list(self._own(self._queries, user))

    def answered(self, user: str) -> list[Record]:
        """History and, as records, the queries with a gold answer, oldest first; for training."""
        records = self.history(user)
        for q in self.queries(user):
            if q.gold is not None:
                records.append(as_record(q, f"query:{q.id}"))
        return in_order(records)

    def histories(self, users: Iterable[str]) -> Mapping[str, list[Record]]:
        """`history` of each of these users, read when it is asked for."""
        return Lazy(users, self.history)

    def all_answered(self, users: Iterable[str]) -> Mapping[str, list[Record]]:
        """`answered` of each of these users, read when it is asked for."""
        return Lazy(users, self.answered)

    def stream_history(self) -> Iterator[Record]:
        """Every record, user by user, in file order."""
        return (record for user in self.splits for record in self._own(self._records, user))

    def stream_queries(self) -> Iterator[Query]:
        """Every query, user by user, in file order."""
        return (query for user in self.splits for query in self._own(self._queries, user))

    def plain_entries(self) -> dict[Part, list[Record | Query]]:
        """Records and queries that are no recorded choices, by part."""
        streams = (self.stream_history(), self.stream_queries())
        plain = [[entry for entry in own if not offered(entry)] for own in streams]
        return dict(zip(PARTS, plain, strict=True))

    def asks_choices(self, *, prefer: bool) -> bool:
        """Whether methods are asked its recorded choices: where it has no other queries, or has
        both and `prefer`.
        """
        kinds = {bool(own.offered) for own in self.stream_queries()}
        return kinds == {True} or (prefer and True in kinds)

    def asking(self, *, choices: bool) -> "DataSet":
        """The data set in which all queries are recorded choices, or none is; training users' other
        ones become records.
        """
        kept, records = dict[str, list[Query]](), dict[str, list[Record]]()
        for user, split in self.splits.items():
            kept[user] = [own for own in self.queries(user) if bool(own.offered) == choices]
            left = [own for own in self.queries(user) if bool(own.offered) != choices]
            known = [as_record(q, f"query:{q.id}") for q in left if q.gold and split == "train"]
            if own := [*self._own(self._records, user), *known]:
                records[user] = own
        same = all(len(kept[user]) == len(self.queries(user)) for user in self.splits)
        return self if same else replace(self, _queries=kept, _records=records)

    def with_history(self, count: int | Literal["all"]) -> "DataSet":
        """New users have only `count` records: the latest that precede all their queries."""
        if count == "all":
            return self
        records = {user: self.history(user) for user in self.splits}
        for user in self.users("test"):
            asked = self.queries(user)
            early = [r for r in records[user] if all(precedes(r, query) for query in asked)]
            records[user] = early[max(0, len(early) - count) :]
        kept = {user: own for user, own in records.items() if own}
        return replace(self, _records=kept)

    def _own(self, entries: Mapping[str, Sequence[Entry]], user: str) -> Sequence[Entry]:
        if user not in self.splits:
            raise UnknownUser(f"the data set '{self.task.name}' has no user '{user}'")
        return entries.get(user, ())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of task, users and entries, whatever file they came from."""
        sha = hashlib.sha256()
        for part in self._content():
            sha.update(json.dumps(part, sort_keys=True).encode() + b"\n")
        return sha.hexdigest()

    def _content(self) -> Iterator[object]:
        yield self.task.to_json()
        for user, split in self.splits.items():
            yield "user", user, split
            for record in self._own(self._records, user):
                yield "history", *fields_of(record).values()
            for query in self._own(self._queries, user):
                yield "queries", *fields_of(query).values()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DataSet) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"DataSet({self.task.name!r}, {len(self.splits)} users, {self.digest[:12]})"


def as_fields(*values: str) -> dict[str, str]:
    """The values, in the order of `FIELDS`, by name."""
    return dict(zip(FIELDS, values, strict=True))


def offered(entry: Record | Query) -> tuple[str, ...]:
    """The candidates of a recorded choice, in the order shown; empty for any other entry."""
    if isinstance(entry, Query):
        return entry.offered
    return entry.candidates if isinstance(entry, Choice) else ()


def equals_fault(candidates: Sequence[str]) -> str:
    """Which candidates are one text; empty if all are different."""
    first: dict[str, int] = {}
    for at, text in enumerate(candidates):
        if (other := first.setdefault(text.strip(), at)) != at:
            return f"candidates {other} and {at} are equal, '{text.strip()[:40]}': keep one of them"
    return ""


def fields_of(entry: Record | Query) -> dict[str, Any]:
    """An entry's `FIELDS`; a query's output is its gold answer. Of a choice also `candidates`."""
    output = entry.output if isinstance(entry, Record) else entry.gold or ""
    fields = as_fields(entry.user, entry.id, str(entry.time), entry.input, output)
    return fields | ({"candidates": own} if (own := offered(entry)) else {})


class Builder:
    """Checks entries one by one and gives each its position in its user's order."""

    def __init__(self, task: Task, splits: Mapping[str, Split]):
        self.task, self.splits = task, dict(splits)
        self._history = Rows(_as_records)
        self._queries = Rows(partial(_as_queries, self._history))
        self._rows: dict[Part, Rows[Any]] = {"history": self._history, "queries": self._queries}
        self._ids: LRUCache[tuple[Part, str], set[str]] = LRUCache(KNOWN_IDS)

    def add_user(self, rows: Sequence[Row], query_share: float = 0.2) -> None:
        """Add a user's entries, oldest first; the last ones become queries."""
        first_query = len(rows) - held_out(len(rows), query_share)
        for at, (place, entry) in enumerate(rows):
            self.add("history" if at < first_query else "queries", entry, place)

    def add(self, part: Part, entry: Fields, place: Place = Place()) -> None:
        """Take an entry (`FIELDS`, all texts) if nothing is wrong with it, else report it. With
        `candidates`, two or more distinct texts among which `output` stands, it is a choice.
        """
        texts = ((name, text_fault(entry[name], may_be_empty=name == "time")) for name in FIELDS)
        faults = [(name, fault) for name, fault in texts if fault]
        user, id, time, _, output = (entry[name] for name in FIELDS)
        free = part == "history" and self.task.free_history
        if not free:
            output = self._tidy(output)
            entry = {**entry, "output": output}
        if "candidates" in entry:
            entry = {**entry, "candidates": [self._tidy(text) for text in entry["candidates"]]}
        if user and user not in self.splits:
            faults.append(("user", f"'{user}' is not among the data set's users"))
        ids = self._known_ids(part, user)
        if id in ids:
            faults.append(("id", f"user '{user}' has the id '{id}' twice"))
        if fault := time_fault(time):
            faults.append(("time", fault))
        if output and not free and not self.task.is_answer(output):
            faults.append(("output", f"'{output[:60]}' is not one of the task's labels"))
        if strange := [c for c in entry.get("candidates", ()) if not self.task.is_answer(c)]:
            faults.append(("candidates", f"'{strange[0][:60]}' is not one of the task's labels"))
        elif fault := equals_fault(entry.get("candidates", ())):  # as tidy labels, if not before
            faults.append(("candidates", fault))
        for name, message in faults:
            place.fault(message, name)
        if not faults:
            own = [entry["candidates"]] if "candidates" in entry else []
            self._rows[part].add(user, [id, time, entry["input"], output, *own])
            ids.add(id)

    def _known_ids(self, part: Part, user: str) -> set[str]:
        """The ids of a user's entries so far; those of the latest users are kept."""
        if (part, user) not in self._ids:
            self._ids[part, user] = {row[0] for row in self._rows[part].raw(user)}
        return self._ids[part, user]

    def _tidy(self, output: str) -> str:
        """The label that is meant: "5.0" is the label "5"; any other text as it is."""
        known = self.task.is_answer(output)
        return output if known else self.task.strategy.tidy(output.strip())

    def build(self, notes: Sequence[str] = ()) -> DataSet:
        """The data set of all entries taken. A user's queries come after all of its history."""
        return DataSet(self.task, self.splits, self._history, self._queries, notes)


def _as_records(user: str, rows: Iterable[list[Any]]) -> list[Record]:
    return [as_record(query, query.id) for query in _parse(user, rows, 0)]


def _as_queries(history: Rows[Record], user: str, rows: Iterable[list[Any]]) -> list[Query]:
    return _parse(user, rows, history.count(user))


def _parse(user: str, rows: Iterable[list[Any]], first: int) -> list[Query]:
    """The entries, whose positions start at `first`; a row is id, time, input, output and, of a
    choice, its candidates.
    """
    entries = []
    for position, (id, time, input, output, *shown) in enumerate(rows, first):
        offered = tuple(shown[0]) if shown else ()
        span = parse_time(time)
        entries.append(Query(user, id, input, output, time, span, position, offered))
    return entries


def time_fault(text: str) -> str:
    """Why `history.parse_time` cannot read it, or ''."""
    try:
        parse_time(text)
    except ValueError as error:
        return str(error)
    return ""


def held_out(count: int, share: float = 0.2) -> int:
    """How many of a user's `count` records, the last ones, become queries: 1 to 10, none of one."""
    return min(10, max(1, int(count * share)), count - 1) if count > 1 else 0
