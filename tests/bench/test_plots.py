"""Plots show the figures of the tables; labels do not overlap; SVG is self-contained."""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.bench.report import plots
from hydra_llm.bench.report import tables as report
from hydra_llm.bench.results import changes_by_user, pair
from hydra_llm.bench.runlog import RunLog, Sample
from hydra_llm.cli.main import run
from hydra_llm.tasks.base import Task

STARS = Task("stars", "rating", "How many stars? {input}", ("1", "2", "3", "4", "5"))
MANIFEST = {"data": "d", "task": STARS.to_json(), "llm": {"model": "m"}, "users": 4, "queries": 8}
ANSWERS = {
    "rag@1": "4444",
    "rag@4": "5555",
    "hydra@4,8": "3345",
    "user-majority": "5555",
    "oracle": "3333",
}
"""Method → the answer that each of four users gets to both queries, whose gold answer is 3."""


@pytest.fixture
def opened(tmp_path: Path) -> report.Run:
    log = RunLog(tmp_path / "run", MANIFEST)
    for place in range(4):
        for query in "ab":
            for method, answers in ANSWERS.items():
                calls = {"user-majority": 0, "hydra@4,8": 8}.get(method, 1)
                log.add(
                    Sample(
                        method,
                        f"u{place}",
                        query,
                        "3",
                        answers[place],
                        calls=calls,
                        tokens=100 * calls,
                    )
                )
    return report.open_run(tmp_path / "run")


def drawn(plot: Any, *columns: str) -> list[tuple[Any, ...]]:
    """These columns of the plot's data, row by row."""
    actual: list[Any] = []

    def walk(part: Any) -> None:
        for value in (
            part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        ):
            walk(value)
        if isinstance(part, dict) and set(columns) <= set(part):
            actual.append(part)

    walk(plot.to_dict())
    return list(dict.fromkeys(tuple(row.get(column) for column in columns) for row in actual))


def test_there_is_a_plot_per_metric_per_cost_and_of_users(opened: report.Run) -> None:
    assert list(plots.plots(report.make_report(opened))) == [
        "score-mae",
        "score-rmse",
        "cost-calls",
        "cost-tokens",
        "users",
    ]
    timed = replace(
        opened,
        samples=tuple(replace(sample, tokens=0, llm_seconds=1.0) for sample in opened.samples),
    )
    assert "cost-llm_seconds" in plots.plots(report.make_report(timed))
    free = replace(
        opened, samples=tuple(replace(sample, tokens=0, calls=0) for sample in opened.samples)
    )
    assert list(plots.plots(report.make_report(free))) == ["score-mae", "score-rmse", "users"]


