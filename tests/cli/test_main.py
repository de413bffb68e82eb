"""Exit codes and errors of `hydra-llm`: one line for an error that the user can fix, a traceback
for a bug, a real signal for Ctrl-C.
"""

import errno
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hydra_llm import __version__, config, setting_names
from hydra_llm.cli.main import COMMANDS, load, run
from hydra_llm.gateway import settings as serve_settings
from tests.marks import slow_except
from tests.waiting import FOREVER, until

# A module with a command for each way to end; `hydra-llm NAME` runs the function of that name.
ENDINGS = """
import errno, sys, time
from pathlib import Path
from typing import Annotated
import typer
from hydra_llm.errors import BudgetExceeded, DataError, LLMError, LLMRefused

def broken_data(): raise DataError("not JSON", file="users.jsonl", line=7, field="user")
def spread_out(): raise DataError("first\\n  second")
def dead_llm(): raise LLMError("no answer after 3 tries")
def wrong_key(): raise LLMRefused("401: check OPENAI_API_KEY")
def side_by_side():
    more = ExceptionGroup("more", [LLMError("gone")])
    raise ExceptionGroup("tasks", [LLMRefused("401"), more])
def bug_among_faults(): raise ExceptionGroup("tasks", [LLMRefused("401"), KeyError("bug")])
def bug():
    secret = "sk-do-not-print"
    raise KeyError("a bug")
def full_disk(): raise OSError(errno.ENOSPC, "No space left on device", "/cache/answers.sqlite")
def lost_file(): Path("/no/such/file").read_text()
def options(k: Annotated[int, typer.Option()] = 4, name: str = "x"): print(k, name)
def wait():
    print("ready", flush=True)
    time.sleep(60)
def wait_async():
    import anyio
    async def sleep():
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, 60)
            print("ready", flush=True)
    anyio.run(sleep)
def flood():
    for number in range(200_000): print(number)
def little(): print("one line")

group = typer.Typer()
@group.command()
def only(): print("the verb is kept")
"""

RUN = (
    "import hydra_llm.cli.main as m; names = [n for n in vars(__import__('endings')) if"
    " n[0].islower()]; "
)
RUN += "m.COMMANDS = {n: (f'endings:{n}', 'a line') for n in names}; m.main()"


