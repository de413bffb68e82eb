"""`hydra-llm llm check`: what it prints, and how it fails."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from hydra_llm.cli.main import run
from tests.waiting import FOREVER


@pytest.fixture
def endpoint() -> Iterator[str]:
    """An endpoint that ignores `n`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "Paris"},
            }
            content = json.dumps(
                {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    ).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_an_endpoint_without_native_n_is_detected(
    endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["llm", "check", f"openai:m@{endpoint}", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {
        name: figures[name]
        for name in (
            "model",
            "kind",
            "answer",
            "native_n",
            "prompt_tokens",
            "completion_tokens",
            "constrains",
        )
    } == {
        "model": "m",
        "kind": "openai",
        "answer": "Paris",
        "native_n": False,
        "prompt_tokens": 9,
        "completion_tokens": 1,
        "constrains": False,
    }
    assert figures["seconds"] > 0
    assert figures["usage"]["calls"] == 3


def test_prices_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["llm", "check", "fake:echo", "--json", "--set", "price_prompt=1e6"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["usage"]["cost"] == figures["usage"]["prompt_tokens"] == 20


def test_without_json_the_output_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["llm", "check", "fake:rule=labels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "kind: fake" in lines
    assert "native_n: True" in lines
    assert "constrains: True" in lines


@pytest.mark.parametrize(
    ("spec", "code", "message"),
    [
        ("nope", 2, "unknown LLM 'nope'"),
        ("openai:m", 2, "OPENAI_API_KEY"),
        ("gguf:/no/such.gguf", 2, "No such file"),
        ("fake:fail=refused", 2, "failed as wished"),
        ("fake:fail=error", 1, "failed as wished"),
        ("openai:m@http://127.0.0.1:9/v1", 1, "no connection"),
    ],
)
def test_every_failure_is_one_line(
    capsys: pytest.CaptureFixture[str], spec: str, code: int, message: str
) -> None:
    assert run(["llm", "check", spec, "--set", "retries=0"]) == code
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert message in errors


@pytest.mark.llm
def test_the_embedded_model_has_native_n_and_constrains(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["llm", "check", "smollm2", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["model"], figures["native_n"], figures["constrains"]) == (
        "smollm2-135m-instruct",
        True,
        True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "learn data --out b",
        "fit data --bundle b",
        "ask text --user u --bundle b",
        "bench run data --out run",
    ],
)
def test_a_missing_key_is_told_before_anything_large_is_imported(command: str) -> None:
    code = "import sys; from hydra_llm.cli.main import run; print(run(sys.argv[1:]), *sys.modules)"
    names = ("OPENAI_API_KEY", "OPENAI_BASE_URL")
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split(), "--llm", "openai:gpt-4o-mini"],
        env={name: value for name, value in os.environ.items() if name not in names},
        capture_output=True,
        text=True,
        timeout=FOREVER,
    )
    assert "needs a key: set OPENAI_API_KEY" in done.stderr
    code, *modules = done.stdout.split()
    assert code == "2"
    assert not {"torch", "transformers", "sklearn"}.intersection(modules)
