"""A run as tables: figures with intervals, best and second best, paired differences.

Baselines and bounds are in parts of their own and are never marked as best. Reads run folders only;
a run may be stopped, or still going on. Knows no LLM.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra_llm.bench.comparison import Comparison, compare, pair
from hydra_llm.bench.method import METHODS, base_name, installed, per_sample
from hydra_llm.bench.report.cells import cell, difference, share
from hydra_llm.bench.runlog import Sample, read_learning, read_run
from hydra_llm.bench.runner import MethodResult, rounded, scored, tabulate
from hydra_llm.bench.stats import Relative, over_tasks, relative
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
"""Group of a method → title of its part of the table, in the table's order."""
RANKED = ("prompt", "hydra", "adapter", "sampling")
"""Groups whose best and second best are marked."""
OVERALL = (
    "Over the best prompts, mean over tasks and metrics, 95 % intervals over users (HYDRA's"
    " headline figure)"
)


# ---- a run, read from its folder


@dataclass(frozen=True)
class Run:
    """A run folder, read."""

    folder: Path
    manifest: Mapping[str, Any]
    task: Task
    samples: tuple[Sample, ...]
    learning: tuple[Mapping[str, Any], ...] = ()
    """Each seed's report of learning."""

    @property
    def methods(self) -> list[str]:
        """In the order of the installed methods; others come last."""
        places = {name: place for place, name in enumerate(METHODS.names())}
        names = {sample.method for sample in self.samples}
        return sorted(names, key=lambda name: (places.get(base_name(name), len(places)), name))

    @property
    def seeds(self) -> list[int]:
        """Of the learned parts."""
        with_seeds = {name for name in self.methods if not per_sample(name)}
        return sorted({sample.seed for sample in self.samples if sample.method in with_seeds})

    def of(self, method: str) -> list[Sample]:
        return [sample for sample in self.samples if sample.method == method]


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


def compare_runs(first: Run, second: Run) -> dict[str, Comparison]:
    """The methods that both runs have: second minus first.

    Raises:
        SettingsError: they have none in common, or answer other data.
    """
    if first.manifest["data"] != second.manifest["data"]:
        raise SettingsError(
            f"{first.folder} and {second.folder} answer other data sets: their answers cannot be"
            " paired"
        )
    common = [method for method in first.methods if method in second.methods]
    if not common:
        raise SettingsError(f"{first.folder} and {second.folder} have no method in common")
    return {name: compare(first.task, second.of(name), first.of(name)) for name in common}


# ---- the report of a run


@dataclass(frozen=True)
class TableRow:
    """A method in the table."""

    group: str
    result: MethodResult
    over_prompts: Relative | None
    """Mean relative improvement over the best prompt-based method of each metric (HYDRA 4.2)."""
    over_prompts_without_bleu: Relative | None
    """The same without BLEU, whose ratios are large for short texts, as it is near 0 there."""
    comparison: Comparison | None
    """Against the baseline; None for the baseline itself, and without one."""

    @property
    def method(self) -> str:
        return self.result.method


@dataclass(frozen=True)
class Report:
    """A run with its table: what text, page and plots are made from."""

    run: Run
    rows: tuple[TableRow, ...]
    prices: Prices = FREE

    @property
    def baseline(self) -> str | None:
        """The method that the others are compared with."""
        found = [row.method for row in self.rows if row.comparison is None]
        return found[0] if len(found) == 1 else None

    @property
    def comparisons(self) -> dict[str, Comparison]:
        """Method → its difference from the baseline."""
        return {row.method: row.comparison for row in self.rows if row.comparison is not None}

    @property
    def metrics(self) -> list[str]:
        """The task's metrics, the first one first."""
        return list(self.rows[0].result.metrics)

    def sign(self, metric: str) -> int:
        """1 if more is better, −1 if less is."""
        return self.run.task.metric_specs[metric].sign

    @cached_property
    def marks(self) -> dict[tuple[str, str], int]:
        """(method, metric) → 1 for the best of the ranked groups, 2 for the second best."""
        out: dict[tuple[str, str], int] = {}
        for metric in self.metrics:
            values = {
                row.method: self.sign(metric) * row.result.metrics[metric][0]
                for row in self.rows
                if row.group in RANKED and not math.isnan(row.result.metrics[metric][0])
            }
            for place, value in enumerate(sorted(set(values.values()), reverse=True)[:2], 1):
                out |= {(method, metric): place for method, own in values.items() if own == value}
        return out


def make_report(run: Run, baseline: str | None = None, prices: Prices = FREE) -> Report:
    """Every method of a run, against the baseline (by default the best prompt-based method by the
    first metric).

    Raises:
        SettingsError: the run has no such baseline.
    """
    samples = [sample for name in run.methods for sample in run.of(name)]
    results = {each.method: each for each in tabulate(run.task, samples, prices)}
    specs = run.task.metric_specs
    best = {name: _best_prompt(run, results, name) for name in specs}
    base = baseline or next(iter(best.values()))
    if base is not None and base not in results:
        raise SettingsError(f"{run.folder}: no method '{base}': take one of {', '.join(results)}")
    without_bleu = {name: top for name, top in best.items() if specs[name].in_improvement}
    rows = (
        TableRow(
            group_of(name),
            result,
            _over(run, name, best),
            _over(run, name, without_bleu),
            compare(run.task, run.of(name), run.of(base)) if base and name != base else None,
        )
        for name, result in results.items()
    )
    return Report(run, tuple(rows), prices)


