"""Figures for a talk: differences from the baseline (forest plot) and score against cost, 16:9.

The title says the finding, under it stands what was measured. PNG, and SVG that holds its font
(Inter, in `fonts/`). No text of the data set is shown. Needs the extra `report`.
"""

import base64
import math
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal, NamedTuple

from hydra_llm.bench.method import base_name
from hydra_llm.bench.report.cells import axis_title
from hydra_llm.bench.report.plots import COSTS, INK, LOOKS, Plot, Size, chart, cost_plot, svg
from hydra_llm.bench.report.tables import GROUPS, Report, TableRow, group_of, improvements, overall
from hydra_llm.bench.stats import MIN_USERS, title
from hydra_llm.errors import SettingsError
from hydra_llm.extras import require

require("report", "a slide")
import altair as alt
import vl_convert

FONT, FONTS = "Inter", Path(__file__).parent / "fonts"
WEIGHTS = {400: "Inter-Regular.ttf", 600: "Inter-SemiBold.ttf"}
WIDTH, HEIGHT = 1280, 720  # of a slide in pixels; PNG has twice as many
COST = Size(1150, 458, font=16, mark=190)
TITLE_LENGTH, NOTE_LENGTH = 70, 130  # characters of a line
NAME_LENGTH = 50  # of a method, task or model in a line
SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")
ROW = (18, 46)  # least and greatest height of a row in pixels


