"""Recorded choices: which of several candidates a user took. `choices.jsonl[.gz]` of the native
layout, a choice a line:

    {"user", "id", "part": "history" or "query", "time", "input", "candidates": [...], "chosen": 0}

`candidates` are in the order in which they were shown; `chosen` counts them from 0. A choice is a
`Choice` among the records, or a query with `offered` candidates.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from hydra_llm.datasets.dataset import FIELDS, DataSet, Part, Place, equals_fault, fields_of
from hydra_llm.text import text_fault
from hydra_llm.types import Query, Record

PARTS_OF_CHOICES: Mapping[str, Part] = {"history": "history", "query": "queries"}
NAME = "choices"  # of the file


def choice_entry(data: Mapping[str, Any], texts: Mapping[str, str], place: Place) -> dict[str, Any]:
    """The entry of a line: its `texts` (user, id, time, input) with candidates and output. Raises
    DataError: fewer than two candidates, one that is empty or stands twice, no such `chosen`.
    """
    for name in ("candidates", "chosen"):
        if name not in data:
            raise place.error("is missing", name)
    candidates, chosen = data["candidates"], data["chosen"]
    if fault := candidates_fault(candidates):
        raise place.error(fault, "candidates")
    if isinstance(chosen, bool) or not isinstance(chosen, int):
        fault = "must be the place of the candidate that was taken, a whole number from 0"
        raise place.error(f"{fault}, not {json.dumps(chosen)[:40]}", "chosen")
    if not 0 <= chosen < len(candidates):
        last = len(candidates) - 1
        raise place.error(f"{chosen} is none of the {last + 1} candidates: 0 to {last}", "chosen")
    return {**texts, "output": candidates[chosen], "candidates": candidates}


def candidates_fault(candidates: Any) -> str:
    """What is wrong with a choice's candidates; empty if nothing is."""
    if not isinstance(candidates, list) or not all(isinstance(own, str) for own in candidates):
        return "must be a list of texts"
    if len(candidates) < 2:
        return f"a choice has two candidates or more, this one has {len(candidates)}"
    for place, text in enumerate(candidates):
        if fault := text_fault(text):
            return f"candidate {place} {fault}"
    return equals_fault(candidates)


class ChoiceReader:
    """Turns the JSON objects of a file into entries; knows which ids were there."""

    def __init__(self) -> None:
        self._ids = set[tuple[str, str]]()

    def entry(
        self, data: Mapping[str, Any], texts: Mapping[str, str], place: Place
    ) -> tuple[Part, dict[str, Any]]:
        """A line's part of the data set and its entry; DataError for what is broken."""
        part, key = texts["part"], (texts["user"], texts["id"])
        if part not in PARTS_OF_CHOICES:
            raise place.error(f"'{part[:60]}' is neither history nor query", "part")
        if key in self._ids:  # in either part
            raise place.error(f"user '{key[0]}' has the id '{key[1]}' twice", "id")
        self._ids.add(key)
        return PARTS_OF_CHOICES[part], choice_entry(data, texts, place)


def rows_of(dataset: DataSet) -> Iterator[dict[str, Any]]:
    """The lines of a data set's choices, user by user."""
    rows = [_row("history", fields) for fields in _choices(dataset.stream_history())]
    rows += [_row("query", fields) for fields in _choices(dataset.stream_queries())]
    places = {user: place for place, user in enumerate(dataset.splits)}
    yield from sorted(rows, key=lambda row: places[row["user"]])


class Shown(NamedTuple):
    """What recorded choices say about the display."""

    choices: int
    candidates: list[int]  # how many each choice had
    first: float  # share of choices that took the first one shown
    by_lot: float  # the share that a draw would have


def shown(dataset: DataSet) -> Shown | None:
    """Of all recorded choices; None where there are none."""
    rows = list(rows_of(dataset))
    if not rows:
        return None
    counts = [len(row["candidates"]) for row in rows]
    first = sum(row["chosen"] == 0 for row in rows) / len(rows)
    return Shown(len(rows), counts, first, sum(1 / count for count in counts) / len(rows))


def _choices(entries: Iterable[Record | Query]) -> Iterator[dict[str, Any]]:
    return (fields for fields in map(fields_of, entries) if "candidates" in fields)


def _row(part: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    candidates = list(fields["candidates"])
    values = {name: fields[name] for name in FIELDS if name != "output"}
    chosen = candidates.index(fields["output"])
    return {**values, "part": part, "candidates": candidates, "chosen": chosen}
