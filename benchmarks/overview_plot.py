"""Draw the README's figure from `results/overall.json`: each method compared with the best prompt.

    python benchmarks/overview_plot.py [--out docs/images/overview.svg]

A point is the mean relative improvement over the best prompt of each metric, over the data sets
that have a run by folds; the bar is its 95 % interval over users. Needs the extra `report`.
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
MEASURE = "without BLEU"


def chart() -> alt.LayerChart | alt.FacetChart:
    """The figure, as an altair chart."""
    overall = json.loads((ROOT / "benchmarks/results/overall.json").read_text(encoding="utf-8"))
    rows = []
    for method, name in METHODS.items():
        if method not in overall:
            continue
        mean, low, high = (100 * share for share in overall[method][MEASURE])
        rows.append({"method": name, "mean": mean, "low": low, "high": high})
    base = alt.Chart(alt.InlineData(rows)).encode(
        y=alt.Y("method:N", sort=None, title=None, axis=alt.Axis(labelLimit=260, ticks=False)),
        color=alt.condition("datum.method[0] == 'H'", alt.value("#D55E00"), alt.value("#555555")),
    )
    title = "improvement over the best prompt, % (95 % interval over users)"
    bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=title), x2="high:Q")
    points = base.mark_point(filled=True, size=80).encode(x="mean:Q")
    zero = alt.Chart(alt.InlineData([{"x": 0}])).mark_rule(strokeDash=[4, 4], color="#999999")
    layers = alt.layer(zero.encode(x="x:Q"), bars, points)
    return layers.properties(width=420, height=190, background="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/overview.svg")
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(vl_convert.vegalite_to_svg(chart().to_json()), encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
