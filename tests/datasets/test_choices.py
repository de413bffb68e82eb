"""Recorded choices: what is written comes back, each broken line is named by file, line and field,
and a table of choices becomes a data set.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.cli.main import run
from hydra_llm.datasets.check import find_problems, summarize
from hydra_llm.datasets.dataset import DataSet, Split, offered
from hydra_llm.datasets.native import load, save
from hydra_llm.datasets.tabular import CHOICES, read_table
from hydra_llm.datasets.verdicts import verdicts
from hydra_llm.errors import DataError
from hydra_llm.tasks.base import CHOICE_METRICS, Task
from hydra_llm.types import Choice, Query, Record

TASK = {"name": "next", "kind": "generation", "prompt": "Go on: {input}"}


def line(number: int, **changed: Any) -> dict[str, Any]:
    part = "history" if number < 3 else "query"
    candidates = [f"text {number}", "another one", " a third"]
    fields = {"user": "ada", "id": f"c{number}", "part": part, "time": 1600000000 + number}
    return {**fields, "input": "then", "candidates": candidates, "chosen": number % 3, **changed}


def folder_of(folder: Path, lines: list[dict[str, Any]], **task: Any) -> Path:
    (folder / "task.json").write_text(json.dumps({**TASK, **task}))
    (folder / "users.jsonl").write_text('{"user": "ada", "split": "train"}\n')
    text = "".join(json.dumps(own) + "\n" for own in lines)
    (folder / "choices.jsonl").write_text(text)
    return folder


def test_choices_are_records_and_queries(tmp_path: Path) -> None:
    dataset = load(folder_of(tmp_path, [line(number) for number in range(4)]))
    records, queries = dataset.history("ada"), dataset.queries("ada")
    first = records[0]
    assert isinstance(first, Choice)
    assert first.output == first.candidates[first.chosen] == "text 0"
    assert [record.output for record in records] == ["text 0", "another one", " a third"]
    assert queries[0].offered == ("text 3", "another one", " a third")
    assert queries[0].gold == "text 3"
    assert list(dataset.task.metric_specs) == list(CHOICE_METRICS)
    answered = dataset.answered("ada")[-1]
    assert isinstance(answered, Choice)
    assert answered.chosen == 0


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    dataset = load(folder_of(source, [line(number) for number in range(5)]))
    save(dataset, tmp_path / "saved")
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert names == {"task.json", "users.jsonl", "choices.jsonl.gz"}
    again = load(tmp_path / "saved")
    assert again == dataset
    assert list(again.stream_queries()) == list(dataset.stream_queries())


def test_choices_stand_beside_records(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [line(number) for number in range(3)])
    record = {"user": "ada", "id": "r", "time": 1600000001.5, "input": "once", "output": "upon"}
    (folder / "history.jsonl").write_text(json.dumps(record) + "\n")
    query = {**record, "id": "q", "time": 1700000000}
    (folder / "queries.jsonl").write_text(json.dumps(query) + "\n")
    dataset = load(folder)
    assert [record.id for record in dataset.history("ada")] == ["c0", "c1", "r", "c2"]
    assert [bool(offered(own)) for own in dataset.history("ada")] == [True, True, False, True]
    assert next(iter(dataset.task.metric_specs)) == "rouge1"
    assert "mrr" in dataset.task.metric_specs
    save(dataset, tmp_path / "saved")
    assert load(tmp_path / "saved") == dataset


def test_candidates_are_part_of_the_digest(tmp_path: Path) -> None:
    def data(*candidates: str) -> DataSet:
        choice = Choice("ada", "1", "then", "a", candidates=candidates, chosen=0)
        return DataSet.from_records(task, {"ada": "train"}, [choice], [])

    task = load(folder_of(tmp_path, [line(0)])).task
    plain = DataSet.from_records(task, {"ada": "train"}, [Record("ada", "1", "then", "a")], [])
    digests = {data("a", "b").digest, data("a", "c").digest, data("b", "a").digest, plain.digest}
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("changed", "field", "message"),
    [
        (
            {"candidates": ["one"], "chosen": 0},
            "candidates",
            "two candidates or more, this one has",
        ),
        ({"candidates": [], "chosen": 0}, "candidates", "this one has 0"),
        ({"candidates": ["a", "b", " a "]}, "candidates", "candidates 0 and 2 are equal"),
        ({"candidates": ["a", "b", " "]}, "candidates", "candidate 2 is empty"),
        ({"candidates": ["a", 5]}, "candidates", "must be a list of texts"),
        ({"candidates": "a"}, "candidates", "must be a list of texts"),
        ({"chosen": 3}, "chosen", "3 is none of the 3 candidates: 0 to 2"),
        ({"chosen": -1}, "chosen", "-1 is none of the 3 candidates"),
        ({"chosen": "0"}, "chosen", "a whole number from 0, not"),
        ({"chosen": True}, "chosen", "a whole number from 0, not true"),
        ({"part": "queries"}, "part", "'queries' is neither history nor query"),
        ({"user": "bob"}, "user", "'bob' is not among the data set's users"),
        ({"id": "c0", "part": "query"}, "id", "user 'ada' has the id 'c0' twice"),
        ({"input": " "}, "input", "is empty"),
        ({"time": "soon"}, "time", "is no time"),
    ],
)
def test_a_broken_choice_is_named(
    tmp_path: Path, changed: dict[str, Any], field: str, message: str
) -> None:
    folder = folder_of(tmp_path, [line(0), line(1, **changed), line(2)])
    with pytest.raises(DataError) as fault:
        load(folder)
    assert str(fault.value).startswith(f"{folder}/choices.jsonl:2: field '{field}': ")
    assert message in str(fault.value)
    assert "\n" not in str(fault.value)
    assert len(find_problems(folder)[1]) == 1  # the other lines are read


def test_a_missing_field_of_a_choice_is_named(tmp_path: Path) -> None:
    own = {name: value for name, value in line(1).items() if name != "chosen"}
    with pytest.raises(DataError, match=r"choices.jsonl:1: field 'chosen': is missing"):
        load(folder_of(tmp_path, [own]))


def test_candidates_of_labels_are_labels(tmp_path: Path) -> None:
    labels = {"kind": "classification", "labels": ["yes", "no", "maybe"]}
    good = line(0, candidates=["no", "yes"])
    assert load(folder_of(tmp_path, [good], **labels)).history("ada")[0].output == "no"
    with pytest.raises(DataError, match="field 'candidates': 'never' is not one of the task's"):
        load(folder_of(tmp_path, [line(0, candidates=["no", "never"])], **labels))


def test_check_tells_how_often_the_first_was_taken(tmp_path: Path) -> None:
    dataset = load(folder_of(tmp_path, [line(number, chosen=0) for number in range(6)]))
    summary = summarize(dataset)
    assert summary["choices"] == 6
    assert summary["first taken"] == {"share": 1.0, "by lot": round(1 / 3, 4)}
    found = {own.check: own for own in verdicts(dataset)}
    assert found["position"].severity == "warning"
    assert "always taking it" in str(found["position"])
    assert found["choices"].severity == "warning"
    assert found["choices"].number == 3


CSV = """user,text,candidate,candidate,candidate,chosen,time
ada,one,x,y,z,2,2020
ada,two,x,y,,y,2021
ada,three,"x, or y",y,,0,2022
"""
JSONL = """{"user": "ada", "text": "one", "candidates": ["x", "y", "z"], "chosen": 2, "time": 2020}
{"user": "ada", "text": "two", "candidates": ["x", "y"], "chosen": "y", "time": 2021}
{"user": "ada", "text": "three", "candidates": ["x, or y", "y"], "chosen": 0, "time": 2022}
"""
LISTS = """user;text;candidates;chosen;time
ada;one;"[""x"", ""y"", ""z""]";2;2020
ada;two;"[""x"", ""y""]";y;2021
ada;three;"[""x, or y"", ""y""]";0;2022
"""
COLUMNS = type(CHOICES)(input="text")


@pytest.mark.parametrize("content", [CSV, JSONL, LISTS])
def test_a_table_becomes_choices(tmp_path: Path, content: str) -> None:
    file = tmp_path / "log.csv"
    file.write_text(content)
    dataset = read_table(file, COLUMNS)
    first, second = dataset.history("ada")
    (query,) = dataset.queries("ada")
    assert isinstance(first, Choice)
    assert isinstance(second, Choice)
    assert (first.candidates, first.chosen) == (("x", "y", "z"), 2)
    assert (second.candidates, second.chosen) == (("x", "y"), 1)
    assert (query.offered, query.gold) == (("x, or y", "y"), "x, or y")
    assert dataset.task.kind == "generation"
    assert dataset.task.metrics == tuple(CHOICE_METRICS)


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ("x,y,z,2", "x,,,0", "log.csv:2: field 'candidates': a choice has two candidates or more"),
        ("x,y,z,2", "x,y,x,2", "log.csv:2: field 'candidates': candidates 0 and 2 are equal"),
        ("x,y,z,2", "x,y,z,3", "log.csv:2: field 'chosen': '3' is none of the 3 candidates"),
        ("x,y,z,2", "x,y,z,w", "log.csv:2: field 'chosen': 'w' is none of the 3 candidates"),
        ("candidate,candidate,candidate", "a,b,c", "field 'candidates': is missing: there is"),
        ("chosen", "taken", "log.csv:1: field 'chosen': is missing"),
    ],
)
def test_a_broken_line_of_a_table_is_named(
    tmp_path: Path, before: str, now: str, message: str
) -> None:
    file = tmp_path / "log.csv"
    file.write_text(CSV.replace(before, now))
    with pytest.raises(DataError) as fault:
        read_table(file, COLUMNS)
    assert message in str(fault.value)
    assert "\n" not in str(fault.value)


HEAD = "user,input,candidate_1,candidate_2,candidate_3,chosen\n"


def test_places_that_count_from_1_are_known_by_the_whole_file(tmp_path: Path) -> None:
    def read(chosen: list[int]) -> DataSet:
        file = tmp_path / "log.csv"
        lines = [f"ada,x{at},one,two,three,{place}\n" for at, place in enumerate(chosen)]
        file.write_text(HEAD + "".join(lines))
        return read_table(file, CHOICES)

    with pytest.raises(DataError, match=r":4: .*no line has 0: .*subtract 1 from each") as fault:
        read([1, 2, 3, 1, 3])
    assert "'3' is none of the 3 candidates" in str(fault.value)
    with pytest.raises(DataError, match=r":3: .*'3' is none of the 3 .*from 0 to 2$"):
        read([1, 3, 0])  # counted from 0, and one of them is wrong
    note = "no line took the first candidate, place 0: if places are counted from 1, subtract 1"
    assert any(line.startswith(note) for line in read([1, 2] * 5).notes)
    assert not any("place 0" in line for line in read([1, 2] * 4).notes)
    assert not any("place 0" in line for line in read([0, 1, 2] * 4).notes)


OBJECT = '{"user": "ada", "input": "x", "candidates": ["3 stars", "2", "1", "0"], "chosen": %s}\n'
NULL = '{"user": "ada", "input": "x", "candidate_1": null, "candidate_2": "two",%s "chosen": 1}\n'
LIST = '{"user": "ada", "input": "x", "candidates": ["A", "B"], "%s": "C", "chosen": 1}\n'


def taken_in(file: Path, content: str) -> str:
    """The text that was taken in the file's only choice."""
    file.write_text(content)
    (record,) = read_table(file, CHOICES).stream_history()
    return record.output


