"""Gain and harm of a method by groups of users: whom personalization helps, and whom it costs.

A user's gain is the mean change of the task's gain over the baseline on the user's queries. Groups
are compared by their users, each of whom counts once.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hydra_llm.bench.method import base_name
from hydra_llm.bench.report.cells import cell, p_value
from hydra_llm.bench.report.tables import Report
from hydra_llm.bench.results import Pair, changes_by_user, of_metric, pair, rounded
from hydra_llm.bench.stats import Interval, interval
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import load, user_columns
from hydra_llm.errors import SettingsError
from hydra_llm.tasks.base import Task

HISTORY, ACTIVITY = "history", "activity"
UNKNOWN = "unknown"  # the group of users without a value
NUMBER_OF_GROUPS = 4  # into which numbers are divided, with about as many users in each
FEW_VALUES = 6  # up to so many distinct numbers are groups as they are
LEAST_USERS = 2  # of a group that takes part in the gap
DRAWS = 10_000
CELLS = 2_000_000  # numbers that are drawn at once
TINY = 1e-12

Value = str | float


@dataclass(frozen=True)
class GroupGain:
    """A group of users: change of gain over the baseline, with 95 % intervals over its users."""

    group: str
    users: int
    queries: int
    gain: float  # mean over users
    gain_interval: Interval
    harmed: float  # share of users whose mean gain is lower
    harm: float  # mean over users of what is lost; users who gain lose 0
    harm_interval: Interval


@dataclass(frozen=True)
class ByGroup:
    """A method against a baseline, by the groups of one field; the worst group first."""

    field: str
    method: str
    baseline: str
    groups: tuple[GroupGain, ...]
    gap: float  # gain of the best group minus that of the worst one; NaN for fewer than two
    gap_interval: Interval
    """Of the difference of these two groups, by the bootstrap over the users of each."""
    gap_p: float
    """How often the largest gap of groups of these sizes is as large if users are dealt by lot."""

    def to_json(self) -> dict[str, Any]:
        groups = []
        for own in self.groups:
            spans = {"gain_interval": own.gain_interval, "harm_interval": own.harm_interval}
            groups.append(asdict(own) | {name: rounded(span) for name, span in spans.items()})
        gap, p = rounded([self.gap, self.gap_p])
        told = {"field": self.field, "method": self.method, "baseline": self.baseline}
        span = rounded(self.gap_interval)
        return told | {"groups": groups, "gap": gap, "gap_interval": span, "gap_p": p}


def values_of(data: DataSet, folder: Path, field: str, users: Iterable[str]) -> dict[str, Value]:
    """User → what decides the group: `history` (number of records), `activity` (number of
    queries), or a column of users.jsonl. Raises SettingsError: there is no such column.
    """
    if field == HISTORY:
        return {user: float(len(data.history(user))) for user in users}
    if field == ACTIVITY:
        return {user: float(len(data.queries(user))) for user in users}
    columns = user_columns(folder)
    names = sorted({name for own in columns.values() for name in own})
    if field not in names:
        known = ", ".join([HISTORY, ACTIVITY, *names])
        raise SettingsError(f"--by {field}: {folder / 'users.jsonl'} has no such column: {known}")
    return {user: columns.get(user, {}).get(field, UNKNOWN) for user in users}


def grouped(values: Mapping[str, Value]) -> dict[str, str]:
    """User → group: ranges of many distinct numbers, also where some users have none; or texts."""
    numbers = {user: value for user, value in values.items() if isinstance(value, int | float)}
    others = {user: str(own).strip() for user, own in values.items() if user not in numbers}
    if len(set(numbers.values())) <= FEW_VALUES or set(others.values()) - {"", UNKNOWN}:
        named = {user: f"{own:g}" if user in numbers else str(own) for user, own in values.items()}
        return {user: name.strip() or UNKNOWN for user, name in named.items()}
    ordered = np.array(sorted(numbers.values()))
    cuts = np.unique(np.quantile(ordered, np.linspace(0, 1, NUMBER_OF_GROUPS + 1)[1:-1]))
    places = {user: int(np.searchsorted(cuts, value, "left")) for user, value in numbers.items()}
    names = {}
    for place in set(places.values()):
        own = [numbers[user] for user in places if places[user] == place]
        names[place] = f"{min(own):g} to {max(own):g}" if min(own) < max(own) else f"{min(own):g}"
    return {user: names[places[user]] if user in places else UNKNOWN for user in values}


def by_group(
    task: Task, pairs: Sequence[Pair], group_of: Mapping[str, str], names: tuple[str, str, str]
) -> ByGroup:
    """The pairs of a method and a baseline by the groups of their users; `names`: field, method and
    baseline.
    """
    changes = changes_by_user(task, pairs)
    members: dict[str, list[str]] = {}
    for user in changes:
        members.setdefault(group_of.get(user, UNKNOWN), []).append(user)
    queries = {user: {own.query for own, _ in pairs if own.user == user} for user in changes}
    gains = {group: np.array([changes[user] for user in own]) for group, own in members.items()}
    rows = []
    for group, own in gains.items():
        users, lost = members[group], np.maximum(0.0, -own)
        rows.append(
            GroupGain(
                group,
                len(own),
                sum(len(queries[user]) for user in users),
                float(own.mean()),
                interval(own.tolist(), users),
                float((own < 0).mean()),
                float(lost.mean()),
                interval(lost.tolist(), users),
            )
        )
    rows.sort(key=lambda row: (row.gain, row.group))
    taken = [row.group for row in rows if row.users >= LEAST_USERS]
    return ByGroup(*names, tuple(rows), *_gap([gains[group] for group in taken]))


def _gap(gains: Sequence[np.ndarray]) -> tuple[float, Interval, float]:
    """Of groups of users, the worst one first: the gap, its interval, and its p-value."""
    if len(gains) < 2:
        return math.nan, Interval(math.nan, math.nan), math.nan
    rng, worst, best = np.random.default_rng(0), gains[0], gains[-1]
    gap = float(best.mean() - worst.mean())
    every, ends = np.concatenate(gains), np.cumsum([len(own) for own in gains])[:-1]
    gaps, by_lot = list[np.ndarray](), list[np.ndarray]()
    for count in _parts(DRAWS, len(every)):
        drawn = rng.choice(best, (count, len(best))).mean(1)
        gaps.append(drawn - rng.choice(worst, (count, len(worst))).mean(1))
        dealt = rng.permuted(np.tile(every, (count, 1)), axis=1)
        means = np.stack([part.mean(1) for part in np.split(dealt, ends, axis=1)])
        by_lot.append(means.max(0) - means.min(0))
    low, high = np.quantile(np.concatenate(gaps), [0.025, 0.975])
    reached = int((np.concatenate(by_lot) >= gap - TINY).sum())
    return gap, Interval(float(low), float(high)), (reached + 1) / (DRAWS + 1)


def _parts(draws: int, users: int) -> Iterator[int]:
    """Draws at once: as many as fit into `CELLS` numbers."""
    most = max(1, CELLS // users)
    while draws > 0:
        yield min(most, draws)
        draws -= most


def of_reports(
    reports: Sequence[Report], field: str | None, folder: Path | None
) -> list[list[ByGroup]]:
    """`of_report` of each; nothing without a field. Raises SettingsError: no data set is named."""
    if field is None:
        return [[] for _ in reports]
    if folder is None:
        raise SettingsError(f"--by {field} needs --data FOLDER: the data set of the run")
    data = load(folder)
    return [of_report(report, data, folder, field) for report in reports]


def of_report(report: Report, data: DataSet, folder: Path, field: str) -> list[ByGroup]:
    """HYDRA's variants of a run against its baseline, by the groups of a field; other methods where
    there is none. Raises SettingsError: the run is of another data set, or has no baseline.
    """
    run, baseline = report.run, report.baseline
    if run.manifest.get("data") != data.digest:
        raise SettingsError(f"--data {folder}: {run.folder} has answered another data set")
    if baseline is None:
        raise SettingsError(f"{run.folder}: has no method to compare with: give --against METHOD")
    methods = [name for name in report.comparisons if base_name(name) == "hydra"]
    users = {sample.user for sample in run.samples}
    group_of, base = grouped(values_of(data, folder, field, users)), report.answers[baseline]
    found = []
    for method in methods or list(report.comparisons):
        pairs = pair(of_metric(run.task, report.answers[method]), of_metric(run.task, base))
        found.append(by_group(run.task, pairs, group_of, (field, method, baseline)))
    return found


def group_rows(found: ByGroup) -> list[dict[str, Any]]:
    """A row per group, the worst one first."""
    return [
        {
            found.field: own.group,
            "users": own.users,
            "queries": own.queries,
            "gain": cell(own.gain, *own.gain_interval, form="+.3f"),
            "users worse": f"{own.harmed:.0%}",
            "harm": cell(own.harm, *own.harm_interval),
        }
        for own in found.groups
    ]


def gap_line(found: ByGroup) -> str:
    """The gap in a sentence; empty where no two groups can be compared."""
    if math.isnan(found.gap):
        return f"No two groups of at least {LEAST_USERS} users: no gap is told."
    gap = cell(found.gap, *found.gap_interval, form="+.3f")
    by_lot = f"as large by lot with p {p_value(found.gap_p)}"
    return f"Gap between the best and the worst group: {gap}, {by_lot}."
