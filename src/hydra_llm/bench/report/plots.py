"""A run's figures as charts, and charts as SVG texts: drawn here, so that who looks needs neither
network nor JavaScript.

Colours are those of Okabe and Ito, told apart by the colour-blind; part of the table and sign also
show as shape and place. Needs the extra `report` (altair, vl-convert). Knows no LLM.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from hydra_llm.bench.metrics import title
from hydra_llm.bench.report.tables import GROUPS, Line, Run
from hydra_llm.errors import SettingsError

if TYPE_CHECKING:
    import altair as alt

    Plot = alt.LayerChart | alt.FacetChart

COLOURS = {
    "prompt": "#0072B2",
    "hydra": "#D55E00",
    "adapter": "#CC79A7",
    "sampling": "#009E73",
    "control": "#7F7F7F",
    "bound": "#000000",
}
SHAPES = {
    "prompt": "circle",
    "hydra": "diamond",
    "adapter": "triangle-down",
    "sampling": "triangle-up",
    "control": "square",
    "bound": "cross",
}
"""By group of a method."""
BETTER, WORSE = "#009E73", "#D55E00"
LINES = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
FONT = "Helvetica, Arial, sans-serif"
BARS = 200
"""So many users are drawn at most; of more of them evenly spaced ones stand for all."""


class Point(NamedTuple):
    """One figure of a study: what was varied, and what came out."""

    method: str
    x: float | str
    value: float
    low: float = math.nan
    high: float = math.nan


def require() -> None:
    """Check that what draws is there.

    Raises:
        SettingsError: the extra `report` is not installed.
    """
    try:
        import altair  # noqa: F401
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            f"reports and plots need {error.name}: pip install 'hydra-llm[report]'"
        ) from None


def plots(run: Run, lines: Sequence[Line]) -> "dict[str, Plot]":
    """Every plot of a run by its name, which serves as a file's name: score-METRIC, cost-MEASURE,
    users.
    """
    ordered = [line for group in GROUPS for line in lines if line.group == group]
    found: dict[str, Plot] = {
        f"score-{metric}": scores(run, ordered, metric) for metric in ordered[0].row.metrics
    }
    for name in ("calls", "tokens" if any(line.row.tokens for line in ordered) else "llm_seconds"):
        if (plot := cost(run, ordered, name)) is not None:
            found[f"cost-{name}"] = plot
    if (plot := users(run, ordered)) is not None:
        found["users"] = plot
    return found


def svg(plot: "Plot") -> str:
    """The plot as the text of an SVG file."""
    text = io.StringIO()
    plot.save(text, format="svg")
    return text.getvalue()


def write(run: Run, lines: Sequence[Line], folder: Path) -> Path:
    """Write every plot of a run to a folder; returns it.

    Raises:
        SettingsError: the extra `report` is not installed, or the folder is a file.
    """
    require()
    drawn = {name: svg(plot) for name, plot in plots(run, lines).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise SettingsError(
            f"{folder}: is a file, or lies in one: name a folder for the plots"
        ) from None
    for name, text in drawn.items():
        (folder / f"{name}.svg").write_text(text, encoding="utf-8")
    return folder


# ---- score


def scores(run: Run, lines: Sequence[Line], metric: str) -> "Plot":
    """Each method's figure with its 95 % interval, method below method; the dashed line is the
    baseline.
    """
    import altair as alt

    rows = [
        {"method": line.row.method, "part": GROUPS[line.group]}
        | dict(zip(("value", "low", "high"), line.row.metrics[metric], strict=True))
        for line in lines
    ]
    axis = alt.Axis(title=None, domain=False, ticks=False, labelLimit=220, labelPadding=6)
    base = _chart(rows).encode(
        y=alt.Y("method:N", sort=[line.row.method for line in lines], axis=axis)
    )
    title, scale = _named(run, metric), alt.Scale(zero=False)
    x, low = alt.X("value:Q", title=title, scale=scale), alt.X("low:Q", title=title, scale=scale)
    layers = [
        base.transform_filter("isValid(datum.low)")
        .mark_rule(strokeWidth=2)
        .encode(x=low, x2="high:Q", color=_colour(lines)),
        base.transform_filter("isValid(datum.value)")
        .mark_point(filled=True, size=70, opacity=1)
        .encode(x=x, color=_colour(lines), shape=_shape(lines)),
        base.transform_filter("!isValid(datum.value)")
        .mark_text(align="left", text="failed")
        .encode(x=alt.value(4)),
    ]
    against = baseline_of(lines)
    if against is not None and not math.isnan(against.row.metrics[metric][0]):
        dashes = (
            _chart([{"value": against.row.metrics[metric][0]}])
            .mark_rule(strokeDash=[4, 3], color="#999999")
            .encode(x="value:Q")
        )
        layers.insert(0, dashes)
    return _dressed(alt.layer(*layers).properties(width=340, height=alt.Step(19)))


def baseline_of(lines: Sequence[Line]) -> Line | None:
    """The line that the others are compared with, if there is one."""
    found = [line for line in lines if line.against is None]
    return found[0] if len(found) == 1 else None


# ---- score against cost

COSTS = {
    "calls": "LLM calls a query",
    "tokens": "tokens a query",
    "llm_seconds": "seconds of LLM a query",
}
AREA = (460, 340)
"""Width and height in pixels of the plot of cost, where labels must find a place."""


def cost(run: Run, lines: Sequence[Line], measure: str) -> "Plot | None":
    """The first metric against what a query costs, on a root scale, which also has a place for what
    costs nothing; None if nothing does.
    """
    import altair as alt

    metric = next(iter(lines[0].row.metrics))
    drawn = [line for line in lines if not math.isnan(line.row.metrics[metric][0])]
    costs, values = (
        [float(getattr(line.row, measure)) for line in drawn],
        [line.row.metrics[metric][0] for line in drawn],
    )
    if not any(costs):
        return None
    most, (low, high) = 1.1 * max(costs), _padded(values)
    pixels = [
        (AREA[0] * math.sqrt(each / most), AREA[1] * (high - value) / (high - low))
        for each, value in zip(costs, values, strict=True)
    ]
    places = label_places(pixels, [6.2 * len(line.row.method) for line in drawn], AREA)
    rows = [
        {"method": line.row.method, "part": GROUPS[line.group], "cost": each, "value": value}
        | {
            "side": label.side,
            "at": most * (label.x / AREA[0]) ** 2,
            "height": high - (high - low) * label.y / AREA[1],
            "moved": label.moved,
        }
        for line, each, value, label in zip(drawn, costs, values, places, strict=True)
    ]
    x = alt.X(
        "cost:Q",
        title=f"{COSTS[measure]} (root scale)",
        axis=alt.Axis(tickCount=6),
        scale=alt.Scale(type="sqrt", domain=[0, most], nice=False),
    )
    y = alt.Y(
        "value:Q",
        title=_named(run, metric),
        scale=alt.Scale(domain=[low, high], nice=False, zero=False),
    )
    base = _chart(rows)
    layers = (
        base.transform_filter("datum.moved")
        .mark_rule(color="#999999", strokeWidth=0.7)
        .encode(x=x, y=y, x2="at:Q", y2="height:Q"),
        base.mark_point(filled=True, size=70, opacity=1).encode(
            x=x, y=y, color=_colour(drawn), shape=_shape(drawn)
        ),
        *(
            _labels(base.transform_filter(f"datum.side == '{side}'"), side)
            for side in ("left", "right")
        ),
    )
    return _dressed(alt.layer(*layers).properties(width=AREA[0], height=AREA[1]))


def _padded(values: Sequence[float]) -> tuple[float, float]:
    room = 0.08 * (max(values) - min(values)) or 0.05
    return min(values) - room, max(values) + room


def _labels(chart: "alt.Chart", side: "Side") -> "alt.Chart":
    drawn: alt.Chart = chart.mark_text(align=side, fontSize=11).encode(
        x="at:Q", y="height:Q", text="method:N"
    )
    return drawn


Side = Literal["left", "right"]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""
LABEL = 13
"""Height of a label in pixels."""


class Label(NamedTuple):
    """Where a label stands, in pixels."""

    x: float
    """Where its text begins (side left) or ends (side right)."""
    y: float
    """Its middle."""
    width: float
    side: Side
    moved: bool = False
    """It does not stand right beside its point."""

    @property
    def box(self) -> Box:
        left = self.x if self.side == "left" else self.x - self.width
        return left, self.y - LABEL / 2, left + self.width, self.y + LABEL / 2


def label_places(
    points: Sequence[tuple[float, float]], widths: Sequence[float], area: tuple[float, float]
) -> list[Label]:
    """Each point's label beside it, or at the nearest height at which it covers neither a point nor
    another label.
    """
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    labels = []
    for (x, y), width in zip(points, widths, strict=True):
        heights = sorted((step * LABEL / 2 for step in range(-60, 61)), key=abs)
        tries = [
            Label(x + 9 * sign, y + up, width, side, up != 0)
            for up in heights
            for sign, side in _SIDES
        ]
        labels.append(next((label for label in tries if _free(label.box, area, taken)), tries[0]))
        taken.append(labels[-1].box)
    return labels


_SIDES: tuple[tuple[int, Side], ...] = ((1, "left"), (-1, "right"))


def _free(box: Box, area: tuple[float, float], taken: Sequence[Box]) -> bool:
    inside = box[0] >= 0 and box[1] >= 0 and box[2] <= area[0] and box[3] <= area[1]
    return inside and not any(
        box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken
    )


# ---- users


def users(run: Run, lines: Sequence[Line]) -> "Plot | None":
    """Each method's users, from who gains most to who loses most against the baseline; None without
    a baseline or another method.
    """
    import altair as alt

    against = baseline_of(lines)
    found = (
        {}
        if against is None
        else _by_method(
            run, [line.row.method for line in lines if line is not against], against.row.method
        )
    )
    panels = {f"{method}|{_counted(values)}": values for method, values in found.items() if values}
    rows = [
        {
            "panel": panel,
            "place": place,
            "difference": value,
            "sign": "better" if value > 0 else "worse",
        }
        for panel, values in panels.items()
        for place, value in enumerate(_thinned(values))
    ]
    if against is None or not rows:
        return None
    header = alt.Header(
        title=None,
        labelExpr="split(datum.value, '|')",
        labelAnchor="start",
        labelFontSize=11,
        labelLineHeight=13,
    )
    zero = alt.when("datum.value === 0").then(alt.value("#555555")).otherwise(alt.value("#E6E6E6"))
    y = alt.Y("difference:Q", title=None, axis=alt.Axis(tickCount=4, gridColor=zero))
    colour = alt.Color(
        "sign:N",
        title=None,
        scale=alt.Scale(domain=["better", "worse"], range=[BETTER, WORSE]),
        legend=None,
    )
    bars = (
        _chart(rows)
        .mark_bar()
        .encode(x=alt.X("place:O", axis=None, scale=alt.Scale(padding=0.15)), y=y, color=colour)
    )
    facet = alt.Facet("panel:N", sort=list(panels), header=header)
    title = _title(f"mean gain of each user minus {against.row.method}'s")
    drawn: alt.FacetChart = bars.properties(width=165, height=80).facet(facet=facet, columns=3)
    return _dressed(drawn.resolve_scale(x="independent").properties(title=title, spacing=14))


def _by_method(run: Run, methods: Sequence[str], against: str) -> dict[str, list[float]]:
    base = gains(run, against)
    return {
        method: sorted(differences(gains(run, method), base).values(), reverse=True)
        for method in methods
    }


def gains(run: Run, method: str) -> dict[tuple[str, str], float]:
    """(user, query) → mean gain of the method's answers; what failed is left out."""
    found: dict[tuple[str, str], list[float]] = {}
    for sample in run.samples:
        if sample.method == method and not sample.error:
            found.setdefault((sample.user, sample.query), []).append(
                run.task.gain(sample.answer, sample.gold)
            )
    return {key: float(np.mean(values)) for key, values in found.items()}


