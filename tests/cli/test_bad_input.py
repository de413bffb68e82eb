"""Bad input: each fault of a text, a file, an endpoint, a disk or a key is one line of error, or
is recorded and the run continues.
"""

import json
import re
import shutil
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

from hydra_llm import learn
from hydra_llm.bundle import Bundle
from hydra_llm.cli.main import run
from hydra_llm.config import load_settings
from tests.learning import ONE_STRENGTH
from tests.marks import slow_except
from tests.waiting import FOREVER


def sets(*settings: str) -> list[str]:
    """`--set` for each of these settings."""
    return [word for setting in settings for word in ("--set", setting)]


ECHO, LABELS = ["--llm", "fake:echo"], ["--llm", "fake:rule=labels"]
SMALL_RUN = {
    "research.epochs": 0,
    "llm.samples": 2,
    "training.queries_per_user": 1,
    "retrieval.retrieved": 2,
    "retrieval.k": 1,
}
SMALL = sets(*(f"{name}={value}" for name, value in SMALL_RUN.items()))
STARS = {
    "name": "stars",
    "kind": "rating",
    "prompt": "How many stars? {input}",
    "labels": ["1", "2", "3"],
}
TITLES = {"name": "titles", "kind": "generation", "prompt": "Title of: {input}"}
USERS = {"t0": "train", "t1": "train", "none": "test", "one": "test", "new": "test"}
Row = tuple[str, str, str, str, str]
"""user, id, time, input, output"""


def write(
    folder: Path,
    history: Sequence[Row],
    queries: Sequence[Row] = (),
    task: Any = STARS,
    users: Any = USERS,
) -> Path:
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


def ratings(*users: str) -> list[Row]:
    return [
        (user, f"r{i}", str(2000 + i), f"rain {i} of {user}", str(1 + (i + at) % 3))
        for at, user in enumerate(users)
        for i in range(5)
    ]


