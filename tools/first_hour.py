"""Write docs/first-hour.md: from an empty machine to a personal answer, as it comes on a terminal.

Builds the wheel of this checkout and runs COMMANDS, one after the other, as a new user would: in an
empty home folder, with no other variable of the environment than pip's. Nothing of the output is
changed but the home folder's name. Behind each command stand its seconds by the clock, and of CPU;
the page says how busy the machine was before. `--keep FOLDER` keeps the home folder.

    python tools/first_hour.py
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "first-hour.md"
TASK = "Does this support agent answer, escalate, refund or wait? Write one word. Ticket: {input}"
TICKET = "My new kettle does not switch on at all. No hurry."
FEW = "--set llm.constrain=true --set training.labelled_users=4 --set retrieval.retrieved=5"
COMMANDS = (
    "python3 -m venv hydra && . hydra/bin/activate",
    "pip install --quiet 'hydra-llm[demo,server]'",
    f"hydra-llm data import labels.csv --out tickets --prompt '{TASK}'",
    "hydra-llm data check tickets",
    f"hydra-llm learn tickets --llm smollm2 --out bundle {FEW}",
    "hydra-llm fit tickets --bundle bundle --llm smollm2",
    f"hydra-llm ask '{TICKET}' --user agent17 --bundle bundle --llm smollm2",
    f"hydra-llm ask '{TICKET}' --user agent28 --bundle bundle --llm smollm2",
)
HEAD = """# The first hour

From an empty machine to a personal answer, each command with its output as it came; written by
`tools/first_hour.py`. The machine has Python {python}, {cores} and no GPU. `labels.csv` is
[examples/agents/labels.csv](../examples/agents/labels.csv): what 30 made-up support agents did
with their tickets (columns user, time, input, output). The LLM is SmolLM2 with 135M parameters,
inside the process; `openai:gpt-4o-mini` in its place would be a model of an API. pip took the
wheel of this checkout and the CPU build of torch ([README](../README.md), Install), and what it had
downloaded before from its cache.

`took` is measured around each command: seconds by the clock, then those of CPU of all its processes
(more than by the clock: several cores). Waiting for downloads and for other work is in the first
number alone. {load}

```console
"""
TAIL = """```

The {count} commands took {minutes:.0f} minutes. The last two ask about the same ticket for two
agents who were not among the training users. Next: [the gateway](gateway.md) puts the bundle
behind an OpenAI-compatible API, `hydra-llm bench run` measures how good the answers are
([benchmark](benchmark.md)), and [examples/walk.py](../examples/walk.py) does all of it.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="the home folder; it must not exist yet")
    kept = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as temporary:
        home = (kept or Path(temporary) / "home").absolute()
        wheels = Path(temporary) / "wheels"
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels]
        subprocess.run([*pip, ROOT], check=True)
        home.mkdir(parents=True)
        shutil.copy(ROOT / "examples" / "agents" / "labels.csv", home)
        TARGET.write_text(recorded(home, wheels), encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")


def recorded(home: Path, wheels: Path) -> str:
    """The page: every command with its output and time."""
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    variables = {
        **pip,
        "HOME": str(home),
        "PATH": f"{home / 'hydra' / 'bin'}:{sys.base_prefix}/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "COLUMNS": "80",
        "PIP_FIND_LINKS": f"{wheels} {pip.get('PIP_FIND_LINKS', '')}",
        "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
    }
    cores = len(os.sched_getaffinity(0))
    busy, lines, began = os.getloadavg()[0], list[str](), time.monotonic()
    load = f"Before the first command {busy:.1f} processes of other work wanted a core."
    for command in COMMANDS:
        print(f"$ {command}", flush=True)
        started, before = time.monotonic(), cpu_seconds()
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=home,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        out = re.sub(r"[ \t]+$", "", done.stdout.replace(str(home), "~"), flags=re.M).rstrip("\n")
        print(out, flush=True)
        if done.returncode:
            sys.exit(f"exit code {done.returncode}: nothing was written")
        seconds, cpu = time.monotonic() - started, cpu_seconds() - before
        took = f"# took {seconds:.0f} s, CPU {cpu:.0f} s"
        lines += [f"~$ {command}", *filter(None, [out]), took, ""]
    text = "\n".join(lines)
    if foreign := re.findall(r"https?://(?!127\.0\.0\.1)\S+", text):
        sys.exit(f"the output names {foreign[0]}: nothing was written")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    minutes = (time.monotonic() - began) / 60
    tail = TAIL.format(count=len(COMMANDS), minutes=minutes)
    named = f"{cores} core{'s' * (cores > 1)}"
    return HEAD.format(python=python, cores=named, load=load) + text + tail


def cpu_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    used = os.times()
    return used.children_user + used.children_system


if __name__ == "__main__":
    main()