def differences(
    own: Mapping[tuple[str, str], float], base: Mapping[tuple[str, str], float]
) -> dict[str, float]:
    """User → mean difference over the queries that both answered."""
    found: dict[str, list[float]] = {}
    for user, query in own:
        if (user, query) in base:
            found.setdefault(user, []).append(own[user, query] - base[user, query])
    return {
        user: round(float(np.mean(values)), 12) for user, values in found.items()
    }  # 1/3 + 1/3 − 2/3 is no difference


def _counted(values: Sequence[float]) -> str:
    better, worse = sum(value > 0 for value in values), sum(value < 0 for value in values)
    return f"{better} better, {len(values) - better - worse} same, {worse} worse"


def _thinned(values: Sequence[float]) -> list[float]:
    if len(values) <= BARS:
        return list(values)
    return [values[round(place)] for place in np.linspace(0, len(values) - 1, BARS)]


# ---- studies


def curve(points: Sequence[Point], x: str, y: str, title: str = "", log: bool = False) -> "Plot":
    """A line for each method over what a study varied: numbers at their distance (`log`: their
    ratio, but for 0), or names in order.

    An interval that is not known (NaN) is left out; so is a point without a value.
    """
    import altair as alt

    if any(isinstance(point.x, str) for point in points):  # 1, 5, all
        points = [point._replace(x=str(point.x)) for point in points]
    rows = [point._asdict() for point in points if not math.isnan(point.value)]
    methods = list(dict.fromkeys(point.method for point in points))
    colour = alt.Color("method:N", title=None, legend=_legend(2), scale=_cycled(methods, LINES))
    shape = alt.Shape(
        "method:N", title=None, legend=_legend(2), scale=_cycled(methods, list(SHAPES.values()))
    )
    base = _chart(rows).encode(x=_along([point.x for point in points], x, log), color=colour)
    sure = base.transform_filter("isValid(datum.low)").encode(
        y=alt.Y("low:Q", title=y, scale=alt.Scale(zero=False)), y2="high:Q"
    )
    layers = (
        sure.mark_area(opacity=0.12),
        sure.mark_rule(opacity=0.5),
        base.mark_line(strokeWidth=2).encode(
            y=alt.Y("value:Q", title=y, scale=alt.Scale(zero=False))
        ),
        base.mark_point(filled=True, size=60, opacity=1).encode(y="value:Q", shape=shape),
    )
    return _dressed(alt.layer(*layers).properties(width=420, height=260, title=_title(title)))


