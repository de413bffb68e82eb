"""A run's figures as charts: scores, score against cost, users better and worse.

Groups of methods differ in colour and shape. Needs the extra `report`. Knows no LLM.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from hydra_llm.bench.comparison import changes_by_user, pair
from hydra_llm.bench.report.cells import axis_title
from hydra_llm.bench.report.charts import chart, legend, points, require, styled, svg, title
from hydra_llm.bench.report.labels import Side, label_places
from hydra_llm.bench.report.tables import GROUPS, Report, TableRow
from hydra_llm.errors import SettingsError

if TYPE_CHECKING:
    import altair as alt

    from hydra_llm.bench.report.charts import Plot

LOOKS = {
    "prompt": ("#0072B2", "circle"),
    "hydra": ("#D55E00", "diamond"),
    "adapter": ("#CC79A7", "triangle-down"),
    "sampling": ("#009E73", "triangle-up"),
    "control": ("#7F7F7F", "square"),
    "bound": ("#000000", "cross"),
}
"""Group of a method → colour and shape."""
SIGNS = {"better": "#009E73", "worse": "#D55E00"}
BARS = 200
"""At most so many users are drawn; of more users evenly spaced ones."""


def plots(report: Report) -> "dict[str, Plot]":
    """Every plot of a run by its name, as for a file: score-METRIC, cost-MEASURE, users."""
    found: dict[str, Plot | None] = {
        f"score-{metric}": score_plot(report, metric) for metric in report.metrics
    }
    tokens = any(row.result.tokens for row in report.rows)
    for measure in ("calls", "tokens" if tokens else "llm_seconds"):
        found[f"cost-{measure}"] = cost_plot(report, measure)
    found["users"] = users_plot(report)
    return {name: plot for name, plot in found.items() if plot is not None}


def write(report: Report, folder: Path) -> Path:
    """Write every plot of a run to a folder as SVG; returns the folder.

    Raises:
        SettingsError: the extra `report` is not installed, or the folder is a file.
    """
    require()
    drawn = {name: svg(plot) for name, plot in plots(report).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise SettingsError(
            f"{folder}: is a file, or lies in one: name a folder for the plots"
        ) from None
    for name, text in drawn.items():
        (folder / f"{name}.svg").write_text(text, encoding="utf-8")
    return folder


# ---- scores


def score_plot(report: Report, metric: str) -> "Plot":
    """Each method's figure with its 95 % interval; the dashed line is the baseline."""
    import altair as alt

    rows = _by_group(report)
    data = [
        {"method": row.method, "part": GROUPS[row.group]}
        | dict(zip(("value", "low", "high"), row.result.metrics[metric], strict=True))
        for row in rows
    ]
    axis = alt.Axis(title=None, domain=False, ticks=False, labelLimit=220, labelPadding=6)
    base = chart(data).encode(y=alt.Y("method:N", sort=[row.method for row in rows], axis=axis))
    look: dict[str, Any] = {"title": _axis(report, metric), "scale": alt.Scale(zero=False)}
    x, low = alt.X("value:Q", **look), alt.X("low:Q", **look)
    colour, shape = _looks(rows)
    interval = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2)
    failed = base.transform_filter("!isValid(datum.value)").mark_text(align="left", text="failed")
    marks = points(base.transform_filter("isValid(datum.value)"))
    layers = [
        interval.encode(x=low, x2="high:Q", color=colour),
        marks.encode(x=x, color=colour, shape=shape),
        failed.encode(x=alt.value(4)),
    ]
    values = [row.result.metrics[metric][0] for row in rows if row.method == report.baseline]
    for value in (value for value in values if not math.isnan(value)):
        dashes = chart([{"value": value}]).mark_rule(strokeDash=[4, 3], color="#999999")
        layers.insert(0, dashes.encode(x="value:Q"))
    return styled(alt.layer(*layers).properties(width=340, height=alt.Step(19)))


# ---- score against cost

COSTS = {"calls": "LLM calls", "tokens": "tokens", "llm_seconds": "seconds of LLM"}
AREA = (460, 340)
"""Width and height of the plot in pixels."""


def cost_plot(report: Report, measure: str) -> "Plot | None":
    """The first metric against the cost on a root scale; None if nothing costs anything."""
    import altair as alt

    metric = report.metrics[0]
    rows = [row for row in _by_group(report) if not math.isnan(row.result.metrics[metric][0])]
    if not any(getattr(row.result, measure) for row in rows):
        return None
    data, (most, low, high) = _cost_data(rows, metric, measure)
    x = alt.X(
        "cost:Q",
        title=f"{COSTS[measure]} a query (root scale)",
        axis=alt.Axis(tickCount=6),
        scale=alt.Scale(type="sqrt", domain=[0, most], nice=False),
    )
    y_scale = alt.Scale(domain=[low, high], nice=False, zero=False)
    y = alt.Y("value:Q", title=_axis(report, metric), scale=y_scale)
    base, (colour, shape) = chart(data), _looks(rows)
    leader = base.transform_filter("datum.moved").mark_rule(color="#999999", strokeWidth=0.7)
    names = base.encode(x="at:Q", y="height:Q", text="method:N")
    left, right = (names.transform_filter(f"datum.side == '{side}'") for side in get_args(Side))
    layers = alt.layer(
        leader.encode(x=x, y=y, x2="at:Q", y2="height:Q"),
        points(base).encode(x=x, y=y, color=colour, shape=shape),
        left.mark_text(align="left", fontSize=11),
        right.mark_text(align="right", fontSize=11),
    )
    return styled(layers.properties(width=AREA[0], height=AREA[1]))


