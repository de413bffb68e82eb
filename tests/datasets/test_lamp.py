"""LaMP's official layout, built from generated records: what was written is what is read, and the
prompt is the file's to the letter.

The instructions are made up in LaMP's manner: only what stands right before the text is LaMP's.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydra_llm.cli.main import run
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.lamp import is_official, stream_questions
from hydra_llm.datasets.native import load, save
from hydra_llm.errors import DataError
from tests.marks import slow_except

NEWS = ["politics", "sports", "food & drink"]
TAGS = ["sci-fi", "true story", "based on a book"]

Profile = list[dict[str, Any]]
"""The task's fields by name, and `id`."""

INSTRUCTIONS = {
    "LaMP-1": 'An author wrote a paper called "{text}',
    "LaMP-2N": (
        f"Which category fits? Just the name. categories: [{', '.join(NEWS)}] article: {{text}}"
    ),
    "LaMP-2M": f"Which tag fits? Just the name. tags: [{', '.join(TAGS)}] description: {{text}}",
    "LaMP-3": "What is the score from 1 to 5? just answer with 1, 2, 3, 4, or 5. review: {text}",
    "LaMP-4": "Generate a headline for the following article: {text}",
    "LaMP-5": "Generate a title for the following abstract of a paper: {text}",
    "LaMP-7": "Paraphrase this tweet without any explanation before or after it: {text}",
}
FIELDS = {
    "LaMP-1": ("abstract", "title"),
    "LaMP-2N": ("text", "category"),
    "LaMP-2M": ("description", "tag"),
    "LaMP-3": ("text", "score"),
    "LaMP-4": ("text", "title"),
    "LaMP-5": ("abstract", "title"),
    "LaMP-7": ("text", "text"),
}


def question(
    task: str, key: str, text: str, entries: list[tuple[str, str]], **more: Any
) -> dict[str, Any]:
    """A question with a profile of (text, answer) entries."""
    named, answered = FIELDS[task]
    profile: Profile = [
        {"id": f"{key}{at}", answered: answer, named: content}
        for at, (content, answer) in enumerate(entries)
    ]
    if task == "LaMP-2N":
        profile = [{**item, "title": "A headline"} for item in profile]
    return {
        "id": key,
        "input": INSTRUCTIONS[task].replace("{text}", text),
        "profile": profile,
        **more,
    }


