"""Running the code of the pages in docs/: the data set, and the gateway."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from readme_code import NAME, README

from tests.test_readme import _wait_for
from tests.waiting import FOREVER

PARSED_ONLY = ("demo", "data get", "serve", "bench sweep")
"""Commands that need the network or a long time."""


def with_data(folder: Path) -> Path:
    """A folder with a small data set `my-data`: five users who each give one of three labels by
    their own taste. Paths of the checkout that pages name are there too.
    """
    for name in ("benchmarks", "examples"):
        (folder / name).symlink_to(README.parent / name)
    data = folder / "my-data"
    data.mkdir()
    task = {
        "name": "tags",
        "kind": "classification",
        "labels": ["dry", "sweet", "sour"],
        "prompt": "Which taste? {input}",
    }
    (data / "task.json").write_text(json.dumps({**task, "metrics": ["accuracy"]}))
    users = [
        {"user": f"u{number}", "split": "train" if number < 3 else "test"} for number in range(1, 6)
    ]
    for name, rows in (
        ("users", users),
        ("history", list(entries(0, 9))),
        ("queries", list(entries(9, 11))),
    ):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def entries(first: int, last: int) -> Iterator[dict[str, str]]:
    """The records of the five users from one number to another."""
    for user in range(1, 6):
        for number in range(first, last):
            answer = ("dry", "sweet", "sour")[(user + number) % 3]
            stamp = f"2024-01-{number + 1:02}"
            yield {
                "user": f"u{user}",
                "id": f"{user}-{number}",
                "time": stamp,
                "input": f"wine number {number % 3}",
                "output": answer,
            }


@contextmanager
def gateway(folder: Path, *options: str) -> Iterator[int]:
    """The port of `hydra-llm serve` with the fake LLM, which runs in the folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = [sys.executable, "-m", NAME.replace("-", "_"), "serve", "--llm", "fake:echo"]
    server = subprocess.Popen([*serve, *options, "--port", str(port)], cwd=folder)
    try:
        _wait_for(port, server)
        yield port
    finally:
        server.terminate()
        assert server.wait(FOREVER) == 0


def beside_gateway(kind: str, code: str, folder: Path, port: int) -> str:
    """Run a block (bash or python) that asks the gateway; returns what it prints."""
    script = code.replace("8000", str(port)).replace("gpt-4o-mini", "fake:echo")
    command = ["bash", "-euc", script] if kind == "bash" else [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=FOREVER)
    assert done.returncode == 0, done.stderr
    return done.stdout
