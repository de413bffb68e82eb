"""The interactive plots of the site's results page, from the committed reports (no data texts).

Each data set with a run by folds has its methods' improvement over the best prompt with intervals
(a forest plot) and its first metric against calls and tokens. docs/assets/plots.js draws them.
"""

import html
import json
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKER = "<!-- plots -->"
HYDRA = "hydra@4,8"
HONEST = "best prompt (chosen on training users)"
OF_SAME_SET = ("_strict", "_one_call", "_part")  # end the names of runs beside another of the set
SETS = {
    "opinion": "opinions",
    "movie_rating": "movie ratings",
    "news_headline": "headlines",
    "paper_title": "paper titles",
    "news_category": "news categories",
}
"""Data set → its name."""
TITLES = {"accuracy": "accuracy", "mae": "MAE (lower is better)", "rouge1": "ROUGE-1"}
SHARE = "over_prompts_without_bleu"  # mean relative improvement of the metrics
Interval = list[float]  # a value, and the ends of its interval, if it has one


class Shown(NamedTuple):
    """A choice of the plots: a data set, or all of them."""

    name: str
    finding: str
    note: str
    metric: str  # "": no score against cost
    rows: list[dict[str, Any]]


def reports() -> dict[str, dict[str, Any]]:
    """The reports of the runs by folds by data set, in the order of SETS."""
    found = {}
    for file in sorted(RESULTS.glob("*/report.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        by_folds = any(row["method"] == HONEST for row in report["methods"])
        if by_folds and not file.parent.name.endswith(OF_SAME_SET):
            found[report["task"]] = report
    return {name: found[name] for name in SETS if name in found}


def percent(share: Interval) -> Interval:
    """A share and its interval in percent, to one decimal."""
    return [round(100 * value, 1) for value in share]


def finding(share: Interval, where: str) -> str:
    """What an improvement over the best prompt says, as a title."""
    value, low, high = percent(share)
    says = "beats" if low > 0 else "is worse than" if high < 0 else "is not separated from"
    return f"{HYDRA} {says} the best prompt {where}: {value:+.1f} % [{low:+.1f}, {high:+.1f}]"


def hydra(report: dict[str, Any]) -> dict[str, Any]:
    """HYDRA's row of a report."""
    row: dict[str, Any] = next(row for row in report["methods"] if row["method"] == HYDRA)
    return row


def users(row: dict[str, Any]) -> int:
    """How many users a row's comparison is of."""
    return int(next(iter(row["against"]["metrics"].values()))["users"])


def overall(found: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """The means over the data sets by method, and each method's group."""
    means = json.loads((RESULTS / "overall.json").read_text(encoding="utf-8"))
    groups = {row["method"]: row["group"] for own in found.values() for row in own["methods"]}
    return means, groups


def of_set(name: str, report: dict[str, Any]) -> Shown:
    """One data set's methods."""
    rows = [row for row in report["methods"] if row["queries"]]
    metric = next(iter(rows[0]["metrics"]))
    shown = [
        {
            "method": row["method"],
            "group": row["group"],
            "share": percent(row[SHARE]) if row[SHARE] else None,
            "score": [round(value, 3) for value in row["metrics"][metric] if value is not None],
            "calls": round(row["calls"], 2),
            "tokens": round(row["tokens"]),
        }
        for row in rows
    ]
    own = hydra(report)
    note = f"{own['queries']} queries of {users(own)} users, by cross-validation over users"
    title = finding(own[SHARE], f"on {SETS[name]}")
    return Shown(SETS[name], title, note, TITLES[metric], shown)


def of_all(found: dict[str, dict[str, Any]]) -> Shown:
    """The mean over the data sets of the methods that all of them have."""
    means, groups = overall(found)
    rows = [
        {"method": method, "group": groups[method], "share": percent(own["without BLEU"])}
        for method, own in means.items()
    ]
    where = f"in the mean of {len(found)} data sets"
    title = finding(means[HYDRA]["without BLEU"], where)
    return Shown(where[7:], title, "The methods that all of them have", "", rows)


def shown() -> list[Shown]:
    """All that can be chosen, the mean first."""
    found = reports()
    return [of_all(found), *(of_set(name, own) for name, own in found.items())]


def figure() -> str:
    """The plots' place on the page, with their data; without JavaScript it says so."""
    data = json.dumps([own._asdict() for own in shown()], separators=(",", ":"))
    said = html.escape("The plots need JavaScript; the tables below have the same figures.")
    data = data.replace("<", "\\u003c")
    return (
        f'<figure class="plots" markdown="0"><noscript>{said}</noscript>'
        f'<script type="application/json">{data}</script></figure>'
    )


def insert(markdown: str) -> str:
    """The results page with the plots in their place."""
    if markdown.count(MARKER) != 1:
        raise ValueError(f"docs/results.md must have {MARKER} once")
    return markdown.replace(MARKER, figure())
