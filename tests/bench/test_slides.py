"""Slides show the tables' figures, titles say what the intervals say, and SVG has its font."""

import base64
import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from hydra_llm.bench.report import slides, tables
from hydra_llm.bench.runlog import RunLog, Sample
from hydra_llm.cli.main import run
from hydra_llm.tasks.base import Task

STARS = Task("stars", "rating", "How many stars? {input}", ("1", "2", "3", "4", "5"))
CALLS = {"user-majority": 0, "hydra@4,8": 8, "hydra@1,8": 8}
USERS = 12


def opened(
    folder: Path, answers: Mapping[str, str], users: int = USERS, data: str = "d"
) -> tables.Run:
    """A run in which each user has one query, of gold 3; method → answers, repeated over users."""
    llm, settings = {"model": "models/m.gguf"}, {"k": 4, "samples": 8}
    manifest = {
        "data": data,
        "task": replace(STARS, name=data).to_json(),
        "llm": llm,
        "settings": settings,
    }
    log = RunLog(folder, manifest)
    for place in range(users):
        for method, given in answers.items():
            answer = given[place % len(given)]
            calls = CALLS.get(method, 1)
            log.add(Sample(method, f"u{place}", "q", "3", answer, calls=calls, tokens=50 * calls))
    return tables.open_run(folder)


def title(run: tables.Run, baseline: str = "rag@4") -> str:
    plot = slides.difference_slide(tables.make_report(run, baseline), "mae")
    assert plot is not None
    return " ".join(plot.to_dict()["title"]["text"])


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"rag@4": "55", "hydra@4,8": "34"}, "is better than rag@4 in MAE: −1.500 [−1."),
        ({"rag@4": "33", "hydra@4,8": "45"}, "is worse than rag@4 in MAE: +1.500 [+1."),
        ({"rag@4": "34", "hydra@4,8": "43"}, "is not separated from rag@4 in MAE: +0.000 [−"),
    ],
)
def test_title_says_what_the_interval_says(
    tmp_path: Path, answers: Mapping[str, str], said: str
) -> None:
    assert title(opened(tmp_path / "run", answers)).startswith(f"hydra@4,8 {said}")


def test_title_is_of_the_settings_variant_not_of_the_best(tmp_path: Path) -> None:
    answers = {"rag@4": "5", "hydra@1,8": "3", "hydra@4,8": "4"}
    assert title(opened(tmp_path / "run", answers)).startswith("hydra@4,8 is better")


def test_title_without_hydra_counts_methods(tmp_path: Path) -> None:
    answers = {"rag@4": "4", "rag@1": "3", "zero-shot": "5"}
    assert title(opened(tmp_path / "run", answers)) == "1 of 2 methods are better than rag@4 in MAE"


def test_few_users_have_no_finding(tmp_path: Path) -> None:
    run = opened(tmp_path / "run", {"rag@4": "5", "hydra@4,8": "3"}, users=3)
    few = "the run has 3 of the 5 users that are needed for intervals"
    assert title(run) == f"No finding in MAE: {few}"


def test_forest_has_the_figures_of_the_table_the_best_first(tmp_path: Path) -> None:
    answers = {"rag@4": "44", "hydra@4,8": "34", "zero-shot": "55", "oracle": "33"}
    report = tables.make_report(opened(tmp_path / "run", answers), "rag@4")
    plot = slides.difference_slide(report, "mae")
    assert plot is not None
    tables_of_plot = plot.to_dict()["datasets"].values()
    (rows,) = [rows for rows in tables_of_plot if "labels" in rows[0]]
    assert [row["method"] for row in rows] == ["oracle", "hydra@4,8", "zero-shot"]
    for row in rows:
        change = report.comparisons[row["method"]].metrics["mae"]
        assert (row["value"], row["low"], row["high"]) == change[:3]
    assert rows[1]["labels"].split("\n") == [
        "hydra@4,8",
        "{} [{}, {}]".format(
            *map(slides.signed, report.comparisons["hydra@4,8"].metrics["mae"][:3])
        ),
    ]


def test_cost_title_names_the_best_and_the_best_cheaper_one(tmp_path: Path) -> None:
    answers = {"rag@4": "4", "hydra@4,8": "34", "user-majority": "5", "oracle": "3"}
    report = tables.make_report(opened(tmp_path / "run", answers))
    headline, note = slides.cost_title(report, "calls")
    assert headline == "hydra@4,8 has the best MAE, 0.500, at 8 LLM calls a query"
    assert note == "The best cheaper one is rag@4: 1.000 at 1. Bounds are not counted."


