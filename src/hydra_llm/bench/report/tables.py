"""A run as tables to read: figures with intervals, best and second best, paired differences, what
they cost the users.

Bounds and controls stand apart and are never the best. Differences are paired on the same queries
and resampled by user, see
`compare`. Reads run folders only: a run may be stopped, or still going on. Knows no LLM.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from hydra_llm.bench.methods import METHODS
from hydra_llm.bench.runlog import Sample, read_learning, read_run
from hydra_llm.bench.runner import Row, cell, scored, tabulate
from hydra_llm.bench.stats import Paired, Relative, over_tasks, paired, relative
from hydra_llm.errors import SettingsError
from hydra_llm.llm.meter import FREE, Prices
from hydra_llm.tasks.base import Task

GROUPS = {
    "prompt": "prompts",
    "hydra": "HYDRA",
    "adapter": "adapter of others",
    "sampling": "choosing without learning",
    "control": "controls",
    "bound": "bounds",
}
"""Group of a method → how its part of the table is called, in the table's order."""
RANKED = ("prompt", "hydra", "adapter", "sampling")
"""Groups among which the best is named."""
OVERALL = (
    "Over the best prompts, mean over tasks and metrics, 95 % intervals over users (HYDRA's"
    " headline figure)"
)
POWER = 2.8
"""Standard errors that a difference must be worth to be found four times in five at the 5 % level:
1.96 + 0.84.
"""


@dataclass(frozen=True)
class Against:
    """A method beside the baseline, on the queries that both answered."""

    metrics: Mapping[str, Paired]
    """Method minus baseline."""
    wins: int
    """Users whose mean gain is higher."""
    ties: int
    losses: int
    worst_tenth: float
    """Mean change of gain of the tenth of users who lose most (at least one user): nobody should
    pay for the average.
    """
    needed: Mapping[str, int | None]
    """Queries that would show the difference as it is; None where there is none."""

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "metrics": {name: found._asdict() for name, found in self.metrics.items()},
        }


@dataclass(frozen=True)
class Run:
    """A run folder, read."""

    folder: Path
    manifest: Mapping[str, Any]
    task: Task
    samples: tuple[Sample, ...]
    learning: tuple[Mapping[str, Any], ...] = ()
    """What each seed's learning told."""

    @property
    def methods(self) -> list[str]:
        """In the order of `METHODS`."""
        places = list(METHODS)
        names = dict.fromkeys(sample.method for sample in self.samples)
        return sorted(
            names,
            key=lambda name: (
                places.index(plain(name)) if plain(name) in METHODS else len(places),
                name,
            ),
        )

    @property
    def seeds(self) -> list[int]:
        """Of the learned parts."""
        return sorted({sample.seed for sample in self.samples if not in_turn(sample.method)})

    def of(self, method: str) -> list[Sample]:
        return [sample for sample in self.samples if sample.method == method]


@dataclass(frozen=True)
class Line:
    """A method in the table."""

    group: str
    row: Row
    over_prompts: Relative | None
    """Mean relative improvement over the best prompt-based method of each metric, as the paper
    counts it (HYDRA 4.2).
    """
    over_means: Relative | None
    """The same without BLEU, which is near 0 for short texts, so that its ratios drown the others'.
    """
    against: Against | None


