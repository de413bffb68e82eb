"""A run as tables: figures with intervals, best and second best, paired differences.

Baselines and bounds are in parts of their own and are never marked as best. Reads run folders only;
a run may be stopped, or still going on. Knows no LLM.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from hydra_llm.bench.method import METHODS, base_name, installed, per_sample
from hydra_llm.bench.results import (
    Comparison,
    MethodResult,
    compare,
    pair,
    rounded,
    scored_pairs,
    tabulate,
)
from hydra_llm.bench.runlog import Sample, by_method, read_learning, read_run
from hydra_llm.bench.stats import Paired, Relative, over_tasks, relative, title
from hydra_llm.errors import SettingsError, did_you_mean
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
RANKED = ("prompt", "hydra", "adapter", "sampling")  # groups whose best two are marked
OVERALL = (
    "Over the best prompts, mean over tasks and metrics, 95 % intervals over users (HYDRA's"
    " headline figure)"
)


@dataclass(frozen=True)
class Run:
    """A run folder, read; `learning` is each seed's report of learning."""

    folder: Path
    manifest: Mapping[str, Any]
    task: Task
    samples: tuple[Sample, ...]
    learning: tuple[Mapping[str, Any], ...] = ()

    @cached_property
    def by_method(self) -> dict[str, list[Sample]]:
        """Method → samples, in the order of the installed methods; others come last."""
        places = {name: place for place, name in enumerate(METHODS.names())}
        groups = by_method(self.samples)
        order = sorted(groups, key=lambda name: (places.get(base_name(name), len(places)), name))
        return {name: groups[name] for name in order}

    @property
    def seeds(self) -> list[int]:
        """Of the learned parts."""
        learned = [own for name, own in self.by_method.items() if not per_sample(name)]
        return sorted({sample.seed for own in learned for sample in own})

    def of(self, method: str) -> list[Sample]:
        return self.by_method.get(method, [])


def open_run(folder: Path) -> Run:
    """Read a run folder; SettingsError if it is none, is damaged, or of another version."""
    manifest, samples = read_run(folder)
    if not isinstance(manifest.get("task"), dict):
        fault = "its manifest does not say how answers are scored"
        raise SettingsError(f"{folder}: {fault}: it was made by an older hydra-llm, run it again")
    if not samples:
        raise SettingsError(f"{folder}: holds no answer yet")
    task = Task.from_json(manifest["task"], f"{folder}/manifest.json")
    return Run(folder, manifest, task, tuple(samples), tuple(read_learning(folder)))


def compare_runs(first: Run, second: Run) -> dict[str, Comparison]:
    """The methods that both runs have, second minus first; SettingsError if there is none."""
    both = f"{first.folder} and {second.folder}"
    if first.manifest["data"] != second.manifest["data"]:
        raise SettingsError(f"{both} answer other data sets: their answers cannot be paired")
    common = [method for method in first.by_method if method in second.by_method]
    if not common:
        raise SettingsError(f"{both} have no method in common")
    return {name: compare(first.task, second.of(name), first.of(name)) for name in common}


@dataclass(frozen=True)
class TableRow:
    """A method in the table: mean relative improvement over the best prompt-based method of each
    metric (HYDRA 4.2), and without BLEU, whose ratios are large for short texts, as it is near 0
    there; difference from the baseline, None for the baseline itself, and without one.
    """

    group: str
    result: MethodResult
    over_prompts: Relative | None
    over_prompts_without_bleu: Relative | None
    comparison: Comparison | None

    @property
    def method(self) -> str:
        return self.result.method


