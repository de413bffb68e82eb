"""A JSONL or CSV file as a data set: a record a line (user, input, output, perhaps time and id).

Kind and labels are guessed unless given, and a CSV file's delimiter always. The last records of
each user become queries, so a query never precedes its history. Users are split by a hash of their
name: more data does not move them.
"""

import csv
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain, dropwhile
from pathlib import Path
from typing import Any

from hydra_llm.datasets import dataset
from hydra_llm.datasets.choices import candidates_fault
from hydra_llm.datasets.dataset import Builder, DataSet, Place, Row, Split
from hydra_llm.datasets.native import number_as_text, parse_object, read_lines
from hydra_llm.errors import DataError, did_you_mean
from hydra_llm.history import in_order, parse_time
from hydra_llm.tasks.base import CHOICE_METRICS, KINDS, Task
from hydra_llm.tasks.rating import plain_number
from hydra_llm.text import caseless
from hydra_llm.types import Record

SURE_LINES = 10  # with a place, and none of them 0: a doubt is worth a line
MAX_LABELS = 50
MAX_LABEL_LENGTH = 40  # in characters
MAX_RATING_RANGE = 10  # largest difference between two numbers that still looks like one scale


@dataclass(frozen=True, slots=True)
class Columns:
    """Which field of the file holds what. `time` and `id` may be missing unless they were named."""

    user: str = "user"
    input: str = "input"
    output: str = "output"
    time: str = "time"
    id: str = "id"


@dataclass(frozen=True, slots=True)
class ChoiceColumns(Columns):
    """As `Columns`, of recorded choices. The candidates are a JSON list in the column `candidates`,
    or one in each column of that name, or of `candidate1`, `candidate_2` and so on; `output` names
    the column of the place, from 0, or of the text of the one that was taken; in JSONL a number is
    a place and a text a text.
    """

    output: str = "chosen"


CHOICES = ChoiceColumns()


def read_table(
    file: Path | str,
    columns: Columns = Columns(),
    *,
    kind: str | None = None,
    prompt: str | None = None,
    name: str = "",
    test_share: float = 0.33,
    query_share: float = 0.2,
    seed: int = 0,
) -> DataSet:
    """A data set of a user's own file; `notes` say what was guessed. With `CHOICES`, or other
    columns of its class, each line is a recorded choice. DataError names file, line and field of
    what is broken, or could be read in two ways.
    """
    file, places = Path(file), _Places()
    rows = list(_rows(file, columns, places))
    places.check()
    if not rows:
        raise DataError("holds no record", file=file)
    task = _task(file, rows, columns, kind, prompt, name)
    guessed = "given" if kind or isinstance(columns, ChoiceColumns) else "guessed"
    note = f"kind {guessed}: {task.kind}"
    note += f", labels: {', '.join(task.labels)}" if task.labels else ""
    of_user: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        of_user[row[1]["user"]].append(row)
    splits: dict[str, Split] = {}
    for user in of_user:
        digest = hashlib.sha256(f"{seed}:{user}".encode(errors="replace")).digest()
        splits[user] = "test" if int.from_bytes(digest[:8]) < test_share * 2**64 else "train"
    builder = Builder(task, splits)
    for own in of_user.values():
        builder.add_user(_ordered(own), query_share)
    missing = [split for split in dataset.SPLITS if split not in splits.values()]
    advice = [f"no {split} user: give another seed or test share" for split in missing]
    if len(splits) == 1:
        advice = ["one user alone: a bundle is learned from some users for others, so add more"]
    return builder.build([note, *_doubts(rows, columns), *places.doubts(), *advice])


def _task(
    file: Path, rows: list[Row], columns: Columns, kind: str | None, prompt: str | None, name: str
) -> Task:
    """The task of the rows, whose outputs are made tidy."""
    of_choices = isinstance(columns, ChoiceColumns)
    chosen, labels = _tidy(rows, kind or ("generation" if of_choices else None))
    prompt = prompt or KINDS.load(chosen).default_prompt(labels)
    fields = {"name": name or re.sub(r"\..*", "", file.name), "kind": chosen, "labels": labels}
    words = {} if KINDS.load(chosen).closed else {"tokenizer": "unicode"}
    metrics = {"metrics": [*CHOICE_METRICS]} if of_choices else {}
    return Task.from_json({**fields, "prompt": prompt, **words, **metrics}, str(file))


