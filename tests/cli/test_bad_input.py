"""A user with bad luck: each fault of a text, a file, an endpoint, a disk or a key ends in one line, or is recorded and the run goes on."""

import json
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.cli.main import run

SMALL = ["--set", "epochs=0", "--set", "samples=2", "--set", "retrieved=2", "--set", "queries_per_user=1", "--set", "k=1"]
STARS = {"name": "stars", "kind": "rating", "prompt": "How many stars? {input}", "labels": ["1", "2", "3"]}
TITLES = {"name": "titles", "kind": "generation", "prompt": "Title of: {input}"}
USERS = {"t0": "train", "t1": "train", "none": "test", "one": "test", "new": "test"}
Row = tuple[str, str, str, str, str]
"""user, id, time, input, output"""


def write(folder: Path, history: Sequence[Row], queries: Sequence[Row] = (), task: Any = STARS, users: Any = USERS) -> Path:
    """A native data set."""
    folder.mkdir()
    fields = ("user", "id", "time", "input", "output")
    lines = {
        "users.jsonl": [{"user": user, "split": split} for user, split in users.items()],
        "history.jsonl": [dict(zip(fields, row, strict=True)) for row in history],
        "queries.jsonl": [dict(zip(fields, row, strict=True)) for row in queries],
    }
    (folder / "task.json").write_text(json.dumps(task))
    for name, entries in lines.items():
        (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def films(*users: str) -> list[Row]:
    return [(user, f"r{i}", str(2000 + i), f"rain {i} of {user}", str(1 + (i + at) % 3)) for at, user in enumerate(users) for i in range(5)]


QUERIES: list[Row] = [(user, f"q{i}", str(2010 + i), f"a film {i}", "2") for user in ("none", "one", "new") for i in range(2)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training users, and new users with five records, one record, and none."""
    return write(tmp_path_factory.mktemp("data") / "stars", [*films("t0", "t1", "new"), ("one", "r", "2000", "a film", "3")], QUERIES)


@pytest.fixture(scope="module")
def bundle(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    cache = ["--set", f"cache={folder / 'cache'}"]
    assert (
        run(["learn", str(data), "--llm", "fake:rule=labels", "--out", str(folder / "b"), *SMALL, "--set", "constrain=true", *cache]) == 0
    )
    assert run(["fit", str(data), "--llm", "fake:rule=labels", "--bundle", str(folder / "b"), *cache]) == 0
    return folder / "b"


class Told:
    """How a command ended."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.lines = code, out, err.splitlines()

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def fault(self) -> str:
        """The one line of a user's fault."""
        assert self.code == 2
        return self.only

    @property
    def only(self) -> str:
        """The one line of a command that gave nothing."""
        assert (self.out, len(self.lines)) == ("", 1), (self.out, self.lines)
        return self.lines[0].removeprefix("hydra-llm: ")


Hydra = Callable[..., Told]


@pytest.fixture
def hydra(capsys: pytest.CaptureFixture[str]) -> Hydra:
    """Run one command line in this process."""

    def call(*arguments: object) -> Told:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return Told(code, *capsys.readouterr())

    return call


# ---- users


def test_an_unknown_user_is_named(hydra: Hydra, data: Path, bundle: Path) -> None:
    asked = hydra("ask", "--bundle", bundle, "--llm", "fake:echo", "--user", "nobody", "rain")
    assert asked.fault == "unknown user 'nobody': 5 users are known (t0, t1, one, …)"
    before = (bundle / "config.json").read_bytes()
    fitted = hydra("fit", data, "--bundle", bundle, "--llm", "fake:echo", "--user", "new", "--user", "nobody")
    assert fitted.fault == "unknown user 'nobody': the data set has 5 users, see `hydra-llm data check`"
    assert (bundle / "config.json").read_bytes() == before


@pytest.mark.parametrize("user", ["none", "one", "new"])
def test_users_of_any_history_are_answered(hydra: Hydra, bundle: Path, user: str) -> None:
    told = hydra("ask", "--bundle", bundle, "--llm", "fake:rule=labels", "--user", user, "--json", "rain")
    assert (told.code, told.lines) == (0, [])
    assert told.json["answer"] in STARS["labels"]
    assert len(told.json["records"]) == {"none": 0, "one": 1, "new": 2}[user]


def test_users_without_records_are_told_and_keep_their_place(hydra: Hydra, tmp_path: Path) -> None:
    data, bundle = write(tmp_path / "data", films("t0", "new"), QUERIES), tmp_path / "bundle"
    learned = hydra("learn", data, "--llm", "fake:echo", "--out", bundle, *SMALL)
    assert learned.lines == ["1 of 2 users have no records and were left out (t1)"]
    fitted = hydra("fit", data, "--llm", "fake:echo", "--bundle", bundle, "--user", "none", "--user", "new")
    assert fitted.lines == ["1 of 2 users have no records: they get the shared head (none)"]
    told = hydra("bench", "run", data, "--llm", "fake:rule=labels", "--bundle", bundle, "--out", tmp_path / "run", "--json")
    assert told.lines[0].startswith("1 of 3 new users have no head and are left out: run `hydra-llm fit")
    assert {row["queries"] for row in told.json} == {4}
    assert {row["failed"] for row in told.json} == {0}


@pytest.mark.parametrize("count", [0, 1])
def test_training_users_with_next_to_nothing(hydra: Hydra, tmp_path: Path, count: int) -> None:
    data = write(tmp_path / "data", [(user, "r", "2000", "a film", "3") for user in ("t0", "t1")][: 2 * count])
    told = hydra("learn", data, "--llm", "fake:echo", "--out", tmp_path / "bundle", *SMALL, "--json")
    if count:
        assert (told.code, told.lines, told.json["llm_calls"]) == (0, [], 0)  # a single record has nothing to see
    else:
        assert told.fault == "no training user has records: users.jsonl needs users with split 'train'"
        assert not (tmp_path / "bundle").exists()


# ---- texts


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "the text to answer is empty"),
        (" \n ", "the text to answer is empty"),
        ("rain \0", "the text to answer holds a NUL character: remove it"),
        ("\udcff rain", "the text to answer holds half of a surrogate pair, which is no character: remove it"),
    ],
)
def test_a_text_that_is_none(hydra: Hydra, bundle: Path, text: str, line: str) -> None:
    assert hydra("ask", "--bundle", bundle, "--llm", "fake:echo", "--user", "new", text).fault == line