QUERIES: list[Row] = [
    (user, f"q{i}", str(2010 + i), f"a film {i}", "2")
    for user in ("none", "one", "new")
    for i in range(2)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training users, and new users with five records, one record, and none."""
    return write(
        tmp_path_factory.mktemp("data") / "stars",
        [*ratings("t0", "t1", "new"), ("one", "r", "2000", "a film", "3")],
        QUERIES,
    )


@pytest.fixture(scope="module")
def bundle(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    cache = sets(f"llm.cache={folder / 'cache'}")
    # What is told of the LLM's answers is tested, whatever weight its votes have.
    chosen = {"llm.cache": folder / "cache", "llm.constrain": True, "ask": "always"}
    settings = load_settings(**chosen, **SMALL_RUN)
    learn(data, LABELS[1], settings, out=folder / "b", strengths=ONE_STRENGTH)
    assert run(["fit", str(data), *LABELS, "--bundle", str(folder / "b"), *cache]) == 0
    return folder / "b"


PROGRESS = re.compile(
    r"[a-z ]+: \d+(/\d+)?(, [\d.e+-]+/s(, [\d.]+ (s|min|h) left)?|, took [\d.]+ (s|min|h))?"
)


DOUBTS = re.compile(r"data (warning|error): .+")


def without_progress(err: str) -> list[str]:
    """The lines of stderr without progress, which a slow machine prints."""
    return [line for line in err.splitlines() if not PROGRESS.fullmatch(line)]


class Outcome:
    """How a command ended."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, lines = code, out, without_progress(err)
        self.doubts = [line for line in lines if DOUBTS.fullmatch(line)]  # on the data (`learn`)
        self.lines = [line for line in lines if line not in self.doubts]

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of an error that the user can fix."""
        assert self.code == 2
        return self.only_line

    @property
    def only_line(self) -> str:
        """The one line of stderr, without output."""
        assert (self.out, len(self.lines)) == ("", 1), (self.out, self.lines)
        return self.lines[0].removeprefix("hydra-llm: ")


Hydra = Callable[..., Outcome]


@pytest.fixture
def hydra(capsys: pytest.CaptureFixture[str]) -> Hydra:
    """Run one command line in this process."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


# ---- places


def test_an_unwritable_bundle_fails_before_the_llm_is_called(
    hydra: Hydra, data: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    learned = hydra("learn", data, "--llm", "fake:fail=refused", "--out", taken, *SMALL)
    assert learned.error == f"{taken}: is a file: a bundle is a folder, choose another name"
    assert taken.read_text() == "mine"


@pytest.mark.slow
def test_a_run_of_another_bundle_is_refused(
    hydra: Hydra, data: Path, bundle: Path, tmp_path: Path
) -> None:
    other, cache = tmp_path / "other", sets(f"llm.cache={tmp_path / 'cache'}")
    shutil.copytree(bundle, other)
    bench = ["bench", "run", data, *LABELS, "--methods", "rag", "--out", tmp_path / "run", *cache]
    assert hydra(*bench, "--bundle", other, "--limit", 1).code == 0
    learned = Bundle.load(other)
    assert learned.adapter is not None
    learned.adapter.scale *= 2
    learned.save(other)
    assert "holds another run (weights.0:" in hydra(*bench, "--bundle", other, "--limit", 1).error


OTHER_TASKS: dict[str, dict[str, Any]] = {
    "generation": {"name": "other", "kind": "generation", "prompt": "{input}"},
    "classification": {
        "name": "other",
        "kind": "classification",
        "prompt": "{input}",
        "labels": ["1", "2", "3"],
    },
    "labels": {
        "name": "other",
        "kind": "rating",
        "prompt": "{input}",
        "labels": ["1", "2", "3", "4"],
    },
}


@pytest.mark.parametrize("task", slow_except(OTHER_TASKS, "labels"))
def test_data_of_another_task_than_the_bundle_is_refused(
    hydra: Hydra, bundle: Path, tmp_path: Path, task: str
) -> None:
    data = write(tmp_path / "data", ratings("new"), QUERIES, OTHER_TASKS[task])
    line = "the data set's task 'other' is not the bundle's 'stars': kind and labels must agree"
    assert hydra("fit", data, "--bundle", bundle, *ECHO).error == line
    bench = hydra("bench", "run", data, "--bundle", bundle, *ECHO, "--out", tmp_path / "run")
    assert bench.error == line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_queries_before_fitted_records_use_the_shared_head(hydra: Hydra, tmp_path: Path) -> None:
    queries = [("new", "q0", "2002", "a film", "2"), ("new", "q1", "2020", "a film", "2")]
    folder = write(tmp_path / "data", ratings("t0", "t1", "new"), queries)
    bundle, cache = tmp_path / "b", sets(f"llm.cache={tmp_path / 'cache'}")
    assert hydra("learn", folder, *LABELS, "--out", bundle, *SMALL, *cache).code == 0
    new = ["--user", "new", "--json"]
    fitted = hydra("fit", folder, *LABELS, "--bundle", bundle, *new, *cache)
    assert fitted.code == 0
    solved = fitted.json["seconds_of_the_solver"]
    assert solved
    assert all(0 <= took <= fitted.json["seconds"][stage] + 0.001 for stage, took in solved.items())
    bench = ["bench", "run", folder, *LABELS, "--bundle", bundle, "--out", tmp_path / "run"]
    result = hydra(*bench, "--methods", "hydra", *cache)
    assert result.code == 0
    note = "1 of 2 queries precede records that their user's head was fitted on: the shared head"
    assert f"{note} answers them" in "\n".join(result.lines)


# ---- users


def test_an_unknown_user_is_named(hydra: Hydra, data: Path, bundle: Path) -> None:
    answered = hydra("ask", "--bundle", bundle, *ECHO, "--user", "nobody", "rain")
    some = r"unknown user 'nobody': 5 users are known \((\w+), (\w+), (\w+), …\)"
    named = re.fullmatch(some, answered.error)  # in no order: a bundle may have a million users
    assert named
    known = set(Bundle.load(bundle).records)
    assert len(known) == 5
    assert len(known.intersection(named.groups())) == 3
    before = (bundle / "config.json").read_bytes()
    fitted = hydra("fit", data, "--bundle", bundle, *ECHO, "--user", "new", "--user", "nobody")
    hint = "the data set has 5 users, see `hydra-llm data check`"
    assert fitted.error == f"unknown user 'nobody': {hint}"
    assert (bundle / "config.json").read_bytes() == before


@pytest.mark.parametrize("user", ["none", "one", "new"])
def test_users_with_any_number_of_records_are_answered(
    hydra: Hydra, bundle: Path, user: str
) -> None:
    result = hydra("ask", "--bundle", bundle, *LABELS, "--user", user, "--json", "rain")
    assert (result.code, result.lines) == (0, [])
    assert result.json["answer"] in STARS["labels"]
    assert len(result.json["records"]) == {"none": 0, "one": 1, "new": 2}[user]


@pytest.mark.slow
def test_users_without_records_get_the_shared_head(hydra: Hydra, tmp_path: Path) -> None:
    data, bundle = write(tmp_path / "data", ratings("t0", "new"), QUERIES), tmp_path / "bundle"
    learned = hydra("learn", data, *ECHO, "--out", bundle, *SMALL)
    assert learned.lines[0] == "1 of 2 users have no records and were left out (t1)"
    fitted = hydra("fit", data, *ECHO, "--bundle", bundle, "--user", "none", "--user", "new")
    assert fitted.lines == ["1 of 2 users have no records: they get the shared head (none)"]
    result = hydra(
        "bench", "run", data, *ECHO, "--bundle", bundle, "--out", tmp_path / "run", "--json"
    )
    assert result.lines[0].startswith(
        "1 of 3 new users have no head and are left out: run `hydra-llm fit"
    )
    assert {row["queries"] for row in result.json} == {4}
    failed = {row["method"]: row["failed"] for row in result.json if row["failed"]}
    # It learns from answers that can be parsed, and this LLM gives none.
    assert failed.pop("bbox-adapter@8") == 4
    # No other user with records is evaluated beside the one who has some.
    of_others = (*(f"mismatched@{k},8" for k in (1, 2, 4)), "scorer-mismatched")
    assert failed == dict.fromkeys(of_others, 2)


@pytest.mark.parametrize("count", [0, 1])
def test_training_users_with_one_record_or_none(hydra: Hydra, tmp_path: Path, count: int) -> None:
    data = write(
        tmp_path / "data",
        [(user, "r", "2000", "a film", "3") for user in ("t0", "t1")][: 2 * count],
    )
    result = hydra("learn", data, *ECHO, "--out", tmp_path / "bundle", *SMALL, "--json")
    if count:
        # a single record has no earlier ones to retrieve
        assert (result.code, result.json["llm_calls"]) == (0, 0)
        assert result.lines == [
            "no reranker was learned: no retrieved record changed what the LLM's answer was worth",
            "the prior of the adapter's heads is isotropic (2 users are too few to learn how users "
            "differ)",
        ]
        judged = hydra("data", "check", data, "--json").json["verdicts"]
        assert result.doubts == [
            f"data {own['severity']}: {own['check']}: {own['message']}"
            for own in judged
            if own["check"] != "new users"
        ]
        assert result.doubts[0].startswith("data error: answers: all are '3'")
    else:
        needs = "users.jsonl needs users with split 'train'"
        assert result.error == f"no training user has records: {needs}"
        assert not (tmp_path / "bundle").exists()


# ---- texts


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "the text to answer is empty"),
        (" \n ", "the text to answer is empty"),
        ("rain \0", "the text to answer holds a NUL character: remove it"),
        (
            "\udcff rain",
            "the text to answer holds half of a surrogate pair, which is no character: remove it",
        ),
    ],
)
def test_an_invalid_text_is_refused(hydra: Hydra, bundle: Path, text: str, line: str) -> None:
    assert hydra("ask", "--bundle", bundle, *ECHO, "--user", "new", text).error == line