@pytest.fixture
def endings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "endings.py").write_text(ENDINGS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `hydra-llm ARGUMENTS` in a process of its own."""
    process = start(*arguments)
    out, err = process.communicate(timeout=FOREVER)
    return process.returncode, out, err


@pytest.mark.usefixtures("endings")
@pytest.mark.parametrize(
    ("command", "code", "line"),
    [
        ("broken_data", 2, "hydra-llm: users.jsonl:7: field 'user': not JSON\n"),
        ("spread_out", 2, "hydra-llm: first second\n"),
        ("dead_llm", 1, "hydra-llm: no answer after 3 tries\n"),
        ("wrong_key", 2, "hydra-llm: 401: check OPENAI_API_KEY\n"),
        ("side_by_side", 2, "hydra-llm: 401\n"),
        (
            "full_disk",
            2,
            f"hydra-llm: [Errno {errno.ENOSPC}] No space left on device: '/cache/answers.sqlite'\n",
        ),
    ],
)
def test_a_fault_is_one_line(command: str, code: int, line: str) -> None:
    assert outcome(command) == (code, "", line)


@pytest.mark.usefixtures("endings")
@pytest.mark.parametrize("command", ["bug", "bug_among_faults", "lost_file"])
def test_a_bug_keeps_its_traceback_without_locals(command: str) -> None:
    code, _, err = outcome(command)
    assert code == 1
    assert "Traceback" in err
    assert "endings.py" in err
    assert "sk-do-not-print" not in err.replace('secret = "sk-do-not-print"', "")


@pytest.mark.usefixtures("endings")
@pytest.mark.parametrize("command", slow_except(["wait", "wait_async"], "wait_async"))
def test_ctrl_c_is_one_line(command: str) -> None:
    process = start(command)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    status = Path(f"/proc/{process.pid}/status")
    until(lambda: "State:\tS" in status.read_text())  # it sleeps
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=FOREVER)
    assert (process.returncode, err) == (130, "hydra-llm: stopped; the same command continues\n")


@pytest.mark.usefixtures("endings")
@pytest.mark.parametrize("command", slow_except(["flood", "little"], "flood"))
def test_a_closed_pipe_is_quiet(command: str) -> None:
    process = start(command)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=FOREVER) == 1


@pytest.mark.usefixtures("endings")
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["options", "--frobnicate"],
            "hydra-llm options: No such option: --frobnicate (see 'hydra-llm options --help')\n",
        ),
        (["options", "--k", "x"], "(see 'hydra-llm options --help')\n"),
        (["--frobnicate"], "hydra-llm: No such option: --frobnicate (see 'hydra-llm --help')\n"),
        (
            ["optoins"],
            (
                "hydra-llm: No such command 'optoins'. Did you mean 'options'? (see 'hydra-llm"
                " --help')\n"
            ),
        ),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], line: str) -> None:
    code, out, err = outcome(*arguments)
    assert (code, out) == (2, "")
    assert err.endswith(line)
    assert err.count("\n") == 1


@pytest.mark.usefixtures("endings")
def test_a_flag_overrides_the_options_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_OPTIONS_K", "7")
    assert outcome("options") == (0, "7 x\n", "")
    assert outcome("options", "--k", "2") == (0, "2 x\n", "")


@pytest.mark.usefixtures("endings")
def test_a_former_variable_works_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_LLM_OPTIONS_K", "7")
    hint = "'HYDRA_LLM_OPTIONS_K' is now written 'HYDRA_OPTIONS_K'\n"
    assert outcome("options") == (0, "7 x\n", hint)
    monkeypatch.setenv("HYDRA_OPTIONS_K", "8")
    assert outcome("options") == (0, "8 x\n", "")


def test_a_former_command_works_with_a_hint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    setting_names.log_renamed.cache_clear()
    none, out = str(tmp_path / "none.toml"), str(tmp_path / "out")
    ends = []
    for name in ("sweep", "study"):
        code = run(["bench", name, none, "data", "--out", out, "--llm", "fake:echo"])
        ends.append((code, capsys.readouterr().err))
    assert ends[0] == ends[1]
    assert ends[0][0] == 2
    hints = [record.getMessage() for record in caplog.records]
    assert hints == ["'bench study' is now written 'bench sweep'"]
    assert run(["bench", "--help"]) == 0
    assert "study" not in capsys.readouterr().out


def leaves(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each command without subcommands, with the words that call it."""
    below = getattr(command, "commands", None)
    if below is None:
        yield path, command
    for name, own in (below or {}).items():
        yield from leaves(own, (*path, name))


# options that set the setting of their name
OF_SETTINGS = {
    f"serve {name}": f"setting serve.{name}"
    for name in ("log", "workers", "tls_cert", "tls_key", "proxy", "root_path", "private")
}


def test_no_environment_variable_has_two_meanings() -> None:
    meanings: dict[str, set[str]] = defaultdict(set)
    for variable, setting in config.VARIABLES.items():
        meanings[variable].add(f"setting {setting}")
    for variable, setting in serve_settings.VARIABLES.items():
        meanings[variable].add(f"setting serve.{setting}")
    for name in COMMANDS:
        for path, command in leaves(load(name), (name,)):
            for option in command.params:
                if option.param_type_name == "option" and option.name != "help":
                    former = "_".join(("HYDRA_LLM", *path, option.name)).upper().replace("-", "_")
                    for variable in (option.envvar, former):
                        meaning = f"{' '.join(path)} {option.name}"
                        meanings[variable].add(OF_SETTINGS.get(meaning, meaning))
    assert "HYDRA_ASK_SEED" in meanings
    assert "HYDRA_LLM_BENCH_RUN_SET_" in meanings
    assert {name: own for name, own in meanings.items() if len(own) > 1} == {}


@pytest.mark.usefixtures("endings")
def test_a_group_of_one_command_keeps_its_verb() -> None:
    assert outcome("group", "only") == (0, "the verb is kept\n", "")
    assert outcome("group")[0] == 2


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"hydra-llm {__version__}\n"
    assert run([]) == 0
    help_text = capsys.readouterr().out
    assert all(
        f"  {name} " in help_text and summary in help_text
        for name, (_, summary) in COMMANDS.items()
    )


def test_help_imports_no_command_and_nothing_heavy() -> None:
    code = "import sys; from hydra_llm.cli.main import COMMANDS, run; run(['--help']); "
    code += (
        "sys.exit(str([m for m in sys.modules if m in {p.split(':')[0] for p, _ in"
        " COMMANDS.values()} | "
    )
    code += "{'torch', 'openai', 'transformers', 'sklearn', 'numpy', 'pydantic'}]))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
        == "[]\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_loads_and_documents_every_option(name: str) -> None:
    command = load(name)
    for leaf in getattr(command, "commands", {name: command}).values():
        undocumented = [
            option.name
            for option in leaf.params
            if option.param_type_name == "option" and not option.help
        ]
        assert leaf.help, leaf.name
        assert not undocumented, f"{name} {leaf.name}: {undocumented}"


def test_the_package_runs_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hydra_llm", "--version"], capture_output=True, text=True, check=True
    )
    assert __version__ in done.stdout
