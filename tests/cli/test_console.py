"""Output of commands: JSON without NaN, tables that a pipe does not cut, transient progress."""

import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hydra_llm.cli import console
from hydra_llm.types import Answer, Candidate, Proposal, Query, Usage

ANSWER = Answer(
    "גם 🍷",
    Proposal(Query("u", "1", "x"), (), (), (), ()),
    (Candidate("a", None, score=math.nan),),
    0,
)


def test_json_is_one_document_with_null_for_nan(capsys: pytest.CaptureFixture[str]) -> None:
    data = {
        "answer": ANSWER,
        "path": Path("a/b"),
        "nan": math.inf,
        "f32": np.float32(0.5),
        "i64": np.int64(3),
        "set": {2, 1},
    }
    console.emit(data, as_json=True)
    read = json.loads(capsys.readouterr().out)
    assert read["answer"]["text"] == "גם 🍷"
    assert read["answer"]["candidates"][0]["score"] is None
    assert (read["path"], read["nan"], read["f32"], read["i64"], read["set"]) == (
        "a/b",
        None,
        0.5,
        3,
        [1, 2],
    )


def test_without_json_a_mapping_is_lines_and_a_text_is_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console.emit(Usage(calls=3, cost=0.123456))
    assert capsys.readouterr().out.splitlines()[:2] == ["calls: 3", "cached: 0"]
    console.emit("[bold]not markup[/bold]")
    assert capsys.readouterr().out == "[bold]not markup[/bold]\n"


def test_a_piped_table_does_not_cut_columns(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"method": "[x] " + "m" * 150, "mae": 0.5}, {"method": "short", "mae": math.nan}]
    console.emit(rows)
    head, _, first, second = [
        line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()
    ]
    assert head.split() == ["method", "mae"]
    assert first.split() == ["[x]", "m" * 150, "0.5"]
    assert second.split() == ["short"]
    assert first.endswith(" 0.5")


def test_without_a_terminal_progress_is_a_line_in_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(console, "monotonic", lambda: now)
    with console.progress() as report:
        for done in range(31):
            report("pairs", done, 30)
            report("quick", 1, 1)
            now += 1.0
    assert capsys.readouterr().err.splitlines() == [
        "pairs: 10/30, 1/s, 20 s left",
        "pairs: 20/30, 1/s, 10 s left",
        "pairs: 30/30, took 30 s",
    ]


BARS = """
from hydra_llm.cli.console import progress
with progress() as report:
    for done in range(4):
        report("pairs", done, 3)
print("result")
"""


def test_bars_on_a_terminal_go_to_stderr_and_disappear() -> None:
    terminal, child_end = pty.openpty()
    process = subprocess.run(
        [sys.executable, "-c", BARS],
        stdout=subprocess.PIPE,
        stderr=child_end,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(child_end)
    drawn = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert process.stdout == b"result\n"
    assert "pairs" in drawn
    assert drawn.rstrip().endswith("\x1b[2K")  # the bars' line is erased


def test_quiet_progress_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with console.progress(quiet=True) as report:
        report("pairs", 1, 3)
    assert capfd.readouterr() == ("", "")


def test_the_values_of_a_mapping_are_below_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit({"users": 2, "seconds": {"label records": 1.25, "fit reranker": 0.5}})
    lines = ["users: 2", "seconds:", "  label records: 1.25", "  fit reranker: 0.5"]
    assert capsys.readouterr().out.splitlines() == lines
