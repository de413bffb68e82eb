"""Write docs/commands.md from the commands' own help; `--check` fails where the file is not up to
date.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_group

from hydra_llm.cli.main import COMMANDS, NAME, app, load

TARGET = Path(__file__).parents[1] / "docs" / "commands.md"
HEAD = """# Commands

Written by `make docs` from each command's help; `make check` holds it up to date.

Every option can also come from the environment, by the name that its help gives:
`HYDRA_LLM_ASK_SEED=3 hydra-llm ask ...` is
`hydra-llm ask ... --seed 3`. A setting that holds for every command is `HYDRA_<SETTING>`, or a line
of `hydra-llm.toml`.
The order is flag, environment, file, preset, and then what the bundle was learned with or the
default.

Exit codes: 0 done; 1 the LLM failed, or a bug (with its traceback); 2 something to mend, named in
one line; 130 Ctrl-C.
"""


def context_of(command: Any, name: str, parent: Any = None) -> Any:
    """A context of fixed width, so that the text does not depend on the terminal."""
    return command.context_class(
        command, info_name=name, parent=parent, terminal_width=110, **command.context_settings
    )


def sections(command: Any, context: Any) -> Iterator[str]:
    """The help of a command and of those below it, each under its heading."""
    yield f"\n## `{context.command_path}`\n\n```text\n{context.get_help().rstrip()}\n```\n"
    for name in getattr(command, "commands", {}):
        below = load(name) if context.parent is None else command.commands[name]
        yield from sections(below, context_of(below, name, context))


def text() -> str:
    """The whole file."""
    root = get_group(app)
    assert list(root.commands) == list(COMMANDS)
    return HEAD + "".join(sections(root, context_of(root, NAME)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the file is not up to date"
    )
    check, new = parser.parse_args().check, text()
    if check and (not TARGET.exists() or TARGET.read_text(encoding="utf-8") != new):
        sys.exit(f"{TARGET.name} is not up to date with the commands' help: run `make docs`")
    if not check:
        TARGET.write_text(new, encoding="utf-8")
        print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
