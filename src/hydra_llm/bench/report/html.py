"""Runs as one HTML page that holds all it shows: what was run, tables, plots, and sampled answers.
Needs neither network nor JavaScript.

Needs the extra `report`. The answers quote the data set: a page with them is for oneself. Knows no
LLM.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra_llm.bench.report.costs import as_costs, as_learning
from hydra_llm.bench.report.findings import findings
from hydra_llm.bench.report.plots import BARS, baseline_of, plots, require, svg
from hydra_llm.bench.report.summary import about
from hydra_llm.bench.report.sweeps import Studied, as_table, drawn
from hydra_llm.bench.report.tables import (
    GROUPS,
    OVERALL,
    Line,
    Run,
    as_differences,
    as_overall,
    as_rows,
    marks,
    overall,
)
from hydra_llm.bench.runlog import Sample
from hydra_llm.llm.meter import FREE, Prices

if TYPE_CHECKING:
    from hydra_llm.bench.report.plots import Plot

SHOWN = 10
"""Queries whose answers are shown."""
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
}
"""What is seen in plots whose name begins so."""


@dataclass(frozen=True)
class Said:
    """One answer to a query, and the methods that gave it."""

    answer: str | None
    error: str
    gain: float | None
    """None where the call failed."""
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """A query with every method's answer, the best first."""

    user: str
    query: str
    gold: str
    said: tuple[Said, ...]


def page(
    runs: Sequence[tuple[Run, Sequence[Line]]],
    answers: bool = True,
    prices: Prices = FREE,
    studies: Sequence[Studied] = (),
) -> str:
    """The report of runs, each with its lines, then of studies, as the text of an HTML file;
    without `answers` it quotes nothing of the data.

    Raises:
        SettingsError: the extra `report` is not installed.
    """
    require()
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("hydra_llm.bench"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [_shown(run, lines, answers, prices) for run, lines in runs]
    curves = [
        {"question": each["question"], "rows": as_table(each), "plot": Markup(drawn(each))}
        for each in studies
    ]
    over = as_overall(overall(runs))
    names = ", ".join(
        dict.fromkeys([*(run.task.name for run, _ in runs), *(each["name"] for each in studies)])
    )
    return environment.get_template("report.html").render(
        runs=shown, answers=answers, title=OVERALL, overall=over, studies=curves, names=names
    )


def _shown(run: Run, lines: Sequence[Line], answers: bool, prices: Prices) -> dict[str, Any]:
    """What the template shows of a run."""
    against = baseline_of(lines)
    differences = {line.row.method: line.against for line in lines if line.against is not None}
    return {
        "name": run.task.name,
        "like": run.task.like,
        "about": about(run),
        "settings": run.manifest.get("settings", {}),
        "metrics": list(lines[0].row.metrics),
        "parts": parts(run, lines),
        "baseline": None if against is None else against.row.method,
        "findings": findings(run, lines),
        "differences": as_differences(differences),
        "costs": as_costs(lines),
        "learning": as_learning(run, prices),
        "figures": _figures(plots(run, lines)),
        "asked": sampled(run) if answers else [],
    }


def parts(run: Run, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The main table, part by part: each row's cells by column as (text, class), class best or
    second where it is one.
    """
    places = marks(run, lines)
    found: dict[str, list[dict[str, tuple[str, str]]]] = {}
    for row in as_rows(run, lines):
        found.setdefault(row.pop("part"), []).append(
            {
                name: _cell(name, value, places.get((row["method"], name), 0))
                for name, value in row.items()
            }
        )
    classes = {title: group for group, title in GROUPS.items()}
    return [
        {"title": title, "group": classes[title], "rows": rows} for title, rows in found.items()
    ]


def _cell(name: str, value: Any, place: int) -> tuple[str, str]:
    text = str(value)
    return (
        (text[:-2], ("best", "second")[place - 1]) if place else (text, "")
    )  # the mark of `as_rows` is two characters


def _figures(drawn: "Mapping[str, Plot]") -> list[dict[str, Any]]:
    """Plots of a kind beside each other, under what is seen in them."""
    from markupsafe import Markup

    return [
        {
            "kind": kind,
            "caption": caption,
            "plots": [Markup(svg(plot)) for name, plot in drawn.items() if name.startswith(kind)],
        }
        for kind, caption in CAPTIONS.items()
        if any(name.startswith(kind) for name in drawn)
    ]


# ---- answers side by side


def sampled(run: Run, count: int = SHOWN, seed: int = 0) -> list[Asked]:
    """Queries drawn by lot, the same ones each time, with all answers to them."""
    keys = sorted({(sample.user, sample.query) for sample in run.samples})
    drawn = random.Random(seed).sample(keys, min(count, len(keys)))
    return [
        _asked(run, [sample for sample in run.samples if (sample.user, sample.query) == key])
        for key in sorted(drawn)
    ]


def _asked(run: Run, samples: Sequence[Sample]) -> Asked:
    order = run.methods
    alike: dict[tuple[str | None, str], list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: order.index(sample.method)):
        alike.setdefault((sample.answer, sample.error), []).append(sample)
    several = {
        sample.method
        for sample in samples
        if sum(other.method == sample.method for other in samples) > 1
    }
    said = [
        Said(
            answer,
            error,
            None if error else run.task.gain(answer, samples[0].gold),
            tuple(_who(sample, several) for sample in who),
        )
        for (answer, error), who in alike.items()
    ]
    best_first = sorted(
        said, key=lambda each: -1.0 if each.gain is None else each.gain, reverse=True
    )
    return Asked(samples[0].user, samples[0].query, samples[0].gold, tuple(best_first))


def _who(sample: Sample, several: set[str]) -> str:
    """The method, with the seed where it has several."""
    return f"{sample.method} (seed {sample.seed})" if sample.method in several else sample.method