def group_of(method: str) -> str:
    """Its part of the table; a method that is not installed counts as HYDRA's."""
    found = installed(method)
    return found.group if found is not None and found.group in GROUPS else "hydra"


def _best_prompt(run: Run, results: Mapping[str, MethodResult], metric: str) -> str | None:
    """The best prompt-based method by a metric."""
    values = {name: each.metrics[metric][0] for name, each in results.items()}
    found = [name for name in values if group_of(name) == "prompt" and not math.isnan(values[name])]
    sign = run.task.metric_specs[metric].sign
    return min(found, key=lambda name: -sign * values[name], default=None)


def _over(run: Run, method: str, best: Mapping[str, str | None]) -> Relative | None:
    """`best`: metric → the prompt-based method that is best by it."""
    pairs_with = {name: pair(run.of(method), run.of(name)) for name in set(best.values()) if name}
    cases = []
    for metric, name in best.items():
        if name and (pairs := pairs_with[name]):
            own, base = (scored(run.task, [each[side] for each in pairs]) for side in (0, 1))
            cases.append((own[metric], base[metric], [sample.user for sample, _ in pairs]))
    return relative(cases) if cases else None


# ---- several tasks


def overall(reports: Sequence[Report]) -> dict[str, dict[str, Relative]]:
    """Method → mean relative improvement over the best prompts of all runs, with and without BLEU:
    the paper's headline figure (9.01 %).

    Only methods that every run has; empty for one run, or for runs of one data set.
    """
    if len({report.run.manifest.get("data") for report in reports}) < max(2, len(reports)):
        return {}
    tables = [{row.method: row for row in report.rows} for report in reports]
    out: dict[str, dict[str, Relative]] = {}
    for method in (method for method in tables[0] if all(method in each for each in tables)):
        rows = [table[method] for table in tables]
        shares = {
            "all metrics": [row.over_prompts for row in rows],
            "without BLEU": [row.over_prompts_without_bleu for row in rows],
        }
        known = {what: [each for each in found if each] for what, found in shares.items()}
        means = {what: over_tasks(v) for what, v in known.items() if len(v) == len(rows)}
        if means:
            out[method] = means
    return out


def overall_rows(found: Mapping[str, Mapping[str, Relative]]) -> list[dict[str, Any]]:
    """A row per method, the best first."""
    order = sorted(found, key=lambda method: -next(iter(found[method].values())).change)
    return [
        {"method": method, **{what: share(each) for what, each in found[method].items()}}
        for method in order
    ]


# ---- rows for people, and all of it for machines


def method_rows(report: Report) -> list[dict[str, Any]]:
    """A row per method, part by part; * best, ' second best."""
    marks = {0: "", 1: " *", 2: " '"}
    return [
        {
            "part": title,
            "method": row.method,
            **{
                name: cell(*figures) + marks[report.marks.get((row.method, name), 0)]
                for name, figures in row.result.metrics.items()
            },
            "over best prompts": share(row.over_prompts),
            "queries": row.result.queries,
            "LLM calls": round(row.result.calls, 1),
            "failed": row.result.failed,
        }
        for group, title in GROUPS.items()
        for row in report.rows
        if row.group == group
    ]


def comparison_rows(comparisons: Mapping[str, Comparison]) -> list[dict[str, Any]]:
    """A row per method: paired differences, users better and worse, queries needed."""
    out = []
    for method, found in comparisons.items():
        users = found.wins + found.ties + found.losses
        needed = next(iter(found.needed.values()), None)
        out.append(
            {
                "method": method,
                **{name: difference(each) for name, each in found.metrics.items()},
                "users better, same, worse": f"{found.wins}, {found.ties}, {found.losses}",
                "worse": f"{found.losses / users:.0%}" if users else "",
                "worst tenth": f"{found.worst_tenth:+.3f}",
                "queries needed": "" if needed is None else needed,
            }
        )
    return out


def to_json(report: Report) -> dict[str, Any]:
    """The report without findings and learning."""
    rows = [
        {
            "group": row.group,
            **row.result.to_json(),
            "over_prompts": share_json(row.over_prompts),
            "over_prompts_without_bleu": share_json(row.over_prompts_without_bleu),
            "against": row.comparison and row.comparison.to_json(),
        }
        for row in report.rows
    ]
    return {"run": str(report.run.folder), "task": report.run.task.name, "methods": rows}


def share_json(found: Relative | None) -> list[float | None] | None:
    """Change and the ends of its interval, null where there is none."""
    return found and rounded((found.change, *found.interval()))