def _doubts(rows: list[Row], columns: Columns) -> Iterator[str]:
    """What the reader took in one of two possible ways."""
    place, _ = rows[0]
    for name, column in asdict(columns).items():
        if place.names.get(name, column) != column:
            yield f"the column '{place.names[name]}' was taken as '{column}'"
    users = {entry["user"] for _, entry in rows}
    if twice := sorted(user for user in users if user.endswith(".0") and user[:-2] in users):
        yield f"'{twice[0]}' and '{twice[0][:-2]}' are two users: write ids alike if they are one"


def _ordered(rows: list[Row]) -> list[Row]:
    """One user's rows, oldest first; in file order where times are equal."""
    records = []
    for at, (_, entry) in enumerate(rows):
        time = "" if dataset.time_fault(entry["time"]) else entry["time"]  # reported later
        records.append(Record("", "", "", "", span=parse_time(time), position=at))
    return [rows[record.position] for record in in_order(records)]


class _Places:
    """The places of the candidates that were taken: only the whole file tells that they are counted
    from 1, as no line has 0 and some line the number of its candidates.
    """

    def __init__(self) -> None:
        self.seen = set[int]()
        self.lines = 0  # that name a place
        self.beyond: tuple[Place, str, DataError] | None = None  # the first line with the number

    def check(self) -> None:
        """DataError: a place is none of its candidates'."""
        if self.beyond is None:
            return
        place, said, error = self.beyond
        if 0 in self.seen:
            raise error
        fault = f"'{said}' is none of the {said} candidates, and no line has 0: places count from 0"
        raise place.error(f"{fault}: subtract 1 from each, or write the texts", "output")

    def doubts(self) -> Iterator[str]:
        """What may be counted from 1, though no line proves it."""
        if self.lines >= SURE_LINES and 0 not in self.seen:
            fix = "if places are counted from 1, subtract 1 from each, or write the texts"
            yield f"no line took the first candidate, place 0: {fix}"


def _rows(file: Path, columns: Columns, places: _Places) -> Iterator[Row]:
    """The entries of a file; one whose id its user has already is an error."""
    seen = set[tuple[str, str]]()
    for place, data, typed in _cells(read_lines(file, dataset.stop), columns):
        entry: dict[str, Any] = {"time": "", "id": ""}
        for name, column in place.names.items():
            value = number_as_text(data[column])
            if isinstance(value, str):
                entry[name] = value if name in ("input", "output") else value.strip()
            elif value is not None or name not in entry:
                raise place.error("is missing, or neither a text nor a number", name)
        if isinstance(columns, ChoiceColumns):
            entry |= _chosen(place, data, entry["output"].strip(), places, typed=typed)
        user, id = entry["user"], entry["id"] or f"line{place.line}"
        if (user, id) in seen:  # checked here, or one could be history and the other a query
            raise place.error(f"user '{user}' has the id '{id}' twice", "id")
        seen.add((user, id))
        yield place, {**entry, "id": id}


def _chosen(
    place: Place, data: Mapping[str, Any], said: str, places: _Places, *, typed: bool
) -> dict[str, Any]:
    """The candidates of a line and the text of the one that was taken. In a file with `typed`
    values a text is a candidate's, and a number a place unless the candidates are numbers too.
    """
    raw, gap = _candidates(place, data)
    candidates = [number_as_text(own) for own in raw] if isinstance(raw, list) else raw
    if fault := candidates_fault(candidates):
        raise place.error(fault, "candidates")
    texts = [text.strip() for text in candidates]
    is_text = typed and isinstance(data[place.names["output"]], str)
    is_place = typed and not is_text and all(isinstance(own, str) for own in raw)
    as_text = texts.index(said) if said in texts and not is_place else -1
    as_place = int(said) if said.isdecimal() and len(said) < 10 and not is_text else -1
    one_more = as_place == len(texts) and as_text < 0
    as_place = as_place if as_place < len(texts) else -1
    fault = ""
    if as_text < 0 and as_place < 0:
        ways = f"write its text{' in quotes' * typed}, or its place from 0 to {len(texts) - 1}"
        ways += " without quotes" * typed
        fault = f"'{said[:60]}' is none of the {len(texts)} candidates: {ways}"
    elif min(as_text, as_place) >= 0 and as_text != as_place:
        other = texts[as_place][:60]
        fault = f"'{said}' is a candidate, and the place of another one, '{other}': write JSONL,"
        fault += f' with the texts in quotes; "chosen": "{said}" is a text, {said} a place'
    elif as_place >= 0 and gap:
        fault = f"place {said} can be counted in two ways, {gap}: write the candidate's text"
    if one_more:
        places.beyond = places.beyond or (place, said, place.error(fault, "output"))
    elif fault:
        raise place.error(fault, "output")
    elif as_text < 0:
        places.seen.add(as_place)
        places.lines += 1
    return {"candidates": candidates, "output": candidates[max(as_text, as_place)]}