def _along(values: Sequence[float | str], title: str, log: bool) -> "alt.X":
    import altair as alt

    if names := [value for value in dict.fromkeys(values) if isinstance(value, str)]:
        return alt.X("x:O", title=title, sort=names, axis=alt.Axis(labelAngle=0))
    numbers = sorted({float(value) for value in values})
    scale = alt.Scale(type="symlog" if log else "linear", zero=False, padding=12)
    return alt.X("x:Q", title=title, axis=alt.Axis(values=numbers), scale=scale)


def _cycled(names: Sequence[str], looks: Sequence[str]) -> "alt.Scale":
    import altair as alt

    return alt.Scale(domain=names, range=[looks[place % len(looks)] for place in range(len(names))])


# ---- what all charts share


def _data(rows: Sequence[Mapping[str, Any]]) -> "alt.InlineData":
    """Rows in the chart itself; what is not a number is null."""
    import altair as alt

    return alt.InlineData(
        values=[
            {key: None if value != value else value for key, value in row.items()} for row in rows
        ]
    )


def _chart(rows: Sequence[Mapping[str, Any]]) -> "alt.Chart":
    import altair as alt

    return alt.Chart(_data(rows))


def _named(run: Run, metric: str) -> str:
    better = "more" if run.task.metric_specs[metric].higher_is_better else "less"
    return f"{title(metric)} ({better} is better)"