class Effect(NamedTuple):
    """A row of a forest plot."""

    method: str
    group: str
    value: float
    low: float  # NaN, as `high`, for too few users
    high: float

    @property
    def separated(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def write(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Write the slides of runs to a folder, and that of all of them together; returns the files.
    SettingsError: the folder is a file.
    """
    files = []
    for number, report in enumerate(reports, 1):
        below = f"{number}-{report.run.folder.name}" if len(reports) > 1 else ""
        files += _write(slides(report), folder / below)
    if (together := overall_slide(reports)) is not None:
        files += _write({"overall": together}, folder)
    return files


def slides(report: Report) -> dict[str, Plot]:
    """Every slide of a run by its name: difference-METRIC, then cost-MEASURE."""
    drawn: dict[str, Plot | None] = {
        f"difference-{metric}": difference_slide(report, metric) for metric in report.metrics
    }
    tokens = sum(row.result.tokens for row in report.rows)  # NaN where the LLM did not tell them
    for measure in ("calls", "tokens" if tokens > 0 else "llm_seconds"):
        drawn[f"cost-{measure}"] = cost_slide(report, measure)
    return {name: plot for name, plot in drawn.items() if plot is not None}


def difference_slide(report: Report, metric: str) -> Plot | None:
    """Each method's paired difference from the baseline; None without a baseline."""
    effects = [
        Effect(method, group_of(method), change.difference, change.low, change.high)
        for method, own in report.comparisons.items()
        if not math.isnan((change := own.metrics[metric]).difference)
    ]
    if not effects:
        return None
    sign = report.sign(metric)
    axis = f"difference from {short(report.baseline)} in {axis_title(metric, sign > 0)}"
    forest = _forest(_best_first(effects, sign), axis, "+.3f")
    bars = "Bars: 95 % intervals over users; filled: the interval excludes 0."
    notes = (_measured(report), report.too_few or bars)
    return _slide(forest, difference_title(report, effects, metric), notes)


def difference_title(report: Report, effects: Sequence[Effect], metric: str) -> str:
    """What the differences say, in a sentence: of HYDRA, else how many methods are better."""
    sign, base, name = report.sign(metric), short(report.baseline), title(metric)
    users = len({sample.user for sample in report.run.samples})
    if all(math.isnan(effect.low) for effect in effects):
        needed = f"{users} of the {MIN_USERS} users that are needed"
        return f"No finding in {name}: the run has {needed} for intervals"
    own = _subject(report, effects)
    if own is None:
        better = sum(effect.separated and sign * effect.value > 0 for effect in effects)
        return f"{better} of {len(effects)} methods are better than {base} in {name}"
    interval, method = _figures(own, "+.3f"), short(own.method)
    if not own.separated:
        return f"{method} is not separated from {base} in {name}: {interval}"
    word = "better" if sign * own.value > 0 else "worse"
    return f"{method} is {word} than {base} in {name}: {interval}"


def _subject(report: Report, effects: Sequence[Effect]) -> Effect | None:
    """HYDRA; of several variants the one with the settings' k and samples, not the best one, which
    would be a choice with hindsight.
    """
    own = [effect for effect in effects if base_name(effect.method) == "hydra"]
    settings = report.run.manifest.get("settings", {})
    names = ("hydra", f"hydra@{settings.get('k')},{settings.get('samples')}")
    return next((effect for effect in own if effect.method in names), own[0] if own else None)


def cost_slide(report: Report, measure: str) -> Plot | None:
    """The first metric against the cost; None if nothing costs anything."""
    plot = cost_plot(report, measure, COST)
    if plot is None:
        return None
    headline, note = cost_title(report, measure)
    return _slide(plot, headline, (_measured(report), note))


def cost_title(report: Report, measure: str) -> tuple[str, str]:
    """The method with the best value and its cost, bounds left out; and the best cheaper one."""
    metric = report.metrics[0]
    sign, name = report.sign(metric), title(metric)
    rows = [row for row in report.rows if row.group != "bound"]
    rows = [row for row in rows if not math.isnan(_value(row, metric))]

    def best(among: Iterable[TableRow]) -> TableRow:
        return max(among, key=lambda row: (sign * _value(row, metric), -_cost(row, measure)))

    if not rows:
        return f"No method was scored in {name}", ""
    if report.too_few:
        return f"{name} against {COSTS[measure]} a query: no finding", report.too_few
    top = best(rows)
    price = f"{_cost(top, measure):,.3g} {COSTS[measure]} a query"
    headline = f"{short(top.method)} has the best {name}, {_value(top, metric):.3f}, at {price}"
    cheaper = [row for row in rows if _cost(row, measure) < _cost(top, measure)]
    if not cheaper:
        return headline, "No method is cheaper."
    other = best(cheaper)
    figures = f"{_value(other, metric):.3f} at {_cost(other, measure):,.3g}"
    return (
        headline,
        f"The best cheaper one is {short(other.method)}: {figures}. Bounds are not counted.",
    )


def _value(row: TableRow, metric: str) -> float:
    return row.result.metrics[metric][0]


def _cost(row: TableRow, measure: str) -> float:
    return float(getattr(row.result, measure))


def overall_slide(reports: Sequence[Report]) -> Plot | None:
    """The mean relative improvements over the best prompts of several data sets, of HYDRA on each
    too; None for one.
    """
    shares = overall(reports)
    if not shares:
        return None
    what = next(iter(next(iter(shares.values()))))
    effects = [
        percent(method, group_of(method), over.change, *over.interval())
        for method, own in shares.items()
        if (over := own.get(what)) is not None
    ]
    own = _subject(reports[0], effects) or max(effects, key=lambda effect: effect.value)
    names = [report.run.task.name for report in reports]
    rows = [next(row for row in report.rows if row.method == own.method) for report in reports]
    on_each = improvements(rows, [report.honest for report in reports])[what]
    each = [
        percent(f"on {short(name)}", own.group, over.change, *over.interval())
        for name, over in zip(names, on_each, strict=True)
        if over is not None
    ]
    note = f"{len(reports)} data sets: {short(', '.join(names), 2 * NOTE_LENGTH)}"
    return means_slide(effects, own, each, (what, note))


def percent(method: str, group: str, value: float, low: float, high: float) -> Effect:
    """A relative improvement in percent."""
    return Effect(method, group, 100 * value, 100 * low, 100 * high)


def means_slide(
    effects: Sequence[Effect], own: Effect, each: Sequence[Effect], notes: tuple[str, str]
) -> Plot:
    """Methods' means over data sets; below that of `own` stands what it has on each. `notes`: of
    which metrics, and of what.
    """
    says = "is not separated from"
    if own.separated:
        says = "is better than" if own.value > 0 else "is worse than"
    headline = f"{short(own.method)} {says} the best prompts: {_figures(own, '+.1f')} %"
    axis = f"mean relative improvement over the best prompts, % ({notes[0]})"
    rows = _best_first(effects, 1)
    below = rows.index(own) + 1
    rows[below:below] = _best_first(each, 1)
    bars = "Bars: 95 % intervals over users; filled: the interval excludes 0."
    return _slide(_forest(rows, axis, "+.1f"), headline, (notes[1], bars))


def _measured(report: Report) -> str:
    """`movie_rating; LLM m; 60 users, 300 queries`."""
    run = report.run
    users = len({sample.user for sample in run.samples})
    queries = len({(sample.user, sample.query) for sample in run.samples})
    model = run.manifest.get("llm", {}).get("model")
    llm = f"LLM {short(Path(str(model)).name)}" if model else "without an LLM"
    named = [short(run.task.name), llm]
    return "; ".join([*named, f"{users} users, {queries} queries"])


def _best_first(effects: Sequence[Effect], sign: int) -> list[Effect]:
    """`sign`: 1 if more is better, else -1."""
    return sorted(effects, key=lambda effect: -sign * effect.value)


def _forest(effects: Sequence[Effect], axis: str, form: str) -> Plot:
    """The effects in this order; the figures stand at right."""
    rows = [
        {
            **effect._asdict(),
            "part": GROUPS[effect.group],
            "separated": effect.separated,
            "labels": f"{effect.method}\n{_figures(effect, form)}",  # of the left and right axis
        }
        for effect in effects
    ]
    height = min(ROW[1], max(ROW[0], 430 // len(rows)))
    left, right = (_names(side, min(17, height - 2)) for side in SIDES)
    base, (colour, stroke) = chart(rows).encode(y=left), _colours(effects)
    scale = alt.Axis(title=axis, tickCount=7)
    x, low, at = (alt.X(f"{name}:Q", axis=scale) for name in ("value", "low", "zero"))
    point: dict[str, Any] = {"size": min(200, 9 * height), "strokeWidth": 2.5, "opacity": 1}
    ends = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=3)
    filled = base.transform_filter("datum.separated").mark_point(filled=True, **point)
    hollow = base.transform_filter("!datum.separated").mark_point(fill="#ffffff", **point)
    zero = chart([{"zero": 0}]).mark_rule(color="#555555", strokeDash=[5, 4])
    layers = alt.layer(
        zero.encode(x=at),
        ends.encode(x=low, x2="high:Q", color=colour),
        filled.encode(x=x, color=colour),
        hollow.encode(x=x, stroke=stroke),
    )
    figures = chart(rows).mark_point(opacity=0).encode(y=right)
    least = 290 + height * len(rows)  # of many methods the slide is higher
    size = {"width": WIDTH, "height": max(HEIGHT, least)}
    fit = alt.AutoSizeParams(type="fit", contains="padding")
    both: Plot = alt.layer(layers, figures).resolve_scale(y="independent")
    return both.properties(autosize=fit, **size)


def _names(side: Literal["left", "right"], font: int) -> alt.Y:
    """The axis with the methods' names at left, that with their figures at right."""
    part = f"split(datum.value, '\\n')[{int(side == 'right')}]"
    plain: Any = {"title": None, "domain": False, "ticks": False, "labelLimit": 420}
    axis = alt.Axis(orient=side, labelFontSize=font, labelExpr=part, **plain)
    return alt.Y("labels:N", sort=None, axis=axis)


def _colours(effects: Sequence[Effect]) -> tuple[alt.Color, alt.Stroke]:
    """Each group's, with a legend."""
    groups = [group for group in GROUPS if any(effect.group == group for effect in effects)]
    scale = alt.Scale(
        domain=[GROUPS[group] for group in groups], range=[LOOKS[group][0] for group in groups]
    )
    legend = alt.Legend(title=None, orient="bottom", symbolType="circle", symbolOpacity=1)
    return (
        alt.Color("part:N", scale=scale, legend=legend),
        alt.Stroke("part:N", scale=scale, legend=None),
    )


def signed(value: float, form: str = "+.3f") -> str:
    """With a minus sign as wide as the plus sign, none before 0."""
    text = format(value, form)
    return text.replace("-", "−" if float(text) else "+")


def short(name: object, most: int = NAME_LENGTH) -> str:
    """A name that leaves room for the figure."""
    text = str(name)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _figures(effect: Effect, form: str) -> str:
    value, low, high = (signed(own, form) for own in effect[2:])
    return value if math.isnan(effect.low) else f"{value} [{low}, {high}]"


# ---- one look for all slides


def _slide(plot: Plot, headline: str, notes: Sequence[str]) -> Plot:
    """The plot with the finding as its title, in the slides' look."""
    heading = alt.TitleParams(
        wrap(headline, TITLE_LENGTH),
        subtitle=[line for note in notes for line in wrap(note, NOTE_LENGTH)],
        anchor="start",
        frame="bounds",
        offset=22,
        fontSize=30,
        fontWeight=600,
        lineHeight=37,
        color="#1a1a1a",
        subtitleFontSize=17,
        subtitleLineHeight=24,
        subtitlePadding=10,
        subtitleColor="#555555",
    )
    axis = {**INK, "labelFontSize": 16, "titleFontSize": 17, "titleFontWeight": "normal"}
    legend = {"labelFontSize": 16, "symbolSize": 150, "columns": 6, "labelLimit": 400}
    looks: Any = plot.properties(title=heading, padding=32)
    looks = looks.configure(font=FONT, background="white", aria=False, axis=axis, legend=legend)
    done: Plot = looks.configure_view(stroke=None)
    return done


def with_font(text: str) -> str:
    """The SVG with the font in it, so that it looks the same on every machine."""
    faces = "".join(
        f"@font-face{{font-family:{FONT};font-weight:{weight};"
        f"src:url(data:font/ttf;base64,{_font(name)}) format('truetype')}}"
        for weight, name in WEIGHTS.items()
    )
    end = text.index(">", text.index("<svg")) + 1
    return f"{text[:end]}<style>{faces}</style>{text[end:]}"


@cache
def _font(name: str) -> str:
    return base64.b64encode((FONTS / name).read_bytes()).decode("ascii")


def _write(drawn: dict[str, Plot], folder: Path) -> list[Path]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        fault = "is a file, or lies in one: name a folder for the slides"
        raise SettingsError(f"{folder}: {fault}") from None
    vl_convert.register_font_directory(str(FONTS))
    files = []
    for name, plot in drawn.items():
        text = svg(plot)
        files += [folder / f"{name}.svg", folder / f"{name}.png"]
        files[-2].write_text(with_font(text), encoding="utf-8")
        files[-1].write_bytes(vl_convert.svg_to_png(text, scale=2))
    return files
