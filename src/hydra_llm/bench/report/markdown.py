"""Runs as Markdown: tables and findings, no text of the data, so that it may be committed. Knows no
LLM.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra_llm.bench.report.costs import as_costs, as_learning
from hydra_llm.bench.report.findings import findings
from hydra_llm.bench.report.summary import sentence
from hydra_llm.bench.report.sweeps import Studied, as_table
from hydra_llm.bench.report.tables import OVERALL, Line, Run, as_differences, as_overall, as_rows
from hydra_llm.bench.stats import Relative
from hydra_llm.llm.meter import FREE, Prices


def markdown(run: Run, lines: Sequence[Line], baseline: str, prices: Prices = FREE) -> str:
    """The report of one run."""
    differences = {line.row.method: line.against for line in lines if line.against is not None}
    manifest = run.manifest
    title = (
        f"{run.task.name}, {manifest['llm'].get('model')}, {manifest['users']} users,"
        f" {manifest['queries']} queries"
    )
    like = (
        f"LaMP-style, shaped like {run.task.like}; not LaMP: no figure here can be set beside a"
        " published LaMP figure."
        if run.task.like
        else ""
    )
    legend = (
        "`*` best, `'` second best of what is ranked (controls and bounds are not); 95 % intervals"
        " over users."
    )
    legend = " ".join([legend, *(s.note for s in run.task.metric_specs.values() if s.note)])
    parts = [f"## {title}", like, f"{sentence(run)}.", as_markdown(as_rows(run, lines)), legend]
    if said := findings(run, lines):
        parts += ["### What it says", "\n".join(f"- {each}" for each in said)]
    parts += [
        f"### Against {baseline}",
        as_markdown(as_differences(differences)),
        "### What a query costs",
        as_markdown(as_costs(lines)),
    ]
    if learning := as_learning(run, prices):
        parts += ["### What learning cost", as_markdown(learning)]
    return "\n\n".join(filter(None, parts)) + "\n"


def overall_of(found: Mapping[str, Mapping[str, Relative]]) -> str:
    """What several runs say together; empty where there is nothing."""
    return f"## {OVERALL}\n\n{as_markdown(as_overall(found))}\n" if found else ""


def of_study(found: Studied) -> str:
    """A study's table."""
    return f"## {found['question']}\n\n{as_markdown(as_table(found))}\n"


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a table."""
    if not rows:
        return "(nothing to compare)"
    names = list(rows[0])
    table = [
        names,
        ["---"] * len(names),
        *([str(row[name]).replace("|", "\\|") for name in names] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)
