"""Runs as Markdown: tables and findings, no text of the data, so that it may be committed."""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra_llm.bench.report import tables
from hydra_llm.bench.report.findings import findings
from hydra_llm.bench.report.summary import cost_rows, family_line, learning_rows, summary_line
from hydra_llm.bench.report.sweeps import SweepResult, sweep_rows

LIKE = (
    "LaMP-style, shaped like {}; not LaMP: no figure here can be set beside a published LaMP"
    " figure."
)
LEGEND = (
    "`*` best, `'` second best of what is ranked (controls and bounds are not); 95 % intervals over"
    " users."
)


def markdown(reports: Sequence[tables.Report], sweeps: Sequence[SweepResult] = ()) -> str:
    """The reports of runs, what they say together, and the tables of sweeps."""
    parts = [_run(report) for report in reports]
    if shares := tables.overall(reports):
        parts.append(f"## {tables.OVERALL}\n\n{_table(tables.overall_rows(shares))}\n")
    parts += [f"## {sweep['question']}\n\n{_table(sweep_rows(sweep))}\n" for sweep in sweeps]
    return "\n".join(parts).replace("<", "&lt;")  # names are the data set's: no tags


def _run(report: tables.Report) -> str:
    task, manifest = report.run.task, report.run.manifest
    sizes = f"{manifest['users']} users, {manifest['queries']} queries"
    notes = (spec.note for spec in task.metric_specs.values() if spec.note)
    parts = [
        f"## {task.name}, {manifest['llm'].get('model') or 'no LLM'}, {sizes}",
        LIKE.format(task.like) if task.like else "",
        f"{summary_line(report.run)}.",
        report.too_few,
        _table(tables.method_rows(report)),
        "" if report.too_few else " ".join([LEGEND, *notes]),
    ]
    if sentences := [line for line in findings(report) if line != report.too_few]:
        parts += ["### What it says", "\n".join(f"- {line}" for line in sentences)]
    comparisons = tables.comparison_rows(report.comparisons, report.holm)
    parts += [f"### Against {report.baseline or 'nothing'}", _table(comparisons)]
    parts.append(family_line(report))
    parts += ["### What a query costs", _table(cost_rows(report))]
    if learning := learning_rows(report):
        parts += ["### What learning cost", _table(learning)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys."""
    if not rows:
        return "(nothing to compare)"
    names = list(rows[0])
    cells = [[str(row[name]).replace("|", "\\|") for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [names, ["---"] * len(names), *cells])
