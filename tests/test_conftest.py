"""The tests' own fence: it refuses the network and lets loopback through."""

import socket
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