def _candidates(place: Place, data: Mapping[str, Any]) -> tuple[Any, str]:
    """A line's candidates; and why a place among their columns is not sure, empty if it is."""
    found = {field: _CANDIDATE.fullmatch(_plain(field)) for field in data}
    of_ours = set(place.names.values())
    fields = {field: own for field, own in found.items() if own and field not in of_ours}
    if not fields:
        there = ", ".join(f"'{field}'" for field in data)[:200]
        raise place.error(f"is missing: there is {there}", "candidates")
    forms = dict[tuple[str, bool], str]()
    for field, own in fields.items():
        forms.setdefault((own[1], bool(own[2])), field.partition("#")[0])
    if len(forms) > 1:
        both = " and ".join(f"'{field}'" for field in forms.values())
        raise place.error(f"{both} look like candidates all: rename what is none", "candidates")
    if len(fields) > 1:
        empty = [field for field in fields if data[field] is None or not str(data[field]).strip()]
        filled = [field for field in fields if field not in empty]
        numbers = [int(fields[field][2] or at) for at, field in enumerate(filled)]
        first = min([1, *numbers])  # the columns count from 0 or 1
        if [*fields][: len(filled)] != filled:
            gap = "as a column is empty before the last candidate"
        else:
            in_order = numbers == [*range(first, first + len(numbers))]
            gap = "" if in_order else "as the columns' numbers have a gap or no order"
        return [data[field] for field in filled], gap
    (candidates,) = (data[field] for field in fields)
    if isinstance(candidates, str):
        try:
            candidates = json.loads(candidates)
        except (ValueError, RecursionError) as error:
            raise place.error(f"must be a JSON list of texts: {error}", "candidates") from None
    return candidates, ""


_CANDIDATE = re.compile(r"(candidates?)_?(\d*)(#\d+)?")


def _distinct(fields: list[str], columns: Columns) -> list[str]:
    """A header in which columns of candidates that have one name are told apart."""
    ours = set(map(_plain, asdict(columns).values()))
    plain = [_plain(field) for field in fields]
    own = [bool(_CANDIDATE.fullmatch(name)) and name not in ours for name in plain]
    return [f"{field}#{at}" if own[at] else field for at, field in enumerate(fields)]


def _named(place: Place, fields: Sequence[str], columns: Columns) -> Place:
    """The place with the file's names of our fields. DataError: one is missing, or several fit."""
    names, faults = _names(tuple(fields), columns)
    for name, fault in faults:
        raise place.error(fault, name)
    return replace(place, names=names)


@lru_cache  # the lines of a JSONL file have few different lists of fields
def _names(
    fields: tuple[str, ...], columns: Columns
) -> tuple[Mapping[str, str], list[tuple[str, str]]]:
    """Our fields' names among the file's, but for case, blanks and `_`; and what is wrong."""
    names, faults = dict[str, str](), list[tuple[str, str]]()
    for name, wanted in asdict(columns).items():
        fits = [field for field in fields if _plain(field) == _plain(wanted)]
        if wanted != name and fits.count(wanted) == 1:
            fits = [wanted]
        option = f"--{name}-field"
        if len(fits) > 1:
            both = " and ".join(f"'{field}'" for field in dict.fromkeys(fits))
            fault = f"{both} both fit" if len(set(fits)) > 1 else f"{both} stands twice"
            faults.append((wanted, f"{fault}: rename one, or name another with {option}"))
        elif fits:
            names[name] = fits[0]
        elif wanted != name or name in ("user", "input", "output"):
            there = ", ".join(f"'{field}'" for field in fields)[:200]
            near = did_you_mean(wanted, fields)
            faults.append((wanted, f"is missing{near}: there is {there}; {option} names it"))
    return names, faults


