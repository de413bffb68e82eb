"""The plots of the results page show the committed figures, at desktop and phone width.

The browser's tests need Chromium and playwright.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import site_plots
from view_page import browser

from tests.waiting import FOREVER

DOCS = Path(__file__).parents[1] / "docs"
DATA = json.loads(
    re.sub(r"^.*?<script[^>]*>(.*?)</script>.*$", r"\1", site_plots.figure(), flags=re.S)
)


def test_every_data_set_has_its_figures_and_a_finding() -> None:
    assert [own["name"] for own in DATA[1:]] == list(site_plots.SETS.values())
    assert DATA[0]["name"] == f"mean of {len(site_plots.SETS)} data sets"
    overall = json.loads((site_plots.RESULTS / "overall.json").read_text(encoding="utf-8"))
    for row in DATA[0]["rows"]:
        assert row["share"] == site_plots.percent(overall[row["method"]]["without BLEU"])
    for own, report in zip(DATA[1:], site_plots.reports().values(), strict=True):
        assert len(own["rows"]) == len(report["methods"])
        share = site_plots.hydra(report)[site_plots.SHARE]
        separated = share[1] > 0 or share[2] < 0
        assert (" is not separated from " in own["finding"]) == (not separated)


def test_a_finding_says_what_the_interval_says() -> None:
    for share, says in (
        ([0.1, 0.02, 0.2], "beats the best prompt here: +10.0 % [+2.0, +20.0]"),
        ([0.1, -0.02, 0.2], "is not separated from the best prompt here"),
        ([-0.1, -0.2, -0.02], "is worse than the best prompt here"),
    ):
        assert f"hydra@4,8 {says}" in site_plots.finding(share, "here")


def test_the_results_page_has_a_place_for_them() -> None:
    page = site_plots.insert((DOCS / "results.md").read_text(encoding="utf-8"))
    assert site_plots.figure() in page
    with pytest.raises(ValueError, match="once"):
        site_plots.insert(page)


@pytest.fixture(scope="module")
def opened() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if (program := browser()) is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as runner:
        started = runner.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1000, 390, 360])
def test_plots_in_the_browser(opened: Any, tmp_path: Path, width: int) -> None:
    """Every row is drawn, the best first; nothing leaves the page, no label covers another."""
    style, script = ((DOCS / "assets" / name).as_uri() for name in ("site.css", "plots.js"))
    page_file = tmp_path / "page.html"
    page_file.write_text(
        f'<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="{style}">'
        f'<body class="md-typeset" style="margin:8px">{site_plots.figure()}'
        f'<script src="{script}"></script>',
        encoding="utf-8",
    )
    page = opened.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(1000 * FOREVER)
    page.goto(page_file.as_uri())
    for place, own in enumerate(DATA):
        page.select_option(".choices select", str(place))
        assert page.inner_text(".finding >> nth=0") == own["finding"]
        forest, *others = page.query_selector_all("figure svg")
        rows = sorted(
            (row for row in own["rows"] if row["share"]), key=lambda row: -row["share"][0]
        )
        shown = [title.inner_html() for title in forest.query_selector_all(".row title")]
        assert [title.split(":")[0] for title in shown] == [row["method"] for row in rows]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(FAULTS) == [], own["name"]
        if own["metric"]:
            assert len(others[0].query_selector_all(".row circle")) == len(own["rows"])
            labels = others[0].query_selector_all(".row text")
            assert "hydra@4,8" in [label.inner_html() for label in labels], own["name"]
    page.close()


FAULTS = """() => [...document.querySelectorAll('figure svg')].flatMap((svg) => {
  const frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')];
  const boxes = texts.map((text) => text.getBoundingClientRect());
  const meet = (a, b) =>
    a.left < b.right && b.left < a.right && a.top + 3 < b.bottom - 3 && b.top + 3 < a.bottom - 3;
  return boxes.flatMap((a, i) => [
    ...(a.left < frame.left - 1 || a.right > frame.right + 1
      || a.top < frame.top - 3 || a.bottom > frame.bottom + 3
      ? [texts[i].textContent + ' is cut'] : []),
    ...boxes.flatMap((b, j) => j > i && meet(a, b)
      ? [texts[i].textContent + ' over ' + texts[j].textContent] : []),
  ]);
})"""
"""Texts that leave their plot, and texts that cover others."""
