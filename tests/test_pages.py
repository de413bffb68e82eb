"""The code of the pages in docs/ is run: each page in a folder of its own, from top to bottom.

`hydra-llm` lines run with the fake LLM, other shell lines in bash, Python in a process of its own.
A page whose code is run elsewhere is named in ELSEWHERE; a block that cannot be run says why
(`<!-- not run: REASON -->`). readme_code.py has the marks.
"""

import os
import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from readme_code import NAME, README, RUN, Step, lines, offline, steps

from hydra_llm.cli.main import COMMANDS, run
from tests.pages import PARSED_ONLY, beside_gateway, gateway, with_data
from tests.test_readme import parse
from tests.waiting import FOREVER

DOCS = README.parent / "docs"
ELSEWHERE = {
    "clients.md": "make clients",
    "first-hour.md": "tools/first_hour.py",
    "api.md": "signatures",
    "how-to/several-machines.md": "make test-ray, a cluster of its own",
}
PAGES = {
    page.relative_to(DOCS).as_posix(): steps(page.read_text(encoding="utf-8"))
    for page in sorted(DOCS.rglob("*.md"))
}
RUN_HERE = [name for name, own in PAGES.items() if own and name not in ELSEWHERE]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_HERE)
def test_the_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(with_data(tmp_path))
    monkeypatch.setenv("HYDRA_EPOCHS", "2")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    with ExitStack() as servers:
        port = 0
        for step in PAGES[page]:
            if step.gateway:
                port = port or servers.enter_context(gateway(tmp_path))
                beside_gateway(step.kind, step.code, tmp_path, port)
            else:
                do(step, tmp_path, capsys)


def do(step: Step, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Do one step of a page."""
    if step.kind == "file":
        file = folder / step.name
        file.parent.mkdir(exist_ok=True)
        file.write_text(step.code, encoding="utf-8")
    elif step.kind == "python":
        checked([sys.executable, "-c", step.code], folder)
    else:
        for line in lines(step.code):
            arguments = shlex.split(line, comments=True)
            if arguments[0] != NAME:
                checked(["bash", "-euc", re.sub(r"--llm \S+", "--llm fake:echo", line)], folder)
            elif " ".join(arguments[1:]).startswith(PARSED_ONLY):
                parse(arguments[1:])
            else:
                assert run(offline(arguments[1:])) == 0, (line, capsys.readouterr().err)


def checked(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=FOREVER)
    assert done.returncode == 0, (command[-1], done.stderr)


def test_every_how_to_has_code_that_is_run() -> None:
    how_tos = {name for name in PAGES if name.startswith("how-to/")}
    assert len(how_tos) >= 7
    assert how_tos <= {*RUN_HERE, *ELSEWHERE}


def shown(text: str) -> list[list[str]]:
    """Lines of `hydra-llm` that a page shows, in blocks that are not run."""
    own = [line for line in lines(text) if line.startswith(f"{NAME} ")]
    words = [shlex.split(line, comments=True)[1:] for line in own]
    return [arguments for arguments in words if arguments[0] in COMMANDS]


def test_lines_that_are_shown_name_what_is_there() -> None:
    found = [
        arguments
        for page in PAGES
        if page not in ("commands.md", "lab.md")
        for arguments in shown((DOCS / page).read_text(encoding="utf-8"))
    ]
    assert len(found) > 30
    for arguments in found:
        parse(arguments)


def test_steps_of_a_page_are_found_in_order() -> None:
    text = (
        "<!-- file: a/b.py -->\n```python\nx = 1\n```\n\n```sh\nls\n```\n\n```toml\na = 1\n```\n"
        "<!-- not run: a key -->\n```sh\nrm\n```\n<!-- gateway -->\n```bash\ncurl\n```\n"
    )
    assert steps(text) == [
        Step("file", "x = 1\n", "a/b.py"),
        Step("sh", "ls\n"),
        Step("bash", "curl\n", gateway=True),
    ]
    assert set(RUN) == {"sh", "bash", "python"}
