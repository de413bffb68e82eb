"""Figures by hour → what the page of activity shows: sums, shares, bars and lines as SVG shapes.
Knows no store and no template.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from hydra_llm.gateway.activity import BOUNDS, HOUR, quantile
from hydra_llm.gateway.ui.words import GROUPS, OTHER

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 200, 44, 22  # of a chart, in its own units
NAMES = (*GROUPS, OTHER)
GATE, PERSONAL = GROUPS["Gate"], "personal"
Row = Sequence[Any]  # hour, kind, name, count


@dataclass(frozen=True)
class Span:
    """A time that the page shows, and how it is cut."""

    name: str
    hours: int
    step: int  # hours of one bar
    form: str  # of a bar's time, for people
    short: str  # the same, under a chart
    each: int  # bars from one time to the next under a chart


SPANS: Mapping[str, Span] = {
    "day": Span("24 hours", 24, 1, "%H:%M", "%H:%M", 4),
    "week": Span("7 days", 7 * 24, 6, "%d %b %H:%M", "%d %b", 4),
    "month": Span("30 days", 30 * 24, 24, "%d %b", "%d %b", 5),
}


def figures(rows: Iterable[Row], span: Span, now: float) -> dict[str, Any]:
    """All that the page says, from the rows of `GET /v1/activity`."""
    step = span.step * HOUR
    last = int(now) // HOUR * HOUR
    first = last - (span.hours - 1) * HOUR
    count = math.ceil(span.hours / span.step)
    slots: list[defaultdict[str, Counter[str]]] = [defaultdict(Counter) for _ in range(count)]
    whole: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for hour, kind, name, number in rows:
        slots[min(count - 1, max(0, int(hour - first) // step))][kind][name] += number
        whole[kind][name] += number
    times = [datetime.fromtimestamp(first + place * step, UTC) for place in range(count)]
    labels = [time.strftime(span.form) for time in times]
    ticks = _ticks([time.strftime(span.short) for time in times], span.each)
    answers = whole["answer"]
    judged = answers[PERSONAL] + sum(answers[name] for name in GATE)
    return {
        "total": answers.total(),
        "personal": answers[PERSONAL],
        "gated": judged - answers[PERSONAL],
        "judged": judged,
        "first": whole["pick"]["first"],
        "picked": whole["pick"].total(),
        "own": quantile(whole["own"], 0.95),
        "upstream": quantile(whole["upstream"], 0.95),
        "reasons": answers.most_common(),
        "bars": {**_bars([slot["answer"] for slot in slots], labels), "ticks": ticks},
        "lines": {**_lines(slots, labels), "ticks": ticks},
    }


def seconds(value: float | None) -> str:
    """An upper bound of seconds for people."""
    if value is None:
        return "–"
    if math.isinf(value):
        return f"> {BOUNDS[-1]:g} s"
    return f"≤ {value * 1000:g} ms" if value < 1 else f"≤ {value:g} s"


def _bars(slots: Sequence[Counter[str]], labels: Sequence[str]) -> dict[str, Any]:
    """Bars of answers, one part for each group of reasons."""
    group_of = {reason: name for name, reasons in GROUPS.items() for reason in reasons}
    sums = [Counter[str]() for _ in slots]
    for own, slot in zip(sums, slots, strict=True):
        for reason, number in slot.items():
            own[group_of.get(reason, OTHER)] += number
    top = _round_up(max((own.total() for own in sums), default=0))
    shapes, wide = [], (WIDTH - LEFT) / len(slots)
    for place, own in enumerate(sums):
        y = float(HEIGHT - BOTTOM)
        for group, name in enumerate(NAMES):
            tall = own[name] / top * (HEIGHT - BOTTOM - 8)
            y -= tall
            if own[name]:
                shape = {"x": LEFT + place * wide + wide * 0.12, "y": y, "width": wide * 0.76}
                shapes.append({**shape, "height": tall, "group": group})
    rows = [(label, [own[name] for name in NAMES]) for label, own in zip(labels, sums, strict=True)]
    marks = [(f"{top:,}", 8.0), (f"{top // 2:,}", 8 + (HEIGHT - BOTTOM - 8) / 2), ("0", 178.0)]
    table = [row for row in rows if any(row[1])]
    return {"shapes": shapes, "marks": marks, "rows": table}


def summed(rows: Iterable[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
    """Rows of spend with the same `name` as one, in the order in which they come. A cost that is
    not known is none in a sum with one that is.
    """
    out: dict[str, dict[str, Any]] = {}
    for row in rows:
        own = out.setdefault(row[name], {name: row[name], "cost": None})
        for part in ("calls", "prompt_tokens", "completion_tokens"):
            own[part] = own.get(part, 0) + row[part]
        if row["cost"] is not None:
            own["cost"] = (own["cost"] or 0.0) + row["cost"]
    return list(out.values())


def money_bars(rows: Sequence[Mapping[str, Any]], days: int, since: str) -> dict[str, Any]:
    """A bar of cost for each day, from the rows of `GET /v1/spend?by=day`; nothing without cost."""
    first, cost = date.fromisoformat(since), {row["day"]: row["cost"] or 0.0 for row in rows}
    labels = [(first + timedelta(days=n)).isoformat() for n in range(days)]
    if not (top := max([cost.get(label, 0.0) for label in labels], default=0.0)):
        return {}
    shapes, wide, room = [], (WIDTH - LEFT) / days, HEIGHT - BOTTOM - 8
    for place, label in enumerate(labels):
        tall = cost.get(label, 0.0) / top * room
        shape = {"x": LEFT + place * wide + wide * 0.12, "y": HEIGHT - BOTTOM - tall}
        shapes.append({**shape, "width": wide * 0.76, "height": tall, "group": 0})
    short = [date.fromisoformat(label).strftime("%d %b") for label in labels]
    marks = [(f"{top:,.0f}" if top >= 100 else f"{top:.2g}", 8.0), ("0", float(HEIGHT - BOTTOM))]
    return {"shapes": shapes, "ticks": _ticks(short, math.ceil(days / 7)), "marks": marks}


def _lines(slots: Sequence[Mapping[str, Counter[str]]], labels: Sequence[str]) -> dict[str, Any]:
    """The 95th percentile of seconds as points on a scale of classes, which are about equally far
    from each other on a logarithmic scale.
    """
    scale, wide = [*BOUNDS, math.inf], (WIDTH - LEFT) / len(slots)
    room = HEIGHT - BOTTOM - 8
    points: dict[str, list[dict[str, float]]] = {"own": [], "upstream": []}
    rows = []
    for place, slot in enumerate(slots):
        values = {kind: quantile(slot.get(kind, {}), 0.95) for kind in points}
        for kind, value in values.items():
            if value is not None:
                high = (scale.index(value) + 1) / len(scale)
                x, y = LEFT + (place + 0.5) * wide, HEIGHT - BOTTOM - high * room
                points[kind].append({"x": x, "y": y})
        if any(value is not None for value in values.values()):
            rows.append((labels[place], [seconds(value) for value in values.values()]))
    paths = {
        kind: " ".join(f"{own['x']:.1f},{own['y']:.1f}" for own in each)
        for kind, each in points.items()
    }
    marks = [
        (f"{bound:g} s", HEIGHT - BOTTOM - (place + 1) / len(scale) * room)
        for place, bound in enumerate(BOUNDS)
        if bound in (0.01, 0.1, 1.0, 10.0)
    ]
    return {"points": points, "paths": paths, "marks": marks, "rows": rows}


def _ticks(labels: Sequence[str], each: int) -> list[tuple[str, float]]:
    """Some labels under a chart, and where."""
    wide = (WIDTH - LEFT) / len(labels)
    return [(labels[i], LEFT + (i + 0.5) * wide) for i in range(0, len(labels), each)]


def _round_up(value: int) -> int:
    """The least of 2, 4, 6, 8, 10, 20, 40, ... that is not less."""
    size = 1
    while True:
        for step in (2, 4, 6, 8, 10):
            if value <= step * size:
                return step * size
        size *= 10