def test_a_long_text_is_cut_with_one_note_each(
    hydra: Hydra, bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The encoder warns once in a process, the prompt once in an answer."""
    monkeypatch.setattr("hydra_llm.model.encoder._warned_of_cut", False)
    for start in ("one", "two"):
        result = hydra(
            "ask",
            "--bundle",
            bundle,
            *ECHO,
            "--user",
            "new",
            "--json",
            f"{start} " + "word " * 5000,
        )
        assert result.code == 0
        note = "the text of query 'asked' cut at its end"
        assert len([line for line in result.lines if note in line]) == 1
        assert sum(len(message["content"]) for message in result.json["prompt"]) < 3.5 * 1536
    cuts = [record.getMessage() for record in caplog.records if record.name.startswith("hydra_llm")]
    assert cuts == ["1 text(s) longer than the encoder's window were cut to 256 tokens (told once)"]


BROKEN: dict[str, tuple[list[Row], str]] = {
    "unknown label": (
        [("t0", "r", "2000", "x", "7")],
        "history.jsonl:1: field 'output': '7' is not one of the task's labels",
    ),
    "duplicate id": (
        ratings("t0")[:2] + ratings("t0")[:1],
        "history.jsonl:3: field 'id': user 't0' has the id 'r0' twice",
    ),
    "empty text": ([("t0", "r", "2000", " ", "1")], "history.jsonl:1: field 'input': is empty"),
    "nul": (
        [("t0", "r", "2000", "a\0b", "1")],
        "history.jsonl:1: field 'input': holds a NUL character: remove it",
    ),
    "time": (
        [("t0", "r", "soon", "a", "1")],
        (
            "history.jsonl:1: field 'time': 'soon' is no time: write ISO 8601, a year, or seconds"
            " since 1970"
        ),
    ),
    "unknown user": (
        [("x", "r", "2000", "a", "1")],
        "history.jsonl:1: field 'user': 'x' is not among the data set's users",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_every_command_names_a_broken_line(
    hydra: Hydra, bundle: Path, tmp_path: Path, name: str
) -> None:
    history, line = BROKEN[name]
    data = write(tmp_path / "data", history)
    wanted = f"{tmp_path / 'data'}/{line}"
    assert hydra("data", "check", data).error == wanted
    assert hydra("learn", data, *ECHO, "--out", tmp_path / "bundle", *SMALL).error == wanted
    assert hydra("fit", data, *ECHO, "--bundle", bundle).error == wanted
    bench = hydra("bench", "run", data, *ECHO, "--bundle", bundle, "--out", tmp_path / "run")
    assert bench.error == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) in (["data"], ["caches", "data"])


SCRIPTS = [
    "😀👩‍👩‍👧🏳️‍🌈",
    "مرحبا بالعالم \u202e שלום",
    "\u200f\u200e ا",
    "\u0301\u0302 x",
    "日本語の本",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "texts",
    [SCRIPTS, ["the of and to", "of", "the", "and to", "to"]],
    ids=["scripts", "stop words"],
)
def test_any_script_and_stop_words_work_end_to_end(
    hydra: Hydra, tmp_path: Path, texts: list[str]
) -> None:
    user, bundle = f"أحمد 😀 {texts[1]}", tmp_path / "bundle"
    users = {"t0": "train", "t1": "train", user: "test"}
    history = [
        (name, f"r{i}", str(2000 + i), texts[i], texts[-1 - i]) for name in users for i in range(5)
    ]
    data = write(
        tmp_path / "data", history, [(user, texts[0], "2010", texts[2], texts[0])], TITLES, users
    )
    assert hydra("data", "check", data).code == 0
    assert hydra("learn", data, *ECHO, "--out", bundle, *SMALL).code == 0
    assert hydra("fit", data, *ECHO, "--bundle", bundle).code == 0
    result = hydra("ask", *ECHO, "--bundle", bundle, "--user", user, "--json", texts[1])
    assert (result.code, result.json["user"]) == (0, user)
    assert len(result.json["records"]) == 2
    assert texts[1] in result.json["prompt"][-1]["content"]
    rows = hydra(
        "bench", "run", data, *ECHO, "--bundle", bundle, "--out", tmp_path / "run", "--json"
    ).json
    alone = [row for row in rows if row["method"].startswith("mismatched")]  # no other user
    assert [(row["queries"], row["failed"]) for row in alone] == [(1, 1)] * 3
    rows = [row for row in rows if row not in alone]
    assert all((row["queries"], row["failed"], row["unparsable"]) == (1, 0, 0) for row in rows)


# ---- answers of the LLM


@pytest.mark.slow
@pytest.mark.parametrize(
    "reply",
    ["", "I'm sorry, but I can't help with that.", "€€€ \0", "\ud83d cut"],
    ids=["empty", "refuses", "nul", "half"],
)
def test_unparsable_answers_are_counted_and_the_run_continues(
    hydra: Hydra, data: Path, bundle: Path, tmp_path: Path, reply: str
) -> None:
    (tmp_path / "reply.json").write_text(json.dumps({"": reply}))
    llm = f"fake:script={tmp_path / 'reply.json'}"
    result = hydra("ask", "--llm", llm, "--bundle", bundle, "--user", "new", "--json", "rain")
    assert (result.code, result.lines) == (0, ["2 of 2 answers could not be parsed"])
    assert result.json["answer"] in STARS["labels"]  # the adapter knows the user without the LLM
    assert hydra("learn", data, "--llm", llm, "--out", tmp_path / "bundle", *SMALL).code == 0
    rows = {
        row["method"]: row
        for row in hydra(
            "bench",
            "run",
            data,
            "--llm",
            llm,
            "--bundle",
            bundle,
            "--out",
            tmp_path / "run",
            "--json",
        ).json
    }
    rag = rows["rag@1"]
    assert (rag["unparsable"], rag["failed"], rag["metrics"]["mae"][0]) == (
        6,
        0,
        1.0,
    )  # the farthest end from a 2
    assert rows["hydra@1,8"]["unparsable"] == 0


# ---- endpoints


Behaviour = Callable[[int], tuple[int, dict[str, str], str] | None]
"""Number of earlier requests → status, headers, reply; None cuts the connection."""


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect: only the command's own lines count."""


class Endpoint:
    """A real HTTP endpoint on loopback that keeps the requests."""

    def __init__(self, behaviour: Behaviour):
        self.requests: list[str] = []
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                with lock:
                    before = len(outer.requests)
                    outer.requests.append(body)
                answer = behaviour(before)
                if answer is None:
                    self.close_connection = True
                    return
                status, headers, reply = answer
                choice = {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": reply},
                }
                content = json.dumps(
                    {"choices": [choice]} if status == 200 else {"error": {"message": reply}}
                ).encode()
                self.send_response(status)
                for name, value in {
                    "Content-Type": "application/json",
                    "Content-Length": str(len(content)),
                    **headers,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = QuietServer(("127.0.0.1", 0), Handler)
        self.llm = f"openai:m@http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()


@pytest.fixture
def serve() -> Iterator[Callable[[Behaviour], Endpoint]]:
    started: list[Endpoint] = []

    def start(behaviour: Behaviour) -> Endpoint:
        started.append(Endpoint(behaviour))
        return started[-1]

    yield start
    for endpoint in started:
        endpoint.server.shutdown()
        endpoint.server.server_close()


Serve = Callable[[Behaviour], Endpoint]


def hang(before: int) -> tuple[int, dict[str, str], str]:
    time.sleep(FOREVER)
    return 200, {}, "2"


ONCE = sets("llm.retries=0")
BAD_ENDPOINTS: dict[str, tuple[Behaviour, int, str]] = {
    "401": (lambda _: (401, {}, "wrong key"), 2, "HTTP 401"),
    "404": (lambda _: (404, {}, "no such model"), 2, "HTTP 404"),
    "500": (lambda _: (500, {}, "out of order"), 1, "HTTP 500"),
    "hang": (hang, 1, "no answer within 0.2 s"),
    "cut": (lambda _: None, 1, "no connection"),
}


@pytest.mark.parametrize("name", slow_except(BAD_ENDPOINTS, "401", "500"))
def test_a_broken_endpoint_is_one_line_in_every_command(
    hydra: Hydra, serve: Serve, data: Path, bundle: Path, tmp_path: Path, name: str
) -> None:
    behaviour, code, line = BAD_ENDPOINTS[name]
    quick = [*ONCE, *sets("llm.timeout=0.2")] if name == "hang" else ONCE
    llm, out, log = serve(behaviour).llm, tmp_path / "bundle", tmp_path / "run"
    for command in (
        ["ask", "--bundle", bundle, "--llm", llm, "--user", "new", *quick, "rain"],
        ["learn", data, "--llm", llm, "--out", out, *SMALL, *quick],
        [
            "bench",
            "run",
            data,
            "--bundle",
            bundle,
            "--llm",
            llm,
            "--out",
            log,
            "--methods",
            "rag,user-majority",
            *quick,
        ],
    ):
        result = hydra(*command)
        assert result.code == code, result.lines
        assert line in result.only_line
    assert not out.exists()
    errors = [
        json.loads(sample)["error"] for sample in (log / "samples.jsonl").read_text().splitlines()
    ]
    assert len([error for error in errors if line in error]) == 6  # recorded, not lost


def test_a_repeat_retries_only_the_calls_that_failed(
    hydra: Hydra, serve: Serve, data: Path, bundle: Path, tmp_path: Path
) -> None:
    flawed = True
    endpoint = serve(
        lambda before: (500, {}, "out of order") if flawed and before % 3 == 1 else (200, {}, "2")
    )
    run_ = [
        "bench",
        "run",
        data,
        "--llm",
        endpoint.llm,
        "--bundle",
        bundle,
        "--out",
        tmp_path / "run",
        "--methods",
        "rag",
        *ONCE,
        "--json",
    ]
    result = hydra(*run_)
    assert result.code == 0
    assert re.match(
        r"2 of 6 answers failed, the first \S+ on \w+'s \S+: m at http://127.0.0.1:\d+/v1/:"
        r" HTTP 500.*; the same command retries them$",
        result.lines[0],
    )
    assert result.json[0]["failed"] == 2
    flawed, first = False, len(endpoint.requests)
    assert hydra(*run_).json[0]["failed"] == 0
    assert len(endpoint.requests) - first == 2
    assert hydra(*run_).json[0]["failed"] == 0
    assert len(endpoint.requests) - first == 2


def test_rate_limited_requests_are_retried(hydra: Hydra, serve: Serve, bundle: Path) -> None:
    endpoint = serve(
        lambda before: (429, {"Retry-After": "0.01"}, "slow down") if before < 2 else (200, {}, "2")
    )
    result = hydra(
        "ask", "--bundle", bundle, "--llm", endpoint.llm, "--user", "new", "--json", "rain"
    )
    assert (result.code, result.lines, result.json["usage"]["failed"]) == (0, [], 0)
    assert len(endpoint.requests) == 4


# ---- the machine


FULL = """
import resource, signal, sys
from hydra_llm.cli.main import run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(run(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 40_000], ids=["from the start", "in the middle"])
def test_a_full_disk_disables_only_the_cache(
    serve: Serve, bundle: Path, tmp_path: Path, limit: int
) -> None:
    """Every write fails: the answer is printed, with one warning, and the cache stays intact."""
    endpoint = serve(lambda _: (200, {}, "2"))
    command = [
        "ask",
        "--bundle",
        str(bundle),
        "--llm",
        endpoint.llm,
        "--user",
        "new",
        *sets(f"llm.cache={tmp_path / 'cache'}", "llm.samples=8"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(limit), *command, "rain " * 900],
        capture_output=True,
        text=True,
        timeout=FOREVER,
    )
    assert (done.returncode, done.stdout.strip() in STARS["labels"]) == (0, True), done.stderr
    assert (
        len(re.findall(r"llm\.sqlite: cannot keep answers .* the run goes on without", done.stderr))
        == 1
    )
    assert "Traceback" not in done.stderr
    assert run([*command, "rain " * 900]) == 0
    with sqlite3.connect(tmp_path / "cache" / "llm.sqlite") as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert file.execute("SELECT count(*) FROM answers").fetchone() == (8,)


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        "from hydra_llm.cli.main import main; main()",
        *map(str, arguments),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_processes_share_a_cache_and_one_is_interrupted(
    hydra: Hydra, serve: Serve, data: Path, tmp_path: Path
) -> None:
    """A real SIGINT after three answers; then the same command continues beside another process:
    no answer is requested or stored twice.
    """
    fast = threading.Event()

    def behave(before: int) -> tuple[int, dict[str, str], str]:
        if before >= 3:
            fast.wait(FOREVER)
        return 200, {}, "2" if before % 2 else "3"

    endpoint, cache = serve(behave), tmp_path / "cache"
    learn = [
        "learn",
        data,
        "--llm",
        endpoint.llm,
        *SMALL,
        *sets("llm.concurrency=1", f"llm.cache={cache}"),
    ]
    process = start(*learn, "--out", tmp_path / "one")
    while len(endpoint.requests) < 4:
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=FOREVER)
    assert (process.returncode, out, Outcome(130, out, err).lines) == (
        130,
        "",
        ["hydra-llm: stopped; the same command continues"],
    )
    assert not (tmp_path / "one").exists()
    answered, pending = endpoint.requests[:3], endpoint.requests[3:]
    assert len(pending) == 1

    fast.set()
    again = [start(*learn, "--out", tmp_path / name) for name in ("one", "two")]
    ends = [(*process.communicate(timeout=FOREVER), process.returncode) for process in again]
    assert [code for _, _, code in ends] == [0, 0], ends
    assert not set(endpoint.requests[4:]) & set(
        answered
    )  # no answer from before the interrupt is requested again
    with sqlite3.connect(cache / "llm.sqlite") as file:
        kept = file.execute(
            "SELECT count(*), count(DISTINCT request || ':' || candidate) FROM answers"
        ).fetchone()
    assert kept == (len(set(endpoint.requests)),) * 2

    before = len(endpoint.requests)
    result = hydra(*learn, "--out", tmp_path / "three", "--json")
    assert (result.code, result.json["llm_calls"], len(endpoint.requests)) == (0, 0, before)
    one, two, three = (
        json.loads((tmp_path / name / "config.json").read_text())["report"]
        for name in ("one", "two", "three")
    )
    same = [
        {name: report.get(name) for name in ("reranker", "adapter")} for report in (one, two, three)
    ]
    assert same[0] == same[1] == same[2]
