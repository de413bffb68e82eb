"""Charts: of a run its scores, score against cost, users better and worse; of a sweep its curve.

One style, SVG without network or JavaScript. Groups of methods differ in colour and shape; colours
are those of Okabe and Ito, which colour-blind people can tell apart. Needs the extra `report`
(altair, vl-convert). Knows no LLM.
"""

import io
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from hydra_llm.bench.report.cells import axis_title
from hydra_llm.bench.report.tables import GROUPS, Report, TableRow
from hydra_llm.bench.results import changes_by_user, of_metric, pair
from hydra_llm.errors import SettingsError
from hydra_llm.extras import require

require("report", "a report")
import altair as alt

Plot = alt.LayerChart | alt.FacetChart
LINES = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
SHAPES = ("circle", "diamond", "triangle-down", "triangle-up", "square", "cross")
INK = {"labelColor": "#222222", "titleColor": "#222222", "gridColor": "#E6E6E6"}
AXIS = {**INK, "titleFontWeight": "normal"}
HEADING: dict[str, Any] = {"anchor": "start", "fontSize": 12, "fontWeight": "normal"}
MARK: dict[str, Any] = {"filled": True, "opacity": 1}
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
BARS = 200  # at most so many users are drawn; of more users evenly spaced ones
COSTS = {"calls": "LLM calls", "tokens": "tokens", "llm_seconds": "seconds of LLM"}
SIDES: tuple[tuple[int, Literal["left", "right"]], ...] = ((1, "left"), (-1, "right"))


class Size(NamedTuple):
    """The size of a plot with labels, in pixels."""

    width: int
    height: int
    font: int  # of the labels
    mark: int = 70  # area of a point

    @property
    def line(self) -> int:
        """The height of a label."""
        return self.font + 2

    @property
    def upward(self) -> list[float]:
        """Vertical distances of a label from its point that are tried, the nearest first."""
        return sorted((step * self.line / 2 for step in range(-60, 61)), key=abs)


PAGE = Size(460, 340, font=11)


def plots(report: Report) -> dict[str, Plot]:
    """Every plot of a run by its name, as for a file: score-METRIC, cost-MEASURE, users."""
    total = sum(row.result.tokens for row in report.rows)  # NaN where the LLM did not tell them
    measures = "calls", "tokens" if total > 0 else "llm_seconds"
    drawn: dict[str, Plot | None] = {
        **{f"score-{metric}": score_plot(report, metric) for metric in report.metrics},
        **{f"cost-{measure}": cost_plot(report, measure) for measure in measures},
        "users": users_plot(report),
    }
    return {name: plot for name, plot in drawn.items() if plot is not None}


def write(report: Report, folder: Path) -> Path:
    """Write every plot of a run to a folder as SVG; SettingsError if the folder is a file."""
    require("report", "a report")
    drawn = {name: svg(plot) for name, plot in plots(report).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        fault = "is a file, or lies in one: name a folder for the plots"
        raise SettingsError(f"{folder}: {fault}") from None
    for name, text in drawn.items():
        (folder / f"{name}.svg").write_text(text, encoding="utf-8")
    return folder


def score_plot(report: Report, metric: str) -> Plot:
    """Each method's figure with its 95 % interval; the dashed line is the baseline."""
    rows, (colour, shape) = report.by_group, _looks_of_groups(report.by_group)
    figures = {row.method: row.result.metrics[metric] for row in rows}
    data = []
    for row in rows:
        value, low, high = figures[row.method]
        names = {"method": row.method, "part": GROUPS[row.group]}
        data.append({**names, "value": value, "low": low, "high": high})
    axis = alt.Axis(title=None, domain=False, ticks=False, labelLimit=220, labelPadding=6)
    base = chart(data).encode(y=alt.Y("method:N", sort=list(figures), axis=axis))
    title = axis_title(metric, report.sign(metric) > 0)
    look: dict[str, Any] = {"title": title, "scale": alt.Scale(zero=False)}
    x, x_low = alt.X("value:Q", **look), alt.X("low:Q", **look)
    interval = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2)
    failed = base.transform_filter("!isValid(datum.value)").mark_text(align="left", text="failed")
    marks = base.transform_filter("isValid(datum.value)").mark_point(size=70, **MARK)
    layers = [
        interval.encode(x=x_low, x2="high:Q", color=colour),
        marks.encode(x=x, color=colour, shape=shape),
        failed.encode(x=alt.value(4)),
    ]
    if report.baseline and not math.isnan(value := figures[report.baseline][0]):
        dashes = chart([{"value": value}]).mark_rule(strokeDash=[4, 3], color="#999999")
        layers.insert(0, dashes.encode(x="value:Q"))
    return _styled(alt.layer(*layers).properties(width=340, height=alt.Step(19)))