@pytest.mark.slow
def test_score_plot_has_intervals_and_marks_failures(
    opened: report.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = drawn(plots.score_plot(report.make_report(opened), "mae"), "method", "low", "high")
    assert ("hydra@4,8", None, None) in few  # four users have no interval
    monkeypatch.setattr("hydra_llm.bench.stats.MIN_USERS", 4)
    shown = report.make_report(opened)
    row = next(line.result for line in shown.rows if line.method == "hydra@4,8")
    actual = drawn(plots.score_plot(shown, "mae"), "method", "part", "value", "low", "high")
    assert ("hydra@4,8", "HYDRA", *row.metrics["mae"]) in actual
    assert row.metrics["mae"][0] == 0.75
    failed = replace(
        opened,
        samples=tuple(
            replace(s, answer=None, error="HTTP 500") if s.method == "rag@4" else s
            for s in opened.samples
        ),
    )
    plot = plots.score_plot(report.make_report(failed), "mae")
    assert ("rag@4", "prompts", None, None, None) in drawn(
        plot, "method", "part", "value", "low", "high"
    )
    assert plots.svg(plot).count(">failed<") == 1
    assert "MAE (less is better)" in plots.svg(plot)


def test_every_group_has_a_look_of_its_own() -> None:
    assert set(plots.LOOKS) == set(report.GROUPS)
    for looks in zip(*plots.LOOKS.values(), strict=True):
        assert len(set(looks)) == len(plots.LOOKS)


def test_cost_plot_shows_cost_and_score(opened: report.Run) -> None:
    actual = report.make_report(opened)
    plot = plots.cost_plot(actual, "calls")
    assert sorted(drawn(plot, "method", "cost", "value")) == [
        ("hydra@4,8", 8.0, 0.75),
        ("oracle", 1.0, 0.0),
        ("rag@1", 1.0, 1.0),
        ("rag@4", 1.0, 2.0),
        ("user-majority", 0.0, 2.0),
    ]


@given(st.lists(st.tuples(st.floats(0, 460), st.floats(0, 340), st.floats(20, 110)), max_size=25))
def test_labels_cover_no_other_label_and_stay_in_the_plot(
    cases: Sequence[tuple[float, float, float]],
) -> None:
    labels = plots.label_places([(x, y) for x, y, _ in cases], [width for *_, width in cases])
    boxes = [label.box for label in labels]
    for left, top, right, bottom in boxes:
        assert left >= 0 and top >= 0 and right <= 460 and bottom <= 340  # noqa: PT018
    for place, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[:place]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
    for label, (x, y, _) in zip(labels, cases, strict=True):
        assert label.moved or label.y == y
        assert abs(label.x - x) == pytest.approx(9)


def test_users_are_counted_as_in_the_table_of_differences(opened: report.Run) -> None:
    shown = report.make_report(opened)
    plot = plots.users_plot(shown)
    bars = drawn(plot, "panel", "place", "difference", "sign")
    for method, actual in shown.comparisons.items():
        counts = f"{actual.wins} better, {actual.ties} same, {actual.losses} worse"
        own = [change for panel, _, change, _ in bars if panel == f"{method}|{counts}"]
        signs = [sum(sign(value) == wanted for value in own) for wanted in (1, 0, -1)]
        assert signs == [actual.wins, actual.ties, actual.losses]
        assert len(own) == 4
    panel = "hydra@4,8|2 better, 1 same, 1 worse"
    assert [bar for bar in bars if bar[0] == panel] == [
        (panel, 0, 0.25, "better"),
        (panel, 1, 0.25, "better"),
        (panel, 2, 0.0, "worse"),
        (panel, 3, -0.25, "worse"),
    ]


def sign(value: float) -> int:
    return (value > 0) - (value < 0)


def test_changes_of_a_user_average_seeds_and_leave_out_failures() -> None:
    def of(answers: Mapping[tuple[str, str], Sequence[str]]) -> list[Sample]:
        return [
            Sample("hydra", user, query, "3", answer, seed=seed)
            for (user, query), given in answers.items()
            for seed, answer in enumerate(given)
        ]

    base = of({("u0", "a"): "4", ("u0", "c"): "1", ("u2", "a"): "3", ("u9", "a"): "3"})
    own = of({("u0", "a"): "345", ("u0", "b"): "3", ("u1", "a"): "1"})
    own.append(Sample("hydra", "u9", "a", "3", None, "HTTP 500"))
    # gains of 1, .75 and .5 against .75, on the one query that both answered
    assert changes_by_user(STARS, pair(own, base)) == {"u0": 0.0}
    assert changes_by_user(STARS, pair(of({("u0", "a"): "33"}), base)) == {"u0": 0.25}
    thirds = Task("thirds", "rating", "{input}", ("0", "1", "2", "3"))
    own, base = of({("u0", "a"): "1", ("u0", "b"): "1"}), of({("u0", "a"): "2", ("u0", "b"): "0"})
    assert changes_by_user(thirds, pair(own, base)) == {"u0": 0.0}  # rounding is no difference


def test_many_users_are_thinned_and_their_ends_stay(
    opened: report.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    actual = report.make_report(opened)
    panel = "hydra@4,8|2 better, 1 same, 1 worse"

    def changes() -> list[float]:
        bars = drawn(plots.users_plot(actual), "panel", "place", "difference")
        return [change for name, _, change in bars if name == panel]

    every = changes()
    monkeypatch.setattr(plots, "BARS", 3)
    thin = changes()
    assert (len(every), len(thin), thin[0], thin[-1]) == (4, 3, every[0], every[-1])
    assert thin == sorted(thin, reverse=True)


def test_a_curve_has_a_line_per_method_and_skips_nan() -> None:
    points = [
        plots.Point("hydra", 0, 0.4, 0.3, 0.5),
        plots.Point("hydra", 20, 0.6),
        plots.Point("rag", 0, math.nan),
        plots.Point("rag", 20, 0.5),
    ]
    plot = plots.curve(points, "records", "accuracy", "cold start", log=True)
    assert drawn(plot, "method", "x", "value", "low") == [
        ("hydra", 0, 0.4, 0.3),
        ("hydra", 20, 0.6, None),
        ("rag", 20, 0.5, None),
    ]
    text = plots.svg(plot)
    assert all(
        f">{word}<" in text
        for word in ("hydra", "rag", "records", "accuracy", "cold start", "0", "20")
    )
    assert "NaN" not in text
    named = plots.svg(
        plots.curve(
            [
                plots.Point("hydra", 5, 0.4),
                plots.Point("hydra", 10, 0.4),
                plots.Point("hydra", "all", 0.5),
            ],
            "records",
            "f",
        )
    )
    ticks = re.findall(r">(5|10|all)<", named)
    assert ticks == ["5", "10", "all"]  # in their own order, not the alphabet's


def test_svg_is_valid_deterministic_and_self_contained(opened: report.Run) -> None:
    shown = report.make_report(opened)
    for plot in plots.plots(shown).values():
        text = plots.svg(plot)
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert {
            value
            for element in root.iter()
            for name, value in element.attrib.items()
            if name.endswith("href")
        } == set()
        assert not re.search(
            r"<(script|image|style)|\bid=|url\(", text
        )  # several stand in one page: no names to clash
        assert plots.svg(plot) == text
    assert plots.svg(plots.plots(shown)["users"]).count("u0") == 0  # no user is named


@pytest.mark.slow
def test_plots_of_several_runs_have_separate_folders(opened: report.Run, tmp_path: Path) -> None:
    assert run(["bench", "show", str(opened.folder), "--plots", str(tmp_path / "one")]) == 0
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == [
        "cost-calls.svg",
        "cost-tokens.svg",
        "score-mae.svg",
        "score-rmse.svg",
        "users.svg",
    ]
    assert (
        run(
            [
                "bench",
                "show",
                str(opened.folder),
                str(opened.folder),
                "--plots",
                str(tmp_path / "two"),
            ]
        )
        == 0
    )
    assert sorted(folder.name for folder in (tmp_path / "two").iterdir()) == ["1-run", "2-run"]


@pytest.mark.parametrize("missing", ["altair", "vl_convert", "jinja2"])
def test_without_the_extra_it_says_how_to_install_it(
    opened: report.Run,
    tmp_path: Path,
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    for option in ("--html", "--plots"):
        assert run(["bench", "show", str(opened.folder), option, str(tmp_path / "out")]) == 2
        lack = f"a report needs the extra 'report' ({missing} is not installed)"
        fix = "pip install 'hydra-llm[report]'"
        assert capsys.readouterr().err == f"hydra-llm: {lack}: {fix}\n"
        assert not (tmp_path / "out").exists()
    assert run(["bench", "show", str(opened.folder)]) == 0