def _cost_data(
    rows: Sequence[TableRow], metric: str, measure: str
) -> tuple[list[dict[str, Any]], tuple[float, float, float]]:
    """Points with labels, and the axes' ends: greatest cost, lowest and highest value."""
    costs = [float(getattr(row.result, measure)) for row in rows]
    values = [row.result.metrics[metric][0] for row in rows]
    room = 0.08 * (max(values) - min(values)) or 0.05
    most, low, high = 1.1 * max(costs), min(values) - room, max(values) + room
    pixels = [
        (AREA[0] * math.sqrt(cost / most), AREA[1] * (high - value) / (high - low))
        for cost, value in zip(costs, values, strict=True)
    ]
    labels = label_places(pixels, [6.2 * len(row.method) for row in rows], AREA)
    data = [
        {
            "method": row.method,
            "part": GROUPS[row.group],
            "cost": cost,
            "value": value,
            "side": label.side,
            "at": most * (label.x / AREA[0]) ** 2,
            "height": high - (high - low) * label.y / AREA[1],
            "moved": label.moved,
        }
        for row, cost, value, label in zip(rows, costs, values, labels, strict=True)
    ]
    return data, (most, low, high)


# ---- users


def users_plot(report: Report) -> "Plot | None":
    """Each method's users by their change against the baseline; None without one."""
    import altair as alt

    panels = _panels(report)
    rows = [
        {"panel": panel, "place": place, "difference": change, "sign": _sign(change)}
        for panel, changes in panels.items()
        for place, change in enumerate(_thinned(changes))
    ]
    if not rows:
        return None
    zero = alt.when("datum.value === 0").then(alt.value("#555555")).otherwise(alt.value("#E6E6E6"))
    scale = alt.Scale(domain=list(SIGNS), range=list(SIGNS.values()))
    bars = (
        chart(rows)
        .mark_bar()
        .encode(
            x=alt.X("place:O", axis=None, scale=alt.Scale(padding=0.15)),
            y=alt.Y("difference:Q", title=None, axis=alt.Axis(tickCount=4, gridColor=zero)),
            color=alt.Color("sign:N", title=None, scale=scale, legend=None),
        )
    )
    header = alt.Header(
        title=None,
        labelExpr="split(datum.value, '|')",
        labelAnchor="start",
        labelFontSize=11,
        labelLineHeight=13,
    )
    facet = alt.Facet("panel:N", sort=list(panels), header=header)
    drawn: alt.FacetChart = bars.properties(width=165, height=80).facet(facet=facet, columns=3)
    heading = title(f"mean gain of each user minus {report.baseline}'s")
    return styled(drawn.resolve_scale(x="independent").properties(title=heading, spacing=14))


def _panels(report: Report) -> dict[str, list[float]]:
    """Heading of a method's panel → its users' mean changes of gain, the greatest first."""
    if report.baseline is None:
        return {}
    run, base = report.run, report.run.of(report.baseline)
    found = {}
    for row in _by_group(report):
        if row.comparison is not None:
            changes = changes_by_user(run.task, pair(run.of(row.method), base)).values()
            each = row.comparison
            counts = f"{each.wins} better, {each.ties} same, {each.losses} worse"
            found[f"{row.method}|{counts}"] = sorted(changes, reverse=True)
    return found


def _sign(change: float) -> str:
    return "better" if change > 0 else "worse"


def _thinned(values: Sequence[float]) -> list[float]:
    if len(values) <= BARS:
        return list(values)
    return [values[round(place)] for place in np.linspace(0, len(values) - 1, BARS)]


# ---- what the charts of a run share


def _by_group(report: Report) -> list[TableRow]:
    return [row for group in GROUPS for row in report.rows if row.group == group]


def _axis(report: Report, metric: str) -> str:
    return axis_title(metric, report.sign(metric) > 0)


def _looks(rows: Sequence[TableRow]) -> "tuple[alt.Color, alt.Shape]":
    """Colour and shape by the part of the table."""
    import altair as alt

    groups = list(dict.fromkeys(row.group for row in rows))
    parts = [GROUPS[group] for group in groups]
    colours, shapes = (
        alt.Scale(domain=parts, range=[LOOKS[group][which] for group in groups]) for which in (0, 1)
    )
    look: dict[str, Any] = {"title": None, "legend": legend(3)}
    return alt.Color("part:N", scale=colours, **look), alt.Shape("part:N", scale=shapes, **look)
