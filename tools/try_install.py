"""Install the package as users do, and run README's commands outside the checkout.

    python tools/try_install.py [EXTRA ...] [--each] [--write]

Builds the wheel, makes a fresh virtual environment for each extra (default: `server` and `all`;
`base` is none), installs the wheel with it, measures seconds and size, and runs what README says of
it, with the fake LLM where README names a hosted one. `--each` takes every extra. `--write` writes
benchmarks/results/install.json; `make docs` makes README's table of it. pip's cache and
constraints.txt are used. Exit code 1 if anything fails.
"""

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from readme_code import README, blocks, commands, gateway_blocks, offline

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "install.json"
TEXT = README.read_text(encoding="utf-8")
NEEDS = {"learn": "learn", "fit": "learn", "ask": "learn", "demo": "demo", "bench": "bench"}
NEEDS |= {"store": "server", "users": "server"}
"""Command of README → the extra that it needs."""
NOT_RUN = ("data get", "bench sweep", "serve")  # the network, a long time, a server
LONG = {"demo": ["--users", "2"]}  # what makes a long command shorter
MOST = {"server": 200}  # MB on disk, with pip itself
BRINGS = {  # extra → the others that it holds
    "accelerate": ["learn", "openai"],
    "bench": ["learn", "openai"],
    "demo": ["bench", "embedded", "learn", "openai"],
    "learn": ["openai"],
    "onnx": ["device", "learn", "openai"],
    "privacy": ["learn", "openai"],
    "ray": ["learn", "openai"],
    "report": ["bench", "learn", "openai"],
    "all": [
        *("accelerate", "bench", "demo", "embedded", "learn"),
        *("mcp", "openai", "otel", "privacy", "report", "server"),
    ],
}


@dataclass(frozen=True)
class Venv:
    """A fresh environment with one extra, and a folder outside the checkout to run in."""

    extra: str
    folder: Path
    cache: Path  # of downloaded models, shared by all

    @property
    def has(self) -> set[str]:
        """The extras that are installed."""
        return {self.extra, *BRINGS.get(self.extra, [])}

    def run(self, *command: str) -> None:
        """Run a program of the environment; CalledProcessError if it fails."""
        started = time.monotonic()
        program = str(self.folder / "bin" / command[0])
        where = self.folder / "here"
        done = subprocess.run(
            [program, *command[1:]], cwd=where, env=self.environment, capture_output=True, text=True
        )
        took = time.monotonic() - started
        print(f"  {took:4.0f} s  {' '.join(shlex.join(command).split())[:90]}", flush=True)
        if done.returncode != 0:
            print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", flush=True)
            done.check_returncode()

    @property
    def environment(self) -> dict[str, str]:
        """The caller's, without what would find the checkout, its cache or its settings."""
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("HYDRA_", "PYTHON"))}
        path = f"{self.folder / 'bin'}:{ours['PATH']}"
        return {**ours, "PATH": path, "HYDRA_CACHE": str(self.cache)}

    def install(self, wheel: Path) -> dict[str, float]:
        """Install the wheel with the extra: seconds, and MB on disk of the whole environment."""
        (self.folder / "here").mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "venv", self.folder], check=True)
        extra = "" if self.extra == "base" else f"[{self.extra}]"
        options = ["--quiet", "--constraint", str(ROOT / "constraints.txt")]
        started, what = time.monotonic(), f"hydra-llm{extra} @ {wheel.as_uri()}"
        self.run("python", "-m", "pip", "install", *options, what)
        seconds = time.monotonic() - started
        used = sum(file.lstat().st_blocks for file in self.folder.rglob("*")) * 512  # as du counts
        if (size := used / 2**20) > MOST.get(self.extra, size):
            raise RuntimeError(f"{self.extra} takes {size:.0f} MB: more than {MOST[self.extra]}")
        return {"seconds": round(seconds), "MB": round(size)}


def try_commands(venv: Venv) -> None:
    """What works with this extra: every line and block of README that needs no other."""
    venv.run("hydra-llm", "--version")
    make_data(venv)
    for line in commands(TEXT):
        if NEEDS.get(line[0], venv.extra) in venv.has and not " ".join(line).startswith(NOT_RUN):
            line = line if "learn" in venv.has else without_bundle(line)
            venv.run("hydra-llm", *offline(line), *LONG.get(line[0], []))
    if "learn" in venv.has:
        for code in blocks("python", TEXT):
            venv.run("python", "-c", code)
    if "embedded" in venv.has:
        venv.run("hydra-llm", "llm", "check", "smollm2")
    if "report" in venv.has:
        venv.run("hydra-llm", "bench", "show", "table", "--html", "table.html")
    if "server" in venv.has:
        try_gateway(venv)


def without_bundle(line: list[str]) -> list[str]:
    """The line as one writes it who has learned none."""
    if "--bundle" not in line:
        return line
    place = line.index("--bundle")
    return line[:place] + line[place + 2 :]


def make_data(venv: Venv) -> None:
    """The table that README's commands import."""
    shutil.copytree(ROOT / "examples" / "agents", venv.folder / "here" / "examples" / "agents")


def try_gateway(venv: Venv) -> None:
    """README's requests to the gateway; without `learn` those of its shell block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    learned = "learn" in venv.has
    bundle = ["--bundle", "my-bundle"] if learned else []
    serve = [venv.folder / "bin" / "hydra-llm", "serve", "--llm", "fake:echo", "--port", port]
    here = venv.folder / "here"
    server = subprocess.Popen([*serve, *bundle], cwd=here, env=venv.environment)
    try:
        wait_for(int(port), server)
        for kind, code in gateway_blocks(TEXT):
            script = code.replace("8000", port).replace("gpt-4o-mini", "fake:echo")
            if kind == "bash":
                done = ["bash", "-euc", script]
                said = subprocess.run(done, check=True, capture_output=True, text=True).stdout
                if '"choices"' not in said or '"error"' in said:
                    raise RuntimeError(f"the gateway said: {said}")
            elif learned:
                venv.run("python", "-c", script)
    finally:
        server.terminate()
        server.wait(60)


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    """Until the server listens; RuntimeError if it ends before."""
    while server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError("`hydra-llm serve` ended")


def measured(extras: Sequence[str], folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Each extra with what its installation took, after its commands have run."""
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", folder / "dist", ROOT], check=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    for extra in extras:
        print(f"{extra}:", flush=True)
        venv = Venv(extra, folder / extra, folder / "cache")
        row = venv.install(wheel)
        try_commands(venv)
        shutil.rmtree(venv.folder)
        print(f"  {row['seconds']} s, {row['MB']} MB", flush=True)
        yield extra, row


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = ["base", *sorted(project["optional-dependencies"].keys() - {"dev"})]
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("extras", nargs="*", default=["server", "all"], metavar="EXTRA")
    parser.add_argument("--each", action="store_true")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if unknown := set(given.extras) - set(known):
        parser.error(f"unknown {', '.join(unknown)}: take some of {', '.join(known)}")
    with tempfile.TemporaryDirectory(prefix="hydra-llm-install-") as folder:
        try:
            rows = dict(measured(known if given.each else given.extras, Path(folder)))
        except (subprocess.CalledProcessError, RuntimeError) as error:
            sys.exit(f"failed: {error}")
    if given.write:
        before = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
        RESULT.write_text(json.dumps({**before, **rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