@pytest.mark.parametrize(
    ("content", "field", "message"),
    [
        (HEAD + "ada,x,,two,three,1\n", "chosen", "place 1 can be counted in two ways"),
        (HEAD + "ada,x,one, ,three,1\n", "chosen", "a column is empty before the last"),
        (NULL % ' "candidate_3": "three",', "chosen", "a column is empty before the last"),
        (NULL.replace('"candidate_1": null, ', "") % ' "candidate_3": "t",', "chosen", "a gap"),
        (HEAD.replace("e_1", "e_4") + "ada,x,A,B,C,1\n", "chosen", "a gap or no order"),
        (HEAD + "ada,x,2,0,1,2\n", "chosen", "'2' is a candidate, and the place of another one"),
        (
            OBJECT.replace('"3 stars", "2"', "3, 2").replace('"1", "0"', "1, 0") % 2,
            "chosen",
            '"chosen": "2" is a text, 2 a place',
        ),
        (OBJECT % '"3"', "chosen", "its place from 0 to 3 without quotes"),
        (OBJECT % 4, "chosen", "'4' is none of the 4 candidates"),
        (LIST % "candidate", "candidates", "'candidates' and 'candidate' look like candidates all"),
        (LIST % "candidate_1", "candidates", "'candidates' and 'candidate_1' look like"),
        (
            HEAD.replace("input", "input,candidate") + "ada,x,Bob,A,B,C,1\n",
            "candidates",
            "'candidate' and 'candidate_1' look like candidates all: rename what is none",
        ),
    ],
)
def test_no_choice_is_read_in_one_of_two_ways(
    tmp_path: Path, content: str, field: str, message: str
) -> None:
    with pytest.raises(DataError) as fault:
        taken_in(tmp_path / "log", content)
    assert f": field '{field}': " in str(fault.value)
    assert message in str(fault.value)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("content", "taken"),
    [
        (HEAD + "ada,x,,two,three,three\n", "three"),
        (HEAD + "ada,x,one,two,,1\n", "two"),
        (HEAD + "ada,x,0,1,5,1\n", "1"),  # both readings are one
        (HEAD + "ada,x,1,3,5,3\n", "3"),  # no place
        (OBJECT % '"2"', "2"),
        (OBJECT % 2, "1"),
        (OBJECT % 2.0, "1"),
        (OBJECT % '"3 stars"', "3 stars"),
    ],
)
def test_a_choice_that_has_one_reading_is_taken(tmp_path: Path, content: str, taken: str) -> None:
    assert taken_in(tmp_path / "log", content) == taken


