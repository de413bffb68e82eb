"""The code of README.md and of the pages in docs/, for tests/test_readme.py, tests/test_pages.py
and tools/try_install.py.

`<!-- not run: REASON -->` above a block leaves it out. Blocks below `<!-- gateway -->` belong to a
running gateway. A block below `<!-- file: NAME -->` is that file.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(
    r"(?P<before>[^\n]*)\n```(?P<kind>\w+)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE
)
GATEWAY = "<!-- gateway -->"
NOT_RUN = "<!-- not run: "
FILE = re.compile(r"<!-- file: (\S+) -->$")
RUN = ("sh", "bash", "python")
"""The kinds of blocks that are run; others (text, toml, json) are shown."""
NAME = "hydra-llm"


def blocks(kind: str, text: str) -> list[str]:
    """The code blocks of a kind that are to be run, in order."""
    elsewhere = (NOT_RUN, GATEWAY)
    return [
        block["code"]
        for block in BLOCK.finditer(text)
        if block["kind"] == kind and not block["before"].startswith(elsewhere)
    ]


class Step(NamedTuple):
    """A block of a page that is run, or written to a file."""

    kind: str  # one of RUN, or "file"
    code: str
    name: str = ""  # of the file
    gateway: bool = False


def steps(text: str) -> list[Step]:
    """All that is to be done of a page, in order."""
    found = []
    for block in BLOCK.finditer(text):
        kind, code, before = block["kind"], block["code"], block["before"]
        if file := FILE.match(before):
            found.append(Step("file", code, file[1]))
        elif kind in RUN and not before.startswith(NOT_RUN):
            found.append(Step(kind, code, gateway=before == GATEWAY))
    return found


def lines(code: str) -> list[str]:
    """The commands of a shell block, each in one line."""
    joined = code.replace("\\\n", " ").splitlines()
    return [line for line in joined if line.strip() and not line.startswith("#")]


def gateway_blocks(text: str) -> list[tuple[str, str]]:
    """Kind and code of the blocks that are run beside a gateway, in order."""
    found = BLOCK.finditer(text)
    return [(block["kind"], block["code"]) for block in found if block["before"] == GATEWAY]


def commands(text: str) -> list[list[str]]:
    """Every `hydra-llm` line of the shell blocks, split as a shell splits it."""
    own = lines("\n".join(blocks("sh", text)))
    return [shlex.split(line, comments=True)[1:] for line in own if line.startswith(f"{NAME} ")]


def offline(arguments: list[str]) -> list[str]:
    """The same line with the fake LLM in place of one that needs a key."""
    spec_at = {index + 1 for index, word in enumerate(arguments) if word == "--llm"}
    spec_at |= {2} if arguments[:2] == ["llm", "check"] else set()
    fakes = {at for at in spec_at if arguments[at : at + 1] and arguments[at].startswith("fake:")}
    spec_at -= fakes
    return ["fake:echo" if index in spec_at else word for index, word in enumerate(arguments)]


def answers(text: str) -> dict[str, str]:
    """Line of `hydra-llm ask`, without its comment → what README says that it prints."""
    lines = "\n".join(blocks("sh", text)).splitlines()
    asked = [line.rpartition("  # ") for line in lines if line.startswith(f"{NAME} ask ")]
    return {line: answer for line, mark, answer in asked if mark}
