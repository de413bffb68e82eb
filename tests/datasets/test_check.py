"""`data check`: its figures against a data set small enough to count by hand, and all problems of a
broken one.
"""

import json
from pathlib import Path

import pytest

from hydra_llm.cli.main import run
from hydra_llm.datasets.check import find_problems, summarize
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import save
from hydra_llm.tasks.base import Task
from hydra_llm.types import Query, Record

CHOICE = Task("choice", "classification", "Which? {input}", ("yes", "no"), ("accuracy",))


def by_hand() -> DataSet:
    records = [
        Record("a", "1", "one two three", "yes", "2020"),
        Record("a", "2", "one", "yes", "2021-05-01"),
        Record("a", "3", "one", "yes", "2021-05-02"),
        Record("b", "1", "one", "no"),
    ]
    queries = [
        Query("a", "3", "one", "no", "2022"),
        Query("a", "4", "new", "yes", "2020-06"),
        Query("b", "9", "five words are in here", "no", "2023"),
    ]
    return DataSet.from_records(CHOICE, {"a": "train", "b": "test", "c": "test"}, records, queries)


def test_the_figures_are_those_counted_by_hand() -> None:
    summary = summarize(by_hand())
    assert summary["users"] == {"train": 1, "test": 2}
    assert (summary["records"], summary["queries"]) == (4, 3)
    assert summary["time"] == {"first": "2020", "last": "2023", "unknown": 1}
    assert summary["records per user"] == {"min": 0, "median": 1, "max": 3}
    assert (summary["users without history"], summary["users without queries"]) == (1, 1)
    assert summary["words per input"] == {
        "history": {"min": 1, "median": 1, "max": 3},
        "queries": {"min": 1, "median": 1, "max": 5},
    }
    assert summary["labels"] == {
        "yes": {"history": 0.75, "queries": 1 / 3},
        "no": {"history": 0.25, "queries": 2 / 3},
    }
    assert summary["duplicates"] == {"count": 1, "examples": ["a/3"]}
    assert {way: leak["examples"] for way, leak in summary["leaks"].items()} == {
        "query's text stands in its user's history": ["a/3"],
        "query's id stands in its user's history": ["a/3"],
        "query does not come after all of its history": ["a/4"],
        "gold text stands in another user's history": [],
    }


def test_a_gold_text_of_another_user_is_a_leak() -> None:
    task = Task("t", "generation", "Title: {input}")
    records = [Record("a", "1", "x", "Mine"), Record("b", "1", "x", "Theirs")]
    queries = [Query("a", "2", "y", "Mine"), Query("a", "3", "z", "Theirs")]
    summary = summarize(DataSet.from_records(task, {"a": "train", "b": "train"}, records, queries))
    assert summary["leaks"]["gold text stands in another user's history"] == {
        "count": 1,
        "examples": ["a/3"],
    }


def test_all_problems_up_to_twenty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(by_hand(), tmp_path / "data")
    history = tmp_path / "data" / "history.jsonl"
    (tmp_path / "data" / "history.jsonl.gz").unlink()
    line = {"user": "a", "id": "x", "time": "soon", "input": "", "output": "maybe"}
    history.write_text(
        json.dumps(line) + "\n{\n" + json.dumps({**line, "id": "y", "user": "z"}) + "\n",
        encoding="utf-8",
    )
    assert run(["data", "check", str(tmp_path / "data"), "--json"]) == 2
    captured = capsys.readouterr()
    problems = json.loads(captured.out)["problems"]
    expected = [
        (1, "input"),
        (1, "time"),
        (1, "output"),
        (2, None),
        (3, "input"),
        (3, "user"),
        (3, "time"),
        (3, "output"),
    ]
    assert [(problem["line"], problem["field"]) for problem in problems] == expected
    assert {problem["file"] for problem in problems} == {str(history)}
    assert captured.err.count("\n") == len(expected)
    history.write_text("{\n" * 100, encoding="utf-8")
    assert len(find_problems(tmp_path / "data")[1]) == 20


def test_the_command_prints_the_same_to_people_and_to_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(by_hand(), tmp_path / "data")
    assert run(["data", "check", str(tmp_path / "data"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == summarize(by_hand())
    assert run(["data", "check", str(tmp_path / "data")]) == 0
    text = capsys.readouterr().out
    for cell in (
        "1 train, 2 test",
        "2020 to 2023, 1 unknown",
        "0 to 3, median 1",
        "75.0% of history, 33.3% of queries",
        "1 (a/3)",
    ):
        assert cell in text


def test_a_data_set_without_a_single_entry_can_be_looked_at() -> None:
    summary = summarize(DataSet.from_records(CHOICE, {}, [], []))
    assert summary["records per user"] is None
    assert summary["time"] == {"first": None, "last": None, "unknown": 0}
