"""Replay deploy/Dockerfile in a bare Debian root, without Docker, and ask the server in there.

    python tools/try_image.py [--target slim|full] [--base FOLDER] [--torch FOLDER]

debootstrap makes the base image's root (`--base` keeps it in a folder and takes it from there;
`--torch` has a wheel of CPU torch, where PyTorch's index cannot be reached).
RUN steps run in it by chroot, COPY steps copy, each stage from the one that it names. Then the
image's user starts `hydra-llm serve` as process 1 with the root file system read-only, as
compose.yaml does but on SQLite, in front of a fake upstream on loopback that runs in there too. It
must become healthy by the image's own check, answer, and end by SIGTERM. pip's configuration of
this machine applies. Nothing stays: files are in a temporary folder, mounts in their own namespace.

Needs root, debootstrap and Debian's packages; where they are missing it says so and ends with 0 (1
with `--required`). Exit code 1 if a step or an answer fails.
"""

import argparse
import ast
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from client_upstream import TEXT
from with_postgres import free_port

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
BASES = {"debian:bookworm-slim": "bookworm"}  # image → what debootstrap calls it
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CERTIFICATES = Path("run/build-certificates.pem")  # in the root: this machine's, for pip
WHEELS = Path("run/build-wheels")
TORCH = "--index-url https://download.pytorch.org/whl/cpu"
KEY = "an-admin-key-for-this-test"
UPSTREAM = Path(__file__).with_name("client_upstream.py")
OWN = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
"""Own mounts and processes, all of which end when this one does, however that is."""
SECONDS = 300  # that a start, an answer or an end may take on a busy machine
Process = subprocess.Popen[bytes]


class NoBase(Exception):
    """The base image's root cannot be had here."""


@dataclass
class Image:
    """A stage: its root folder, and what the instructions so far say of it."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    folder: str = "/"
    user: str = "0:0"
    healthcheck: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)

    def copied(self, root: Path) -> "Image":
        """The same image in another folder."""
        subprocess.run(["cp", "-a", "--reflink=auto", self.root, root], check=True)
        return replace(self, root=root, env=dict(self.env))

    def path(self, name: str) -> Path:
        """A path of the image, as this machine sees it."""
        return self.root / str(Path(self.folder) / name).lstrip("/")


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Word and rest of each instruction, without comments and continued lines."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    for line in filter(str.strip, text.splitlines()):
        word, _, rest = line.strip().partition(" ")
        yield word, " ".join(rest.split()) if word != "RUN" else rest


def stages(text: str) -> dict[str, list[tuple[str, str]]]:
    """Each stage's instructions by its name; the first is its FROM."""
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions(text):
        if word == "FROM":
            own: list[tuple[str, str]] = found.setdefault(rest.split(" AS ")[1], [])
        own.append((word, rest))
    return found