def cost_plot(report: Report, measure: str, size: Size = PAGE) -> Plot | None:
    """The first metric against the cost on a root scale; None if nothing costs anything."""
    metric = report.metrics[0]
    rows = [row for row in report.by_group if not math.isnan(row.result.metrics[metric][0])]
    costs = [float(getattr(row.result, measure)) for row in rows]
    if not any(costs):
        return None
    values = [row.result.metrics[metric][0] for row in rows]
    room = 0.08 * (max(values) - min(values)) or 0.05
    most, low, high = 1.1 * max(costs), min(values) - room, max(values) + room
    data = _labelled(list(zip(rows, costs, values, strict=True)), most, low, high, size)
    x_scale = alt.Scale(type="sqrt", domain=[0, most], nice=False)
    y_scale = alt.Scale(domain=[low, high], nice=False, zero=False)
    x_title, ticks = f"{COSTS[measure]} a query (root scale)", alt.Axis(tickCount=6)
    x = alt.X("cost:Q", title=x_title, axis=ticks, scale=x_scale)
    y = alt.Y("value:Q", title=axis_title(metric, report.sign(metric) > 0), scale=y_scale)
    base, (colour, shape) = chart(data), _looks_of_groups(rows)
    leader = base.transform_filter("datum.moved").mark_rule(color="#999999", strokeWidth=0.7)
    leaders = leader.encode(x=x, y=y, x2="at:Q", y2="height:Q")
    marks = base.mark_point(size=size.mark, **MARK).encode(x=x, y=y, color=colour, shape=shape)
    names = base.encode(x="at:Q", y="height:Q", text="method:N")
    sides = [
        names.transform_filter(f"datum.side == '{side}'").mark_text(align=side, fontSize=size.font)
        for _, side in SIDES
    ]
    drawn = alt.layer(leaders, marks, *sides).properties(width=size.width, height=size.height)
    return _styled(drawn)


def _labelled(
    points: Sequence[tuple[TableRow, float, float]],
    most: float,
    low: float,
    high: float,
    size: Size,
) -> list[dict[str, Any]]:
    """Methods, costs and values as rows of a chart, each with its label's place; the axes end at
    the cost `most` and the values `low` and `high`.
    """
    width, height, rows = size.width, size.height, []
    pixels = [
        (width * math.sqrt(cost / most), height * (high - value) / (high - low))
        for _, cost, value in points
    ]
    widths = [0.565 * size.font * len(row.method) for row, *_ in points]
    labels = label_places(pixels, widths, size)
    for (row, cost, value), label in zip(points, labels, strict=True):
        at, up = most * (label.x / width) ** 2, high - (high - low) * label.y / height
        place = {"side": label.side, "moved": label.moved, "at": at, "height": up}
        names = {"method": row.method, "part": GROUPS[row.group]}
        rows.append({**names, "cost": cost, "value": value, **place})
    return rows


class Label(NamedTuple):
    """Where a label is, in pixels: its text begins (side left) or ends (right) at x, around y."""

    x: float
    y: float
    width: float
    side: Literal["left", "right"]
    moved: bool = False  # above or below its point's height
    line: int = PAGE.line  # its height

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom."""
        left = self.x if self.side == "left" else self.x - self.width
        return left, self.y - self.line / 2, left + self.width, self.y + self.line / 2


def label_places(
    points: Sequence[tuple[float, float]], widths: Sequence[float], size: Size = PAGE
) -> list[Label]:
    """Each point's label beside it, or at the nearest height where it covers no point or label."""
    radius = round(0.6 * math.sqrt(size.mark))
    taken = [(x - radius, y - radius, x + radius, y + radius) for x, y in points]

    def free(label: Label) -> bool:
        left, top, right, bottom = label.box
        inside = left >= 0 and top >= 0 and right <= size.width and bottom <= size.height
        return inside and not any(
            left < t[2] and t[0] < right and top < t[3] and t[1] < bottom for t in taken
        )

    labels = []
    for (x, y), width in zip(points, widths, strict=True):
        places = [(up, sign, side) for up in size.upward for sign, side in SIDES]
        tries = [
            Label(x + (radius + 4) * sign, y + up, width, side, up != 0, size.line)
            for up, sign, side in places
        ]
        labels.append(next(filter(free, tries), tries[0]))
        taken.append(labels[-1].box)
    return labels


