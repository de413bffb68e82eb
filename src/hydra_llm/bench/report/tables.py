"""A run as tables: figures with intervals, best and second best, paired differences.

Baselines and bounds are in parts of their own and are never marked as best. Reads run folders only;
a run may be stopped, or still going on. Knows no LLM.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from hydra_llm.bench.calibration import Calibration, of_labels
from hydra_llm.bench.method import METHODS, base_name, installed, per_sample
from hydra_llm.bench.multiple import ALPHA, UsersTested, compare_users, holm
from hydra_llm.bench.report import best_prompt
from hydra_llm.bench.report.cells import difference, figure, json_number, p_value, share, share_json
from hydra_llm.bench.results import (
    Answers,
    Comparison,
    MethodResult,
    compare,
    pair,
    scored_by_metric,
    tabulate,
)
from hydra_llm.bench.runlog import Sample, by_method, read_learning, read_run
from hydra_llm.bench.stats import MIN_USERS, Relative, over_tasks, relative, title
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
OVERALL = "Over the best prompts, mean over tasks and metrics, 95 % intervals over users (HYDRA's"
OVERALL += " headline figure)"
Over = Relative | None


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

    The best prompts are those chosen on training users, in a run with folds; `over_hindsight` are
    the improvements over those chosen with hindsight, with BLEU and without it.
    """

    group: str
    result: MethodResult
    over_prompts: Relative | None
    over_prompts_without_bleu: Relative | None
    comparison: Comparison | None
    over_hindsight: tuple[Relative | None, Relative | None] = (None, None)

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
    answers: Mapping[str, Answers] = field(default_factory=dict)  # method → its samples
    honest: bool = False  # whether the best prompts were chosen on training users

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

    @cached_property
    def too_few(self) -> str:
        """Why nothing is said about differences, and no method ranked; empty for users enough."""
        users = len({sample.user for sample in self.run.samples})
        needs = f"at least {MIN_USERS} users are needed for intervals and p-values"
        said = f"Nothing can be said about differences: {users} answered, {needs}."
        return said if users < MIN_USERS else ""

    @cached_property
    def holm(self) -> dict[str, float]:
        """Method → p-value of its difference in the first metric, corrected by Holm for all of the
        table's; NaN for too few users.
        """
        first = self.metrics[0]
        p_values = [own.metrics[first].p for own in self.comparisons.values()]
        return dict(zip(self.comparisons, holm(p_values), strict=True))

    @cached_property
    def users_tested(self) -> dict[str, UsersTested]:
        """Variant of HYDRA → users whom it makes worse or better than `rag` of as many records."""
        tested, run = {}, self.run
        for method in (row.method for row in self.rows if base_name(row.method) == "hydra"):
            k = method.partition("@")[2].partition(",")[0]
            if base := run.of(f"rag@{k}" if k else "rag"):
                tested[method] = compare_users(run.task, pair(run.of(method), base))
        return tested

    @cached_property
    def calibrations(self) -> dict[str, Calibration]:
        """Method that gives a probability → its calibration, for tasks with labels."""
        if not self.run.task.labels:
            return {}
        found = {name: of_labels(own) for name, own in self.run.by_method.items()}
        return {name: own for name, own in found.items() if own is not None}

    def sign(self, metric: str) -> int:
        """1 if more is better, −1 if less is."""
        return self.run.task.metric_specs[metric].sign

    @cached_property
    def marks(self) -> dict[tuple[str, str], int]:
        """(method, metric) → 1 for the best of the ranked groups, 2 for the second best."""
        marks: dict[tuple[str, str], int] = {}
        ranked = [r for r in self.rows if r.group in RANKED and r.method != best_prompt.NAME]
        ranked = [] if self.too_few else ranked
        for metric in self.metrics:
            sign = self.sign(metric)
            values = {row.method: sign * row.result.metrics[metric][0] for row in ranked}
            best = sorted({v for v in values.values() if not math.isnan(v)}, reverse=True)[:2]
            marks |= {(m, metric): 1 + best.index(v) for m, v in values.items() if v in best}
        return marks


