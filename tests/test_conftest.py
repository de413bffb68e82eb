"""The tests' own fence: it refuses the network and lets loopback through."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def test_a_connection_that_leaves_the_machine_is_refused(refused: list[Any]) -> None:
    with (
        pytest.raises(OSError, match="no network"),
        socket.create_connection(("192.0.2.1", 80), timeout=1),
    ):
        pass
    assert refused == [("192.0.2.1", 80)]
    refused.clear()


@pytest.mark.anyio
async def test_asyncio_is_refused_too(refused: list[Any]) -> None:
    import asyncio

    with pytest.raises(OSError, match="no network"):
        await asyncio.open_connection("192.0.2.1", 80)
    assert refused
    refused.clear()


def test_loopback_connects() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=5) as client,
    ):
        client.sendall(b"x")
        accepted, _ = server.accept()
        with accepted:
            assert accepted.recv(1) == b"x"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "code", "workers"), [("4 * 2**30", 0, ()), ("1", 1, ()), ("1", 1, ("-n", "1"))]
)
def test_a_process_beyond_the_memory_limit_fails_the_run(
    tmp_path: Path, limit: str, code: int, workers: tuple[str, ...]
) -> None:
    source = Path(__file__).with_name("conftest.py").read_text()
    assert "MAX_MEMORY = 4 * 2**30\n" in source
    (tmp_path / "conftest.py").write_text(source.replace("= 4 * 2**30\n", f"= {limit}\n"))
    (tmp_path / "test_it.py").write_text("def test_it():\n    assert b'x' * 10**8\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:schemathesis", *workers, "."]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == code, run.stdout
    assert "peak memory 0." in run.stdout
    assert "GB in test_it.py" in run.stdout
    assert (", more than 0.0" in run.stdout) == bool(code)