def open_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        SettingsError: it is none, is damaged, or of another version.
    """
    manifest, samples = read_run(folder)
    if not isinstance(manifest.get("task"), dict):
        raise SettingsError(
            f"{folder}: its manifest does not say how answers are scored: it was made by an older"
            " hydra-llm, run it again"
        )
    if not samples:
        raise SettingsError(f"{folder}: holds no answer yet")
    task = Task.from_json(manifest["task"], f"{folder}/manifest.json")
    return Run(folder, manifest, task, tuple(samples), tuple(read_learning(folder)))


def plain(method: str) -> str:
    """`hydra@4,8` → hydra."""
    return method.partition("@")[0]


def in_turn(method: str) -> bool:
    """Whether its samples take turns, so that their seeds are places."""
    return plain(method) in METHODS and METHODS[plain(method)].in_turn


def group_of(method: str) -> str:
    """Its part of the table."""
    return METHODS[plain(method)].group if plain(method) in METHODS else "hydra"


# ---- the table


def lines_of(run: Run, baseline: str | None = None, prices: Prices = FREE) -> list[Line]:
    """Every method of a run, against the baseline (without a name: the best prompt-based method by
    the first metric).

    Raises:
        SettingsError: the run has no such baseline.
    """
    rows = {
        row.method: row
        for row in tabulate(
            run.task,
            sorted(run.samples, key=lambda sample: run.methods.index(sample.method)),
            prices,
        )
    }
    specs = run.task.metric_specs
    best = {name: _best(run, rows, name) for name in specs}
    against = baseline or next(iter(best.values()))
    if against is not None and against not in rows:
        raise SettingsError(f"{run.folder}: no method '{against}': take one of {', '.join(rows)}")
    return [
        Line(
            group_of(name),
            row,
            _over(run, name, best),
            _over(
                run,
                name,
                {metric: top for metric, top in best.items() if specs[metric].in_improvement},
            ),
            (
                compare(run.task, run.of(name), run.of(against))
                if against and name != against
                else None
            ),
        )
        for name, row in rows.items()
    ]


def _best(run: Run, rows: Mapping[str, Row], metric: str) -> str | None:
    """The best prompt-based method by a metric."""
    found = [
        name
        for name in rows
        if group_of(name) == "prompt" and not math.isnan(rows[name].metrics[metric][0])
    ]
    return min(
        found,
        key=lambda name: -run.task.metric_specs[metric].sign * rows[name].metrics[metric][0],
        default=None,
    )


def _over(run: Run, method: str, best: Mapping[str, str | None]) -> Relative | None:
    """`best`: metric → the prompt-based method that is best by it."""
    paired_with = {top: pair(run.of(method), run.of(top)) for top in set(best.values()) if top}
    cases = []
    for metric, top in best.items():
        if top and (pairs := paired_with[top]):
            own, base = (
                scored(run.task, [each[side] for each in pairs])[metric] for side in (0, 1)
            )
            cases.append((own, base, [mine.user for mine, _ in pairs]))
    return relative(cases) if cases else None


def marks(run: Run, lines: Sequence[Line]) -> dict[tuple[str, str], int]:
    """(method, metric) → 1 for the best of the ranked groups, 2 for the second best; equal values
    share their place.
    """
    out: dict[tuple[str, str], int] = {}
    for metric in lines[0].row.metrics:
        sign = run.task.metric_specs[metric].sign
        values = {
            line.row.method: sign * line.row.metrics[metric][0]
            for line in lines
            if line.group in RANKED
        }
        values = {method: value for method, value in values.items() if not math.isnan(value)}
        for place, value in enumerate(sorted(set(values.values()), reverse=True)[:2], 1):
            out |= {(method, metric): place for method, own in values.items() if own == value}
    return out


# ---- two methods on the same queries


def compare(task: Task, own: Sequence[Sample], base: Sequence[Sample]) -> Against:
    """How `own` differs from `base` on the queries that both have; a method of one seed stands
    beside each of the other's.
    """
    pairs = pair(own, base)
    users, queries = (
        [mine.user for mine, _ in pairs],
        len({(mine.user, mine.query) for mine, _ in pairs}),
    )
    ours, theirs = (scored(task, [each[side] for each in pairs]) for side in (0, 1))
    metrics = {name: paired(ours[name], theirs[name], users) for name in ours}
    change = _by_user(task, pairs)
    worst = np.sort(change)[: max(1, len(change) // 10)]
    return Against(
        metrics,
        int((change > 0).sum()),
        int((change == 0).sum()),
        int((change < 0).sum()),
        float(worst.mean()) if len(worst) else math.nan,
        {name: needed(found, queries) for name, found in metrics.items()},
    )


def pair(own: Sequence[Sample], base: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """The samples of the same query and seed; where only one side has several seeds, the other's
    one sample goes with each. Turns are no seeds: each of `random`'s samples goes with each of
    the other's.
    """
    sides: list[dict[tuple[str, str], dict[int, Sample]]] = [{}, {}]
    for side, samples in zip(sides, (own, base), strict=True):
        for sample in samples:
            side.setdefault((sample.user, sample.query), {})[sample.seed] = sample
    pairs = []
    for key in (key for key in sides[0] if key in sides[1]):
        ours, theirs = sides[0][key], sides[1][key]
        turns = any(in_turn(next(iter(side.values())).method) for side in (ours, theirs))
        if turns and ours.keys() != theirs.keys():
            pairs += [(mine, its) for mine in ours.values() for its in theirs.values()]
            continue
        seeds = set(
            ours if len(theirs) == 1 else theirs if len(ours) == 1 else ours.keys() & theirs.keys()
        )
        pairs += [
            (
                ours.get(seed) or next(iter(ours.values())),
                theirs.get(seed) or next(iter(theirs.values())),
            )
            for seed in sorted(seeds)
        ]
    return pairs


def _by_user(task: Task, pairs: Sequence[tuple[Sample, Sample]]) -> np.ndarray:
    """Each user's mean change of gain, over the queries that neither failed."""
    changes: dict[str, list[float]] = {}
    for own, base in pairs:
        if not own.error and not base.error:
            changes.setdefault(own.user, []).append(
                task.gain(own.answer, own.gold) - task.gain(base.answer, base.gold)
            )
    return np.round([np.mean(values) for values in changes.values()], 12)