def make_report(run: Run, baseline: str | None = None, prices: Prices = FREE) -> Report:
    """Every method of a run, against the baseline (by default the best prompt-based method by the
    first metric, chosen on training users where the run has folds); SettingsError if the run has no
    such baseline.
    """
    task, samples = run.task, list(chain(*run.by_method.values()))
    results = {result.method: result for result in tabulate(task, samples, prices)}
    answers: dict[str, Answers] = dict(run.by_method)
    prompts = [name for name in results if group_of(name) == "prompt"]
    best = best_prompt.with_hindsight(task, [results[name] for name in prompts])
    hindsight = {metric: run.of(top) for metric, top in best.items()}
    honest = best_prompt.on_training_users(task, {name: run.of(name) for name in prompts})
    if honest:
        answers[best_prompt.NAME] = honest
        results[best_prompt.NAME] = best_prompt.result(task, honest, prices)
    base = baseline or (best_prompt.NAME if honest else best.get(next(iter(task.metric_specs))))
    if base is None and "random" in results:  # of recorded choices, which no prompt answers
        base = "random"
    if base is None and len(results) == 1:
        (base,) = results
    if base is not None and base not in results:
        near, names = did_you_mean(base, results), ", ".join(results)
        raise SettingsError(f"{run.folder}: no method '{base}'{near}: take one of {names}")
    rows = []
    for name, result in results.items():
        own = answers[name]
        against = compare(task, own, answers[base]) if base and name != base else None
        over, without_bleu = _over_prompts(task, own, honest or hindsight)
        row = TableRow(group_of(name), result, over, without_bleu, against)
        if honest:
            row = replace(row, over_hindsight=_over_prompts(task, own, hindsight))
        rows.append(row)
    return Report(run, tuple(rows), base, prices, answers, bool(honest))


def group_of(method: str) -> str:
    """Its part of the table; a method that is not installed counts as HYDRA's."""
    if method == best_prompt.NAME:
        return "prompt"
    known = installed(method)
    return known.group if known and known.group in GROUPS else "hydra"


def _over_prompts(
    task: Task, own: Answers, best: Mapping[str, Sequence[Sample]]
) -> tuple[Relative | None, Relative | None]:
    """With and without BLEU; `best`: metric → the answers of the best prompts by it."""
    cases, without_bleu = [], []
    for metric, case in scored_by_metric(task, own, best).items():
        if metric in best and case[2]:
            cases.append(case)
            if task.metric_specs[metric].in_improvement:
                without_bleu.append(case)
    return relative(cases), relative(without_bleu)


def overall(reports: Sequence[Report]) -> dict[str, dict[str, Relative]]:
    """Method → mean relative improvement over the best prompts of all runs, with and without BLEU:
    the paper's headline figure (9.01 %). Empty for one run, for runs of one data set, and where a
    run has too few users.
    """
    several = len({report.run.manifest.get("data") for report in reports}) >= max(2, len(reports))
    if not several or any(report.too_few for report in reports):
        return {}
    return _overall(tuple(reports))


@lru_cache(maxsize=16)  # several outputs of the same reports share it
def _overall(reports: tuple[Report, ...]) -> dict[str, dict[str, Relative]]:
    tables = [{row.method: row for row in report.rows} for report in reports]
    means: dict[str, dict[str, Relative]] = {}
    for method in tables[0]:
        rows = [table[method] for table in tables if method in table]
        if len(rows) < len(tables):
            continue
        shares = improvements(rows, [report.honest for report in reports])
        for what, over in shares.items():
            if len(known := [share for share in over if share]) == len(tables):
                means.setdefault(method, {})[what] = over_tasks(known)
    return means