def users_plot(report: Report) -> Plot | None:
    """Each method's users by their change against the baseline; None without one."""
    run, rows = report.run, list[dict[str, Any]]()
    base = of_metric(run.task, report.answers.get(report.baseline or "", ()))
    for row in report.by_group:
        if own := row.comparison:
            own_samples = of_metric(run.task, report.answers[row.method])
            panel = f"{row.method}|{own.wins} better, {own.ties} same, {own.losses} worse"
            by_user = changes_by_user(run.task, pair(own_samples, base))
            changes = sorted(by_user.values(), reverse=True)
            places = np.linspace(0, len(changes) - 1, min(BARS, len(changes)))
            for place, change in enumerate(changes[round(at)] for at in places):
                sign = "better" if change > 0 else "worse"
                rows.append({"panel": panel, "place": place, "difference": change, "sign": sign})
    if not rows:
        return None
    zero = alt.when("datum.value === 0").then(alt.value("#555555")).otherwise(alt.value("#E6E6E6"))
    signs = alt.Scale(domain=list(SIGNS), range=list(SIGNS.values()))
    x = alt.X("place:O", axis=None, scale=alt.Scale(padding=0.15))
    y = alt.Y("difference:Q", title=None, axis=alt.Axis(tickCount=4, gridColor=zero))
    colour = alt.Color("sign:N", title=None, scale=signs, legend=None)
    bars = chart(rows).mark_bar().encode(x=x, y=y, color=colour)
    lines: dict[str, Any] = {"labelExpr": "split(datum.value, '|')", "labelLineHeight": 13}
    header = alt.Header(title=None, labelAnchor="start", labelFontSize=11, **lines)
    panels = list(dict.fromkeys(row["panel"] for row in rows))
    facet = alt.Facet("panel:N", sort=panels, header=header)
    drawn: alt.FacetChart = bars.properties(width=165, height=80).facet(facet=facet, columns=3)
    heading = alt.TitleParams(f"mean gain of each user minus {report.baseline}'s", **HEADING)
    return _styled(drawn.resolve_scale(x="independent").properties(title=heading, spacing=14))


# ---- the curve of a sweep


class Point(NamedTuple):
    """One figure of a sweep."""

    method: str
    x: float | str
    value: float
    low: float = math.nan
    high: float = math.nan


def curve(data: Sequence[Point], x: str, y: str, heading: str = "", log: bool = False) -> Plot:
    """A line per method over what a sweep varies: numbers to scale (`log`: logarithmic, but for 0),
    or names in order. Unknown intervals (NaN) and points without a value are left out.
    """
    methods = dict.fromkeys(point.method for point in data)
    styles = zip(methods, cycle(LINES), cycle(SHAPES), strict=False)
    colour, shape = _looks("method", {name: look for name, *look in styles}, columns=2)
    if any(isinstance(point.x, str) for point in data):  # 1, 5, all
        names = list(dict.fromkeys(str(point.x) for point in data))
        data = [point._replace(x=str(point.x)) for point in data]
        x_axis = alt.X("x:O", title=x, sort=names, axis=alt.Axis(labelAngle=0))
    else:
        x_scale = alt.Scale(type="symlog" if log else "linear", zero=False, padding=12)
        ticks = alt.Axis(values=sorted({float(point.x) for point in data}))
        x_axis = alt.X("x:Q", title=x, axis=ticks, scale=x_scale)
    rows = [point._asdict() for point in data if not math.isnan(point.value)]
    base, scale = chart(rows).encode(x=x_axis, color=colour), alt.Scale(zero=False)
    value, low = alt.Y("value:Q", title=y, scale=scale), alt.Y("low:Q", title=y, scale=scale)
    interval = base.transform_filter("isValid(datum.low)").encode(y=low, y2="high:Q")
    layers = alt.layer(
        interval.mark_area(opacity=0.12),
        interval.mark_rule(opacity=0.5),
        base.mark_line(strokeWidth=2).encode(y=value),
        base.mark_point(size=60, **MARK).encode(y="value:Q", shape=shape),
    )
    title = alt.TitleParams(heading, **HEADING)
    return _styled(layers.properties(width=420, height=260, title=title))


# ---- what all charts share


def svg(plot: Plot) -> str:
    """The plot as the text of an SVG file."""
    text = io.StringIO()
    plot.save(text, format="svg")
    return text.getvalue()


def chart(rows: Sequence[Mapping[str, Any]]) -> alt.Chart:
    """A chart that holds its rows; NaN is null."""
    values = [{name: None if v != v else v for name, v in row.items()} for row in rows]
    return alt.Chart(alt.InlineData(values=values))


def _looks_of_groups(rows: Sequence[TableRow]) -> tuple[alt.Color, alt.Shape]:
    return _looks("part", {GROUPS[row.group]: LOOKS[row.group] for row in rows}, columns=3)


def _looks(
    column: str, of_names: Mapping[str, Sequence[str]], columns: int
) -> tuple[alt.Color, alt.Shape]:
    """Colour and shape of each name in a column, with a legend of `columns` below the plot."""
    box = alt.Legend(orient="bottom", columns=columns, symbolOpacity=1, labelLimit=220)
    colours, shapes = (
        alt.Scale(domain=list(of_names), range=[look[which] for look in of_names.values()])
        for which in (0, 1)
    )
    options: dict[str, Any] = {"title": None, "legend": box}
    colour = alt.Color(f"{column}:N", scale=colours, **options)
    return colour, alt.Shape(f"{column}:N", scale=shapes, **options)


def _styled(plot: Plot) -> Plot:
    """Dark on white, without a description of every mark, as pages have a caption."""
    font = "Helvetica, Arial, sans-serif"
    configured = plot.configure(font=font, background="white", aria=False, axis=AXIS)
    plain: Plot = configured.configure_view(stroke=None)
    return plain
