"""The MCP server by real processes: `hydra-llm serve` on loopback, `hydra-llm mcp` on stdio."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

from hydra_llm.cli.main import run
from hydra_llm.gateway.auth import make_key
from hydra_llm.store.store import Store

from .test_mcp import call, fault
from .test_processes import served

pytestmark = pytest.mark.anyio
PAGE = Path(__file__).parents[2] / "docs" / "mcp.md"
BLOCKS = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.S)]
"""Claude Desktop's, Cursor's and VS Code's configuration."""
ADDRESS = "http://127.0.0.1:8000"


def ask(url: str, key: str) -> Any:
    """A chat completion's records, by a key of one user."""
    body = {"model": "fake:echo", "messages": [{"role": "user", "content": "Which tea?"}]}
    headers = {"authorization": f"Bearer {key}"}
    reply = httpx2.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=300)
    return reply.json()["personalization"]["records"]


@pytest.mark.slow
async def test_the_pages_configurations_reach_one_user_of_a_server(tmp_path: Path) -> None:
    """Claude Desktop's block over stdio, Cursor's over streamable HTTP; a revoked key ends both."""
    stored = f"sqlite:///{tmp_path / 's.db'}"
    store = Store(stored)
    key, secret = make_key(store, users=["ada"])
    with served("--llm", "fake:echo", "--store", stored) as (_, url, _):
        desktop, cursor, _code = (
            json.loads(json.dumps(block).replace(ADDRESS, url).replace("hk-...", secret))
            for block in BLOCKS
        )
        program = desktop["mcpServers"]["hydra"]
        assert program["command"] == "hydra-llm"
        stdio = StdioServerParameters(
            command=sys.executable,
            args=["-m", "hydra_llm", *program["args"]],
            env={**os.environ, **program["env"]},
        )
        remote = cursor["mcpServers"]["hydra"]
        async with (
            httpx2.AsyncClient(headers=remote["headers"], timeout=300) as http,
            Client(streamable_http_client(remote["url"], http_client=http)) as direct,
            Client(stdio) as relayed,
            Client(stdio, mode="legacy") as old,
        ):
            tools = await direct.list_tools()
            for other in (relayed, old):
                assert (await other.list_tools()).tools == tools.tools
                assert other.instructions == direct.instructions
            for place, mcp in enumerate((direct, relayed, old)):
                record = {"input": f"Which tea number {place}?", "output": "mint"}
                (id,) = (await call(mcp, "add_records", records=[record]))["ids"]
                assert id in ask(url, secret)
                (latest,) = (await call(mcp, "list_answers", limit=1))["answers"]
                given = {"request_id": latest["id"], "edited": f"mint {place}"}
                assert (await call(mcp, "give_feedback", **given))["record"] in ask(url, secret)
                assert (await call(mcp, "delete_record", id=id))["deleted"]
                assert id not in ask(url, secret)
                assert await fault(mcp, "delete_record", id=id) == "no such record"
            assert store.users() == ["ada"]
            store.revoke_key(key.id)
            said = await fault(relayed, "list_records")
            assert said.startswith(f"the gateway at {url}/mcp refuses: this key is not valid")
    store.close()


@pytest.mark.slow
async def test_a_gateway_that_is_gone_is_told_by_each_call(tmp_path: Path) -> None:
    stored = f"sqlite:///{tmp_path / 's.db'}"
    with served("--llm", "fake:echo", "--store", stored) as (process, url, _):
        command = ["-m", "hydra_llm", "mcp", "--url", f"{url}/v1", "--user", "zoë"]
        stdio = StdioServerParameters(command=sys.executable, args=command, env={**os.environ})
        async with Client(stdio) as mcp:
            await call(mcp, "add_records", records=[{"input": "a", "output": "b"}])
            process.terminate()
            process.wait()
            assert f"the gateway at {url}/mcp does not answer" in await fault(mcp, "list_records")
    store = Store(stored)
    assert store.users() == ["zoë"]
    store.close()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--url", "localhost:8000"], "--url localhost:8000 is no URL: write it as http://127"),
        (["--url", "http://127.0.0.1:1"], "the gateway at http://127.0.0.1:1/mcp does not answer"),
        (["--key", "hk-7x q9"], "HYDRA_MCP_KEY holds a blank, a line break"),
    ],
)
def test_what_it_cannot_start_with_is_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["mcp", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"hydra-llm: {line}")
    assert said.err.count("\n") == 1
    assert "7x" not in said.err


@pytest.mark.slow
def test_a_wrong_key_ends_it_at_the_start(tmp_path: Path) -> None:
    stored = f"sqlite:///{tmp_path / 's.db'}"
    store = Store(stored)
    make_key(store, admin=True)
    store.close()
    with served("--llm", "fake:echo", "--store", stored) as (_, url, _):
        command = [sys.executable, "-m", "hydra_llm", "mcp", "--url", url]
        environment = {**os.environ, "HYDRA_MCP_KEY": "hk-wrong-secret"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"hydra-llm: the gateway at {url}/mcp refuses: this key is not")
    assert "secret" not in done.stderr


@pytest.mark.slow
def test_a_key_of_another_user_ends_it_at_the_start(tmp_path: Path) -> None:
    stored = f"sqlite:///{tmp_path / 's.db'}"
    store = Store(stored)
    _, key = make_key(store, users=["ada"])
    store.close()
    with served("--llm", "fake:echo", "--store", stored) as (_, url, _):
        command = [sys.executable, "-m", "hydra_llm", "mcp", "--url", url, "--user"]
        environment = {**os.environ, "HYDRA_MCP_KEY": key}
        ends: Any = {"env": environment, "capture_output": True, "text": True, "input": ""}
        done = subprocess.run([*command, "b/ob"], **ends)
        own = subprocess.run([*command, "ada"], **ends)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "hydra-llm: the key is not for the user 'b/ob': leave --user out\n"
    assert own.returncode == 0


def test_the_pages_blocks_name_the_server_and_no_other() -> None:
    servers = [(block.get("mcpServers") or block["servers"])["hydra"] for block in BLOCKS]
    assert len(servers) == 3
    for server in servers:
        assert ADDRESS in json.dumps(server)