def _title(text: str) -> "alt.TitleParams":
    import altair as alt

    return alt.TitleParams(text, anchor="start", fontSize=12, fontWeight="normal")


def _legend(columns: int) -> "alt.Legend":
    import altair as alt

    return alt.Legend(orient="bottom", columns=columns, symbolOpacity=1, labelLimit=220)


def _colour(lines: Sequence[Line]) -> "alt.Color":
    import altair as alt

    return alt.Color("part:N", title=None, legend=_legend(3), scale=_by_part(lines, COLOURS))


def _shape(lines: Sequence[Line]) -> "alt.Shape":
    import altair as alt

    return alt.Shape("part:N", title=None, legend=_legend(3), scale=_by_part(lines, SHAPES))


def _by_part(lines: Sequence[Line], looks: Mapping[str, str]) -> "alt.Scale":
    import altair as alt

    there = [group for group in GROUPS if any(line.group == group for line in lines)]
    return alt.Scale(
        domain=[GROUPS[group] for group in there], range=[looks[group] for group in there]
    )


def _dressed(chart: "Plot") -> "Plot":
    """Dark on white; without a description of every mark, which the page's own caption gives
    better.
    """
    axis = {
        "labelColor": "#222222",
        "titleColor": "#222222",
        "titleFontWeight": "normal",
        "gridColor": "#E6E6E6",
    }
    dressed: Plot = chart.configure(
        font=FONT, background="white", aria=False, axis=axis
    ).configure_view(stroke=None)
    return dressed