def test_a_text_beyond_both_windows_is_cut_and_told_once_each(
    hydra: Hydra, bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The encoder tells once in a process, the prompt once in an answer."""
    monkeypatch.setattr("hydra_llm.model.encoder._told_of_cut", False)
    for start in ("one", "two"):
        told = hydra("ask", "--bundle", bundle, "--llm", "fake:echo", "--user", "new", "--json", f"{start} " + "word " * 5000)
        assert told.code == 0
        assert len([line for line in told.lines if "the text of query 'asked' cut at its end" in line]) == 1
        assert sum(len(message["content"]) for message in told.json["prompt"]) < 3.5 * 1536
    cuts = [record.getMessage() for record in caplog.records if record.name.startswith("hydra_llm")]
    assert cuts == ["1 text(s) longer than the encoder's window were cut to 256 tokens (told once)"]


BROKEN: dict[str, tuple[list[Row], str]] = {
    "unknown label": ([("t0", "r", "2000", "x", "7")], "history.jsonl:1: field 'output': '7' is not one of the task's labels"),
    "duplicate id": (films("t0")[:2] + films("t0")[:1], "history.jsonl:3: field 'id': user 't0' has the id 'r0' twice"),
    "empty text": ([("t0", "r", "2000", " ", "1")], "history.jsonl:1: field 'input': is empty"),
    "nul": ([("t0", "r", "2000", "a\0b", "1")], "history.jsonl:1: field 'input': holds a NUL character: remove it"),
    "time": (
        [("t0", "r", "soon", "a", "1")],
        "history.jsonl:1: field 'time': 'soon' is no time: write ISO 8601, a year, or seconds since 1970",
    ),
    "unknown user": ([("x", "r", "2000", "a", "1")], "history.jsonl:1: field 'user': 'x' is not among the data set's users"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_is_named_by_every_command_that_reads_it(hydra: Hydra, bundle: Path, tmp_path: Path, name: str) -> None:
    history, line = BROKEN[name]
    data = write(tmp_path / "data", history)
    wanted = f"{tmp_path / 'data'}/{line}"
    assert hydra("data", "check", data).fault == wanted
    assert hydra("learn", data, "--llm", "fake:echo", "--out", tmp_path / "bundle", *SMALL).fault == wanted
    assert hydra("fit", data, "--llm", "fake:echo", "--bundle", bundle).fault == wanted
    assert hydra("bench", "run", data, "--llm", "fake:echo", "--bundle", bundle, "--out", tmp_path / "run").fault == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) in (["data"], ["caches", "data"])


SCRIPTS = ["😀👩‍👩‍👧🏳️‍🌈", "مرحبا بالعالم \u202e שלום", "\u200f\u200e ا", "\u0301\u0302 x", "日本語の本"]


@pytest.mark.parametrize("texts", [SCRIPTS, ["the of and to", "of", "the", "and to", "to"]], ids=["scripts", "stop words"])
def test_any_script_and_stop_words_alone_go_the_whole_way(hydra: Hydra, tmp_path: Path, texts: list[str]) -> None:
    user, bundle = f"أحمد 😀 {texts[1]}", tmp_path / "bundle"
    users = {"t0": "train", "t1": "train", user: "test"}
    history = [(name, f"r{i}", str(2000 + i), texts[i], texts[-1 - i]) for name in users for i in range(5)]
    data = write(tmp_path / "data", history, [(user, texts[0], "2010", texts[2], texts[0])], TITLES, users)
    assert hydra("data", "check", data).code == 0
    assert hydra("learn", data, "--llm", "fake:echo", "--out", bundle, *SMALL).code == 0
    assert hydra("fit", data, "--llm", "fake:echo", "--bundle", bundle).code == 0
    told = hydra("ask", "--llm", "fake:echo", "--bundle", bundle, "--user", user, "--json", texts[1])
    assert (told.code, told.json["user"]) == (0, user)
    assert len(told.json["records"]) == 2
    assert texts[1] in told.json["prompt"][-1]["content"]
    rows = hydra("bench", "run", data, "--llm", "fake:echo", "--bundle", bundle, "--out", tmp_path / "run", "--json").json
    assert all((row["queries"], row["failed"], row["unparsable"]) == (1, 0, 0) for row in rows)


# ---- answers of the LLM


@pytest.mark.parametrize(
    "said", ["", "I'm sorry, but I can't help with that.", "€€€ \0", "\ud83d cut"], ids=["empty", "refuses", "nul", "half"]
)
def test_an_answer_that_is_none_is_counted_and_the_run_goes_on(hydra: Hydra, data: Path, bundle: Path, tmp_path: Path, said: str) -> None:
    (tmp_path / "said.json").write_text(json.dumps({"": said}))
    llm = f"fake:script={tmp_path / 'said.json'}"
    told = hydra("ask", "--llm", llm, "--bundle", bundle, "--user", "new", "--json", "rain")
    assert (told.code, told.lines) == (0, ["2 of 2 answers could not be parsed"])
    assert told.json["answer"] in STARS["labels"]  # the adapter knows the user without the LLM
    assert hydra("learn", data, "--llm", llm, "--out", tmp_path / "bundle", *SMALL).code == 0
    rows = {
        row["method"]: row
        for row in hydra("bench", "run", data, "--llm", llm, "--bundle", bundle, "--out", tmp_path / "run", "--json").json
    }
    assert (rows["rag"]["unparsable"], rows["rag"]["failed"], rows["rag"]["metrics"]["mae"][0]) == (6, 0, 1.0)  # the farthest end from a 2
    assert rows["hydra"]["unparsable"] == 0
