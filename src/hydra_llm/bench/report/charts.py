"""What all charts share: one style, SVG without network or JavaScript, and the curve of a sweep.

Colours are those of Okabe and Ito, which colour-blind people can tell apart. Needs the extra
`report` (altair, vl-convert).
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra_llm.errors import SettingsError

if TYPE_CHECKING:
    import altair as alt

    Plot = alt.LayerChart | alt.FacetChart

LINES = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
SHAPES = ("circle", "diamond", "triangle-down", "triangle-up", "square", "cross")
FONT = "Helvetica, Arial, sans-serif"
DARK, GRID = "#222222", "#E6E6E6"
AXIS = {"labelColor": DARK, "titleColor": DARK, "titleFontWeight": "normal", "gridColor": GRID}


def require() -> None:
    """Check that the drawing libraries are there.

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


def svg(plot: "Plot") -> str:
    """The plot as the text of an SVG file."""
    text = io.StringIO()
    plot.save(text, format="svg")
    return text.getvalue()


def chart(rows: Sequence[Mapping[str, Any]]) -> "alt.Chart":
    """A chart that holds its rows; NaN is null."""
    import altair as alt

    values = [
        {key: None if value != value else value for key, value in row.items()} for row in rows
    ]
    return alt.Chart(alt.InlineData(values=values))


def points(base: "alt.Chart", size: int = 70) -> "alt.Chart":
    """Filled marks for the rows of a chart."""
    made: alt.Chart = base.mark_point(filled=True, size=size, opacity=1)
    return made


def title(text: str) -> "alt.TitleParams":
    """A small heading at the left."""
    import altair as alt

    return alt.TitleParams(text, anchor="start", fontSize=12, fontWeight="normal")


def legend(columns: int) -> "alt.Legend":
    """A legend below the plot."""
    import altair as alt

    return alt.Legend(orient="bottom", columns=columns, symbolOpacity=1, labelLimit=220)


def styled(plot: "Plot") -> "Plot":
    """Dark on white, without a description of every mark, as pages have a caption."""
    made: Plot = plot.configure(
        font=FONT, background="white", aria=False, axis=AXIS
    ).configure_view(stroke=None)
    return made


# ---- the curve of a sweep


class Point(NamedTuple):
    """One figure of a sweep."""

    method: str
    x: float | str
    value: float
    low: float = math.nan
    high: float = math.nan


def curve(data: Sequence[Point], x: str, y: str, heading: str = "", log: bool = False) -> "Plot":
    """A line per method over what a sweep varies: numbers to scale (`log`: logarithmic, but for 0),
    or names in order. Unknown intervals (NaN) and points without a value are left out.
    """
    import altair as alt

    if any(isinstance(point.x, str) for point in data):  # 1, 5, all
        data = [point._replace(x=str(point.x)) for point in data]
    methods = list(dict.fromkeys(point.method for point in data))
    rows = [point._asdict() for point in data if not math.isnan(point.value)]
    look: dict[str, Any] = {"title": None, "legend": legend(2)}
    base = chart(rows).encode(
        x=_x_axis([point.x for point in data], x, log),
        color=alt.Color("method:N", scale=_cycled(methods, LINES), **look),
    )
    scale = alt.Scale(zero=False)
    value, low = alt.Y("value:Q", title=y, scale=scale), alt.Y("low:Q", title=y, scale=scale)
    interval = base.transform_filter("isValid(datum.low)").encode(y=low, y2="high:Q")
    shape = alt.Shape("method:N", scale=_cycled(methods, SHAPES), **look)
    layers = alt.layer(
        interval.mark_area(opacity=0.12),
        interval.mark_rule(opacity=0.5),
        base.mark_line(strokeWidth=2).encode(y=value),
        points(base, 60).encode(y="value:Q", shape=shape),
    )
    return styled(layers.properties(width=420, height=260, title=title(heading)))


def _x_axis(values: Sequence[float | str], name: str, log: bool) -> "alt.X":
    import altair as alt

    if names := [value for value in dict.fromkeys(values) if isinstance(value, str)]:
        return alt.X("x:O", title=name, sort=names, axis=alt.Axis(labelAngle=0))
    numbers = sorted({float(value) for value in values})
    scale = alt.Scale(type="symlog" if log else "linear", zero=False, padding=12)
    return alt.X("x:Q", title=name, axis=alt.Axis(values=numbers), scale=scale)


def _cycled(names: Sequence[str], looks: Sequence[str]) -> "alt.Scale":
    import altair as alt

    return alt.Scale(domain=names, range=[looks[place % len(looks)] for place in range(len(names))])