def needed(found: Paired, queries: int) -> int | None:
    """How many queries would show this difference (power .8, level .05): of more users with as many
    queries each, since users are drawn.
    """
    error = (
        (found.high - found.low) / (2 * float(stdtrit(found.users - 1, 0.975)))
        if found.users > 1
        else math.nan
    )
    if not found.difference or not error > 0:
        return None
    return math.ceil(round(queries * (POWER * error / abs(found.difference)) ** 2, 6))


def compare_runs(a: Run, b: Run) -> dict[str, Against]:
    """The methods that both runs have: b minus a.

    Raises:
        SettingsError: they have none in common, or answer other data.
    """
    if a.manifest["data"] != b.manifest["data"]:
        raise SettingsError(
            f"{a.folder} and {b.folder} answer other data sets: their answers cannot be paired"
        )
    common = [method for method in a.methods if method in b.methods]
    if not common:
        raise SettingsError(f"{a.folder} and {b.folder} have no method in common")
    return {method: compare(a.task, b.of(method), a.of(method)) for method in common}


# ---- several tasks


def overall(tables: Sequence[tuple[Run, Sequence[Line]]]) -> dict[str, dict[str, Relative]]:
    """Method → mean relative improvement over the best prompts of all runs, with and without BLEU:
    the paper's headline figure (9.01 %).

    Only methods that every run has; empty for one run, or for runs of one data set.
    """
    if len({run.manifest.get("data") for run, _ in tables}) < max(2, len(tables)):
        return {}
    named = [{line.row.method: line for line in lines} for _, lines in tables]
    out: dict[str, dict[str, Relative]] = {}
    for method in (method for method in named[0] if all(method in each for each in named)):
        lines = [each[method] for each in named]
        shares = {
            "all metrics": [line.over_prompts for line in lines],
            "without BLEU": [line.over_means for line in lines],
        }
        known = {
            what: [share for share in found if share is not None] for what, found in shares.items()
        }
        out[method] = {
            what: over_tasks(found) for what, found in known.items() if len(found) == len(named)
        }
    return {method: found for method, found in out.items() if found}


def as_overall(found: Mapping[str, Mapping[str, Relative]]) -> list[dict[str, Any]]:
    """A row per method, the best first."""
    order = sorted(found, key=lambda method: -next(iter(found[method].values())).change)
    return [
        {"method": method, **{what: told_share(share) for what, share in found[method].items()}}
        for method in order
    ]


# ---- for people


def told_share(found: Relative | None) -> str:
    """`+3.1% [-2.0%, +8.2%]`."""
    if found is None:
        return ""
    low, high = found.interval()
    return f"{found.change:+.1%}" + ("" if math.isnan(low) else f" [{low:+.1%}, {high:+.1%}]")


def share_json(found: Relative | None) -> list[float | None] | None:
    """Change and the ends of its interval, null where there is none."""
    return found and [
        None if math.isnan(each) else round(each, 6) for each in (found.change, *found.interval())
    ]


def as_rows(run: Run, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """One row per method, one part of the table after the other; * best, ' second best."""
    places = marks(run, lines)
    out = []
    for group, title in GROUPS.items():
        for line in (line for line in lines if line.group == group):
            row = line.row
            cells: dict[str, Any] = {"part": title, "method": row.method}
            for name, figures in row.metrics.items():
                cells[name] = cell(*figures) + {1: " *", 2: " '"}.get(
                    places.get((row.method, name), 0), ""
                )
            over = told_share(line.over_prompts)
            cells |= {
                "over best prompts": over,
                "queries": row.queries,
                "LLM calls": round(row.calls, 1),
                "failed": row.failed,
            }
            out.append(cells)
    return out


def as_differences(differences: Mapping[str, Against]) -> list[dict[str, Any]]:
    """One row per method: paired differences, users, and what it would take to be sure."""
    out = []
    for method, found in differences.items():
        cells: dict[str, Any] = {"method": method}
        for name, difference in found.metrics.items():
            if math.isnan(difference.difference):
                cells[name] = "failed"
                continue
            cells[name] = (
                f"{difference.difference:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}] p"
                f" {difference.p:.3f}"
            )
        users = found.wins + found.ties + found.losses
        cells |= {"users better, same, worse": f"{found.wins}, {found.ties}, {found.losses}"}
        cells |= {
            "worse": f"{found.losses / users:.0%}" if users else "",
            "worst tenth": f"{found.worst_tenth:+.3f}",
        }
        first = next(iter(found.needed.values()), None)
        cells["queries needed"] = "" if first is None else first
        out.append(cells)
    return out


def to_json(run: Run, lines: Sequence[Line]) -> dict[str, Any]:
    """All of it for machines."""
    rows = [
        {
            "group": line.group,
            **line.row.to_json(),
            "over_prompts": share_json(line.over_prompts),
            "over_prompts_without_bleu": share_json(line.over_means),
            "against": line.against and line.against.to_json(),
        }
        for line in lines
    ]
    return {"run": str(run.folder), "task": run.task.name, "methods": rows}
