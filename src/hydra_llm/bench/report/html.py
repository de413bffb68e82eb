"""Runs as one HTML page without network or JavaScript: what was run, tables, plots, and sampled
answers, which quote the data set. Needs the extra `report`. Knows no LLM.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hydra_llm.bench.report import tables
from hydra_llm.bench.report.findings import findings
from hydra_llm.bench.report.plots import BARS, plots, svg
from hydra_llm.bench.report.summary import cost_rows, family_line, learning_rows, run_summary
from hydra_llm.bench.report.sweeps import SweepResult, sweep_rows, sweep_svg
from hydra_llm.bench.runlog import Sample, by_method
from hydra_llm.extras import require

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
    nothing of the data. MissingExtra if the extra `report` is not installed.
    """
    require("report", "a report")
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
        runs=[_run(report, answers) for report in reports],
        answers=answers,
        title=tables.OVERALL,
        overall=tables.overall_rows(tables.overall(reports)),
        sweeps=curves,
        names=", ".join(dict.fromkeys(names)),
    )


def _run(report: tables.Report, answers: bool) -> dict[str, Any]:
    """What the template takes of a run; plots of a kind are beside each other, under a caption."""
    from markupsafe import Markup

    run, drawn = report.run, {name: Markup(svg(plot)) for name, plot in plots(report).items()}
    figures = [
        {"kind": kind, "caption": CAPTIONS[kind], "plots": of_kind}
        for kind in CAPTIONS
        if (of_kind := [plot for name, plot in drawn.items() if name.startswith(kind)])
    ]
    return {
        "name": run.task.name,
        "like": run.task.like,
        "summary": run_summary(run),
        "settings": run.manifest.get("settings", {}),
        "parts": _parts(report),
        "baseline": report.baseline,
        "findings": findings(report),
        "differences": tables.comparison_rows(report.comparisons, report.holm),
        "family": family_line(report),
        "costs": cost_rows(report),
        "learning": learning_rows(report),
        "figures": figures,
        "queries": sampled(run) if answers else [],
    }


def _parts(report: tables.Report) -> list[Mapping[str, Any]]:
    """The main table by part: cells as (text, class), class best or second or none."""
    parts: dict[str, dict[str, Any]] = {}
    unmarked = tables.method_rows(report, marks=("", "", ""))
    for row, cells in zip(report.by_group, unmarked, strict=True):
        part = parts.setdefault(row.group, {"title": cells["part"], "group": row.group, "rows": []})
        places = {name: report.marks.get((row.method, name), 0) for name in cells if name != "part"}
        part["rows"].append({n: (cells[n], ("", "best", "second")[p]) for n, p in places.items()})
    return list(parts.values())


class SharedAnswer(NamedTuple):
    """One answer to a query, and the methods that gave it."""

    text: str | None
    error: str
    gain: float | None  # None if the call failed
    methods: tuple[str, ...]


class SampledQuery(NamedTuple):
    """A query with every method's answer, the best first."""

    user: str
    query: str
    gold: str
    answers: list[SharedAnswer]


def sampled(run: tables.Run, count: int = SHOWN, seed: int = 0) -> list[SampledQuery]:
    """Random queries, the same ones each time, with all answers to them."""
    by_query: dict[tuple[str, str], list[Sample]] = {}
    for sample in run.samples:
        by_query.setdefault((sample.user, sample.query), []).append(sample)
    drawn = random.Random(seed).sample(sorted(by_query), min(count, len(by_query)))
    return [_sampled_query(run, by_query[key]) for key in sorted(drawn)]


def _sampled_query(run: tables.Run, samples: Sequence[Sample]) -> SampledQuery:
    own, gold = by_method(samples), samples[0].gold
    methods: dict[tuple[str | None, str], list[str]] = {}
    for method in filter(own.__contains__, run.by_method):
        for sample in own[method]:
            name = f"{method} (seed {sample.seed})" if len(own[method]) > 1 else method
            methods.setdefault((sample.answer, sample.error), []).append(name)
    answers = [
        SharedAnswer(text, error, None if error else run.task.gain(text, gold), tuple(names))
        for (text, error), names in methods.items()
    ]
    answers.sort(key=lambda shared: -1.0 if shared.gain is None else shared.gain, reverse=True)
    return SampledQuery(samples[0].user, samples[0].query, gold, answers)
