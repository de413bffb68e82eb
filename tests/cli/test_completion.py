"""Real shells complete commands and options."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hydra_llm.cli.main import COMMANDS, run
from tests.waiting import FOREVER

PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def completed(line: str) -> list[str]:
    """What bash's function answers to a line."""
    words = line.split(" ")
    script = f"""
        eval "$(hydra-llm completion bash)"
        COMP_WORDS=({" ".join(word or "''" for word in words)}) COMP_CWORD={len(words) - 1}
        _hydra_llm_completion hydra-llm
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    env = {**os.environ, "PATH": PATH}
    command = ["bash", "--norc", "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=FOREVER)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_bash_gets_commands_verbs_and_options() -> None:
    assert completed("hydra-llm be") == ["bench"]
    assert completed("hydra-llm bench s") == ["show", "sweep"]
    assert completed("hydra-llm bench show --sl") == ["--slides"]


@pytest.mark.slow
def test_tab_completes_a_verb_on_a_terminal() -> None:
    """Tab after `bench vi`; then the line is made an argument of `echo`."""
    process, terminal = pty.fork()
    if process == 0:  # the shell
        os.environ.update({"PATH": PATH, "PS1": "ready> ", "TERM": "dumb"})
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
    try:
        os.write(terminal, b'eval "$(hydra-llm completion bash)"; echo EVALUATE""D\n')
        read_until(terminal, "EVALUATED")
        os.write(terminal, b"hydra-llm bench vi\t")
        read_until(terminal, "bench view")
        os.write(terminal, b"\x01echo SAID:\n")  # Ctrl-A
        read_until(terminal, "SAID:hydra-llm bench view")
    finally:
        os.write(terminal, b"\x15exit\n")
        os.close(terminal)
        os.waitpid(process, 0)


def read_until(terminal: int, text: str) -> None:
    """Read what a terminal shows until a text is in it, in a line of its own or not."""
    said, ends = "", time.monotonic() + FOREVER
    while text not in said:
        assert time.monotonic() < ends, said
        if select.select([terminal], [], [], 1)[0]:
            said += os.read(terminal, 4096).decode(errors="replace").replace("\r", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_name_the_program(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    said = capsys.readouterr().out
    assert f"_HYDRA_LLM_COMPLETE=complete_{shell}" in said
    if program := shutil.which(shell):
        done = subprocess.run([program, "-n"], input=said, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_another_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", "tcsh"]) == 2
    assert "is not one of 'bash', 'zsh', 'fish'" in capsys.readouterr().err
    assert "completion" in COMMANDS
