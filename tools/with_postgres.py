"""Run a command beside a real PostgreSQL of its own: `python tools/with_postgres.py make test`.

The server is made anew in a temporary folder, listens on loopback alone, and is gone when the
command ends. The command finds it as TEST_POSTGRES_URL, and its folder of data as
TEST_POSTGRES_DATA. Where PostgreSQL is not installed, that is said, and the command runs without
it; with `--required` it is an error.
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
    """The folder of PostgreSQL's own programs: Debian keeps them out of PATH."""
    places = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"),
        key=lambda place: int(place.parent.name),
        reverse=True,
    )
    on_path = shutil.which("initdb")
    return next(
        iter(
            [place for place in places if (place / "initdb").exists()]
            or ([Path(on_path).parent] if on_path else [])
        ),
        None,
    )


def account() -> str | None:
    """Whose processes they are: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@contextmanager
def server(programs: Path) -> Iterator[dict[str, str]]:
    """A running server, as environment variables."""
    user = account()
    with tempfile.TemporaryDirectory(prefix="hydra-postgres-", dir="/tmp") as folder:
        if user:
            shutil.chown(folder, user)
        data = Path(folder) / "data"
        quiet = {"user": user, "cwd": folder, "stdout": subprocess.DEVNULL, "check": True}
        subprocess.run(
            [
                programs / "initdb",
                "-D",
                data,
                "-A",
                "trust",
                "-U",
                "postgres",
                "--no-sync",
                "-E",
                "UTF8",
                "--locale=C",
            ],
            **quiet,
        )
        port = free_port()
        options = (
            f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder}"
        )
        subprocess.run(
            [
                programs / "pg_ctl",
                "-D",
                data,
                "-o",
                options,
                "-l",
                Path(folder) / "log",
                "-w",
                "start",
            ],
            **quiet,
        )
        try:
            yield {
                "TEST_POSTGRES_URL": f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres",
                "TEST_POSTGRES_DATA": str(data),
            }
        finally:
            subprocess.run(
                [programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop"],
                **{**quiet, "check": False},
            )


def restart(programs: Path, data: str) -> None:
    """Stop it as a crash would, and start it anew on the same port (pg_ctl keeps the options)."""
    command = [programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "restart"]
    subprocess.run(
        command, user=account(), cwd=Path(data).parent, stdout=subprocess.DEVNULL, check=True
    )


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
