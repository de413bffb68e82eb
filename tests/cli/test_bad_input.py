"""A user with bad luck: each fault of a text, a file, an endpoint, a disk or a key ends in one
line, or is recorded and the run goes on.
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

from hydra_llm.bundle import Bundle
from hydra_llm.cli.main import run
from tests.waiting import FOREVER

SMALL = [
    "--set",
    "epochs=0",
    "--set",
    "samples=2",
    "--set",
    "retrieved=2",
    "--set",
    "queries_per_user=1",
    "--set",
    "k=1",
]
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


def films(*users: str) -> list[Row]:
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
        [*films("t0", "t1", "new"), ("one", "r", "2000", "a film", "3")],
        QUERIES,
    )


@pytest.fixture(scope="module")
def bundle(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    cache = ["--set", f"cache={folder / 'cache'}"]
    assert (
        run(
            [
                "learn",
                str(data),
                "--llm",
                "fake:rule=labels",
                "--out",
                str(folder / "b"),
                *SMALL,
                "--set",
                "constrain=true",
                *cache,
            ]
        )
        == 0
    )
    assert (
        run(["fit", str(data), "--llm", "fake:rule=labels", "--bundle", str(folder / "b"), *cache])
        == 0
    )
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


# ---- places


def test_an_unwritable_bundle_fails_before_the_llm_is_called(
    hydra: Hydra, data: Path, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    learned = hydra("learn", data, "--llm", "fake:fail=refused", "--out", taken, *SMALL)
    assert learned.fault == f"{taken}: is a file: a bundle is a folder, choose another name"
    assert taken.read_text() == "mine"


@pytest.mark.slow
def test_a_run_of_another_bundle_is_refused(
    hydra: Hydra, data: Path, bundle: Path, tmp_path: Path
) -> None:
    other, cache = tmp_path / "other", ["--set", f"cache={tmp_path / 'cache'}"]
    shutil.copytree(bundle, other)
    bench = [
        "bench",
        "run",
        data,
        "--llm",
        "fake:rule=labels",
        "--methods",
        "rag",
        "--out",
        tmp_path / "run",
        *cache,
    ]
    assert hydra(*bench, "--bundle", other, "--limit", 1).code == 0
    learned = Bundle.load(other)
    assert learned.adapter is not None
    learned.adapter.scale *= 2
    learned.save(other)
    assert "holds another run (weights.0:" in hydra(*bench, "--bundle", other, "--limit", 1).fault


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


@pytest.mark.parametrize("task", OTHER_TASKS)
def test_data_of_another_task_than_the_bundle_is_refused(
    hydra: Hydra, bundle: Path, tmp_path: Path, task: str
) -> None:
    data = write(tmp_path / "data", films("new"), QUERIES, OTHER_TASKS[task])
    line = "the data set's task 'other' is not the bundle's 'stars': kind and labels must agree"
    assert hydra("fit", data, "--bundle", bundle, "--llm", "fake:echo").fault == line
    assert (
        hydra(
            "bench",
            "run",
            data,
            "--bundle",
            bundle,
            "--llm",
            "fake:echo",
            "--out",
            tmp_path / "run",
        ).fault
        == line
    )
    assert not (tmp_path / "run").exists()


def test_queries_amid_the_history_are_told(hydra: Hydra, tmp_path: Path) -> None:
    queries = [("new", "q0", "2002", "a film", "2"), ("new", "q1", "2020", "a film", "2")]
    folder, cache = (
        write(tmp_path / "amid", films("t0", "t1", "new"), queries),
        ["--set", f"cache={tmp_path / 'cache'}"],
    )
    llm, bundle = ["--llm", "fake:rule=labels"], tmp_path / "b"
    assert hydra("learn", folder, *llm, "--out", bundle, *SMALL, *cache).code == 0
    assert hydra("fit", folder, *llm, "--bundle", bundle, "--user", "new", *cache).code == 0
    told = hydra(
        "bench",
        "run",
        folder,
        *llm,
        "--bundle",
        bundle,
        "--methods",
        "hydra",
        "--out",
        tmp_path / "run",
        *cache,
    )
    assert told.code == 0
    assert (
        "1 of 2 queries precede records that their user's head was fitted on: the shared head"
        " answers them" in "\n".join(told.lines)
    )


# ---- users


def test_an_unknown_user_is_named(hydra: Hydra, data: Path, bundle: Path) -> None:
    asked = hydra("ask", "--bundle", bundle, "--llm", "fake:echo", "--user", "nobody", "rain")
    assert asked.fault == "unknown user 'nobody': 5 users are known (t0, t1, one, …)"
    before = (bundle / "config.json").read_bytes()
    fitted = hydra(
        "fit", data, "--bundle", bundle, "--llm", "fake:echo", "--user", "new", "--user", "nobody"
    )
    assert (
        fitted.fault
        == "unknown user 'nobody': the data set has 5 users, see `hydra-llm data check`"
    )
    assert (bundle / "config.json").read_bytes() == before


@pytest.mark.parametrize("user", ["none", "one", "new"])
def test_users_of_any_history_are_answered(hydra: Hydra, bundle: Path, user: str) -> None:
    told = hydra(
        "ask", "--bundle", bundle, "--llm", "fake:rule=labels", "--user", user, "--json", "rain"
    )
    assert (told.code, told.lines) == (0, [])
    assert told.json["answer"] in STARS["labels"]
    assert len(told.json["records"]) == {"none": 0, "one": 1, "new": 2}[user]


def test_users_without_records_are_told_and_keep_their_place(hydra: Hydra, tmp_path: Path) -> None:
    data, bundle = write(tmp_path / "data", films("t0", "new"), QUERIES), tmp_path / "bundle"
    learned = hydra("learn", data, "--llm", "fake:echo", "--out", bundle, *SMALL)
    assert learned.lines[0] == "1 of 2 users have no records and were left out (t1)"
    fitted = hydra(
        "fit", data, "--llm", "fake:echo", "--bundle", bundle, "--user", "none", "--user", "new"
    )
    assert fitted.lines == ["1 of 2 users have no records: they get the shared head (none)"]
    told = hydra(
        "bench",
        "run",
        data,
        "--llm",
        "fake:rule=labels",
        "--bundle",
        bundle,
        "--out",
        tmp_path / "run",
        "--json",
    )
    assert told.lines[0].startswith(
        "1 of 3 new users have no head and are left out: run `hydra-llm fit"
    )
    assert {row["queries"] for row in told.json} == {4}
    failed = {row["method"]: row["failed"] for row in told.json if row["failed"]}
    assert failed == {
        "bbox-adapter@8": 4
    }  # learns from answers that can be read, and this LLM gives none


@pytest.mark.parametrize("count", [0, 1])
def test_training_users_with_next_to_nothing(hydra: Hydra, tmp_path: Path, count: int) -> None:
    data = write(
        tmp_path / "data",
        [(user, "r", "2000", "a film", "3") for user in ("t0", "t1")][: 2 * count],
    )
    told = hydra(
        "learn", data, "--llm", "fake:echo", "--out", tmp_path / "bundle", *SMALL, "--json"
    )
    if count:
        assert (told.code, told.json["llm_calls"]) == (0, 0)  # a single record has nothing to see
        assert told.lines == [
            "no reranker was learned: no retrieved record changed what the LLM's answer was worth"
        ]
    else:
        assert (
            told.fault == "no training user has records: users.jsonl needs users with split 'train'"
        )
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
def test_a_text_that_is_none(hydra: Hydra, bundle: Path, text: str, line: str) -> None:
    assert (
        hydra("ask", "--bundle", bundle, "--llm", "fake:echo", "--user", "new", text).fault == line
    )


def test_a_text_beyond_both_windows_is_cut_and_told_once_each(
    hydra: Hydra, bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The encoder tells once in a process, the prompt once in an answer."""
    monkeypatch.setattr("hydra_llm.model.encoder._told_of_cut", False)
    for start in ("one", "two"):
        told = hydra(
            "ask",
            "--bundle",
            bundle,
            "--llm",
            "fake:echo",
            "--user",
            "new",
            "--json",
            f"{start} " + "word " * 5000,
        )
        assert told.code == 0
        assert (
            len([line for line in told.lines if "the text of query 'asked' cut at its end" in line])
            == 1
        )
        assert sum(len(message["content"]) for message in told.json["prompt"]) < 3.5 * 1536
    cuts = [record.getMessage() for record in caplog.records if record.name.startswith("hydra_llm")]
    assert cuts == ["1 text(s) longer than the encoder's window were cut to 256 tokens (told once)"]