@dataclass(frozen=True, eq=False)
class Report:
    """A run with its table: what text, page and plots are made from."""

    run: Run
    rows: tuple[TableRow, ...]
    baseline: str | None  # the method that the others are compared with
    prices: Prices

    @property
    def by_group(self) -> list[TableRow]:
        """The rows in the order of the table's parts."""
        return [row for group in GROUPS for row in self.rows if row.group == group]

    @property
    def comparisons(self) -> dict[str, Comparison]:
        """Method → its difference from the baseline."""
        return {row.method: row.comparison for row in self.rows if row.comparison is not None}

    @property
    def metrics(self) -> list[str]:
        """The task's metrics, the first one first."""
        return list(self.run.task.metric_specs)

    def sign(self, metric: str) -> int:
        """1 if more is better, −1 if less is."""
        return self.run.task.metric_specs[metric].sign

    @cached_property
    def marks(self) -> dict[tuple[str, str], int]:
        """(method, metric) → 1 for the best of the ranked groups, 2 for the second best."""
        marks: dict[tuple[str, str], int] = {}
        ranked = [row for row in self.rows if row.group in RANKED]
        for metric in self.metrics:
            sign = self.sign(metric)
            values = {row.method: sign * row.result.metrics[metric][0] for row in ranked}
            best = sorted({v for v in values.values() if not math.isnan(v)}, reverse=True)[:2]
            marks |= {(m, metric): 1 + best.index(v) for m, v in values.items() if v in best}
        return marks


def make_report(run: Run, baseline: str | None = None, prices: Prices = FREE) -> Report:
    """Every method of a run, against the baseline (by default the best prompt-based method by the
    first metric); SettingsError if the run has no such baseline.
    """
    samples = list(chain(*run.by_method.values()))
    results = {result.method: result for result in tabulate(run.task, samples, prices)}
    prompts = [result for name, result in results.items() if group_of(name) == "prompt"]
    best: dict[str, str] = {}
    for metric, spec in run.task.metric_specs.items():
        values = {row.method: spec.sign * row.metrics[metric][0] for row in prompts}
        if known := [name for name, value in values.items() if not math.isnan(value)]:
            best[metric] = max(known, key=values.__getitem__)
    base = baseline or best.get(next(iter(run.task.metric_specs)))
    if base is None and len(results) == 1:
        (base,) = results
    if base is not None and base not in results:
        near, names = did_you_mean(base, results), ", ".join(results)
        raise SettingsError(f"{run.folder}: no method '{base}'{near}: take one of {names}")
    rows = []
    for name, result in results.items():
        against = compare(run.task, run.of(name), run.of(base)) if base and name != base else None
        over, without_bleu = _over_prompts(run, name, best)
        rows.append(TableRow(group_of(name), result, over, without_bleu, against))
    return Report(run, tuple(rows), base, prices)


def group_of(method: str) -> str:
    """Its part of the table; a method that is not installed counts as HYDRA's."""
    known = installed(method)
    return known.group if known and known.group in GROUPS else "hydra"


def _over_prompts(
    run: Run, method: str, best: Mapping[str, str]
) -> tuple[Relative | None, Relative | None]:
    """With and without BLEU; `best`: metric → the prompt-based method that is best by it."""
    tops = set(best.values())
    scores = {top: scored_pairs(run.task, pair(run.of(method), run.of(top))) for top in tops}
    cases, without_bleu = [], []
    for metric, top in best.items():
        ours, theirs, users = scores[top]
        if users:
            case = (ours[metric], theirs[metric], users)
            cases.append(case)
            if run.task.metric_specs[metric].in_improvement:
                without_bleu.append(case)
    return relative(cases), relative(without_bleu)


def overall(reports: Sequence[Report]) -> dict[str, dict[str, Relative]]:
    """Method → mean relative improvement over the best prompts of all runs, with and without BLEU:
    the paper's headline figure (9.01 %). Empty for one run, or for runs of one data set.
    """
    if len({report.run.manifest.get("data") for report in reports}) < max(2, len(reports)):
        return {}
    return _overall(tuple(reports))