def improvements(rows: Sequence[TableRow], honest: Sequence[bool]) -> dict[str, list[Over]]:
    """A method's in each run: over the prompts chosen on training users if all runs have folds, and
    over those chosen with hindsight.
    """
    chosen = [(row.over_prompts, row.over_prompts_without_bleu) for row in rows]
    pairs = zip(rows, chosen, honest, strict=True)
    hindsight = [row.over_hindsight if turns else own for row, own, turns in pairs]
    named = {"": chosen, ", with hindsight": hindsight} if all(honest) else {"": hindsight}
    return {
        f"{what}{how}": [over[place] for over in shares]
        for how, shares in named.items()
        for place, what in enumerate(("all metrics", "without BLEU"))
    }


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
                name: figure(row.result, figures) + marks[report.marks.get((row.method, name), 0)]
                for name, figures in row.result.metrics.items()
            },
            "over best prompts": "" if report.too_few else share(row.over_prompts),
            **({"over hindsight": share(row.over_hindsight[0])} if report.honest else {}),
            "queries": row.result.queries,
            "LLM calls": round(row.result.calls, 1),
            "failed": row.result.failed,
        }
        for row in report.by_group
    ]


def comparison_rows(
    comparisons: Mapping[str, Comparison], corrected: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """A row per method: paired differences, users better and worse, queries needed. `corrected`
    has the p-values of the first metric after Holm's correction; `*` is below 5 %.
    """
    rows = []
    for method, own in comparisons.items():
        users, needed = own.wins + own.ties + own.losses, next(iter(own.needed.values()), None)
        row = {
            "method": method,
            **{name: difference(change, users > 0) for name, change in own.metrics.items()},
            **({} if corrected is None else {"p (Holm)": _holm_cell(corrected[method])}),
            "users better, same, worse": f"{own.wins}, {own.ties}, {own.losses}",
            "worse": f"{own.losses / users:.0%}" if users >= MIN_USERS else "",
            "worst tenth": f"{own.worst_tenth:+.3f}" if users else "",
            "queries needed": "" if needed is None else needed,
        }
        rows.append(row)
    return rows


def _holm_cell(p: float) -> str:
    return "" if math.isnan(p) else f"{p_value(p)}{' *' if p < ALPHA else ''}"


def to_json(report: Report) -> dict[str, Any]:
    """The report without findings and learning."""
    rows = [
        {
            "group": row.group,
            **row.result.to_json(),
            "over_prompts": share_json(row.over_prompts),
            "over_prompts_without_bleu": share_json(row.over_prompts_without_bleu),
            "against": None if row.comparison is None else row.comparison.to_json(),
            "holm": json_number(report.holm.get(row.method, math.nan)),
            **(_hindsight_json(row) if report.honest else {}),
        }
        for row in report.rows
    ]
    return {
        "run": str(report.run.folder),
        "task": report.run.task.name,
        "best_prompts": "training users" if report.honest else "hindsight",
        "comparisons": sum(not math.isnan(p) for p in report.holm.values()),
        "users_tested": {name: own.to_json() for name, own in report.users_tested.items()},
        "calibration": {name: own.to_json() for name, own in report.calibrations.items()},
        "methods": rows,
    }


def _hindsight_json(row: TableRow) -> dict[str, Any]:
    over, without_bleu = map(share_json, row.over_hindsight)
    return {"over_hindsight": over, "over_hindsight_without_bleu": without_bleu}


def results_table(results: Sequence[MethodResult]) -> list[dict[str, Any]]:
    """A row per method: metrics with their intervals, calls, failures."""
    return [
        {
            "method": result.method,
            **{title(name): figure(result, own) for name, own in result.metrics.items()},
            "queries": result.queries,
            "LLM calls": round(result.calls, 1),
            "LLM s": round(result.llm_seconds, 2),
            "failed": result.failed,
            "unparsable": result.unparsable,
        }
        for result in results
    ]