class Builder:
    """Builds stages in folders beside each other."""

    def __init__(self, folder: Path, base: Path, wheels: Path | None):
        self._folder, self._base, self._wheels = folder, base, wheels
        self._stages = stages(DOCKERFILE.read_text(encoding="utf-8"))
        self._built: dict[str, Image] = {}

    def build(self, name: str) -> Image:
        """A stage, after those that it needs."""
        if name not in self._built:
            (_, source), *rest = self._stages[name]
            parent = source.partition(" AS ")[0]
            before = Image(self._bare(parent)) if parent in BASES else self.build(parent)
            image = self._built[name] = before.copied(self._folder / name)
            for word, text in rest:
                started = time.monotonic()
                self._step(image, word, text)
                took = time.monotonic() - started
                print(f"  {took:4.0f} s  {name}: {word} {' '.join(text.split())[:80]}", flush=True)
        return self._built[name]

    def _bare(self, image: str) -> Path:
        if not (self._base / "etc/debian_version").exists():
            print(f"{image}: debootstrap", flush=True)
            bootstrap = [*OWN, "debootstrap", "--variant=minbase", BASES[image], str(self._base)]
            done = subprocess.run(bootstrap, capture_output=True, text=True)
            if done.returncode:
                raise NoBase(f"debootstrap: {(done.stdout + done.stderr).strip()[-500:]}")
        return self._base

    def _step(self, image: Image, word: str, text: str) -> None:
        match word:
            case "RUN":
                self._run(image, text)
            case "COPY":
                self._copy(image, shlex.split(text))
            case "ARG" | "ENV":
                for part in shlex.split(text):
                    name, _, value = part.partition("=")
                    image.env[name] = re.sub(r"\$(\w+)", lambda m: image.env.get(m[1], ""), value)
            case "WORKDIR":
                image.folder = text
                image.path("").mkdir(parents=True, exist_ok=True)
            case "USER":
                image.user = text
            case "ENTRYPOINT":
                image.entrypoint = json.loads(text)
            case "HEALTHCHECK":
                image.healthcheck = json.loads(text.partition(" CMD ")[2])
            case "VOLUME" | "EXPOSE" | "CMD":
                pass
            case _:
                raise RuntimeError(f"this tool does not know the instruction {word}")

    def _run(self, image: Image, command: str) -> None:
        """With this machine's way to names and packages, of which nothing stays in the image."""
        shutil.copy("/etc/resolv.conf", image.root / "etc/resolv.conf")
        options = pip_options()
        if certificates := options.get("PIP_CERT"):
            shutil.copy(certificates, image.root / CERTIFICATES)
            options["PIP_CERT"] = f"/{CERTIFICATES}"
        env = {**options, **image.env, "DEBIAN_FRONTEND": "noninteractive"}
        place = image.root / WHEELS
        place.mkdir(exist_ok=True)
        if self._wheels and TORCH in command:
            command = command.replace(TORCH, f"--find-links /{WHEELS}")
            print(f"  torch comes from a folder, not by {TORCH}", flush=True)
        mount = f"mount --bind {shlex.quote(str(self._wheels or place))} {shlex.quote(str(place))}"
        shell = ["/bin/sh", "-ec", f"cd {image.folder}; {command}"]
        inside = [*OWN, "/bin/sh", "-ec", f'{mount}; exec chroot "$@"', "sh", image.root, *shell]
        done = subprocess.run(inside, env=env, capture_output=True, text=True)
        place.rmdir()
        (image.root / CERTIFICATES).unlink(missing_ok=True)
        if done.returncode:
            raise RuntimeError(f"RUN {command}: {done.stdout[-3000:]}{done.stderr[-3000:]}")

    def _copy(self, image: Image, words: list[str]) -> None:
        source = ROOT
        if words[0].startswith("--from="):
            source = self.build(words.pop(0).removeprefix("--from=")).root
        *files, target = words
        for file in files:
            found = source / file.lstrip("/")
            place = image.path(target)
            if not found.is_dir():
                shutil.copy(found, place / file if target.endswith("/") else place)
            elif source == ROOT:
                ignored = shutil.ignore_patterns("__pycache__")  # as Dockerfile.dockerignore
                shutil.copytree(found, place, ignore=ignored, dirs_exist_ok=True)
            else:  # many files that no later step changes: hard links
                subprocess.run(["cp", "-alT", found, place], check=True)


def pip_options() -> dict[str, str]:
    """This machine's configuration of pip, as environment variables."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    options = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        option = name.rpartition(".")[2].upper().replace("-", "_")
        options[f"PIP_{option}"] = str(ast.literal_eval(value))
    return options


# ---- the server


def inside(image: Image, data: Path) -> list[str]:
    """What runs a command as a container would: as the image's user and as process 1, the root
    file system read-only, /data a volume, /tmp in memory. All that it starts ends with it.
    """
    root = shlex.quote(str(image.root))
    script = f"""
        mount --bind {root} {root}
        mount --bind {shlex.quote(str(data))} {root}/data
        mount -t tmpfs tmpfs {root}/tmp
        mount -t proc proc {root}/proc
        mount -o remount,ro,bind {root}
        exec chroot --userspec={image.user} {root} "$@"
    """
    return [*OWN, "/bin/sh", "-euc", script, "sh"]


@contextmanager
def started(command: list[str], env: dict[str, str], log: Path) -> Iterator[Process]:
    """A process of the image; what it prints goes into a file, and is shown where it fails."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
        try:
            yield process
        except RuntimeError as error:
            said = log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise RuntimeError(f"{error}\n{said}") from None
        finally:
            end(process)


def end(process: Process) -> None:
    """Kill process 1 in there, and with it all others: it is another user's, so that --kill-child
    has no effect on it.
    """
    while process.poll() is None:
        with suppress(OSError, IndexError):  # it is about to begin, or has just ended
            os.kill(first_process(process), signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.2)


