"""A user's own file: what is guessed, who becomes a new user, and that no query comes before its
history.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydra_llm.cli.main import run
from hydra_llm.datasets.dataset import DataSet, held_out
from hydra_llm.datasets.native import load
from hydra_llm.datasets.tabular import Columns, guess_kind, read_table
from hydra_llm.errors import DataError
from hydra_llm.history import before, parse_time
from hydra_llm.types import Record

Row = dict[str, Any]


def write(folder: Path, rows: list[Row], form: str = "jsonl") -> Path:
    file = folder / f"mine.{form}"
    if form == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if form == "tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    file.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
    return file


times = st.sampled_from(
    ["", "2019", "2020", "2020-05", "2020-05-01", "2020-05-01T10:00:00", "1588327200"]
)
rows_of = st.lists(
    st.tuples(st.sampled_from("abc"), times, st.sampled_from(["x", "y", "é😀 שלום", 'q"uo,te'])),
    min_size=1,
    max_size=30,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(drawn=rows_of, form=st.sampled_from(["jsonl", "csv", "tsv"]))
def test_every_row_comes_in_once_and_no_query_before_its_history(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[str, str, str]], form: str
) -> None:
    rows: list[Row] = [
        {"user": u, "id": f"r{at}", "time": time, "input": text, "output": f"o{at}"}
        for at, (u, time, text) in enumerate(drawn)
    ]
    dataset = read_table(write(tmp_path_factory.mktemp("own"), rows, form), kind="generation")
    entries = [(r.user, r.id, r.time, r.input, r.output) for r in dataset.stream_history()]
    entries += [(q.user, q.id, q.time, q.input, q.gold or "") for q in dataset.stream_queries()]
    assert sorted(entries) == sorted(
        (r["user"], r["id"], r["time"], r["input"], r["output"]) for r in rows
    )
    for user in dataset.users():
        history, queries = dataset.history(user), dataset.queries(user)
        assert len(queries) == held_out(len(history) + len(queries))
        for query in queries:
            assert [record.id for record in before(history, query)] == [
                record.id for record in history
            ]
            assert not any(
                parse_time(query.time)[1] < record.span[0]
                for record in history
                if query.time and record.time
            )


def test_the_last_records_in_time_become_queries(tmp_path: Path) -> None:
    rows = [
        {
            "user": "u",
            "time": f"2020-01-{31 - at:02}",
            "input": f"day {31 - at}",
            "output": f"o{at}",
        }
        for at in range(30)
    ]
    dataset = read_table(write(tmp_path, rows))
    assert [query.input for query in dataset.queries("u")] == [
        f"day {day}" for day in range(26, 32)
    ]
    assert [record.input for record in dataset.history("u")] == [
        f"day {day}" for day in range(2, 26)
    ]


def test_more_data_leaves_every_user_in_its_split(tmp_path: Path) -> None:
    def splits(users: int, seed: int) -> dict[str, Any]:
        rows = [{"user": f"u{at}", "input": "x", "output": f"y{at}"} for at in range(users)]
        return read_table(write(tmp_path, rows), seed=seed).splits

    many = splits(600, 0)
    assert splits(60, 0).items() <= many.items()
    assert splits(600, 1) != many
    assert 0.25 < list(many.values()).count("test") / 600 < 0.41


def test_a_user_with_one_record_has_history_only(tmp_path: Path) -> None:
    dataset = read_table(write(tmp_path, [{"user": "u", "input": "x", "output": "y"}]))
    assert (len(dataset.history("u")), dataset.queries("u")) == (1, [])


@pytest.mark.parametrize(
    ("outputs", "kind", "labels"),
    [
        (["1", "5", "3", "3"], "rating", ("1", "2", "3", "4", "5")),
        (["4.0", "2", "5"], "rating", ("2", "3", "4", "5")),
        (["0.5", "1", "1.5"], "rating", ("0.5", "1", "1.5")),
        (["-1", "0", "1"], "rating", ("-1", "0", "1")),
        (["yes", "no", " yes", "no"], "classification", ("no", "yes")),
        (["0", "1", "1", "0"], "classification", ("0", "1")),
        (["a long sentence which nobody would take for a label", "b"] * 4, "generation", ()),
        (["one", "two", "three"], "generation", ()),
        (
            ["1990", "2005", "2020", "1990", "2005", "2020"],
            "classification",
            ("1990", "2005", "2020"),
        ),
    ],
)
def test_the_kind_is_guessed_from_the_outputs(
    tmp_path: Path, outputs: list[str], kind: str, labels: tuple[str, ...]
) -> None:
    dataset = read_table(
        write(tmp_path, [{"user": "u", "input": "x", "output": output} for output in outputs])
    )
    assert (dataset.task.kind, dataset.task.labels) == (kind, labels)
    assert kind in dataset.notes[0]


def test_the_kind_that_is_given_wins() -> None:
    assert guess_kind({"1", "2", "3"}, 9) == "rating"
    assert guess_kind({"a"}, 9) == "generation"


def test_fields_of_other_names_and_a_prompt(tmp_path: Path) -> None:
    rows = [
        {"who": 7, "text": "x", "stars": at % 3 + 1, "when": 1588327200 + at} for at in range(6)
    ]
    columns = Columns(user="who", input="text", output="stars", time="when")
    dataset = read_table(write(tmp_path, rows), columns, prompt="Stars? {input}", name="stars")
    assert (dataset.task.name, dataset.task.prompt, dataset.users()) == (
        "stars",
        "Stars? {input}",
        ["7"],
    )
    assert [query.gold for query in dataset.queries("7")] == ["3"]


BROKEN = [
    (
        "u.jsonl",
        '{"user":"u","input":"x","output":"y"}\n{"user":"u","input":"x"}\n',
        {},
        2,
        "output",
        "missing",
    ),
    ("u.jsonl", '{"user":"u","input":["x"],"output":"y"}\n', {}, 1, "input", "missing, or neither"),
    ("u.jsonl", '{"user":"u","input":"x","output":"y"}\n{oops\n', {}, 2, None, "not JSON"),
    (
        "u.jsonl",
        '{"user":"u","input":"x","output":"y"}\n',
        {"columns": Columns(time="when")},
        1,
        "when",
        "missing",
    ),
    ("u.jsonl", '{"user":"u","input":"x","output":"y","time":"soon"}\n', {}, 1, "time", "soon"),
    ("u.jsonl", '{"user":"u","input":"","output":"y"}\n', {}, 1, "input", "empty"),
    ("u.jsonl", '{"user":"u","input":"a\\u0000","output":"y"}\n', {}, 1, "input", "NUL"),
    ("u.jsonl", '{"user":"u","id":"1","input":"x","output":"y"}\n' * 2, {}, 2, "id", "twice"),
    (
        "u.jsonl",
        '{"user":"u","input":"x","output":"4"}\n{"user":"u","input":"x","output":"good"}\n',
        {"kind": "rating"},
        2,
        "output",
        "'good'",
    ),
    (
        "u.csv",
        "user,input,stars\nu,x,4\nu,x,good\n",
        {"kind": "rating", "columns": Columns(output="stars")},
        3,
        "stars",
        "no number",
    ),
    ("u.csv", "user,input,output\nu,x,4\nu,x,5\nu,y,\n", {"kind": "rating"}, 4, "output", "empty"),
    ("u.csv", "user,input,output\nu,x,\n", {"kind": "rating"}, None, "labels", "at least two"),
    (
        "u.csv",
        "user,input,output\nu,x,4\nu,y,4\n",
        {"kind": "rating"},
        None,
        "labels",
        "at least two",
    ),
    ("u.json", '[{"user":"u","input":"x","output":"y"}]', {}, 1, None, "one JSON object a line"),
    (
        "u.json",
        '[\n  {"user":"u","input":"x","output":"y"}\n]\n',
        {},
        1,
        None,
        "one JSON object a line",
    ),
    (
        "u.jsonl",
        '{"user":"u","input":"x","output":"y"}\n',
        {"prompt": "no place"},
        None,
        "prompt",
        "{input}",
    ),
    ("u.jsonl", "", {}, None, None, "no record"),
    ("u.csv", "user,User,input,output\nu,v,x,y\n", {}, 1, "user", "'user' and 'User' both fit"),
    ("u.csv", "user,input,input,output\nu,v,x,y\n", {}, 1, "input", "stands twice: rename one"),
    ("u.csv", "user,input,output\r" * 2, {}, 1, None, "line ends of CR alone: save it with LF"),
    ("u.csv", "user\x1b[2J\0,input,output\nu,x,y\n", {}, 1, "user", "'user\\x1b[2J\\x00'"),
    ("u.jsonl", '{"user":' + "9" * 5000 + "}", {}, 1, None, "a number of 5000 digits"),
    ("u.jsonl", '{"user":' + "[" * 100_000, {}, 1, None, "nested too deeply"),
    ("u.csv", 'user,input,output,time\nu,x,y,"so\non"\n', {}, 3, "time", "'so on' is no time"),
    ("u.csv", "usr,input,output\nu,x,y\n", {}, 1, "user", "(did you mean 'usr'?)"),
    ("u.csv", "user,text,output\nu,x,y\n", {}, 1, "input", "--input-field names it"),
    (
        "u.jsonl",
        '{"user":"u","USER ":"v","input":"x","output":"y"}\n',
        {},
        1,
        "user",
        "'user' and 'USER ' both fit",
    ),
    ("u.csv", "user,input,output,time\nu,x,y,202401\n", {}, 2, "time", "write 2024-01"),
    (
        "u.csv",
        "who,text,output\nu,x,a\nu,,b\n",
        {"columns": Columns("who", "text")},
        3,
        "text",
        "is empty",
    ),
    ("u.jsonl", '{"user":"u","input":"x","output":NaN}\n', {}, 1, None, "NaN is no JSON value"),
    ("u.jsonl", '{"user":"u","input":"x","output":true}\n', {}, 1, "output", "neither a text"),
    (
        "u.csv",
        "user,input,output\n" + "".join(f"u,x,{n * 7}\n" for n in range(150)),
        {"kind": "rating"},
        None,
        "labels",
        "not 150: if the answers are texts or amounts, take the kind generation",
    ),
    (
        "u.csv",
        "user,input,output\n" + "".join(f"u,x,text {n}\n" for n in range(1200)),
        {"kind": "classification"},
        None,
        "labels",
        "at most 1,000 labels, not 1,200",
    ),
    ("u.csv", "user,input,output\nu,x\n", {}, 2, None, "3 fields"),
    ("u.csv", 'user,input,output\nu,"x,y\n', {}, 2, None, "not CSV"),
    ("u.csv", "name,text\nu,x\n", {}, 1, "user", "missing: there is 'name', 'text'"),
    ("u.csv", b"user,input,output\nu,\xff,y\n", {}, 2, None, "UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "options", "line", "field", "message"), BROKEN)
def test_what_is_broken_is_named(
    tmp_path: Path,
    name: str,
    content: str | bytes,
    options: Any,
    line: int | None,
    field: str | None,
    message: str,
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read_table(tmp_path / name, **options)
    assert (Path(str(caught.value.file)).name, caught.value.line, caught.value.field) == (
        name,
        line,
        field,
    )
    assert message in str(caught.value)


def test_the_command_writes_a_data_set_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"user": f"u{at % 4}", "input": f"text {at}", "output": "yes" if at % 3 else "no"}
        for at in range(40)
    ]
    out = tmp_path / "data"
    command = [
        "data",
        "import",
        str(write(tmp_path, rows, "csv")),
        "--out",
        str(out),
        "--seed",
        "3",
        "--json",
    ]
    assert run(command) == 0
    summary = json.loads(capsys.readouterr().out)
    dataset = load(out)
    assert summary["digest"] == dataset.digest
    assert (summary["kind"], summary["labels"], summary["records"], summary["queries"]) == (
        "classification",
        ["no", "yes"],
        32,
        8,
    )
    assert run(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(["data", "import", str(tmp_path / "none.csv"), "--out", str(tmp_path / "x")]) == 2
    assert (
        run(
            [
                "data",
                "import",
                str(tmp_path / "mine.csv"),
                "--out",
                str(tmp_path / "x"),
                "--kind",
                "odd",
            ]
        )
        == 2
    )


def test_ratings_of_a_wide_range_keep_the_numbers_that_occur(tmp_path: Path) -> None:
    file = tmp_path / "u.csv"
    file.write_text("user,input,output\nu,x,0\nu,y,1000000000000\nu,z,1234567.0\nu,w,2.50\n")
    task = read_table(file, kind="rating").task
    assert task.labels == ("0", "2.5", "1234567", "1000000000000")


@pytest.mark.parametrize("delimiter", ",;\t|")
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_delimiters_headers_and_blank_lines_are_read(
    tmp_path: Path, delimiter: str, ends: str
) -> None:
    rows = [
        [],
        [" User", "INPUT", '"Output"', "When"],
        ["007", '"a, b; c | d"', "x", "2024"],
        [],
        ["007 ", '"two\nlines"', "y", "2023"],
        ["7", "z", "x", ""],
        [],
    ]
    file = tmp_path / "mine.csv"
    file.write_bytes(b"\xef\xbb\xbf" + ends.join(map(delimiter.join, rows)).encode() + b"\n\n")
    dataset = read_table(file, Columns(time="when"))
    assert dataset.users() == ["007", "7"]
    assert [q.input for q in dataset.queries("007")] == ["a, b; c | d"]
    assert dataset.history("007")[0].input.split() == ["two", "lines"]
    assert dataset.notes[1:5] == [
        "the column ' User' was taken as 'user'",
        "the column 'INPUT' was taken as 'input'",
        "the column 'Output' was taken as 'output'",
        "the column 'When' was taken as 'when'",
    ]


def test_a_spreadsheets_line_names_the_delimiter(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("sep=;\nuser;input;output\nu;a;x\n  \nu;;y\n")
    with pytest.raises(DataError, match=r"mine.csv:5: field 'input': is empty"):
        read_table(file)


def test_numbers_as_ids_are_whole_and_zeros_stay(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    ids = ["1", "1.0", '"1"', "12345678901234567890", '"007"']
    rows = (f'{{"user": {id}, "input": "x{n}", "output": "y"}}' for n, id in enumerate(ids))
    file.write_text("\n".join(rows) + "\n\n \n")
    dataset = read_table(file)
    assert dataset.users() == ["1", "12345678901234567890", "007"]
    file = tmp_path / "mine.csv"
    file.write_text("user,input,output\n1,x,y\n1.0,x,y\n")
    assert "'1.0' and '1' are two users: write ids alike if they are one" in read_table(file).notes


def test_texts_are_compared_by_unicode_words(tmp_path: Path) -> None:
    rows = [{"user": "u", "input": "x", "output": text} for text in ("今天", "天气", "很好")]
    task = read_table(write(tmp_path, rows)).task
    assert (task.words, task.to_json()["tokenizer"]) == ("unicode", "unicode")


def test_labels_of_one_spelling_are_one_label(tmp_path: Path) -> None:
    composed, marks = "caf\u00e9", "cafe\u0301"
    rows = [
        {"user": f"u{n}", "input": "x", "output": (composed, marks, "bar")[n % 3]} for n in range(9)
    ]
    dataset = read_table(write(tmp_path, rows), kind="classification")
    assert dataset.task.labels == ("bar", composed)
    again = DataSet.from_records(dataset.task, {"u": "train"}, [Record("u", "1", "x", marks)], [])
    assert again.history("u")[0].output == composed


def test_a_file_of_one_line_gets_advice_that_one_user_can_follow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "one.csv"
    file.write_text("user,input,output\nada,a ticket,refund\n")
    assert run(["data", "import", str(file), "--out", str(tmp_path / "data")]) == 0
    output = capsys.readouterr()
    assert output.out == f"wrote 1 record and 0 queries of 1 user to {tmp_path / 'data'}\n"
    assert "one user alone: a bundle is learned from some users for others" in output.err
    assert "another seed" not in output.err
