"""Runs as one HTML page: what was run, tables, plots, and sampled answers. The page needs neither
network nor JavaScript.

Needs the extra `report`. The answers quote the data set. Knows no LLM.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra_llm.bench.report import tables
from hydra_llm.bench.report.cells import require
from hydra_llm.bench.report.costs import cost_rows, learning_rows
from hydra_llm.bench.report.findings import findings
from hydra_llm.bench.report.plots import BARS, plots, svg
from hydra_llm.bench.report.summary import run_summary
from hydra_llm.bench.report.sweeps import SweepResult, sweep_rows, sweep_svg
from hydra_llm.bench.runlog import Sample, by_method

SHOWN = 10  # queries whose answers are shown
CAPTIONS = {
    "score": (
        "Each method's figure with its 95 % interval over users. The dashed line is the baseline."
    ),
    "cost": "The first metric against what a query costs. Methods without an LLM cost nothing.",
    "users": (
        "Each method's users, from who gains most to who loses most against the baseline; a gap is"
        f" a user for whom nothing changes. Of more than {BARS} users, {BARS} evenly spaced ones"
        " are drawn."
    ),
}  # of the plots whose name begins so


def page(
    reports: Sequence[tables.Report], answers: bool = True, sweeps: Sequence[SweepResult] = ()
) -> str:
    """The reports of runs, then of sweeps, as the text of an HTML file; without `answers` it quotes
    nothing of the data. SettingsError if the extra `report` is not installed.
    """
    require()
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    templates = PackageLoader("hydra_llm.bench.report")
    strict: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined}
    environment = Environment(loader=templates, trim_blocks=True, lstrip_blocks=True, **strict)
    names = [report.run.task.name for report in reports] + [sweep["name"] for sweep in sweeps]
    curves = [
        {"question": sweep["question"], "rows": sweep_rows(sweep), "plot": Markup(sweep_svg(sweep))}
        for sweep in sweeps
    ]
    return environment.get_template("report.html").render(
        runs=[_shown(report, answers) for report in reports],
        answers=answers,
        title=tables.OVERALL,
        overall=tables.overall_rows(tables.overall(reports)),
        sweeps=curves,
        names=", ".join(dict.fromkeys(names)),
    )


def _shown(report: tables.Report, answers: bool) -> dict[str, Any]:
    """What the template shows of a run."""
    run = report.run
    return {
        "name": run.task.name,
        "like": run.task.like,
        "summary": run_summary(run),
        "settings": run.manifest.get("settings", {}),
        "parts": _parts(report),
        "baseline": report.baseline,
        "findings": findings(report),
        "differences": tables.comparison_rows(report.comparisons),
        "costs": cost_rows(report),
        "learning": learning_rows(report),
        "figures": _figures(report),
        "queries": sampled(run) if answers else [],
    }


def _parts(report: tables.Report) -> list[dict[str, Any]]:
    """The main table by part: cells as (text, class), class best or second or none."""
    parts: dict[str, dict[str, Any]] = {}
    for row, cells in zip(report.by_group, tables.method_rows(report), strict=True):
        part = {"title": cells.pop("part"), "group": row.group, "rows": []}
        marked = {}
        for name, text in cells.items():
            place = report.marks.get((row.method, name), 0)
            # the class takes the place of a mark, which is cut off
            marked[name] = (text[:-2] if place else str(text), ("", "best", "second")[place])
        parts.setdefault(row.group, part)["rows"].append(marked)
    return list(parts.values())


def _figures(report: tables.Report) -> list[dict[str, Any]]:
    """Plots of a kind beside each other, under their caption."""
    from markupsafe import Markup

    drawn = {name: Markup(svg(plot)) for name, plot in plots(report).items()}
    kinds = {kind: [drawn[name] for name in drawn if name.startswith(kind)] for kind in CAPTIONS}
    return [{"kind": k, "caption": CAPTIONS[k], "plots": own} for k, own in kinds.items() if own]


@dataclass(frozen=True)
class SharedAnswer:
    """One answer to a query, and the methods that gave it."""

    text: str | None
    error: str
    gain: float | None  # None if the call failed
    methods: tuple[str, ...]


@dataclass(frozen=True)
class SampledQuery:
    """A query with every method's answer, the best first."""

    user: str
    query: str
    gold: str
    answers: tuple[SharedAnswer, ...]


def sampled(run: tables.Run, count: int = SHOWN, seed: int = 0) -> list[SampledQuery]:
    """Random queries, the same ones each time, with all answers to them."""
    by_query: dict[tuple[str, str], list[Sample]] = {}
    for sample in run.samples:
        by_query.setdefault((sample.user, sample.query), []).append(sample)
    drawn = random.Random(seed).sample(sorted(by_query), min(count, len(by_query)))
    return [_sampled_query(run, by_query[key]) for key in sorted(drawn)]


def _sampled_query(run: tables.Run, samples: Sequence[Sample]) -> SampledQuery:
    own, first = by_method(samples), samples[0]
    by_answer: dict[tuple[str | None, str], list[str]] = {}
    for method in sorted(own, key=run.methods.index):
        for sample in own[method]:
            name = f"{method} (seed {sample.seed})" if len(own[method]) > 1 else method
            by_answer.setdefault((sample.answer, sample.error), []).append(name)
    answers = [
        SharedAnswer(text, error, None if error else run.task.gain(text, first.gold), tuple(names))
        for (text, error), names in by_answer.items()
    ]
    answers.sort(key=lambda shared: -1.0 if shared.gain is None else shared.gain, reverse=True)
    return SampledQuery(first.user, first.query, first.gold, tuple(answers))
