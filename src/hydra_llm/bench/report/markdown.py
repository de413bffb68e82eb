"""Runs as Markdown: tables and findings, no text of the data, so that it may be committed."""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra_llm.bench.report import tables
from hydra_llm.bench.report.costs import cost_rows, learning_rows
from hydra_llm.bench.report.findings import findings
from hydra_llm.bench.report.summary import summary_line
from hydra_llm.bench.report.sweeps import SweepResult, sweep_rows
from hydra_llm.bench.stats import Relative

LIKE = (
    "LaMP-style, shaped like {}; not LaMP: no figure here can be set beside a published LaMP"
    " figure."
)
LEGEND = (
    "`*` best, `'` second best of what is ranked (controls and bounds are not); 95 % intervals over"
    " users."
)


def markdown(report: tables.Report) -> str:
    """The report of one run."""
    task, manifest = report.run.task, report.run.manifest
    sizes = f"{manifest['users']} users, {manifest['queries']} queries"
    notes = (spec.note for spec in task.metric_specs.values() if spec.note)
    parts = [
        f"## {task.name}, {manifest['llm'].get('model')}, {sizes}",
        LIKE.format(task.like) if task.like else "",
        f"{summary_line(report.run)}.",
        as_markdown(tables.method_rows(report)),
        " ".join([LEGEND, *notes]),
    ]
    if sentences := findings(report):
        parts += ["### What it says", "\n".join(f"- {line}" for line in sentences)]
    comparisons = tables.comparison_rows(report.comparisons)
    parts += [f"### Against {report.baseline or 'nothing'}", as_markdown(comparisons)]
    parts += ["### What a query costs", as_markdown(cost_rows(report))]
    if learning := learning_rows(report):
        parts += ["### What learning cost", as_markdown(learning)]
    return "\n\n".join(filter(None, parts)) + "\n"


def overall_markdown(shares: Mapping[str, Mapping[str, Relative]]) -> str:
    """What several runs say together; empty if they say nothing."""
    rows = as_markdown(tables.overall_rows(shares))
    return f"## {tables.OVERALL}\n\n{rows}\n" if shares else ""


def sweep_markdown(result: SweepResult) -> str:
    """A sweep's table."""
    return f"## {result['question']}\n\n{as_markdown(sweep_rows(result))}\n"


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a table."""
    if not rows:
        return "(nothing to compare)"
    names = list(rows[0])
    cells = [[str(row[name]).replace("|", "\\|") for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [names, ["---"] * len(names), *cells])
