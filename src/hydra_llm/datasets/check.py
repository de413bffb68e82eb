"""The content of a data set and its faults: what `hydra-llm data check` prints. Changes nothing."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from hydra_llm.datasets.choices import shown
from hydra_llm.datasets.dataset import SPLITS, DataSet
from hydra_llm.datasets.native import load
from hydra_llm.datasets.verdicts import verdicts
from hydra_llm.errors import DataError
from hydra_llm.history import before
from hydra_llm.tasks.base import Task
from hydra_llm.text import length
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
    histories = {user: dataset.history(user) for user in dataset.users()}
    of_users = {user: dataset.queries(user) for user in dataset.users()}
    records, queries = list(dataset.stream_history()), list(dataset.stream_queries())
    first: dict[tuple[str, str, str], Record] = {}
    repeated = [r for r in records if first.setdefault((r.user, r.input, r.output), r) is not r]
    return {
        "name": dataset.task.name,
        "kind": dataset.task.kind,
        "digest": dataset.digest,
        "users": {split: len(dataset.users(split)) for split in SPLITS},
        "records": len(records),
        "queries": len(queries),
        "time": _span([*records, *queries]),
        "records per user": _spread(map(len, histories.values())),
        "queries per user": _spread(map(len, of_users.values())),
        "users without history": sum(not own for own in histories.values()),
        "users without queries": sum(not own for own in of_users.values()),
        "words per input": {
            "history": _spread(length(record.input) for record in records),
            "queries": _spread(length(query.input) for query in queries),
        },
        **_of_choices(dataset),
        "labels": _shares(dataset.task, records, queries),
        "duplicates": _examples(repeated),
        "leaks": _leaks(dataset.task, histories, queries),
        "notes": list(dataset.notes),
        "verdicts": [asdict(verdict) for verdict in verdicts(dataset)],
    }


def _of_choices(dataset: DataSet) -> dict[str, Any]:
    """Of recorded choices: how many, of how many candidates, and how often the first was taken."""
    own = shown(dataset)
    if own is None:
        return {}
    shares = {"share": round(own.first, 4), "by lot": round(own.by_lot, 4)}
    candidates = _spread(own.candidates)
    return {"choices": own.choices, "candidates per choice": candidates, "first taken": shares}


def _span(entries: Sequence[Record | Query]) -> dict[str, Any]:
    known = [entry for entry in entries if entry.span != ALWAYS]
    first = min(known, key=lambda entry: entry.span[0], default=None)
    last = max(known, key=lambda entry: entry.span[1], default=None)
    start = None if first is None else first.time
    end = None if last is None else last.time
    return {"first": start, "last": end, "unknown": len(entries) - len(known)}


def _spread(counts: Iterable[int]) -> dict[str, float] | None:
    values = list(counts)
    return {"min": min(values), "median": median(values), "max": max(values)} if values else None


def _shares(task: Task, records: list[Record], queries: list[Query]) -> dict[str, Any]:
    """Each label's share of the history's and of the queries' answers."""
    history = Counter[str | None](() if task.free_history else (r.output for r in records))
    counts = {"history": history, "queries": Counter(query.gold for query in queries)}
    return {
        label: {part: count[label] / count.total() for part, count in counts.items() if count}
        for label in task.labels
    }


def _leaks(
    task: Task, histories: Mapping[str, list[Record]], queries: list[Query]
) -> dict[str, Any]:
    """Ways in which an answer may be known beforehand; each with its count and examples."""
    records = [record for history in histories.values() for record in history]
    texts, ids = {(r.user, r.input) for r in records}, {(r.user, r.id) for r in records}
    owners: dict[str | None, set[str]] = defaultdict(set)
    for record in [] if task.labels else records:  # a label is in every history
        owners[record.output].add(record.user)
    same_text = [q for q in queries if (q.user, q.input) in texts]
    same_id = [q for q in queries if (q.user, q.id) in ids]
    early = [q for q in queries if len(before(histories[q.user], q)) < len(histories[q.user])]
    same_gold = [q for q in queries if owners[q.gold] - {q.user}]
    return {
        "query's text stands in its user's history": _examples(same_text),
        "query's id stands in its user's history": _examples(same_id),
        "query does not come after all of its history": _examples(early),
        "gold text stands in another user's history": _examples(same_gold),
    }


def _examples(entries: Sequence[Record | Query]) -> dict[str, Any]:
    examples = [f"{entry.user}/{entry.id}" for entry in entries[:EXAMPLES]]
    return {"count": len(entries), "examples": examples}


def rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The summary as lines of a table: what, and how much."""
    time = summary["time"]
    times = [f"{time['first']} to {time['last']}"] if time["first"] else []
    times += [f"{time['unknown']} unknown"] if time["unknown"] else []
    lacking = ("users without history", "users without queries")
    words = summary["words per input"].items()
    return [
        ("kind", summary["kind"]),
        ("users", ", ".join(f"{count} {split}" for split, count in summary["users"].items())),
        *((name, str(summary[name])) for name in ("records", "queries")),
        ("time", ", ".join(times)),
        *((name, _range(summary[name])) for name in ("records per user", "queries per user")),
        *((name, str(summary[name])) for name in lacking if summary[name]),
        *((f"words per input, {part}", _range(spread)) for part, spread in words),
        *_choice_rows(summary),
        *((f"label {label}", _percent(shares)) for label, shares in summary["labels"].items()),
        ("duplicates within a user", _count(summary["duplicates"])),
        *((f"leak: {way}", _count(leak)) for way, leak in summary["leaks"].items()),
        ("digest", summary["digest"][:16]),
        *(("note", note) for note in summary["notes"]),
        *((own["severity"], f"{own['check']}: {own['message']}") for own in summary["verdicts"]),
    ]


def _choice_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "choices" not in summary:
        return []
    first, name = summary["first taken"], "candidates per choice"
    taken = f"{first['share']:.1%}, by lot {first['by lot']:.1%}"
    counts = ("choices", str(summary["choices"])), (name, _range(summary[name]))
    return [*counts, ("first one shown was taken", taken)]


def _range(spread: Mapping[str, float] | None) -> str:
    return f"{spread['min']} to {spread['max']}, median {spread['median']:g}" if spread else "none"


def _percent(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{share:.1%} of {part}" for part, share in shares.items()) or "none"


def _count(entries: Mapping[str, Any]) -> str:
    count, examples = entries["count"], ", ".join(entries["examples"])
    more = ", …" if count > EXAMPLES else ""
    return f"{count} ({examples}{more})" if count else "0"