def _plain(field: str) -> str:
    return re.sub(r"[\s_-]+", "_", caseless(field).strip())


def _delimiter(header: str, columns: Columns) -> str:
    """The one that splits a CSV file's first line into most of the wanted names."""
    wanted = set(map(_plain, asdict(columns).values()))

    def named(delimiter: str) -> int:
        return sum(_plain(cell.strip('"')) in wanted for cell in header.split(delimiter))

    return max(",\t;|", key=named)


def _cells(
    lines: Iterator[tuple[Place, str]], columns: Columns
) -> Iterator[tuple[Place, Mapping[str, Any], bool]]:
    """The fields of each line or CSV row; and whether it is JSON, which the first line tells."""
    filled = dropwhile(lambda line: not line[1].strip(), lines)
    place, header = next(filled, (Place(), ""))
    lines = chain([(place, header)], filled)
    match header.lstrip()[:1]:
        case "[":
            raise place.error("is one JSON array: write one JSON object a line")
        case "{":
            for here, line in lines:
                if line.strip():
                    data = parse_object(line, here)
                    yield _named(here, list(data), columns), data, True
            return
    csv.field_size_limit(2**31 - 1)
    named = re.fullmatch(r"sep=(.)\s*", header)  # as spreadsheets write it
    if named:
        place, _ = next(lines)
    delimiter = named[1] if named else _delimiter(header, columns)
    text = (line + "\n" for _, line in lines)  # a quoted field may go on over several lines
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    skipped = (place.line or 1) - (0 if named else 1)
    try:
        fields = next(reader, [])
        fields = _distinct(fields, columns) if isinstance(columns, ChoiceColumns) else fields
        place = _named(place, fields, columns) if fields else place
        for row in reader:
            if len(row) < 2 and not "".join(row).strip():
                continue
            here = replace(place, line=reader.line_num + skipped)
            if len(row) != len(fields):
                raise here.error(f"the header names {len(fields)} fields, the line has {len(row)}")
            yield here, dict(zip(fields, row, strict=True)), False
    except csv.Error as error:
        here = replace(place, line=reader.line_num + skipped)
        cause = "line ends of CR alone: save it with LF" if "new-line" in str(error) else error
        raise here.error(f"not CSV: {cause}") from None


def _tidy(rows: list[Row], kind: str | None) -> tuple[str, list[str]]:
    """The kind and the labels, of all that was answered or offered. Labels and ratings are
    normalized in place: white space is stripped, `4.0` becomes `4`. Raises the first text that the
    kind cannot read.
    """
    outputs = {entry["output"].strip() for _, entry in rows} - {""}
    chosen = kind or guess_kind(outputs, len(rows))
    of_kind = KINDS.load(chosen)
    for place, entry in rows:
        shown = [("candidates", text.strip()) for text in entry.get("candidates", ())]
        for name, text in [("output", entry["output"].strip()), *shown]:
            if text and (fault := of_kind.output_fault(text)):
                raise place.error(fault, name)
        outputs |= {text for _, text in shown}
        if of_kind.closed:
            entry["output"] = of_kind.tidy(entry["output"].strip())
    return chosen, of_kind.labels_of({of_kind.tidy(output) for output in outputs})


def guess_kind(outputs: set[str], count: int) -> str:
    """Rating: >= 3 numbers of a small range; classification: few short outputs; else generation."""
    numbers = [number for output in outputs if (number := plain_number(output)) is not None]
    all_numbers = 3 <= len(numbers) == len(outputs) <= 2 * MAX_RATING_RANGE + 1
    if all_numbers and max(numbers) - min(numbers) <= MAX_RATING_RANGE:
        return "rating"
    few = 2 <= len(outputs) <= min(MAX_LABELS, count // 2)
    return "classification" if few and max(map(len, outputs)) <= MAX_LABEL_LENGTH else "generation"
