"""Runs as Markdown: tables and findings, no text of the data, so that it may be committed."""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra_llm.bench.report.costs import cost_rows, learning_rows
from hydra_llm.bench.report.findings import findings
from hydra_llm.bench.report.summary import summary_line
from hydra_llm.bench.report.sweeps import SweepResult, sweep_rows
from hydra_llm.bench.report.tables import (
    OVERALL,
    Report,
    comparison_rows,
    method_rows,
    overall_rows,
)
from hydra_llm.bench.stats import Relative

LIKE = (
    "LaMP-style, shaped like {}; not LaMP: no figure here can be set beside a published LaMP"
    " figure."
)
LEGEND = (
    "`*` best, `'` second best of what is ranked (controls and bounds are not); 95 % intervals over"
    " users."
)


def markdown(report: Report) -> str:
    """The report of one run."""
    task, manifest = report.run.task, report.run.manifest
    sizes = f"{manifest['users']} users, {manifest['queries']} queries"
    parts = [
        f"## {task.name}, {manifest['llm'].get('model')}, {sizes}",
        LIKE.format(task.like) if task.like else "",
        f"{summary_line(report.run)}.",
        as_markdown(method_rows(report)),
        " ".join([LEGEND, *(spec.note for spec in task.metric_specs.values() if spec.note)]),
    ]
    if found := findings(report):
        parts += ["### What it says", "\n".join(f"- {each}" for each in found)]
    comparisons = comparison_rows(report.comparisons)
    parts += [f"### Against {report.baseline or 'nothing'}", as_markdown(comparisons)]
    parts += ["### What a query costs", as_markdown(cost_rows(report))]
    if learning := learning_rows(report):
        parts += ["### What learning cost", as_markdown(learning)]
    return "\n\n".join(filter(None, parts)) + "\n"


def overall_markdown(found: Mapping[str, Mapping[str, Relative]]) -> str:
    """What several runs say together; empty if they say nothing."""
    return f"## {OVERALL}\n\n{as_markdown(overall_rows(found))}\n" if found else ""


def sweep_markdown(found: SweepResult) -> str:
    """A sweep's table."""
    return f"## {found['question']}\n\n{as_markdown(sweep_rows(found))}\n"


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a table."""
    if not rows:
        return "(nothing to compare)"
    names = list(rows[0])
    cells = [[str(row[name]).replace("|", "\\|") for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [names, ["---"] * len(names), *cells])
