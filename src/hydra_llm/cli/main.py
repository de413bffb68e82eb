"""The command `hydra-llm`: its subcommands, the environment variables of their options, exit codes.

A subcommand's module is imported only when it is called, so that `--help` stays fast. Each option
can be given as `HYDRA_<COMMAND>_<OPTION>`: `HYDRA_ASK_SEED=3 hydra-llm ask`. Exit codes: 0 done,
1 the LLM failed or a bug, 2 an error that the user can fix, 3 a batch is not done yet, 130 Ctrl-C.
"""

import errno
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any

import typer
from typer.completion import completion_init  # type: ignore[attr-defined]  # imported there
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_group

from hydra_llm import __version__, ranks
from hydra_llm.environment import (
    clean_variables,
    expanded,
    open_standard_streams,
    read_secret_files,
)
from hydra_llm.errors import HydraError, UserFault
from hydra_llm.extras import one_line_imports

NAME = "hydra-llm"
STOPPED = 130  # exit code after Ctrl-C
COMPLETED = "_HYDRA_LLM_COMPLETE"  # typer's variable of a shell that completes

COMMANDS: Mapping[str, tuple[str, str]] = {
    "demo": ("hydra_llm.cli.demo:demo", "Personalize a real LLM for real users, offline."),
    "learn": ("hydra_llm.cli.learn:learn", "Learn a bundle: shared weights and heads."),
    "fit": ("hydra_llm.cli.learn:fit", "Fit heads of new users in a learned bundle."),
    "audit": ("hydra_llm.cli.audit:audit", "Test whether a bundle tells who was in it."),
    "ask": ("hydra_llm.cli.learn:ask", "Answer one question for one user."),
    "bench": ("hydra_llm.cli.bench:app", "Compare methods on the same users and queries."),
    "data": ("hydra_llm.cli.data:app", "Import, check and download data sets."),
    "llm": ("hydra_llm.cli.llm:app", "Check an LLM; list and cancel its batches."),
    "completion": ("hydra_llm.cli.completion:completion", "Print a shell's completion script."),
    "init": ("hydra_llm.cli.init:init", "Write an example of the settings file."),
    "serve": ("hydra_llm.cli.serve:serve", "Run the personalizing, OpenAI-compatible gateway."),
    "users": ("hydra_llm.cli.users:app", "List, show, import, export and delete users."),
    "mcp": ("hydra_llm.cli.mcp:mcp", "Give an assistant a gateway's tools, over stdio (MCP)."),
    "keys": ("hydra_llm.cli.store:keys", "Create, list and revoke the gateway's API keys."),
    "spend": ("hydra_llm.cli.spend:app", "Show what LLMs cost, and limit keys and users."),
    "bundles": ("hydra_llm.cli.store:bundles", "Set or show the bundle of running servers."),
    "store": ("hydra_llm.cli.store:maintenance", "Maintain the gateway's database."),
}
"""Name → function or typer app (a group of commands), and the summary that `--help` shows."""

# Errors of the machine, not of this program: reported in one line.
MACHINE_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

NO_TEMPORARY = "No usable temporary directory"  # Python's own words


def load(name: str) -> Any:
    """Import the command `name` of COMMANDS: a typer (click) command or group."""
    path, summary = COMMANDS[name]
    target = resolve_name(path)
    if isinstance(target, typer.Typer):
        target.rich_markup_mode = None
        command: Any = get_group(target)  # get_command would drop the verb of a single command
    else:
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command()(target)
        command = get_command(single)
    command.name, command.help = name, command.help or summary
    _set_variables(command, name)
    return command


def _set_variables(command: Any, *path: str) -> None:
    """Name the environment variable of each option of a command and of those below it:
    `HYDRA_ASK_SEED`, or the former `HYDRA_LLM_ASK_SEED` if only that one is set.
    """
    for option in command.params:
        option.callback = option.callback or _in_home
        if option.param_type_name == "option":
            flag = max(option.opts, key=len).lstrip("-")
            new = "_".join(("hydra", *path, flag)).upper().replace("-", "_")
            old = "_".join(("hydra_llm", *path, option.name)).upper().replace("-", "_")
            only_former = old in os.environ and new not in os.environ
            option.envvar = old if only_former else new
            if only_former:
                from hydra_llm.setting_names import log_renamed

                log_renamed(old, new)
    for name, below in getattr(command, "commands", {}).items():
        _set_variables(below, *path, name)


def _in_home(_context: Any, _parameter: Any, value: Any) -> Any:
    """`~` in a path is the home folder also where no shell replaces it: in a variable, a file."""
    return expanded(value) if isinstance(value, Path) else value


class LazyGroup(TyperGroup):
    """Lists COMMANDS by their summaries; imports a command only to run it."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self.commands = {
            name: TyperCommand(name=name, help=summary) for name, (_, summary) in COMMANDS.items()
        }

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name else command, rest


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{NAME} {__version__}")
        raise typer.Exit()


VERSION_HELP = "Show the version and exit."
VERSION = typer.Option("--version", callback=_print_version, is_eager=True, help=VERSION_HELP)


@app.callback()
def root(version: Annotated[bool, VERSION] = False) -> None:
    """Personalize any black-box LLM: a shared reranker and adapter with one small head per user."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code. An error is one line, a bug its traceback."""
    try:
        read_secret_files()
        clean_variables()
        if COMPLETED in os.environ:  # a shell asks, by what `hydra-llm completion` printed
            completion_init()
        words = list(arguments) or ["--help"]
        with one_line_imports(f"`{NAME} {words[0]}`"):
            result = get_group(app).main(words, prog_name=NAME, standalone_mode=False)
        sys.stdout.flush()  # a closed pipe must show here, not at interpreter shutdown
    except HydraError as error:
        return _report(error, error.exit_code)
    except typer.TyperException as error:
        message, context = error.format_message(), getattr(error, "ctx", None)
        if context is None or "\n" in message.strip():  # a group without its command: its help
            typer.echo(message, err=True)
            return error.exit_code
        line = f"{message.rstrip('.')} (see '{context.command_path} --help')"
        return _report(line, error.exit_code, context.command_path)
    except BaseExceptionGroup as group:  # concurrent tasks that failed: the first error is reported
        if group.split(HydraError)[1] is not None:
            raise
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        return _report(first, getattr(first, "exit_code", 1))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in MACHINE_FAULTS and NO_TEMPORARY not in str(error):
            raise
        return _report(error, UserFault.exit_code)
    except KeyboardInterrupt:
        result = STOPPED
    if result == STOPPED:  # typer itself turns most KeyboardInterrupts into this code
        _report("stopped; the same command continues", STOPPED)
    return result if isinstance(result, int) else 0


def _report(what: object, code: int, command: str = NAME) -> int:
    if ranks.rank() == 0:  # the first process of several says it
        print(f"{command}: {' '.join(str(what).split())}", file=sys.stderr)
    return code


def main() -> None:
    """The entry point of the command `hydra-llm`."""
    open_standard_streams()
    # Waiting threads must not spin: the encoder, the solver and an embedded LLM share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # SIGTERM ends a command as Ctrl-C does, so that recordings are written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run(sys.argv[1:]))