@lru_cache(maxsize=16)  # several outputs of the same reports share it
def _overall(reports: tuple[Report, ...]) -> dict[str, dict[str, Relative]]:
    tables = [{row.method: row for row in report.rows} for report in reports]
    means: dict[str, dict[str, Relative]] = {}
    for method in tables[0]:
        rows = [table[method] for table in tables if method in table]
        shares = {
            "all metrics": [row.over_prompts for row in rows],
            "without BLEU": [row.over_prompts_without_bleu for row in rows],
        }
        for what, over in shares.items():
            if len(known := [share for share in over if share]) == len(tables):
                means.setdefault(method, {})[what] = over_tasks(known)
    return means


def overall_rows(shares: Mapping[str, Mapping[str, Relative]]) -> list[dict[str, Any]]:
    """A row per method, the best first."""
    rows = sorted(shares.items(), key=lambda row: -next(iter(row[1].values())).change)
    return [{"method": name, **{what: share(over[what]) for what in over}} for name, over in rows]


def method_rows(
    report: Report, marks: tuple[str, str, str] = ("", " *", " '")
) -> list[dict[str, Any]]:
    """A row per method, part by part; `marks` follow a figure: none, of the best, second best."""
    return [
        {
            "part": GROUPS[row.group],
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
        for row in report.by_group
    ]


def comparison_rows(comparisons: Mapping[str, Comparison]) -> list[dict[str, Any]]:
    """A row per method: paired differences, users better and worse, queries needed."""
    rows = []
    for method, own in comparisons.items():
        users, needed = own.wins + own.ties + own.losses, next(iter(own.needed.values()), None)
        row = {
            "method": method,
            **{name: difference(change) for name, change in own.metrics.items()},
            "users better, same, worse": f"{own.wins}, {own.ties}, {own.losses}",
            "worse": f"{own.losses / users:.0%}" if users else "",
            "worst tenth": f"{own.worst_tenth:+.3f}",
            "queries needed": "" if needed is None else needed,
        }
        rows.append(row)
    return rows


def to_json(report: Report) -> dict[str, Any]:
    """The report without findings and learning."""
    rows = [
        {
            "group": row.group,
            **row.result.to_json(),
            "over_prompts": share_json(row.over_prompts),
            "over_prompts_without_bleu": share_json(row.over_prompts_without_bleu),
            "against": None if row.comparison is None else row.comparison.to_json(),
        }
        for row in report.rows
    ]
    return {"run": str(report.run.folder), "task": report.run.task.name, "methods": rows}


def share_json(over: Relative | None) -> list[float | None] | None:
    """Change and the ends of its interval, null where there is none."""
    return None if over is None else rounded((over.change, *over.interval()))


def results_table(results: Sequence[MethodResult]) -> list[dict[str, Any]]:
    """A row per method: metrics with their intervals, calls, failures."""
    return [
        {
            "method": result.method,
            **{title(name): cell(*figures) for name, figures in result.metrics.items()},
            "queries": result.queries,
            "LLM calls": round(result.calls, 1),
            "LLM s": round(result.llm_seconds, 2),
            "failed": result.failed,
            "unparsable": result.unparsable,
        }
        for result in results
    ]


# ---- figures as text


def cell(value: float, low: float, high: float, *, form: str = ".3f") -> str:
    """`0.810 [0.672, 0.935]`; too few users have no interval."""
    if math.isnan(value):
        return "failed"
    return f"{value:{form}}" + ("" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]")


def signed(change: Paired) -> str:
    """`+0.069 [-0.026, +0.180]`."""
    return cell(change.difference, change.low, change.high, form="+.3f")


def difference(change: Paired) -> str:
    """`+0.069 [-0.026, +0.180] p 0.150`."""
    return signed(change) + ("" if math.isnan(change.p) else f" p {change.p:.3f}")


def share(over: Relative | None) -> str:
    """`+3.1% [-2.0%, +8.2%]`."""
    return cell(over.change, *over.interval(), form="+.1%") if over else ""


def axis_title(metric: str, higher: bool) -> str:
    """`MAE (less is better)`."""
    return f"{title(metric)} ({'more' if higher else 'less'} is better)"
