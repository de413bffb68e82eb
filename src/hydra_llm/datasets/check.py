"""The content of a data set and its faults: what `hydra-llm data check` prints. Changes nothing."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from hydra_llm.datasets.dataset import SPLITS, DataSet
from hydra_llm.datasets.native import load
from hydra_llm.errors import DataError
from hydra_llm.history import before
from hydra_llm.types import ALWAYS, Query, Record

MAX_PROBLEMS = 20
EXAMPLES = 3


def find_problems(path: Path) -> tuple[DataSet | None, list[DataError]]:
    """Read the data set and collect up to 20 problems; the data set is None if there are any."""
    problems: list[DataError] = []

    def keep(problem: DataError) -> None:
        problems.append(problem)
        if len(problems) >= MAX_PROBLEMS:
            raise problem

    try:
        dataset = load(path, report=keep)
    except DataError as problem:
        return None, problems if problem in problems else [*problems, problem]
    return (None if problems else dataset), problems


def summarize(dataset: DataSet) -> dict[str, Any]:
    """Counts, spans, shares, duplicates and leaks, as JSON values."""
    users = dataset.users()
    records, queries = list(dataset.stream_history()), list(dataset.stream_queries())
    return {
        "name": dataset.task.name,
        "kind": dataset.task.kind,
        "digest": dataset.digest,
        "users": {split: len(dataset.users(split)) for split in SPLITS},
        "records": len(records),
        "queries": len(queries),
        "time": _span([*records, *queries]),
        "records per user": _spread(len(dataset.history(user)) for user in users),
        "queries per user": _spread(len(dataset.queries(user)) for user in users),
        "users without history": sum(not dataset.history(user) for user in users),
        "users without queries": sum(not dataset.queries(user) for user in users),
        "words per input": {
            "history": _spread(len(record.input.split()) for record in records),
            "queries": _spread(len(query.input.split()) for query in queries),
        },
        "labels": _shares(dataset, records, queries),
        "duplicates": _duplicates(records),
        "leaks": _leaks(dataset),
        "notes": list(dataset.notes),
    }


def _span(entries: Sequence[Record | Query]) -> dict[str, Any]:
    known = [entry for entry in entries if entry.span != ALWAYS]
    unknown = len(entries) - len(known)
    if not known:
        return {"first": None, "last": None, "unknown": unknown}
    first = min(known, key=lambda entry: entry.span[0])
    last = max(known, key=lambda entry: entry.span[1])
    return {"first": first.time, "last": last.time, "unknown": unknown}


def _spread(counts: Iterable[int]) -> dict[str, float] | None:
    values = list(counts)
    return {"min": min(values), "median": median(values), "max": max(values)} if values else None


def _shares(dataset: DataSet, records: list[Record], queries: list[Query]) -> dict[str, Any]:
    """Each label's share of the history's and of the queries' answers."""
    history = [] if dataset.task.free_history else records
    golds = Counter(query.gold for query in queries)
    counts = {"history": Counter[str | None](r.output for r in history), "queries": golds}
    known = {part: count for part, count in counts.items() if count}
    return {
        label: {part: count[label] / count.total() for part, count in known.items()}
        for label in dataset.task.labels
    }


def _duplicates(records: list[Record]) -> dict[str, Any]:
    seen: set[tuple[str, str, str]] = set()
    repeated = []
    for record in records:
        key = (record.user, record.input, record.output)
        if key in seen:
            repeated.append(record)
        seen.add(key)
    return _found(repeated)


def _leaks(dataset: DataSet) -> dict[str, Any]:
    """Ways in which an answer may be known beforehand; each with its count and examples."""
    texts, ids, early = list[Query](), list[Query](), list[Query]()
    for user in dataset.users():
        history, queries = dataset.history(user), dataset.queries(user)
        seen_texts = {record.input for record in history}
        seen_ids = {record.id for record in history}
        texts += [query for query in queries if query.input in seen_texts]
        ids += [query for query in queries if query.id in seen_ids]
        early += [query for query in queries if len(before(history, query)) < len(history)]
    return {
        "query's text stands in its user's history": _found(texts),
        "query's id stands in its user's history": _found(ids),
        "query does not come after all of its history": _found(early),
        "gold text stands in another user's history": _found(_golds_elsewhere(dataset)),
    }


def _golds_elsewhere(dataset: DataSet) -> list[Query]:
    """Of free texts only: a label is in every history."""
    if dataset.task.labels:
        return []
    owners: dict[str, set[str]] = {}
    for record in dataset.stream_history():
        owners.setdefault(record.output, set()).add(record.user)
    queries = dataset.stream_queries()
    return [query for query in queries if owners.get(query.gold or "", set()) - {query.user}]


def _found(entries: Sequence[Record | Query]) -> dict[str, Any]:
    examples = [f"{entry.user}/{entry.id}" for entry in entries[:EXAMPLES]]
    return {"count": len(entries), "examples": examples}


def rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The summary as lines of a table: what, and how much."""
    time = summary["time"]
    unknown = f", {time['unknown']} unknown" if time["unknown"] else ""
    lacking = ("users without history", "users without queries")
    words = summary["words per input"].items()
    return [
        ("kind", summary["kind"]),
        ("users", ", ".join(f"{count} {split}" for split, count in summary["users"].items())),
        *((name, str(summary[name])) for name in ("records", "queries")),
        ("time", f"{time['first']} to {time['last']}{unknown}"),
        *((name, _range(summary[name])) for name in ("records per user", "queries per user")),
        *((name, str(summary[name])) for name in lacking if summary[name]),
        *((f"words per input, {part}", _range(spread)) for part, spread in words),
        *((f"label {label}", _percent(shares)) for label, shares in summary["labels"].items()),
        ("duplicates within a user", _list(summary["duplicates"])),
        *((f"leak: {what}", _list(found)) for what, found in summary["leaks"].items()),
        ("digest", summary["digest"][:16]),
        *(("note", note) for note in summary["notes"]),
    ]


def _range(spread: Mapping[str, float] | None) -> str:
    return f"{spread['min']} to {spread['max']}, median {spread['median']:g}" if spread else "none"


def _percent(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{share:.1%} of {part}" for part, share in shares.items()) or "none"


def _list(found: Mapping[str, Any]) -> str:
    if not found["count"]:
        return "0"
    more = ", …" if found["count"] > EXAMPLES else ""
    return f"{found['count']} ({', '.join(found['examples'])}{more})"