def until(ready: Callable[[], bool], server: Process, what: str) -> None:
    """Wait until it is so. RuntimeError: the server has ended, or it takes too long."""
    begin = time.monotonic()
    while not ready():
        if server.poll() is not None or time.monotonic() - begin > SECONDS:
            raise RuntimeError(f"the server is not {what}: exit code {server.poll()}")
        time.sleep(0.2)
    print(f"  {time.monotonic() - begin:4.0f} s  {what}", flush=True)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def request(url: str, body: Any = None) -> str:
    """The answer to a request with the admin key."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    sent = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, sent, headers)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(asked, timeout=SECONDS) as answer:
        return str(answer.read().decode())


def try_server(image: Image, data: Path) -> None:
    """Start it in front of a fake upstream, ask it, and stop it."""
    (data / "admin_key").write_text(KEY)
    shutil.copy(UPSTREAM, data)
    user = int(image.user.partition(":")[0])
    for file in (data, *data.iterdir()):
        os.chown(file, user, user)
    port, own = free_port(), free_port()
    fake = ["python3", "-m", "uvicorn", "--factory", "--app-dir=/data", "--lifespan=off"]
    fake += ["--log-level=error", f"--port={own}", f"{UPSTREAM.stem}:Upstream"]
    serve = [*image.entrypoint, "serve", "--host=0.0.0.0", f"--port={port}", "--workers=2"]
    serve += [f"--llm=openai:m@http://127.0.0.1:{own}/v1", "--store=sqlite:////data/store.db"]
    env = {**image.env, "HYDRA_ADMIN_KEY_FILE": "/data/admin_key", "OPENAI_API_KEY": "any"}
    run, logs = inside(image, data), data.parent
    check = [*run, *(part.replace("8000", str(port)) for part in image.healthcheck)]

    def healthy() -> bool:
        return subprocess.run(check, env=env, capture_output=True).returncode == 0

    with (
        started([*run, *fake], env, logs / "upstream.log") as upstream,
        started([*run, *serve], env, logs / "server.log") as server,
    ):
        until(lambda: listens(own), upstream, "in front of an upstream")
        until(healthy, server, "healthy by the image's own check")
        ask_server(f"http://127.0.0.1:{port}/v1", server, user)
        stop_server(server, port)
        if healthy():
            raise RuntimeError("the health check calls a server healthy that has ended")


def ask_server(at: str, server: Process, user: int) -> None:
    """Add a record, ask whole and as a stream. RuntimeError: an answer is not as it should be."""
    if (owner := owner_of(first_process(server))) != user:
        raise RuntimeError(f"the server runs as the user {owner}, not as {user}")
    records = [{"id": "1", "input": "wine number 1", "output": "dry"}]
    added = json.loads(request(f"{at}/users/ada/records", {"records": records}))["added"]
    message = {"role": "user", "content": "wine number 1 again"}
    body = {"model": "m", "user": "ada", "messages": [message]}
    answer = json.loads(request(f"{at}/chat/completions", body))
    used = answer["personalization"].get("records")
    said = answer["choices"][0]["message"]["content"]
    if (added, used, said) != (1, ["1"], TEXT):
        raise RuntimeError(f"it added {added} records, used {used} and answered {said!r}")
    stream = request(f"{at}/chat/completions", {**body, "stream": True})
    if TEXT not in stream or not stream.rstrip().endswith("data: [DONE]"):
        raise RuntimeError(f"it streamed {stream!r}")
    print(f"        answers, personal, as the user {user}", flush=True)


def stop_server(server: Process, port: int) -> None:
    """SIGTERM, as `docker stop` sends it. RuntimeError: it does not end at once and with 0."""
    os.kill(first_process(server), signal.SIGTERM)
    try:
        code = server.wait(SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError("the server does not end by SIGTERM") from None
    if code or listens(port):
        raise RuntimeError(f"the server ended with {code}, its port is open: {listens(port)}")
    print("        stops on SIGTERM with exit code 0", flush=True)


def first_process(server: Process) -> int:
    """The process that is number 1 in there, as this machine counts."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
    return int(children.read_text().split()[0])


def owner_of(process: int) -> int:
    return Path(f"/proc/{process}").stat().st_uid


def lacking() -> str:
    """Why the image cannot be tried here; '' if it can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "it needs root"
    missing = [name for name in ("debootstrap", "chroot", "unshare") if not shutil.which(name)]
    return f"{', '.join(missing)} is not installed" if missing else ""


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--target", default="slim", choices=["slim", "full"])
    parser.add_argument("--base", type=Path)
    parser.add_argument("--torch", type=Path)
    parser.add_argument("--required", action="store_true")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the temporary folder goes, as by ^C
    try:
        if reason := lacking():
            raise NoBase(reason)
        try_image(given.target, given.base, given.torch)
    except NoBase as error:
        print(f"the image is not tried: {error}", file=sys.stderr)
        sys.exit(int(given.required))
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"failed: {error}")


@contextmanager
def temporary() -> Iterator[Path]:
    """A folder that goes with all that is in it."""
    folder = Path(tempfile.mkdtemp(prefix="hydra-llm-image-"))
    try:
        yield folder
    finally:
        for _ in range(100):  # a process that was just ended may still write
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.1)


def try_image(target: str, base: Path | None, wheels: Path | None) -> None:
    """Build a target and ask its server."""
    with temporary() as folder:
        (folder / "data").mkdir()
        image = Builder(folder, base or folder / "base", wheels).build(target)
        size = subprocess.check_output(["du", "-sm", image.root], text=True).split()[0]
        print(f"{target}: {size} MB", flush=True)
        try_server(image, folder / "data")


if __name__ == "__main__":
    main()
