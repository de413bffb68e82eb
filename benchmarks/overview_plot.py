"""Draw the README's figure: HYDRA by data set, and each method in the mean over the data sets.

    python benchmarks/overview_plot.py [--out docs/images/overview.svg]

A point is the relative improvement over the best prompt, chosen on training users, in the mean of
the set's metrics; the bar is its 95 % interval over users. The sets are those that have a run by
folds (`results/*/report.json`), their means are in `results/overall.json`. Needs the extra
`report`.
"""

import argparse
import json
from pathlib import Path

import altair as alt
import vl_convert

ROOT = Path(__file__).parents[1]
METHODS = {
    "hydra@4,8": "HYDRA (4 records, 8 samples)",
    "hydra-shared@4,8": "baseline: shared heads",
    "mbr@8": "minimum Bayes risk",
    "self-consistency@8": "self-consistency",
    "rag@4": "RAG, 4 records",
    "bbox-adapter@8": "BBox-Adapter",
    "user-majority": "the user's typical answer, no LLM",
    "zero-shot": "the LLM alone",
}
"""Method → its name in the figure, in the order of the rows."""
HYDRA_NAME = METHODS["hydra@4,8"]
HONEST = "best prompt (chosen on training users)"
VARIANTS = (
    "_strict",
    "_one_call",
    "_part",
)  # end the names of runs that stand beside another of the same set
SETS = {
    "opinion": "opinions (agree or disagree)",
    "movie_rating": "movie ratings (1 to 5)",
    "news_headline": "headlines",
    "paper_title": "paper titles",
    "news_category": "news categories",
}
"""Data set → its name in the figure."""
RESULTS = ROOT / "benchmarks" / "results"
COLOUR, GREY = "#D55E00", "#555555"


def by_set() -> dict[str, list[float]]:
    """HYDRA's mean, low and high of each data set with a run by folds, the largest gain first."""
    found = {}
    for file in RESULTS.glob("*/report.json"):
        rows = {row["method"]: row for row in json.loads(file.read_text("utf-8"))["methods"]}
        if HONEST in rows and not file.parent.name.endswith(VARIANTS):
            name = SETS[file.parent.name.rpartition("_")[0]]
            found[name] = rows["hydra@4,8"]["over_prompts_without_bleu"]
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def by_method() -> dict[str, list[float]]:
    """Each method's mean, low and high over the data sets."""
    overall = json.loads((RESULTS / "overall.json").read_text("utf-8"))
    return {
        name: overall[method]["without BLEU"]
        for method, name in METHODS.items()
        if method in overall
    }


def panel(title: str, shares: dict[str, list[float]], axis: str | None) -> alt.LayerChart:
    """One row a name: a point and its interval, in percent."""
    rows = [
        {"name": name, "mean": 100 * mean, "low": 100 * low, "high": 100 * high}
        for name, (mean, low, high) in shares.items()
    ]
    hydra = alt.condition("datum.name[0] == 'H'", alt.value(COLOUR), alt.value(GREY))
    names = alt.Y("name:N", sort=None, title=None, axis=alt.Axis(labelLimit=260, ticks=False))
    base = alt.Chart(alt.InlineData(rows)).encode(
        y=names, color=hydra if HYDRA_NAME in shares else alt.value(COLOUR)
    )
    bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=axis), x2="high:Q")
    points = base.mark_point(filled=True, size=80).encode(x="mean:Q")
    zero = alt.Chart(alt.InlineData([{"x": 0}])).mark_rule(strokeDash=[4, 4], color="#999999")
    heading = alt.TitleParams(title, anchor="start", fontSize=12)
    layers = alt.layer(zero.encode(x="x:Q"), bars, points)
    return layers.properties(width=420, height=24 * len(rows), title=heading)


def chart() -> alt.VConcatChart:
    """The figure, as an altair chart."""
    axis = "improvement over the best prompt, % (95 % interval over users)"
    upper = panel("HYDRA by data set", by_set(), None)
    lower = panel("Mean over the data sets", by_method(), axis)
    joined = alt.vconcat(upper, lower).resolve_scale(x="shared")
    return joined.properties(background="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/overview.svg")
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(vl_convert.vegalite_to_svg(chart().to_json()), encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
