"""README's code is run, in its order and in one folder: `hydra-llm` lines first, then Python.

The folder holds a small data set `my-data`. Lines run with the fake LLM in place of the one that
README names; a line whose command needs the network or a long time (PARSED_ONLY) is only parsed.
`<!-- not run: REASON -->` above a block leaves it out. Blocks below `<!-- gateway -->` run in their
order beside `hydra-llm serve` with the fake LLM.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from readme_code import README, blocks, commands, gateway_blocks, offline

from hydra_llm.cli.main import COMMANDS, run
from tests.pages import PARSED_ONLY, beside_gateway, gateway, parse, with_data
from tests.waiting import FOREVER


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where README's lines run."""
    return with_data(tmp_path_factory.mktemp("readme"))


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
    else:
        assert run(offline(arguments)) == 0, capsys.readouterr().err


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
    with gateway(folder, "--bundle", "my-bundle") as port:
        for kind, code in snippets:
            said = beside_gateway(kind, code, folder, port)
            assert "error" not in said
            assert ("'head_moved': True" in said) == (kind == "python")


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
