"""README's code is run, in its order and in one folder: `hydra-llm` lines first, then Python.

The data set is that of examples/. Lines run with the fake LLM in place of a hosted one that README
names, and print what README says; a line whose command needs the network or a long time
(PARSED_ONLY) is only parsed.
`<!-- not run: REASON -->` above a block leaves it out. Blocks below `<!-- gateway -->` run in their
order beside `hydra-llm serve` with the fake LLM.
"""

import json
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from readme_code import NAME, README, answers, blocks, commands, gateway_blocks, offline

from hydra_llm.cli.main import COMMANDS, load, run
from tests.waiting import FOREVER

PARSED_ONLY = ("demo", "data get", "serve")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where README's lines run."""
    place = tmp_path_factory.mktemp("readme")
    for name in ("benchmarks", "examples"):
        (place / name).symlink_to(README.parent / name)
    return place


TEXT = README.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", commands(TEXT), ids=" ".join)
def test_shell_line(
    arguments: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_EPOCHS", "2")
    if " ".join(arguments).startswith(PARSED_ONLY):
        parse(arguments)
        return
    assert run(offline(arguments)) == 0, capsys.readouterr().err
    said = [told for line, told in answers(TEXT).items() if shlex.split(line)[1:] == arguments]
    assert capsys.readouterr().out.split() == said or not said


@pytest.mark.slow
def test_the_fake_answers_with_labels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With README's own prompt, which names none: `--llm fake:rule=labels` is told them."""
    monkeypatch.chdir(folder)
    (line,) = [own for own in commands(TEXT) if own[:2] == ["data", "import"] and "--prompt" in own]
    assert (
        run([*line[: line.index("--out")], "--out", "of-fake", *line[line.index("--prompt") :]])
        == 0
    )
    more = ["--out", "fake-run", "--methods", "zero-shot,rag@1"]
    assert run(["bench", "run", "of-fake", "--llm", "fake:rule=labels", *more]) == 0
    rows = json.loads(Path("fake-run/results.json").read_text(encoding="utf-8"))
    assert {row["method"] for row in rows} == {"zero-shot", "rag@1"}
    for row in rows:
        assert row["unparsable"] == 0
        assert row["metrics"]["accuracy"][0] > 0


def test_readme_shows_what_two_users_get() -> None:
    assert len(set(answers(TEXT).values())) == 2, "they have asked the same"


def parse(arguments: list[str]) -> None:
    """Fail where a line names a command or an option that does not exist."""
    name, rest = arguments[0], arguments[1:]
    command = load(name)
    while hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(name, rest)


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks("python", TEXT))
def test_python_block(code: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=FOREVER
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_gateways_blocks(folder: Path) -> None:
    """Start, curl, SDK, feedback, deletion."""
    snippets = gateway_blocks(TEXT)
    assert {kind for kind, _ in snippets} == {"bash", "python"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    serve = [
        sys.executable,
        "-m",
        NAME.replace("-", "_"),
        "serve",
        "--llm",
        "fake:echo",
        "--bundle",
        "my-bundle",
    ]
    server = subprocess.Popen([*serve, "--port", port], cwd=folder)
    try:
        _wait_for(int(port), server)
        for kind, code in snippets:
            script = code.replace("8000", port).replace("gpt-4o-mini", "fake:echo")
            command = ["bash", "-euc", script] if kind == "bash" else [sys.executable, "-c", script]
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=FOREVER
            )
            assert done.returncode == 0, done.stderr
            assert "error" not in done.stdout
            told = re.findall("x-hydra-personalized: .+$", done.stdout, re.MULTILINE)
            assert told == re.findall("# (x-hydra-personalized: .+)$", code, re.MULTILINE)
            assert ("'head_moved': True" in done.stdout) == (kind == "python")
    finally:
        server.terminate()
        assert server.wait(FOREVER) == 0


def _wait_for(port: int, server: subprocess.Popen[bytes], seconds: float = FOREVER) -> None:
    ends = time.monotonic() + seconds
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None
        assert time.monotonic() < ends
        time.sleep(0.1)


def test_readme_opens_with_the_two_commands_and_has_the_table() -> None:
    order = [
        TEXT.index(part)
        for part in ("make demo", "make test", "<!-- demo table -->", "<!-- /demo table -->")
    ]
    assert order == sorted(order)
    assert set(re.findall(r"`hydra-llm (\w+)", TEXT)) <= set(COMMANDS)


def test_blocks_and_lines_are_found() -> None:
    text = (
        "x\n```sh\nhydra-llm ask --llm a:b \\\n  'two words'  # why\nls\n```\n<!-- not run: a key"
        " -->\n```sh\nhydra-llm demo\n```\n"
    )
    assert commands(text) == [["ask", "--llm", "a:b", "two words"]]
    assert offline(commands(text)[0]) == ["ask", "--llm", "fake:echo", "two words"]
    assert blocks("python", text + "\n```python\nprint(1)\n```\n") == ["print(1)\n"]
