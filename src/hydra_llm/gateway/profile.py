"""A user in words: what the store keeps, how the user answers, and what the heads have learned.

The paper learns a head as numbers; here is what they do to the scores of the user's own latest
texts, against the shared head on the same. Knows no HTTP and no database.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from hydra_llm.rerank import record_text
from hydra_llm.tasks.base import Task
from hydra_llm.text import length
from hydra_llm.types import Record

if TYPE_CHECKING:
    from hydra_llm.bundle import Bundle
    from hydra_llm.model.scorer import Scorer

SAMPLE = 16  # the latest records that heads are compared on
STYLE_RECORDS = 500  # the latest records whose style is measured
SHOWN = 5  # records, answers and labels that are listed
MAX_CHOICES = 20  # different answers that are choices and not free texts, where no task says so
WIDTH = 78
TRAITS: Mapping[str, Any] = {
    "end with a full stop": lambda text: text.rstrip().endswith((".", "。")),
    "end with a question": lambda text: text.rstrip().endswith(("?", "？", "؟")),
    "hold an exclamation mark": lambda text: "!" in text or "！" in text,
    "begin with a lower-case letter": lambda text: text[:1].islower(),
    "have several lines": lambda text: "\n" in text.strip(),
    "hold a number": lambda text: re.search(r"\d", text) is not None,
}


def describe(
    kept: Mapping[str, Any],
    records: Sequence[Record],
    learned: Mapping[str, Any],
    task: Task | None,
) -> dict[str, Any]:
    """A user as plain values, from `Store.export_user`, `Store.records` and `leanings`; `task` is
    the bundle's.
    """
    dated = [record for record in records if math.isfinite(record.span[0])]
    timed = sorted(dated, key=lambda record: record.span)
    said = Counter(next(iter(row["content"]["said"]), "?") for row in kept["feedback"])
    used = Counter(id for row in kept["requests"] for id in row["content"].get("records", ()))
    own = {record.id: record for record in records}
    most = [(own[id], count) for id, count in used.most_common() if id in own][:SHOWN]
    return {
        "user": kept["user"],
        "created": _date(kept["created"]),
        "counts": {part: len(kept[part]) for part in ("records", "feedback", "requests", "keys")},
        "first_time": timed[0].time if timed else None,
        "last_time": timed[-1].time if timed else None,
        "feedback": dict(said.most_common()),
        "answers": _answers(records, task),
        "most_used": [
            {"id": it.id, "times": count, "input": _cut(it.input), "output": _cut(it.output)}
            for it, count in most
        ],
        "learned": dict(learned),
    }


def in_words(profile: Mapping[str, Any]) -> list[str]:
    """A profile as lines of at most `WIDTH` characters."""
    counts = profile["counts"]
    times = f", from {profile['first_time']} to {profile['last_time']}"
    parts = [_count(counts["records"], "record") + (times if profile["first_time"] else "")]
    parts.append(_count(counts["requests"], "answered request"))
    kinds = ", ".join(f"{count} {kind}" for kind, count in profile["feedback"].items())
    parts.append(f"feedback on {counts['feedback']} ({kinds})" if kinds else "no feedback")
    lines = [profile["user"], *_indented(f"{'; '.join(parts)}. Known since {profile['created']}.")]
    if profile["answers"]:
        lines += ["How this user answers", *_indented(_answer_words(profile["answers"]))]
    for name, learned in profile["learned"].items():
        of, norm = _count(learned["records"], "record"), learned["norm"]
        lines.append(f"What the {name} has learned from {of} (norm {norm:g})")
        for item in learned["leanings"]:
            points = f"{100 * item['probability']:+.1f}"
            lines += _indented(f"{points:>6}  {item['text']}", 10)
        what = "points of probability, against the scores that all users share"
        lines += _indented(what if learned["leanings"] else "nothing that changes an answer")
    if profile["most_used"]:
        lines.append("Records that were in most prompts")
        for item in profile["most_used"]:
            record = f"{item['id']}: {item['input']} -> {item['output']}"
            lines += _indented(f"{item['times']}x {record}")
    return lines


# ---- how the user answers


def _answers(records: Sequence[Record], task: Task | None) -> dict[str, Any]:
    """Shares of choices, or length and style of the latest free texts; empty without records."""
    outputs = [record.output for record in records]
    if not outputs:
        return {}
    counts = Counter(outputs)
    few = len(counts) <= min(MAX_CHOICES, len(outputs) // 2)
    if task.labels and not task.free_history if task else few:
        shares = {_cut(text): round(n / len(outputs), 3) for text, n in counts.most_common(SHOWN)}
        return {"shares": shares, "others": max(0, len(counts) - SHOWN)}
    latest = outputs[-STYLE_RECORDS:]
    style = {name: sum(map(has, latest)) / len(latest) for name, has in TRAITS.items()}
    return {
        "characters": median(map(len, latest)),
        "words": median(map(length, latest)),
        "style": {name: round(share, 3) for name, share in style.items() if share},
        "latest": _cut(outputs[-1]),
    }


def _answer_words(answers: Mapping[str, Any]) -> str:
    if "shares" in answers:
        shares = ", ".join(f'"{text}" {share:.0%}' for text, share in answers["shares"].items())
        return shares + (f", and {answers['others']} others" if answers["others"] else "") + "."
    style = "".join(f" {share:.0%} {name}." for name, share in answers["style"].items())
    size = f"Typically {answers['words']:g} words, {answers['characters']:g} characters."
    return f'{size}{style} The latest: "{answers["latest"]}".'


# ---- what the heads have learned


def leanings(
    kept: Mapping[str, Any], records: Sequence[Record], bundle: "Bundle"
) -> dict[str, Any]:
    """What the user's heads have learned, by scorer. It encodes at most `SAMPLE` records and their
    answers.
    """
    out = {}
    task = bundle.task
    readable = [it for it in records if task.free_history or task.is_answer(it.output)][-SAMPLE:]
    for row in kept["heads"]:
        scorer = bundle.scorers.get(row["scorer"])
        if scorer is not None and row["bundle"] == bundle.weights and readable:
            numbers = np.frombuffer(row["delta"], "<f4")
            texts = _candidates(row["scorer"], readable, bundle)
            inputs = [record.input for record in readable]
            gains = _differences(scorer, numbers, inputs, texts, bundle)
            order = np.argsort(gains, kind="stable")
            ends = [*order[::-1][:SHOWN], *order[::-1][SHOWN:][-SHOWN:]]
            shown = [(texts[i], round(float(gains[i]), 4)) for i in ends]
            out[row["scorer"]] = {
                "records": row["known"],
                "until": None if row["until"] is None else _date(row["until"]),
                "norm": round(float(np.linalg.norm(numbers)), 4),
                "leanings": [
                    {"text": _cut(text), "probability": value}
                    for text, value in shown
                    if abs(value) >= 0.0005  # less is shown as 0.0 points
                ],
            }
    return out


def _candidates(name: str, records: Sequence[Record], bundle: "Bundle") -> list[str]:
    """The labels, or different texts of the records, as the scorer reads them."""
    if name == "reranker":
        with_answer = bundle.settings.record_answer
        texts = [record_text(record, with_answer=with_answer) for record in records]
    else:
        texts = list(bundle.task.labels) or [record.output for record in records]
    return list(dict.fromkeys(texts))


def _differences(
    scorer: "Scorer", numbers: np.ndarray, inputs: list[str], texts: list[str], bundle: "Bundle"
) -> np.ndarray:
    """[C] how much more probable the user's head makes each text than the shared head, on average
    over the inputs.
    """
    from hydra_llm.model.heads import Head
    from hydra_llm.model.interactions import make_groups

    average = scorer.side_mean.numpy()  # side features are weighed alike for all users
    side = [np.tile(average, (len(texts), 1))] * len(inputs)
    groups = make_groups(bundle.features, scorer.interaction, inputs, [texts] * len(inputs), side)
    own = scorer.shares(scorer.score(groups, [Head(numbers)] * len(inputs)))
    shared = scorer.shares(scorer.score(groups, [None] * len(inputs)))
    difference: np.ndarray = (own - shared).mean(0).numpy()
    return difference


# ---- texts


def _cut(text: str, length: int = 80) -> str:
    line = " ".join(text[:1000].split())
    shown = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line
    )
    return shown if len(shown) <= length else f"{shown[: length - 1]}…"


def _count(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _date(seconds: float) -> str | None:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
    except (OverflowError, OSError, ValueError):  # no calendar has it
        return None


def _indented(text: str, indent: int = 2) -> list[str]:
    """The text in lines that fit; further ones begin at `indent`."""
    from rich.console import Console  # it knows that some letters take two columns
    from rich.text import Text

    console = Console(width=WIDTH)
    first, *rest = (line.plain for line in Text(text).wrap(console, WIDTH - 2))
    left = Text(" ".join(line.strip() for line in rest))
    more = [line.plain for line in left.wrap(console, WIDTH - indent)] if rest else []
    return [f"  {first.rstrip()}", *(" " * indent + line.rstrip() for line in more)]