def write_part(
    folder: Path, part: str, task: str, questions: list[Any], golds: dict[str, str]
) -> Path:
    """Both files of one of LaMP's splits."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{part}_questions.json"
    file.write_text(json.dumps(questions), encoding="utf-8")
    outputs = {
        "task": task[:6].replace("-", "_"),
        "golds": [{"id": key, "output": gold} for key, gold in golds.items()],
    }
    (folder / f"{part}_outputs.json").write_text(json.dumps(outputs), encoding="utf-8")
    return file


texts = st.one_of(
    st.from_regex(r'[a-z:"\[\]{},]+( [a-zA-Z:"]+){0,4}', fullmatch=True),
    st.sampled_from(["😀 article: x", "שלום", "a\nb"]),
)
ANSWERS: dict[str, Any] = {
    "LaMP-1": st.sampled_from(["[1]", "[2]"]),
    "LaMP-2N": st.sampled_from(NEWS),
    "LaMP-2M": st.sampled_from(TAGS),
    "LaMP-3": st.sampled_from(list("12345")),
    "LaMP-4": texts,
    "LaMP-5": texts,
    "LaMP-7": texts,
}
KINDS = {
    "LaMP-1": "classification",
    "LaMP-2N": "classification",
    "LaMP-2M": "classification",
    "LaMP-3": "rating",
}
DrawnQuestion = tuple[str, str, list[tuple[str, str]]]
"""Text, gold, profile."""


@st.composite
def drawn_questions(draw: st.DrawFn, task: str) -> list[DrawnQuestion]:
    answers = texts if task == "LaMP-1" else ANSWERS[task]
    entries = st.lists(st.tuples(texts, answers), min_size=1, max_size=4, unique=True)
    return draw(st.lists(st.tuples(texts, ANSWERS[task], entries), min_size=1, max_size=4))


def written(task: str, entries: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """What a profile becomes: in LaMP-7 the tweet is both sides."""
    return [(text, text) for text, _ in entries] if task == "LaMP-7" else entries


@pytest.mark.parametrize("task", slow_except(FIELDS, "LaMP-3", "LaMP-5"))
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_what_is_written_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, task: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("lamp")
    parts = {part: data.draw(drawn_questions(task), label=part) for part in ("train", "dev")}
    tail = '", is it [1] or [2]? [1]: "A" [2]: "B"' if task == "LaMP-1" else ""
    inputs: dict[str, str] = {}
    for part, questions in parts.items():
        official = [
            question(task, f"{part}{at}", text + tail, entries)
            for at, (text, _, entries) in enumerate(questions)
        ]
        inputs |= {item["id"]: item["input"] for item in official}
        write_part(
            folder,
            part,
            task,
            official,
            {f"{part}{at}": gold for at, (_, gold, _) in enumerate(questions)},
        )
    dataset = load(folder)
    assert (dataset.task.name, dataset.task.like, dataset.task.kind) == (
        task,
        task,
        KINDS.get(task, "generation"),
    )
    assert dataset.task.prompt == INSTRUCTIONS[task].replace("{text}", "{input}")
    assert dataset.users() == list(inputs)
    for part, questions in parts.items():
        for at, (text, gold, entries) in enumerate(questions):
            user = f"{part}{at}"
            assert dataset.splits[user] == {"train": "train", "dev": "test"}[part]
            (query,) = dataset.queries(user)
            assert (query.input, query.gold, query.id) == (text + tail, gold, user)
            assert dataset.task.ask(query.input) == inputs[user]
            expected = list(dict.fromkeys(written(task, entries)))
            assert (
                list(
                    dict.fromkeys((record.input, record.output) for record in dataset.history(user))
                )
                == expected
            )


def small(folder: Path, task: str = "LaMP-3", **changes: Any) -> Path:
    """A train split of two questions; `changes` go into the first one."""
    first = question(task, "1", "good", [("fine", "4"), ("bad", "1")]) | changes
    second = question(task, "2", "better", [("ugly", "2")])
    write_part(folder, "train", task, [first, second], {"1": "5", "2": "3"})
    return folder


def test_labels_are_those_of_the_question(tmp_path: Path) -> None:
    questions = [question("LaMP-2N", "1", "x", [("y", "sports")])]
    write_part(tmp_path, "dev", "LaMP-2N", questions, {"1": "politics"})
    assert load(tmp_path).task.labels == tuple(NEWS)


def test_one_split_one_file_or_the_folders_of_the_download(tmp_path: Path) -> None:
    small(tmp_path / "flat")
    assert load(tmp_path / "flat").users("train") == ["1", "2"]
    assert load(tmp_path / "flat" / "train_questions.json") == load(tmp_path / "flat")
    small(tmp_path / "deep" / "train")
    write_part(
        tmp_path / "deep" / "dev",
        "dev",
        "LaMP-3",
        [question("LaMP-3", "9", "x", [("y", "1")])],
        {"9": "1"},
    )
    deep = load(tmp_path / "deep")
    assert (deep.users("train"), deep.users("test")) == (["1", "2"], ["9"])
    assert load(tmp_path / "deep" / "dev").users() == ["9"]


def test_a_zipped_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    whole = load(small(tmp_path))
    for name in ("train_questions.json", "train_outputs.json"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + content))
    assert load(tmp_path) == whole


def test_the_test_split_without_golds_is_left_out_with_a_note(tmp_path: Path) -> None:
    small(tmp_path)
    (tmp_path / "test_questions.json").write_text("[]", encoding="utf-8")
    assert any("golds are not public" in note for note in load(tmp_path).notes)
    for name in ("train_questions.json", "train_outputs.json"):
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match="no public golds"):
        load(tmp_path)


def test_the_time_split_has_dates_and_users_of_both_parts(tmp_path: Path) -> None:
    old = question("LaMP-3", "t1", "good", [("late", "4"), ("early", "1")], user_id="ann")
    old["profile"][0]["date"], old["profile"][1]["date"] = "2015-6-3", 2014
    again = question("LaMP-3", "t2", "well", [], user_id="ann") | {"profile": old["profile"]}
    new = question("LaMP-3", "d1", "best", [("last", "5")], user_id="ann")
    write_part(tmp_path, "train", "LaMP-3", [old, again], {"t1": "5", "t2": "4"})
    write_part(tmp_path, "dev", "LaMP-3", [new], {"d1": "5"})
    dataset = load(tmp_path)
    assert dataset.splits == {"ann": "train", "ann@test": "test"}
    assert [record.input for record in dataset.history("ann")] == ["early", "late"]
    assert [query.id for query in dataset.queries("ann")] == ["t1", "t2"]
    assert [record.input for record in dataset.history("ann@test")] == ["last"]
    assert any("@test" in note for note in dataset.notes)


def test_known_flaws_are_left_out_with_a_note(tmp_path: Path) -> None:
    profile = [{"id": "a", "text": "", "score": "1"}, {"id": "b", "text": "x\0", "score": "1"}]
    profile += [{"id": "c", "text": "x", "score": 2}] * 2 + [{"id": "c", "text": "z", "score": "3"}]
    dataset = load(small(tmp_path, profile=profile))
    assert [(record.id, record.input, record.output) for record in dataset.history("1")] == [
        ("c", "x", "2"),
        ("c#2", "z", "3"),
    ]
    notes = " / ".join(dataset.notes)
    for part_of_note in (
        "1 profile entries were left out: a text is empty",
        "NUL",
        "taken once",
        "numbered",
    ):
        assert part_of_note in notes


def test_a_paper_in_an_authors_history_needs_no_label(tmp_path: Path) -> None:
    questions = [
        question(
            "LaMP-1", "1", 'T", which, [1] or [2]? [1]: "A" [2]: "B"', [("An abstract", "A title")]
        )
    ]
    write_part(tmp_path / "lamp", "train", "LaMP-1", questions, {"1": "[2]"})
    dataset = load(tmp_path / "lamp")
    assert [(record.input, record.output) for record in dataset.history("1")] == [
        ("An abstract", "A title")
    ]
    save(dataset, tmp_path / "native")
    assert load(tmp_path / "native").digest == dataset.digest


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    small(tmp_path)
    file = tmp_path / "train_questions.json"
    # what follows is far behind what the reader has taken in, so a reader that stops never sees
    # that it is broken
    file.write_text(
        file.read_text(encoding="utf-8")[:-1]
        + ", "
        + json.dumps(question("LaMP-3", "3", "x" * 10**6, []))
        + " broken",
        encoding="utf-8",
    )
    assert load(tmp_path, limit_users=1).users() == ["1"]
    with pytest.raises(DataError, match="no gold"):
        load(tmp_path)


@pytest.mark.parametrize(("score", "gold"), [(5.0, 5.0), ("5.0", "5.0"), (5, 5), ("5", 5.0)])
def test_whole_numbers_may_be_written_as_floats(tmp_path: Path, score: Any, gold: Any) -> None:
    profile = [{"id": 1.0, "text": "x", "score": score}, {"id": 2, "text": "y", "score": 1}]
    first = question("LaMP-3", "1", "good", []) | {"profile": profile}
    write_part(tmp_path, "train", "LaMP-3", [first], {"1": gold})
    dataset = load(tmp_path)
    assert [(record.id, record.output) for record in dataset.history("1")] == [
        ("1", "5"),
        ("2", "1"),
    ]
    assert dataset.queries("1")[0].gold == "5"


BROKEN = [
    (
        {"profile": [{"id": "a", "text": "x", "score": "9"}]},
        "[0].profile[0].score",
        "'9' is not one of",
    ),
    (
        {"profile": [{"id": "a", "text": "x", "score": "1", "date": "soon"}]},
        "[0].profile[0].date",
        "soon",
    ),
    ({"profile": [{"id": "a", "score": "1"}]}, "[0].profile[0].text", "missing"),
    (
        {"profile": [{"id": "a", "text": ["x"], "score": "1"}]},
        "[0].profile[0].text",
        "must be a text",
    ),
    ({"profile": {"score": "1"}}, "[0].profile", "must be a list"),
    ({"input": ["x"]}, "[0].input", "must be a text"),
    ({"id": "7"}, "[0].id", "no gold"),
    ({"id": "2"}, "[1].id", "twice"),
]


@pytest.mark.parametrize(("changes", "field", "message"), BROKEN)
def test_what_is_broken_is_named(
    tmp_path: Path, changes: dict[str, Any], field: str, message: str
) -> None:
    small(tmp_path, **changes)
    if changes.get("id") == "2":
        write_part(
            tmp_path,
            "train",
            "LaMP-3",
            json.loads((tmp_path / "train_questions.json").read_text(encoding="utf-8")),
            {"2": "3"},
        )
    faults: list[DataError] = []
    load(tmp_path, report=faults.append)
    assert field in [fault.field for fault in faults]
    assert any(message in str(fault) for fault in faults)
    with pytest.raises(DataError):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<html>not found</html>", "not JSON"),
        ("[]", "holds no question"),
        ('{"a": 1}', "holds no question"),
        ('[{"id": "1", "input": "a', "not JSON, or cut"),
        (
            '[{"id": "1", "input": "a", "profile": [{"id": "1", "colour": "red"}]}]',
            "no LaMP task that is known",
        ),
        (
            '[{"id": "1", "input": "a", "profile": [{"id": "1", "description": "x", "tag": "y"}]}]',
            "no LaMP task that is known",
        ),
    ],
)
def test_files_that_are_no_lamp_files(tmp_path: Path, content: str, message: str) -> None:
    small(tmp_path)
    (tmp_path / "train_questions.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_golds_without_questions_and_questions_without_golds(tmp_path: Path) -> None:
    small(tmp_path)
    outputs = tmp_path / "train_outputs.json"
    outputs.write_text(
        outputs.read_text(encoding="utf-8").replace('"id": "2"', '"id": "8"'), encoding="utf-8"
    )
    faults: list[DataError] = []
    load(tmp_path, report=faults.append)
    assert [str(fault).rpartition(": ")[2] for fault in faults] == [
        "question '2' has no gold in the outputs file",
        "1 golds have no question, '8' for one",
    ]
    outputs.unlink()
    with pytest.raises(DataError, match=r"train_outputs\.json: no such file"):
        load(tmp_path)


def test_an_unmarked_instruction_is_what_questions_share(tmp_path: Path) -> None:
    questions = [
        question("LaMP-3", key, "", [("y", "1")]) | {"input": f"Rate this product {text}"}
        for key, text in (("1", "good one"), ("2", "glad"))
    ]
    write_part(tmp_path, "train", "LaMP-3", questions, {"1": "1", "2": "2"})
    dataset: DataSet = load(tmp_path)
    assert dataset.task.prompt == "Rate this product {input}"
    assert [query.input for query in dataset.stream_queries()] == ["good one", "glad"]
    assert any("in common" in note for note in dataset.notes)


def test_questions_are_streamed(tmp_path: Path) -> None:
    file = tmp_path / "train_questions.json"
    file.write_text(
        "[" + ",".join(f'{{"id": "{at}", "x": "{"y" * 1000}"}}' for at in range(2000)) + "  broken",
        encoding="utf-8",
    )
    stream = stream_questions(file)
    assert [next(stream)["id"] for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(DataError):
        list(stream)
    assert is_official(file)
    assert not is_official(tmp_path / "other.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "llm"), [("LaMP-2N", "rule=labels"), ("LaMP-3", "rule=labels"), ("LaMP-4", "echo")]
)
def test_a_benchmark_runs_on_the_official_layout(
    task: str, llm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each question is a user of its own; nine in ten answers of a profile are the user's usual
    one, which is the gold.
    """
    usual = {
        "LaMP-2N": NEWS,
        "LaMP-3": ["1", "3", "5"],
        "LaMP-4": ["rain again", "war ends", "love wins"],
    }[task]
    for part, count in (("train", 6), ("dev", 3)):
        golds = {f"{part}{at}": usual[at % 3] for at in range(count)}
        questions = []
        for key, gold in golds.items():
            profile = [(f"news {key} {i}", gold if i else usual[0]) for i in range(6)]
            questions.append(question(task, key, f"news {key}", profile))
        write_part(tmp_path / "lamp", part, task, questions, golds)
    few = [
        f"--set={name}"
        for name in (
            f"cache={tmp_path}",
            "retrieved=3",
            "samples=3",
            "queries_per_user=1",
            "max_length=32",
            "ask=always",  # whatever weight the votes have
        )
    ]
    given = [
        "--llm",
        f"fake:{llm}",
        "--methods",
        "zero-shot,rag@2,hydra@2,3,user-majority,copy-nearest",
        "--out",
        str(tmp_path / "run"),
    ]
    assert (
        run(["bench", "run", str(tmp_path / "lamp"), *given, "--json", "--export-lamp", *few]) == 0
    )
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == ["zero-shot", "rag@2", "hydra@2,3", "user-majority", "copy-nearest"]
    assert {row["queries"] for row in rows.values()} == {3}
    metric, perfect = {"LaMP-2N": ("accuracy", 1), "LaMP-3": ("mae", 0), "LaMP-4": ("rouge1", 1)}[
        task
    ]
    assert rows["user-majority"]["metrics"][metric][0] == pytest.approx(perfect)
    assert rows["zero-shot"]["metrics"][metric][0] != pytest.approx(perfect)
    assert rows["hydra@2,3"]["calls"] == 2
    official = json.loads((tmp_path / "lamp" / "dev_outputs.json").read_text())
    assert (
        json.loads((tmp_path / "run" / "lamp" / "user-majority.json").read_text()) == official
    )  # all right: LaMP's own file
    assert len(json.loads((tmp_path / "run" / "lamp" / "hydra@2,3.json").read_text())["golds"]) == 3
