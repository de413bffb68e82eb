"""Whether a data set is enough to learn from and to compare methods on: a line for each thing that
is, or is not, with its number and what to do. Knows no files.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, Self

from hydra_llm.datasets.choices import shown
from hydra_llm.datasets.dataset import DataSet, offered
from hydra_llm.text import caseless, fold
from hydra_llm.types import ALWAYS, Query, Record

LEARN_USERS, GOOD_USERS = 5, 30  # training users: at least, and for weights that are nobody's own
COMPARE_USERS, GOOD_QUERIES = 5, 50  # new users with queries (bench/stats.py), and their queries
FEW_CHOICES = 10  # of a user, in the median
PLACE_DECIDES = 0.15  # share of first ones taken above that of a draw
FEW_RECORDS = 3  # of a user, in the median
NEAR_CONSTANT, ONE_LABEL, DUPLICATES = 0.95, 0.5, 0.01  # shares that are told
FEW_LABELS, MANY_LABELS, RECORDS_PER_LABEL = 10, 50, 5
YEAR = 365 * 86400.0
MISSING = {"nan", "null", "none", "n/a", "na", "undefined", "-", "?"}  # how tables write no value


@dataclass(frozen=True, slots=True)
class Verdict:
    """One judgement. `error`: nothing can be learned or said; `warning`: less than one expects."""

    severity: Literal["ok", "warning", "error"]
    check: str
    number: float
    message: str

    def __str__(self) -> str:
        return f"{self.check}: {self.message}"


def verdicts(dataset: DataSet) -> list[Verdict]:
    """What the data set is enough for; errors first, then warnings."""
    totals = _Totals.of(dataset)
    found = [
        _training_users(dataset),
        *_new_users(dataset),
        *_records(totals),
        *_answers(dataset, totals),
        *_labels(dataset, totals),
        *_choices(dataset),
        *_entries(totals),
        *_names(dataset.users(), "users"),
    ]
    return sorted(found, key=lambda own: ("error", "warning", "ok").index(own.severity))


@dataclass
class _Totals:
    """What is counted of all entries, user by user: none of them stays in memory."""

    records: list[int] = field(default_factory=list)  # of each user who has some
    outputs: Counter[str] = field(default_factory=Counter)  # of the records
    one_output: int = 0  # users with several records, all with one output
    repeated: int = 0  # records that repeat one of their user's
    entries: int = 0  # records and queries
    untimed: int = 0
    early: int = 0  # in the first year since 1970, though not written so

    @classmethod
    def of(cls, dataset: DataSet) -> Self:
        totals = cls()
        for user in dataset.users():
            own = dataset.history(user)
            if own:
                totals.records.append(len(own))
            given = Counter(record.output for record in own)
            totals.outputs.update(given)
            totals.one_output += len(own) > 1 and len(given) == 1
            totals.repeated += len(own) - len({(r.input, r.output) for r in own})
            entries: list[Record | Query] = [*own, *dataset.queries(user)]
            for entry in entries:
                totals.entries += 1
                totals.untimed += entry.span == ALWAYS
                totals.early += 0 <= entry.span[0] < YEAR and entry.time[:4] != "1970"
        return totals


def doubts(dataset: DataSet, *, of_learning: bool = False) -> list[Verdict]:
    """The verdicts that are not `ok`; `of_learning`: without those on the comparison of methods."""
    left_out = ("new users",) if of_learning else ()
    own = verdicts(dataset)
    return [doubt for doubt in own if doubt.severity != "ok" and doubt.check not in left_out]


def _training_users(dataset: DataSet) -> Verdict:
    name = "training users"
    count = len(dataset.with_records("train"))
    if not count:
        return Verdict("error", name, 0, "none has records: nothing can be learned; add some")
    if count < LEARN_USERS:
        why = f"{count} are too few to learn what people share: at least {LEARN_USERS}"
        return Verdict("warning", name, count, f"{why}, better {GOOD_USERS}")
    if count < GOOD_USERS:
        why = f"{count} are few: what is learned depends on who they are"
        return Verdict("warning", name, count, f"{why}; {GOOD_USERS} are better")
    return Verdict("ok", name, count, f"{count} are enough")


def _new_users(dataset: DataSet) -> Iterator[Verdict]:
    asked = [own for user in dataset.users("test") if (own := dataset.queries(user))]
    users, queries = len(asked), sum(map(len, asked))
    if users < COMPARE_USERS:
        why = f"{users} with queries are too few to compare methods: nothing can be said"
        yield Verdict("warning", "new users", users, f"{why} below {COMPARE_USERS}")
    elif queries < GOOD_QUERIES:
        why = f"{queries} queries of {users} users show large differences only"
        yield Verdict("warning", "new users", queries, f"{why}; {GOOD_QUERIES} are better")
    else:
        yield Verdict("ok", "new users", users, f"{users} with {queries} queries are enough")


def _records(totals: _Totals) -> Iterator[Verdict]:
    if totals.records:
        middle = median(totals.records)
        if middle < FEW_RECORDS:
            why = f"half of the users have {middle:g} or fewer: there is little to choose from"
            yield Verdict("warning", "records", middle, f"{why}; {FEW_RECORDS} or more are better")
        else:
            yield Verdict("ok", "records", middle, f"{middle:g} per user in the median are enough")


def _answers(dataset: DataSet, totals: _Totals) -> Iterator[Verdict]:
    """Whether answers differ, over all users and for each."""
    records = sum(totals.records)
    if not records or dataset.task.free_history:
        return
    (common, most), *others = totals.outputs.most_common()
    named = f"'{fold(common)[:40]}'"
    share = most / records
    if not others and records > 1:
        why = f"all are {named}: there is nothing to learn; is it the right field?"
        yield Verdict("error", "answers", 1.0, why)
    elif share >= NEAR_CONSTANT:
        why = f"{share:.1%} are {named}: always giving it is hard to beat"
        yield Verdict("warning", "answers", round(share, 4), f"{why}; macro-F1 shows the others")
    elif dataset.task.labels:
        several, single = sum(count > 1 for count in totals.records), totals.one_output
        if several and single / several >= ONE_LABEL:
            why = f"{single} of {several} users have one label in all of their records"
            fix = "their own majority is hard to beat, see user-majority in the benchmark"
            yield Verdict("warning", "one-label users", single, f"{why}: {fix}")


def _labels(dataset: DataSet, totals: _Totals) -> Iterator[Verdict]:
    labels, records = dataset.task.labels, sum(totals.records)
    rare = len(labels) > FEW_LABELS and len(labels) * RECORDS_PER_LABEL > records
    if rare or len(labels) > MANY_LABELS:
        why = f"{len(labels):,} labels for {records:,} records are many"
        fix = "if they are texts, import them with --kind generation, else join rare ones"
        yield Verdict("warning", "labels", len(labels), f"{why}: {fix}")
    yield from _names(labels, "labels")
    if empty := [label for label in labels if caseless(label) in MISSING]:
        why = f"'{empty[0]}' looks like a missing value: leave such records out"
        yield Verdict("warning", "labels", len(empty), why)


def _choices(dataset: DataSet) -> Iterator[Verdict]:
    """Whether users have chosen often enough, and how far the place decides."""
    display = shown(dataset)
    if display is None:
        return
    histories = map(dataset.history, dataset.users())
    counts = [own for history in histories if (own := sum(map(bool, map(offered, history))))]
    middle = median(counts) if counts else 0
    if middle < FEW_CHOICES:
        why = f"half of the users have {middle:g} or fewer earlier ones: little is known of a taste"
        yield Verdict("warning", "choices", middle, f"{why}; {FEW_CHOICES} or more are better")
    else:
        yield Verdict("ok", "choices", middle, f"{middle:g} per user in the median are enough")
    share, lot, name = display.first, display.by_lot, "position"
    taken = f"the first one shown was taken in {share:.1%} of the choices, by lot in {lot:.1%}"
    number = round(share, 4)
    if share >= NEAR_CONSTANT:
        why = "always taking it is hard to beat: were the others shown at all?"
        yield Verdict("warning", name, number, f"{taken}; {why}")
    elif share >= lot + PLACE_DECIDES:
        why = "the place counts beside the text; compare with the method first"
        yield Verdict("warning", name, number, f"{taken}: {why}")
    else:
        yield Verdict("ok", name, number, taken)


def _names(names: Iterable[str], what: str) -> Iterator[Verdict]:
    """Names that differ in case, width, composition or blanks alone."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[fold(caseless(name))].append(name)
    if twice := [own for own in alike.values() if len(own) > 1]:
        first, second, *_ = twice[0]
        why = f"'{first}' and '{second}' differ in case or spelling alone"
        yield Verdict("warning", what, len(twice), f"{why}: if they are one, write them alike")


def _entries(totals: _Totals) -> Iterator[Verdict]:
    records, entries = sum(totals.records), totals.entries
    if records and totals.repeated / records >= DUPLICATES:
        why = f"{totals.repeated} of {records} repeat one of their user's: leave them out"
        yield Verdict("warning", "duplicates", totals.repeated, why)
    if untimed := totals.untimed:
        why = f"{untimed} of {entries} records and queries have none"
        fix = "the order of the file counts, and recency says nothing (--time-field names a column)"
        yield Verdict("warning", "times", untimed, f"{why}: {fix}")
    if early := totals.early:
        why = f"{early} of {entries} lie in 1970: are they seconds since then?"
        yield Verdict("warning", "times in 1970", early, f"{why} Write dates as 2024-01-31")