@pytest.mark.slow
def test_files_are_svg_with_the_font_and_png_of_a_slide(tmp_path: Path) -> None:
    opened(tmp_path / "run", {"rag@4": "44", "hydra@4,8": "34"})
    folder = tmp_path / "slides"
    assert run(["bench", "show", str(tmp_path / "run"), "--slides", str(folder)]) == 0
    names = {"difference-mae", "difference-rmse", "cost-calls", "cost-tokens"}
    assert {file.name for file in folder.iterdir()} == {
        f"{name}{end}" for name in names for end in (".svg", ".png")
    }
    text = (folder / "difference-mae.svg").read_text(encoding="utf-8")
    fonts = re.findall(r"url\(data:font/ttf;base64,([^)]+)\)", text)
    assert [base64.b64decode(font)[:4] for font in fonts] == [b"\0\1\0\0"] * 2
    assert set(re.findall(r'font-family="([^"]+)"', text)) == {"Inter"}
    assert not re.search(r"(?:href|src)=|url\((?!data:)|https?://(?!www\.w3\.org/)", text)
    for name, margin in (("difference-mae", 0), ("cost-calls", 60)):
        header = (folder / f"{name}.png").read_bytes()[16:24]
        for actual, meant in zip(struct.unpack(">II", header), (2560, 1440), strict=True):
            assert abs(actual - meant) <= margin


@pytest.mark.slow
def test_several_data_sets_have_a_slide_together(tmp_path: Path) -> None:
    answers = {"rag@4": "44", "hydra@4,8": "34"}
    runs = [opened(tmp_path / name, answers, data=name) for name in "ab"]
    files = slides.write([tables.make_report(run) for run in runs], tmp_path / "slides")
    names = {file.relative_to(tmp_path / "slides").as_posix() for file in files}
    assert {"1-a/difference-mae.png", "2-b/cost-calls.svg", "overall.svg"} <= names
    text = (tmp_path / "slides/overall.svg").read_text(encoding="utf-8")
    assert "hydra@4,8 is better than the best prompts: +" in text
    shown = re.findall(r"<text[^>]*>((?:hydra|rag|on )[^<]*)</text>", text)
    assert [name for name in shown if "prompts" not in name] == [
        "hydra@4,8",
        "on a",
        "on b",
        "rag@4",
    ]


def test_a_file_in_the_way_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened(tmp_path / "run", {"rag@4": "44", "hydra@4,8": "34"})
    (tmp_path / "file").write_text("")
    assert run(["bench", "show", str(tmp_path / "run"), "--slides", str(tmp_path / "file")]) == 2
    assert "name a folder for the slides" in capsys.readouterr().err


@pytest.mark.parametrize("users", [1, 2, 4])
def test_of_few_users_no_slide_has_a_finding(tmp_path: Path, users: int) -> None:
    run = opened(tmp_path / "run", {"rag@4": "5", "hydra@4,8": "3"}, users=users)
    drawn = slides.slides(tables.make_report(run, "rag@4"))
    assert "difference-mae" in drawn
    assert "cost-calls" in drawn
    for plot in drawn.values():
        heading = plot.to_dict()["title"]
        assert "finding" in " ".join(heading["text"]).lower()
        below = " ".join(heading["subtitle"])
        assert f"Nothing can be said about differences: {users} answered" in below
        assert "95 %" not in below


def test_equal_methods_are_not_separated_and_have_no_minus_zero(tmp_path: Path) -> None:
    answers = {"rag@4": "45", "hydra@4,8": "45", "zero-shot": "45"}
    run_, folder = opened(tmp_path / "run", answers), tmp_path / "talk"
    report = tables.make_report(run_, "rag@4")
    assert title(run_) == "hydra@4,8 is not separated from rag@4 in MAE: +0.000 [+0.000, +0.000]"
    assert all(file.stat().st_size > 1000 for file in slides.write([report], folder))
    assert slides.signed(-0.0001) == "+0.000"
    assert slides.signed(-0.001) == "−0.001"


def test_names_of_any_length_leave_room_for_the_figure(tmp_path: Path) -> None:
    long = "plug-in-" + "x" * 3000
    run_ = opened(tmp_path / "run", {"rag@4": "5", "hydra@4,8": "3", long: "4"})
    for base in ("rag@4", long):
        report = tables.make_report(run_, base)
        for plot in slides.slides(report).values():
            heading = plot.to_dict()["title"]
            assert len(heading["text"]) <= 3
            assert len(heading["subtitle"]) <= 4
        files = slides.write([report], tmp_path / "talk")
        assert all(file.stat().st_size > 1000 for file in files)


def test_a_run_without_anything_to_draw_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(tmp_path / "run", {"user-majority": "3"})
    talk = str(tmp_path / "talk")
    assert run(["bench", "show", str(tmp_path / "run"), "--slides", talk]) == 0
    assert "no slide: " in capsys.readouterr().err
