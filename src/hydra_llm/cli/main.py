"""The command `hydra-llm`: which commands there are, and how each of them ends.

A command's module is imported only when the command is called, so that `hydra-llm --help` stays
quick. Knows no data and no LLM.

Every option can also be given by the environment as `HYDRA_LLM_<COMMAND>_<OPTION>` (`hydra-llm ask
--seed 3` is
`HYDRA_LLM_ASK_SEED=3 hydra-llm ask`); a setting for every command is `HYDRA_<SETTING>` (config.py).
A flag wins over both.

Exit codes: 0 done, 1 the LLM failed or a bug, 2 the user can mend it, 130 Ctrl-C.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_group

from hydra_llm import __version__
from hydra_llm.errors import HydraError, UserFault

NAME = "hydra-llm"
STOPPED = 130
"""Exit code after Ctrl-C."""

COMMANDS: Mapping[str, tuple[str, str]] = {
    "demo": (
        "hydra_llm.cli.demo:demo",
        "Learn from real users and personalize a real LLM, offline.",
    ),
    "learn": (
        "hydra_llm.cli.learn:learn",
        "Learn a bundle (bases and one head per user) from a data set.",
    ),
    "fit": (
        "hydra_llm.cli.learn:fit",
        "Give new users a head in a bundle that was learned before.",
    ),
    "ask": ("hydra_llm.cli.ask:ask", "Answer one question for one user."),
    "bench": ("hydra_llm.cli.bench:app", "Compare methods on the same users and queries."),
    "data": ("hydra_llm.cli.data:app", "Import, check and download data sets."),
    "llm": ("hydra_llm.cli.llm:app", "Look at the LLMs that can be asked."),
    "serve": (
        "hydra_llm.cli.serve:serve",
        "Serve answers that are each user's own (OpenAI-compatible).",
    ),
    "keys": ("hydra_llm.cli.serve:keys_app", "Make, list and revoke the gateway's API keys."),
    "bundles": ("hydra_llm.cli.serve:bundles_app", "Say which bundle running servers answer with."),
    "store": ("hydra_llm.cli.store:app", "Look after the gateway's database."),
}
"""Name → place of a function or a typer app (a group of commands), and the line that `--help`
shows.
"""

# Faults of the machine, not of this program: one line says enough.
MACHINE_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def load(name: str) -> Any:
    """Import the command `name` of COMMANDS: a typer (click) command or group."""
    place, summary = COMMANDS[name]
    module, attribute = place.split(":")
    target = getattr(import_module(module), attribute)
    # get_group and not get_command: a group of one command keeps its verb.
    command = (
        get_group(_plain(target))
        if isinstance(target, typer.Typer)
        else get_command(_app_of(target))
    )
    command.name = name
    command.help = command.help or summary
    return command


def _plain(group: typer.Typer) -> typer.Typer:
    group.rich_markup_mode = None
    return group


def _app_of(function: Callable[..., None]) -> typer.Typer:
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command()(function)
    return single


class LazyGroup(TyperGroup):
    """Lists COMMANDS by their line in the table; imports a command only to run it."""

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
    context_settings={
        "auto_envvar_prefix": "HYDRA_LLM",
        "help_option_names": ["-h", "--help"],
        "max_content_width": 120,
    },
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{NAME} {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            allow_from_autoenv=False,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """Personalize any black-box LLM: a shared reranker and adapter with one small head per user."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. What the user can mend is one line on stderr;
    a bug keeps its traceback.
    """
    try:
        result = get_group(app).main(
            list(arguments) or ["--help"], prog_name=NAME, standalone_mode=False
        )
        sys.stdout.flush()  # here, so that a closed pipe is met before the interpreter shuts down
    except HydraError as error:
        return _complain(error, error.exit_code)
    except typer.TyperException as error:
        return _complain_of_usage(error)
    except BaseExceptionGroup as group:
        return _complain_of_group(group)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in MACHINE_FAULTS:
            raise
        return _complain(error, UserFault.exit_code)
    except KeyboardInterrupt:
        result = STOPPED
    if result == STOPPED:  # typer itself turns most of the KeyboardInterrupts into this code
        _complain("stopped; the same command continues", STOPPED)
    return result if isinstance(result, int) else 0


def _complain(what: object, code: int, command: str = NAME) -> int:
    print(f"{command}: {' '.join(str(what).split())}", file=sys.stderr)
    return code


def _complain_of_usage(error: typer.TyperException) -> int:
    message, context = error.format_message(), getattr(error, "ctx", None)
    if (
        context is None or "\n" in message.strip()
    ):  # a group called without its command answers with its whole help
        typer.echo(message, err=True)
        return error.exit_code
    return _complain(
        f"{message.rstrip('.')} (see '{context.command_path} --help')",
        error.exit_code,
        context.command_path,
    )


def _complain_of_group(group: BaseExceptionGroup[BaseException]) -> int:
    """Tasks that ran side by side and failed together: the first line, if the caller can mend all
    of them.
    """
    faults, bugs = group.split(HydraError)
    if bugs is not None or faults is None:
        raise group
    first: BaseException = faults
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return _complain(first, getattr(first, "exit_code", 1))


def main() -> None:
    """The entry point of the command `hydra-llm`."""
    # Threads that wait must not spin: the encoder, the solver and an embedded LLM share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # whoever ends a job ends it as Ctrl-C does: recordings are written
    sys.exit(run(sys.argv[1:]))
