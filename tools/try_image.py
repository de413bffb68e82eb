"""Replay deploy/Dockerfile in a bare Debian root, without Docker, and ask the server in there.

    python tools/try_image.py [--target slim] [--base FOLDER]

debootstrap makes the base image's root (`--base` keeps it in a folder and takes it from there).
RUN steps run in it by chroot, COPY steps copy, each stage from the one that it names. Then the
image's user starts `hydra-llm serve` with the root file system read-only, as compose.yaml does but
on SQLite and with a fake LLM, and the server is asked. pip's configuration of this machine applies.

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
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from with_postgres import free_port

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
BASES = {"debian:bookworm-slim": "bookworm"}  # image → what debootstrap calls it
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CERTIFICATES = Path("run/build-certificates.pem")  # in the root: this machine's, for pip
KEY = "an-admin-key-for-this-test"


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

    def __init__(self, folder: Path, base: Path):
        self._folder, self._base = folder, base
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
            bootstrap = ["debootstrap", "--variant=minbase", BASES[image], str(self._base)]
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
        inside = ["chroot", image.root, "/bin/sh", "-ec", f"cd {image.folder}; {command}"]
        done = subprocess.run(inside, env=env, capture_output=True, text=True)
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


@contextmanager
def mounted(image: Image, data: Path) -> Iterator[list[str]]:
    """What runs a command as the image's user: root read-only, /data a volume, /tmp in memory."""
    root = shlex.quote(str(image.root))
    script = f"""
        mount --bind {root} {root}
        mount --bind {shlex.quote(str(data))} {root}/data
        mount -t tmpfs tmpfs {root}/tmp
        mount -t proc proc {root}/proc
        mount -o remount,ro,bind {root}
        exec chroot --userspec={image.user} {root} "$@"
    """
    yield ["unshare", "--mount", "/bin/sh", "-euc", script, "sh"]


def ask(url: str, body: Any = None) -> Any:
    """The answer to a request with the admin key, as JSON."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    sent = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, sent, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def try_server(image: Image, data: Path) -> None:
    """Start it, ask it, and stop it."""
    user = int(image.user.partition(":")[0])
    (data / "admin_key").write_text(KEY)
    for file in (data, data / "admin_key"):
        os.chown(file, user, user)
    port = free_port()
    serve = ["serve", "--host=0.0.0.0", f"--port={port}", "--llm=fake:echo"]
    serve += ["--store=sqlite:////data/store.db", "--workers=2", "--log=off"]
    env = {**image.env, "HYDRA_ADMIN_KEY_FILE": "/data/admin_key"}
    with mounted(image, data) as inside:
        started = time.monotonic()
        server = subprocess.Popen([*inside, *image.entrypoint, *serve], env=env)
        try:
            check = [*inside, *(part.replace("8000", str(port)) for part in image.healthcheck)]
            while subprocess.run(check, env=env, capture_output=True).returncode:
                if server.poll() is not None or time.monotonic() - started > 300:
                    raise RuntimeError(f"the server does not start: {server.poll()}")
                time.sleep(0.5)
            print(f"  {time.monotonic() - started:4.0f} s  healthy", flush=True)
            at = f"http://127.0.0.1:{port}/v1"
            records = [{"id": "1", "input": "wine number 1", "output": "dry"}]
            added = ask(f"{at}/users/ada/records", {"records": records})["added"]
            message = {"role": "user", "content": "wine number 1 again"}
            body = {"model": "fake:echo", "user": "ada", "messages": [message]}
            used = ask(f"{at}/chat/completions", body)["personalization"]["records"]
            if (added, used) != (1, ["1"]):
                raise RuntimeError(f"it added {added} records and used {used}")
        finally:
            server.terminate()
        if code := server.wait(60):
            raise RuntimeError(f"the server ended with {code}")


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
    parser.add_argument("--required", action="store_true")
    given = parser.parse_args()
    try:
        if reason := lacking():
            raise NoBase(reason)
        try_image(given.target, given.base)
    except NoBase as error:
        print(f"the image is not tried: {error}", file=sys.stderr)
        sys.exit(int(given.required))
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"failed: {error}")


def try_image(target: str, base: Path | None) -> None:
    """Build a target and ask its server."""
    with tempfile.TemporaryDirectory(prefix="hydra-llm-image-") as name:
        folder = Path(name)
        (folder / "data").mkdir()
        image = Builder(folder, base or folder / "base").build(target)
        size = subprocess.check_output(["du", "-sm", image.root], text=True).split()[0]
        print(f"{target}: {size} MB", flush=True)
        try_server(image, folder / "data")


if __name__ == "__main__":
    main()