BROKEN: dict[str, tuple[list[Row], str]] = {
    "unknown label": (
        [("t0", "r", "2000", "x", "7")],
        "history.jsonl:1: field 'output': '7' is not one of the task's labels",
    ),
    "duplicate id": (
        films("t0")[:2] + films("t0")[:1],
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
def test_a_broken_line_is_named_by_every_command_that_reads_it(
    hydra: Hydra, bundle: Path, tmp_path: Path, name: str
) -> None:
    history, line = BROKEN[name]
    data = write(tmp_path / "data", history)
    wanted = f"{tmp_path / 'data'}/{line}"
    assert hydra("data", "check", data).fault == wanted
    assert (
        hydra("learn", data, "--llm", "fake:echo", "--out", tmp_path / "bundle", *SMALL).fault
        == wanted
    )
    assert hydra("fit", data, "--llm", "fake:echo", "--bundle", bundle).fault == wanted
    assert (
        hydra(
            "bench",
            "run",
            data,
            "--llm",
            "fake:echo",
            "--bundle",
            bundle,
            "--out",
            tmp_path / "run",
        ).fault
        == wanted
    )
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
def test_any_script_and_stop_words_alone_go_the_whole_way(
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
    assert hydra("learn", data, "--llm", "fake:echo", "--out", bundle, *SMALL).code == 0
    assert hydra("fit", data, "--llm", "fake:echo", "--bundle", bundle).code == 0
    told = hydra(
        "ask", "--llm", "fake:echo", "--bundle", bundle, "--user", user, "--json", texts[1]
    )
    assert (told.code, told.json["user"]) == (0, user)
    assert len(told.json["records"]) == 2
    assert texts[1] in told.json["prompt"][-1]["content"]
    rows = hydra(
        "bench",
        "run",
        data,
        "--llm",
        "fake:echo",
        "--bundle",
        bundle,
        "--out",
        tmp_path / "run",
        "--json",
    ).json
    assert all((row["queries"], row["failed"], row["unparsable"]) == (1, 0, 0) for row in rows)


# ---- answers of the LLM


@pytest.mark.slow
@pytest.mark.parametrize(
    "said",
    ["", "I'm sorry, but I can't help with that.", "€€€ \0", "\ud83d cut"],
    ids=["empty", "refuses", "nul", "half"],
)
def test_an_answer_that_is_none_is_counted_and_the_run_goes_on(
    hydra: Hydra, data: Path, bundle: Path, tmp_path: Path, said: str
) -> None:
    (tmp_path / "said.json").write_text(json.dumps({"": said}))
    llm = f"fake:script={tmp_path / 'said.json'}"
    told = hydra("ask", "--llm", llm, "--bundle", bundle, "--user", "new", "--json", "rain")
    assert (told.code, told.lines) == (0, ["2 of 2 answers could not be parsed"])
    assert told.json["answer"] in STARS["labels"]  # the adapter knows the user without the LLM
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
"""How many requests came before → status, headers, what is said; None cuts the connection."""


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news: only the command's own lines count."""


class Endpoint:
    """A real HTTP endpoint on loopback; counts what it was asked."""

    def __init__(self, behaviour: Behaviour):
        self.asked: list[str] = []
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                with lock:
                    before = len(outer.asked)
                    outer.asked.append(body)
                answer = behaviour(before)
                if answer is None:
                    self.close_connection = True
                    return
                status, headers, said = answer
                choice = {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": said},
                }
                content = json.dumps(
                    {"choices": [choice]} if status == 200 else {"error": {"message": said}}
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


def slowly(seconds: float, said: str = "2") -> Behaviour:
    def behave(before: int) -> tuple[int, dict[str, str], str]:
        time.sleep(seconds)
        return 200, {}, said

    return behave


ONCE = ["--set", "retries=0"]
BAD_ENDPOINTS: dict[str, tuple[Behaviour, int, str]] = {
    "401": (lambda _: (401, {}, "wrong key"), 2, "HTTP 401"),
    "404": (lambda _: (404, {}, "no such model"), 2, "HTTP 404"),
    "500": (lambda _: (500, {}, "out of order"), 1, "HTTP 500"),
    "hang": (slowly(3), 1, "no answer within 0.5 s"),
    "cut": (lambda _: None, 1, "no connection"),
}


@pytest.mark.parametrize("name", BAD_ENDPOINTS)
def test_a_broken_endpoint_ends_every_command_in_one_line(
    hydra: Hydra, serve: Serve, data: Path, bundle: Path, tmp_path: Path, name: str
) -> None:
    behaviour, code, line = BAD_ENDPOINTS[name]
    quick = [*ONCE, "--set", "timeout=0.5"] if name == "hang" else ONCE
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
        told = hydra(*command)
        assert told.code == code, told.lines
        assert line in told.only
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
    told = hydra(*run_)
    assert told.code == 0
    assert re.match(
        r"2 of 6 answers failed, the first \S+ on \w+'s \S+: m at http://127.0.0.1:\d+/v1/:"
        r" HTTP 500",
        told.lines[0],
    )
    assert told.json[0]["failed"] == 2
    flawed, first = False, len(endpoint.asked)
    assert hydra(*run_).json[0]["failed"] == 0
    assert len(endpoint.asked) - first == 2
    assert hydra(*run_).json[0]["failed"] == 0
    assert len(endpoint.asked) - first == 2


def test_too_many_requests_are_retried_when_the_endpoint_says(
    hydra: Hydra, serve: Serve, bundle: Path
) -> None:
    endpoint = serve(
        lambda before: (429, {"Retry-After": "0.01"}, "slow down") if before < 2 else (200, {}, "2")
    )
    told = hydra(
        "ask", "--bundle", bundle, "--llm", endpoint.llm, "--user", "new", "--json", "rain"
    )
    assert (told.code, told.lines, told.json["usage"]["failed"]) == (0, [], 0)
    assert len(endpoint.asked) == 4


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
def test_a_full_disk_under_the_cache_costs_the_cache_alone(
    serve: Serve, bundle: Path, tmp_path: Path, limit: int
) -> None:
    """A disk that is full for every file: the answer comes, the fault is told, and the cache that
    stands is whole.
    """
    endpoint = serve(lambda _: (200, {}, "2"))
    command = [
        "ask",
        "--bundle",
        str(bundle),
        "--llm",
        endpoint.llm,
        "--user",
        "new",
        "--set",
        f"cache={tmp_path / 'cache'}",
        "--set",
        "samples=8",
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
def test_two_processes_share_a_cache_and_ctrl_c_stops_one(
    hydra: Hydra, serve: Serve, data: Path, tmp_path: Path
) -> None:
    """A real SIGINT after three answers; the same command goes on, beside another one: no answer is
    asked for again or kept twice.
    """
    fast = threading.Event()

    def behave(before: int) -> tuple[int, dict[str, str], str]:
        if before >= 3:
            fast.wait(60)
        return 200, {}, "2" if before % 2 else "3"

    endpoint, cache = serve(behave), tmp_path / "cache"
    learn = [
        "learn",
        data,
        "--llm",
        endpoint.llm,
        *SMALL,
        "--set",
        "concurrency=1",
        "--set",
        f"cache={cache}",
    ]
    process = start(*learn, "--out", tmp_path / "one")
    while len(endpoint.asked) < 4:
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=FOREVER)
    assert (process.returncode, out, err) == (
        130,
        "",
        "hydra-llm: stopped; the same command continues\n",
    )
    assert not (tmp_path / "one").exists()
    answered, pending = endpoint.asked[:3], endpoint.asked[3:]
    assert len(pending) == 1

    fast.set()
    again = [start(*learn, "--out", tmp_path / name) for name in ("one", "two")]
    ends = [(*each.communicate(timeout=FOREVER), each.returncode) for each in again]
    assert [code for _, _, code in ends] == [0, 0], ends
    assert not set(endpoint.asked[4:]) & set(
        answered
    )  # what was answered before the stop is never asked again
    with sqlite3.connect(cache / "llm.sqlite") as file:
        kept = file.execute(
            "SELECT count(*), count(DISTINCT request || ':' || candidate) FROM answers"
        ).fetchone()
    assert kept == (len(set(endpoint.asked)),) * 2

    before = len(endpoint.asked)
    told = hydra(*learn, "--out", tmp_path / "three", "--json")
    assert (told.code, told.json["llm_calls"], len(endpoint.asked)) == (0, 0, before)
    one, two, three = (
        json.loads((tmp_path / name / "config.json").read_text())["report"]
        for name in ("one", "two", "three")
    )
    same = [
        {name: report.get(name) for name in ("reranker", "adapter")} for report in (one, two, three)
    ]
    assert same[0] == same[1] == same[2]
