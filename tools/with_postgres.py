"""Run a command with a temporary PostgreSQL server: `python tools/with_postgres.py make test`.

The server uses a temporary folder, listens on loopback only, and stops when the command ends. The
command gets the environment variables TEST_POSTGRES_URL and TEST_POSTGRES_DATA (the data folder).
If PostgreSQL is not installed, the command runs without a server; with `--required` that is an
error.
"""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def binaries() -> Path | None:
    """The folder of PostgreSQL's programs; Debian does not put it on PATH."""
    folders = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: -int(folder.parent.name)
    )
    if on_path := shutil.which("initdb"):
        folders.append(Path(on_path).parent)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


def account() -> str | None:
    """The account that runs the server: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@contextmanager
def server(programs: Path) -> Iterator[dict[str, str]]:
    """Run a server; yields the environment variables for the command."""
    with tempfile.TemporaryDirectory(prefix="hydra-postgres-", dir="/tmp") as folder:
        if user := account():
            shutil.chown(folder, user)
        data, port = f"{folder}/data", free_port()
        new = ["-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8", "--locale=C"]
        call(folder, programs / "initdb", "-D", data, *new)
        settings = f"listen_addresses=127.0.0.1 port={port} unix_socket_directories={folder}"
        options = ["-o", " ".join(f"-c {setting}" for setting in settings.split())]
        call(
            folder, programs / "pg_ctl", "-D", data, *options, "-l", f"{folder}/log", "-w", "start"
        )
        try:
            yield {
                "TEST_POSTGRES_URL": f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres",
                "TEST_POSTGRES_DATA": data,
            }
        finally:
            stop = ("-m", "immediate", "-w", "stop")
            call(folder, programs / "pg_ctl", "-D", data, *stop, check=False)


def restart(programs: Path, data: str) -> None:
    """Stop the server as a crash would and restart it on the same port (same options)."""
    call(Path(data).parent, programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "restart")


def call(folder: Path | str, *command: Path | str, check: bool = True) -> None:
    """Run one of PostgreSQL's programs in a folder."""
    subprocess.run(command, user=account(), cwd=folder, stdout=subprocess.DEVNULL, check=check)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(arguments: Sequence[str]) -> int:
    required = arguments[:1] == ["--required"]
    command = arguments[required:]
    if not command:
        print(__doc__, file=sys.stderr)
        return 2
    programs = binaries()
    if programs is None:
        print(
            "PostgreSQL is not installed (apt-get install postgresql): its tests are skipped",
            file=sys.stderr,
        )
        return 2 if required else subprocess.run(command).returncode
    with server(programs) as variables:
        return subprocess.run(command, env={**os.environ, **variables}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