def test_a_named_column_holds_no_candidate(tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    file.write_text("user,candidate,candidate_1,candidate_2,chosen\nada,Bob,A,B,1\n")
    (record,) = read_table(file, type(CHOICES)(input="candidate")).history("ada")
    assert (record.input, offered(record)) == ("Bob", ("A", "B"))


def rows_in(file: Path, *candidates: list[str]) -> Path:
    """A file with a choice of each list, whose first candidate was taken."""
    rows = [
        {"user": "ada", "input": str(at), "candidates": own, "chosen": 0}
        for at, own in enumerate(candidates)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("kind", "candidates", "labels"),
    [
        ("classification", (["no", "yes"], ["yes", " maybe"]), ("maybe", "no", "yes")),
        ("rating", (["3", "5.0"], ["2", "3"]), ("2", "3", "4", "5")),
        ("generation", (["no", "yes"], ["yes", "maybe"]), ()),
    ],
)
def test_a_label_that_was_only_offered_is_one(
    tmp_path: Path, kind: str, candidates: tuple[list[str], ...], labels: tuple[str, ...]
) -> None:
    dataset = read_table(rows_in(tmp_path / "log.jsonl", *candidates), CHOICES, kind=kind)
    assert tuple(dataset.task.labels) == labels
    save(dataset, tmp_path / "saved")
    assert find_problems(tmp_path / "saved") == (dataset, [])


def test_a_candidate_that_is_no_rating_is_named(tmp_path: Path) -> None:
    file = rows_in(tmp_path / "log.jsonl", ["3", "4"], ["4", "good"])
    fault = "log.jsonl:2: field 'candidates': 'good' is no number, and this is a rating"
    with pytest.raises(DataError, match=fault):
        read_table(file, CHOICES, kind="rating")


@pytest.mark.parametrize(
    ("kind", "labels", "candidates"),
    [
        ("rating", ["4", "5"], ["5.0", "5", "4"]),
        ("classification", ["b", "\u00e9"], ["e\u0301", "\u00e9", "b"]),
    ],
)
def test_candidates_that_are_one_label_are_named(
    tmp_path: Path, kind: str, labels: list[str], candidates: list[str]
) -> None:
    fault = f"field 'candidates': candidates 0 and 1 are equal, '{labels[1]}': keep one of them"
    folder = folder_of(tmp_path, [line(0, candidates=candidates)], kind=kind, labels=labels)
    with pytest.raises(DataError, match=fault):
        load(folder)
    file = rows_in(tmp_path / "log.jsonl", candidates[1:], candidates[:0:-1], candidates)
    with pytest.raises(DataError, match=f"log.jsonl:3: {fault}"):
        read_table(file, CHOICES, kind=kind)


def test_each_broken_choice_is_one_line_of_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        line(0),
        line(1, candidates=["one"], chosen=0),
        line(2, chosen=7),
        line(3, candidates=["a", "b", "a"]),
    ]
    folder = folder_of(tmp_path, lines)
    assert run(["data", "check", str(folder)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [text.split(": ")[1:3] for text in told] == [
        [f"{folder}/choices.jsonl:2", "field 'candidates'"],
        [f"{folder}/choices.jsonl:3", "field 'chosen'"],
        [f"{folder}/choices.jsonl:4", "field 'candidates'"],
    ]
    assert run(["learn", str(folder), "--out", str(tmp_path / "bundle")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_either_kind_of_queries_is_asked() -> None:
    record = Record("ada", "r", "once", "upon", position=0)
    plain = Query("ada", "p", "once", "more")
    choice = Query("ada", "c", "then", "a", offered=("a", "b"))
    task = Task("next", "generation", "Go on: {input}")

    def data(split: Split, *queries: Query) -> DataSet:
        return DataSet.from_records(task, {"ada": split}, [record], queries)

    both = data("test", plain, choice)
    assert not both.asks_choices(prefer=False)
    assert both.asks_choices(prefer=True)
    assert data("test", choice).asks_choices(prefer=False)
    assert not data("test", plain).asks_choices(prefer=True)
    assert [own.id for own in both.asking(choices=True).stream_queries()] == ["c"]
    assert [own.id for own in both.asking(choices=False).stream_queries()] == ["p"]
    assert data("test", plain).asking(choices=False) == data("test", plain)
    trained = data("train", plain, choice).asking(choices=False)
    assert [own.id for own in trained.history("ada")] == ["r", "query:c"]
    assert isinstance(trained.history("ada")[1], Choice)
