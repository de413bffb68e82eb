"""`hydra-llm completion`: what a shell needs to complete commands and options."""

from typing import Annotated, Literal

import typer
from typer import Argument
from typer.completion import completion_init, get_completion_script  # type: ignore[attr-defined]

from hydra_llm.cli.main import COMPLETED, NAME

Shell = Literal["bash", "zsh", "fish"]


def completion(shell: Annotated[Shell, Argument(help="bash, zsh or fish.")]) -> None:
    """Print what a shell needs to complete commands and options.

    Of bash, in ~/.bashrc: eval "$(hydra-llm completion bash)"; of zsh, in ~/.zshrc after compinit:
    eval "$(hydra-llm completion zsh)"; of fish: hydra-llm completion fish | source.
    """
    completion_init()
    script = get_completion_script(prog_name=NAME, complete_var=COMPLETED, shell=shell)
    typer.echo(script)
