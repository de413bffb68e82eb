"""How the answers of a run came about: `details.jsonl`, beside `samples.jsonl` in a run's folder.

A line per sample: the question, the records in the order of the reranker, the prompt, the
candidates with their scores, and the pick. Methods share most of them: each part and each text of
`SHORT` characters or more stands once, in a line of its own, and is referred to by its digest. The
file quotes users' records: it is as personal as the data.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra_llm.errors import SettingsError
from hydra_llm.types import Answer, Query

FILE = "details.jsonl"
SHORT = 24
PARTS = ("records", "messages", "candidates")  # what methods share as a whole
MARK = "#"  # what a reference begins with; so a text that begins with it is referred to as well
Key = tuple[str, str, str, int]  # method, user, query, seed
Details = Mapping[str, Any]


def details_of(query: Query, answer: Answer | None = None) -> Details:
    """Of a query and its answer; None if there is none: the call failed."""
    details: dict[str, Any] = {"input": query.input, "time": query.time}
    if answer is None:
        return details
    proposal = answer.proposal
    return details | {
        "records": [
            {
                "id": own.record.id,
                "input": own.record.input,
                "output": own.record.output,
                "time": own.record.time,
                "score": own.score,
                "rank": own.rank,
                "usefulness": own.usefulness,
            }
            for own in proposal.records
        ],
        "shown": proposal.shown,
        "messages": [dict(message) for message in proposal.messages],
        "candidates": [asdict(candidate) for candidate in answer.candidates],
        "chosen": answer.chosen,
        "abstained": answer.abstained,
    }


class DetailsLog:
    """Appends details to a run's file; a stopped run continues where it was."""

    def __init__(self, folder: Path):
        self._file, self._known = folder / FILE, set[str]()
        if self._file.exists():
            lines, whole = _lines(self._file)
            self._known = {line["part"] for line in lines if "part" in line}
            if whole != self._file.stat().st_size:  # the line in which the run was killed
                with self._file.open("r+b") as file:
                    file.truncate(whole)

    def add(self, key: Key, details: Details) -> None:
        """Append the details of a sample, after the parts and texts that no earlier one has."""
        new: dict[str, Any] = {}

        def refer(value: Any) -> str:
            digest = sha256(json.dumps(value).encode("ascii")).hexdigest()[:16]
            if digest not in self._known:
                new.setdefault(digest, value)
            return MARK + digest

        line = {"sample": key, **shortened(details, refer)}
        line |= {name: refer(line[name]) for name in PARTS if name in line}
        parts = [{"part": digest, "is": value} for digest, value in new.items()]
        # ASCII: a text of the data may hold half of a surrogate pair, which UTF-8 cannot write
        lines = "".join(json.dumps(own) + "\n" for own in (*parts, line))
        with self._file.open("a", encoding="ascii") as file:
            file.write(lines)
        self._known |= new.keys()


def shortened(value: Any, refer: Callable[[str], Any]) -> Any:
    """A JSON value with each long text replaced by what `refer` makes of it; numbers have six
    decimals, and null stands for what is no number.
    """
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, str):
        return refer(value) if len(value) >= SHORT or value.startswith(MARK) else value
    if isinstance(value, Mapping):
        return {name: shortened(own, refer) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [shortened(own, refer) for own in value]
    return value


def read_details(folder: Path) -> dict[Key, Details]:
    """Each sample's details, of a sample that was tried again the last ones; empty for a run of an
    older version. SettingsError: a line is damaged.
    """
    file = folder / FILE
    if not file.exists():
        return {}
    parts: dict[str, Any] = {}
    found: dict[Key, Details] = {}
    for number, line in enumerate(_lines(file)[0], 1):
        try:
            if "part" in line:
                value = line["is"]
                parts[line["part"]] = value if isinstance(value, str) else _restored(value, parts)
            else:
                method, user, query, seed = line.pop("sample")
                found[method, user, query, seed] = _restored(line, parts)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(file, number, error) from None
    return found


def _restored(value: Any, parts: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        return parts[value.removeprefix(MARK)] if value.startswith(MARK) else value
    if isinstance(value, dict):
        return {name: _restored(own, parts) for name, own in value.items()}
    return [_restored(own, parts) for own in value] if isinstance(value, list) else value


def _lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines, and how many bytes those are."""
    text = file.read_bytes()
    whole = text.rfind(b"\n") + 1
    return list(_objects(file, text[:whole])), whole


def _objects(file: Path, text: bytes) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split(b"\n")[:-1], 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            raise _damaged(file, number, error) from None
        yield entry


def _damaged(file: Path, number: int, error: Exception) -> SettingsError:
    fault = f"cannot be read ({error}): remove the file, and only answers and gold are shown"
    return SettingsError(f"{file}:{number}: {fault}")
