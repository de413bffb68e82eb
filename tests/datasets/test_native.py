"""The native layout: what is written comes back, and each broken line is named by file, line and
field.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydra_llm.datasets.dataset import DataSet, held_out
from hydra_llm.datasets.native import load, save
from hydra_llm.errors import DataError, UnknownUser
from hydra_llm.history import before
from hydra_llm.tasks.base import Task
from hydra_llm.types import Query, Record

TITLES = Task("titles", "generation", "Write a title: {input}", metrics=("rouge1",))
CHOICE = {
    "name": "t",
    "kind": "classification",
    "prompt": "Which? {input}",
    "labels": ["yes", "no"],
}

texts = st.one_of(
    st.text(
        st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20
    ).filter(lambda text: bool(text.strip())),
    st.sampled_from(
        [
            "😀👩‍👩‍👧",
            "שלום עולם",
            "مرحبا",
            "\u202eright\u202c",
            '"{input}"',
            "a\nb",
            "a\u2028b",
            "\ufeffx",
            "NaN",
            "\\u0000",
        ]
    ),
)
times = st.sampled_from(
    [
        "",
        "2020",
        "2020-05",
        "2020-05-01",
        "2020-05-01T10:00:00",
        "2020-05-01T10:00:00+02:00",
        "893214333",
    ]
)


@st.composite
def datasets(draw: st.DrawFn) -> DataSet:
    users = draw(st.lists(texts, unique=True, max_size=4))
    splits = {user: draw(st.sampled_from(["train", "test"])) for user in users}
    records, queries = [], []
    for user in users:
        ids = iter(draw(st.lists(texts, unique=True, min_size=8, max_size=8)))
        records += [
            Record(user, next(ids), draw(texts), draw(texts), draw(times))
            for _ in range(draw(st.integers(0, 4)))
        ]
        queries += [
            Query(user, next(ids), draw(texts), draw(texts), draw(times))
            for _ in range(draw(st.integers(0, 3)))
        ]
    return DataSet.from_records(
        TITLES, splits, draw(st.permutations(records)), draw(st.permutations(queries))
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(dataset=datasets())
def test_what_is_saved_comes_back(
    tmp_path_factory: pytest.TempPathFactory, dataset: DataSet
) -> None:
    folder = tmp_path_factory.mktemp("native") / "data"
    save(dataset, folder)
    again = load(folder)
    assert again.task.to_json() == dataset.task.to_json()
    assert list(again.splits.items()) == list(dataset.splits.items())
    assert list(again.stream_history()) == list(dataset.stream_history())
    assert list(again.stream_queries()) == list(dataset.stream_queries())
    assert again.digest == dataset.digest
    assert sorted(file.name for file in folder.iterdir()) == [
        "history.jsonl.gz",
        "queries.jsonl.gz",
        "task.json",
        "users.jsonl",
    ]
    assert [entry.name for entry in folder.parent.iterdir()] == ["data"]


@given(dataset=datasets())
def test_queries_stand_after_the_history_of_their_user(dataset: DataSet) -> None:
    for user in dataset.users():
        history, queries = dataset.history(user), dataset.queries(user)
        assert sorted(r.position for r in history) == list(range(len(history)))
        assert [q.position for q in queries] == list(
            range(len(history), len(history) + len(queries))
        )
        assert {r.user for r in history} | {q.user for q in queries} <= {user}
        for query in queries:
            if not query.time:
                assert before(history, query) == history


def test_the_digest_changes_with_each_part_of_the_content() -> None:
    def digest(
        user: str = "u",
        split: Any = "train",
        answer: str = "a",
        gold: str = "g",
        time: str = "",
        task: Task = TITLES,
    ) -> str:
        return DataSet.from_records(
            task,
            {user: split},
            [Record(user, "1", "x", answer, time)],
            [Query(user, "2", "y", gold)],
        ).digest

    other = Task("titles", "generation", "Write another title: {input}")
    variants = [
        digest(),
        digest("v"),
        digest(split="test"),
        digest(answer="b"),
        digest(gold="h"),
        digest(time="2020"),
        digest(task=other),
    ]
    assert len(set(variants)) == len(variants)
    assert digest() == digest()


def write(folder: Path, **files: Any) -> Path:
    """A data set of one user with one record and one query, except for the files that are given
    (texts, bytes or lists of objects).
    """
    line = {"user": "u", "id": "1", "time": "2020", "input": "x", "output": "yes"}
    content = {
        "task.json": json.dumps(CHOICE),
        "users.jsonl": [{"user": "u", "split": "train"}],
        "history.jsonl": [line],
        "queries.jsonl": [{**line, "id": "2"}],
    } | {name.replace("__", "."): value for name, value in files.items()}
    folder.mkdir(exist_ok=True)
    for name, value in content.items():
        if isinstance(value, list):
            value = "".join(json.dumps(entry) + "\n" for entry in value)
        if value is not None:
            (folder / name).write_bytes(value if isinstance(value, bytes) else value.encode())
    return folder


GOOD = {"user": "u", "id": "1", "time": "2020", "input": "x", "output": "yes"}
BROKEN: list[tuple[str, Any, int | None, str | None, str]] = [
    ("history.jsonl", [GOOD, {**GOOD, "id": "2", "time": "soon"}], 2, "time", "soon"),
    ("history.jsonl", [GOOD, {**GOOD, "output": "maybe", "id": "2"}], 2, "output", "maybe"),
    ("queries.jsonl", [{**GOOD, "output": "Yes"}], 1, "output", "Yes"),
    ("history.jsonl", [GOOD, GOOD], 2, "id", "twice"),
    ("queries.jsonl", [GOOD, {**GOOD, "input": "other"}], 2, "id", "twice"),
    ("history.jsonl", [{**GOOD, "user": "stranger"}], 1, "user", "stranger"),
    ("history.jsonl", [{**GOOD, "user": ""}], 1, "user", "empty"),
    ("history.jsonl", [{**GOOD, "input": " \n"}], 1, "input", "empty"),
    ("history.jsonl", [{**GOOD, "output": ""}], 1, "output", "empty"),
    ("history.jsonl", [{**GOOD, "input": "a\0b"}], 1, "input", "NUL"),
    (
        "history.jsonl",
        '{"user":"u","id":"1","input":"\\ud83d","output":"yes"}\n',
        1,
        "input",
        "surrogate",
    ),
    ("history.jsonl", [{**GOOD, "output": 5}], 1, "output", "must be a text"),
    ("history.jsonl", [{**GOOD, "input": None}], 1, "input", "must be a text"),
    ("history.jsonl", [{**GOOD, "time": True}], 1, "time", "must be a text"),
    (
        "history.jsonl",
        [{key: value for key, value in GOOD.items() if key != "id"}],
        1,
        "id",
        "missing",
    ),
    ("history.jsonl", [["u", "1"]], 1, None, "object"),
    ("history.jsonl", json.dumps(GOOD) + "\n{not json\n", 2, None, "not JSON"),
    ("history.jsonl", json.dumps(GOOD) + "\n\n{\n", 3, None, "not JSON"),
    (
        "history.jsonl",
        '{"user":"u","id":"1","id":"2","input":"x","output":"yes"}\n',
        1,
        None,
        "twice",
    ),
    (
        "history.jsonl",
        '{"user":"u","id":"1","time":NaN,"input":"x","output":"yes"}\n',
        1,
        None,
        "NaN",
    ),
    ("history.jsonl", json.dumps(GOOD).encode() + b'\n{"user":"\xff"}\n', 2, None, "UTF-8"),
    ("history.jsonl", b"[" * 100_000, 1, None, "not JSON"),
    ("users.jsonl", [{"user": "u", "split": "dev"}], 1, "split", "dev"),
    ("users.jsonl", [{"user": "u", "split": "train"}] * 2, 2, "user", "twice"),
    ("users.jsonl", [{"user": "u"}], 1, "split", "missing"),
    ("task.json", "{", None, None, "not JSON"),
    ("task.json", json.dumps({**CHOICE, "kind": "guessing"}), None, "kind", "guessing"),
    ("task.json", json.dumps({**CHOICE, "prompt": "Which?"}), None, "prompt", "{input}"),
    ("users.jsonl", None, None, None, "no such file"),
    ("queries.jsonl", None, None, None, "no such file"),
]


@pytest.mark.parametrize(
    ("name", "content", "line", "field", "message"),
    BROKEN,
    ids=[f"{row[0]}-{row[4]}-{at}" for at, row in enumerate(BROKEN)],
)
def test_what_is_broken_is_named(
    tmp_path: Path, name: str, content: Any, line: int | None, field: str | None, message: str
) -> None:
    folder = write(tmp_path / "data", **{name.replace(".", "__"): content})
    with pytest.raises(DataError) as caught:
        load(folder)
    fault = caught.value
    assert (Path(str(fault.file)).name, fault.line, fault.field) == (name, line, field)
    assert message in str(fault)
    assert str(folder / name) in str(fault)
    assert "\n" not in str(fault)


def test_every_fault_is_reported_not_only_the_first(tmp_path: Path) -> None:
    bad = [GOOD, {**GOOD, "time": "soon", "output": "maybe"}, {**GOOD, "id": "3", "input": ""}]
    faults: list[DataError] = []
    load(write(tmp_path / "data", history__jsonl=bad), report=faults.append)
    assert [(fault.line, fault.field) for fault in faults] == [
        (2, "id"),
        (2, "time"),
        (2, "output"),
        (3, "input"),
    ]


def test_a_cut_zip_is_an_error(tmp_path: Path) -> None:
    whole = gzip.compress(
        "".join(json.dumps({**GOOD, "id": str(at)}) + "\n" for at in range(5000)).encode()
    )
    folder = write(tmp_path / "data", history__jsonl=None)
    (folder / "history.jsonl.gz").write_bytes(whole[:-2000])
    with pytest.raises(
        DataError, match=r"history\.jsonl\.gz:\d+: the zipped file is damaged or cut"
    ):
        load(folder)


def test_two_histories_are_one_too_many(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    (folder / "history.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match="keep one of them"):
        load(folder)


def test_byte_order_mark_crlf_and_unknown_fields_are_accepted(tmp_path: Path) -> None:
    line = b"\xef\xbb\xbf" + json.dumps({**GOOD, "note": 1}).encode() + b"\r\n"
    dataset = load(
        write(
            tmp_path / "data",
            history__jsonl=line,
            task__json=b"\xef\xbb\xbf" + json.dumps(CHOICE).encode(),
        )
    )
    assert [record.input for record in dataset.history("u")] == ["x"]


def test_times_may_be_numbers_or_missing(tmp_path: Path) -> None:
    lines = [
        {**GOOD, "time": 893214333},
        {**GOOD, "id": "b", "time": None},
        {"user": "u", "id": "c", "input": "x", "output": "no"},
    ]
    dataset = load(write(tmp_path / "data", history__jsonl=lines))
    assert [record.time for record in dataset.stream_history()] == ["893214333", "", ""]


def test_history_comes_oldest_first_whatever_the_file_says(tmp_path: Path) -> None:
    lines = [{**GOOD, "id": time, "time": time} for time in ("2021", "2019", "2020")]
    dataset = load(write(tmp_path / "data", history__jsonl=lines))
    assert [record.id for record in dataset.history("u")] == ["2019", "2020", "2021"]
    assert [record.position for record in dataset.history("u")] == [1, 2, 0]


def test_a_limit_takes_the_first_users_of_each_split(tmp_path: Path) -> None:
    users = [("a", "train"), ("b", "test"), ("c", "train"), ("d", "test"), ("e", "test")]
    folder = write(
        tmp_path / "data",
        users__jsonl=[{"user": user, "split": split} for user, split in users],
        history__jsonl=[{**GOOD, "user": user} for user, _ in reversed(users)],
        queries__jsonl=[],
    )
    dataset = load(folder, limit_users=2)
    assert (dataset.users("train"), dataset.users("test")) == (["a", "c"], ["b", "d"])
    assert [record.user for record in dataset.stream_history()] == ["a", "b", "c", "d"]


def test_an_unknown_user_and_one_without_history(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "data",
        users__jsonl=[{"user": "u", "split": "train"}, {"user": "new", "split": "test"}],
    )
    dataset = load(folder)
    assert dataset.history("new") == []
    with pytest.raises(UnknownUser, match="nobody"):
        dataset.history("nobody")


def test_saving_never_overwrites_and_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load(write(tmp_path / "data"))
    with pytest.raises(DataError, match="exists already"):
        save(dataset, tmp_path / "data")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="No space left"):
        save(dataset, tmp_path / "new")
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "caches"] == ["data"]


def test_no_data_set_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no data set"):
        load(tmp_path)


def test_entries_in_memory_are_checked_too() -> None:
    with pytest.raises(DataError, match=r"field 'u/1\.time'"):
        DataSet.from_records(TITLES, {"u": "train"}, [Record("u", "1", "x", "y", "soon")], [])


@pytest.mark.parametrize(
    ("count", "queries"), [(0, 0), (1, 0), (2, 1), (9, 1), (10, 2), (49, 9), (60, 10), (500, 10)]
)
def test_the_last_fifth_becomes_queries(count: int, queries: int) -> None:
    assert held_out(count) == queries
