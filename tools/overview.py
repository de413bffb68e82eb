"""Draw the README's picture from the committed results, as `bench show --slides` draws `overall`:
docs/images/overview.svg; `--png FILE` too. `--check` exits with 1 if its figures are others.

Needs the extra `report`.
"""

import argparse
import re
import sys
from html import unescape
from pathlib import Path

import site_plots
import vl_convert

from hydra_llm.bench.report import slides
from hydra_llm.bench.report.plots import Plot, svg

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "images" / "overview.svg"
WHAT, SHARE = "without BLEU", site_plots.SHARE


def picture() -> Plot:
    """The slide of all data sets that have a run by folds."""
    found = site_plots.reports()
    overall, groups = site_plots.overall(found)
    effects = [
        slides.percent(method, groups[method], *own[WHAT]) for method, own in overall.items()
    ]
    own = next(effect for effect in effects if effect.method == site_plots.HYDRA)
    each = [
        slides.percent(f"on {site_plots.SETS[name]}", own.group, *site_plots.hydra(report)[SHARE])
        for name, report in found.items()
    ]
    rows = [site_plots.hydra(report) for report in found.values()]
    queries = sum(row["queries"] for row in rows)
    users = sum(site_plots.users(row) for row in rows)
    note = f"{len(found)} data sets, {queries:,} queries of {users} users; a 1.5B LLM"
    return slides.means_slide(effects, own, each, (WHAT, note))


def words(text: str) -> list[str]:
    """All that an SVG says."""
    return [unescape(found) for found in re.findall(r"<text[^>]*>([^<]*)</text>", text)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    parser.add_argument("--png", type=Path)
    given = parser.parse_args()
    vl_convert.register_font_directory(str(slides.FONTS))
    drawn = svg(picture())
    if given.check:
        if words(drawn) != words(TARGET.read_text(encoding="utf-8")):
            sys.exit(f"{TARGET.name} differs from benchmarks/results: run `make docs`")
        return
    TARGET.write_text(slides.with_font(drawn), encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")
    if given.png:
        given.png.write_bytes(vl_convert.svg_to_png(drawn, scale=2))


if __name__ == "__main__":
    main()
