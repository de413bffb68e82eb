"""The MCP server at `/mcp`, asked by the official client: mounted in a gateway of this process."""

import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import pytest
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult

from hydra_llm.gateway.auth import make_key
from hydra_llm.gateway.mcp_tools import TOOLS
from hydra_llm.store.store import Store
from hydra_llm.store.values import Request
from hydra_llm.types import Record
from tests.marks import slow_except

from .conftest import World, records_of, running

pytestmark = pytest.mark.anyio
QUESTION = "whales under the waves at night"
AUTO, LEGACY = "auto", "legacy"  # the protocol of 2026-07-28, and the handshake of those before
ASK = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
ACCEPT = {"accept": "application/json, text/event-stream"}


@asynccontextmanager
async def connected(
    world: World, user: str = "", key: str = "", mode: str = AUTO
) -> AsyncIterator[Client]:
    """The official client, connected to a gateway."""
    headers = {"x-hydra-user": user} if user else {}
    headers |= {"authorization": f"Bearer {key}"} if key else {}
    transport = httpx2.ASGITransport(world.app, raise_app_exceptions=False)
    async with (
        httpx2.AsyncClient(transport=transport, headers=headers) as http,
        Client(streamable_http_client("http://localhost/mcp", http_client=http), mode=mode) as mcp,
    ):
        yield mcp


def text_of(result: CallToolResult) -> str:
    (content,) = result.content
    assert content.type == "text"
    return content.text


async def call(mcp: Client, name: str, **arguments: Any) -> Any:
    """What a tool returns; it must not be an error."""
    result = await mcp.call_tool(name, arguments)
    assert not result.is_error, text_of(result)
    return result.structured_content


async def fault(mcp: Client, name: str, **arguments: Any) -> str:
    """The one line of a tool's error."""
    result = await mcp.call_tool(name, arguments)
    assert result.is_error
    line = text_of(result)
    assert line
    assert "\n" not in line
    return line


@contextmanager
def refusal() -> Iterator[list[str]]:
    """Why a gateway refuses every request, if it does."""
    said: list[str] = []
    try:
        yield said
    except* MCPError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        said.append(str(error))


# ---- what is offered


async def test_every_tool_has_a_schema_and_takes_no_user(store: Store) -> None:
    async with running(store) as world, connected(world) as mcp:
        tools = {tool.name: tool for tool in (await mcp.list_tools()).tools}
        assert mcp.instructions
    assert list(tools) == [
        "search_records",
        "list_records",
        "add_records",
        "delete_record",
        "describe_user",
        "list_answers",
        "give_feedback",
    ]
    for tool in tools.values():
        jsonschema.Draft202012Validator.check_schema(tool.input_schema)
        assert "user" not in tool.input_schema["properties"]
        assert tool.description
        assert "\n" not in tool.description
        assert tool.annotations is not None
        assert tool.annotations.read_only_hint is tool.name.startswith(("search", "list", "desc"))
        assert tool.annotations.destructive_hint is not tool.annotations.read_only_hint


@pytest.mark.parametrize("mode", slow_except((AUTO, LEGACY), AUTO))
async def test_what_a_tool_changes_is_in_the_next_answer(
    store: Store, bundles: dict[str, Path], mode: str
) -> None:
    """Add, search, list, describe, feedback, delete; each seen by a chat of the same user."""
    store.add_records("ada", records_of("ada", 6))
    async with (
        running(store, bundles["titles"], samples=3) as world,
        connected(world, "ada", mode=mode) as mcp,
    ):
        new = {"input": QUESTION, "output": "calm as ever", "time": "2024-05-01"}
        added = await call(mcp, "add_records", records=[new])
        (id,) = added.pop("ids")
        assert added == {"added": 1, "changed": 0, "unchanged": 0}
        assert (await call(mcp, "add_records", records=[new]))["unchanged"] == 1
        answer = (await world.ask(QUESTION)).json()
        assert id in answer["personalization"]["records"]

        found = await call(mcp, "search_records", query=QUESTION, limit=3)
        assert len(found["records"]) == 3
        assert found["records"][0] == {"id": id, **new}
        listed = await call(mcp, "list_records", limit=2)
        assert (listed["records"][0]["id"], listed["total"]) == (id, 7)
        rest = await call(mcp, "list_records", skip=2)
        ids = [record["id"] for record in listed["records"] + rest["records"]]
        assert ids == [record.id for record in reversed(store.records("ada")[1])]

        (kept,) = (await call(mcp, "list_answers"))["answers"]
        assert kept["question"] == QUESTION
        assert kept["candidates"][0] == answer["choices"][0]["message"]["content"]
        given = {"request_id": kept["id"], "edited": "loud at last"}
        learned = await call(mcp, "give_feedback", **given)
        assert learned["record"] == f"feedback:{kept['id']}"
        assert learned["head_moved"]
        assert (await call(mcp, "give_feedback", **given))["repeated"]
        again = (await world.ask(QUESTION)).json()
        assert learned["record"] in again["personalization"]["records"]

        described = await mcp.call_tool("describe_user", {})
        assert "What the adapter has learned" in text_of(described)
        assert described.structured_content is not None
        assert described.structured_content["counts"]["records"] == 8

        for gone in (id, learned["record"]):
            assert await call(mcp, "delete_record", id=gone) == {"id": gone, "deleted": True}
        last = (await world.ask(QUESTION)).json()
        assert not {id, learned["record"]} & {*last["personalization"]["records"]}
        assert store.heads("ada", world.app.state.gateway.deployment.id) == {}


async def test_a_search_finds_what_the_gate_keeps_out(store: Store) -> None:
    """It is asked for; and it is the order of an answer, so the endpoint says the same."""
    store.add_records("ada", records_of("ada"))
    async with running(store, gate="always") as world, connected(world, "ada") as mcp:
        query = {"query": "What is 2 + 2?", "limit": 2}
        answer = await world.ask("What is 2 + 2?")
        assert answer.headers["x-hydra-personalized"] == "false; reason=off-task"
        found = await call(mcp, "search_records", **query)
        assert len(found["records"]) == 2
        reply = (await world.http.post("/v1/users/ada/search", json=query)).json()
        assert reply == {"object": "list", "data": found["records"]}


# ---- one user never reaches another

MARKS = {"ada": "aardvark", "bob": "baboon"}  # in all that is kept about them
AIMED: Mapping[str, Mapping[str, Any]] = {
    "search_records": {"query": "aardvark baboon"},
    "list_records": {},
    "add_records": {"records": [{"id": "shared", "input": "new", "output": "new"}]},
    "delete_record": {"id": "only-bob"},
    "describe_user": {},
    "list_answers": {},
    "give_feedback": {"request_id": "req_bob", "edited": "mine"},
}
"""Arguments that name what is bob's where a tool takes a name."""
NO_USER = "the request names no user: send the header 'x-hydra-user', or a key"
NOT_ALLOWED = "this key may not speak for that user"
INVALID = "this key is not valid: pass `Authorization: Bearer hk-...`"
CASES = [  # key, user of the header → the user, or what is said
    ("ada's", "", "ada"),
    ("ada's", "ada", "ada"),
    ("ada's", "bob", "ada"),  # as in a chat: the key decides
    ("bob's", "", "bob"),
    ("both's", "", NO_USER),
    ("both's", "ada", "ada"),
    ("both's", "eve", NOT_ALLOWED),
    ("eve's", "ada", "eve"),
    ("admin's", "", NO_USER),
    ("admin's", "ada", "ada"),
    ("admin's", "bob", "bob"),
    ("environment's", "ada", "ada"),
    ("environment's", "", NO_USER),
    ("revoked", "ada", INVALID),
    ("wrong", "ada", INVALID),
    ("", "ada", INVALID),
]
USERS = {"ada's": ["ada"], "bob's": ["bob"], "both's": ["ada", "bob"], "eve's": ["eve"]}


def fill(store: Store) -> dict[str, str]:
    """Two users with records and an answered request each; the keys by name."""
    for user, mark in MARKS.items():
        own = [(f"only-{user}", f"{mark} one"), ("shared", f"{mark} two")]
        store.add_records(user, [Record(user, id, text, mark) for id, text in own])
        texts = {"said": mark, "text": mark, "answer": mark, "votes": 1, "greedy": True}
        content = {"candidates": [{**texts, "score": None}], "repeats": [], "visible": 2}
        content["records"] = ["shared"]
        store.add_request(Request(f"req_{user}", user, time.time(), "", f"{mark}?", content))
    keys = {name: make_key(store, users=users)[1] for name, users in USERS.items()}
    keys["admin's"] = make_key(store, admin=True)[1]
    revoked, keys["revoked"] = make_key(store, users=["ada"])
    store.revoke_key(revoked.id)
    wrong = keys["ada's"] + "x"
    return {**keys, "wrong": wrong, "environment's": "environment-16+", "": ""}


@pytest.mark.parametrize("mode", slow_except((AUTO, LEGACY), AUTO))
@pytest.mark.parametrize(("key", "named", "expected"), CASES)
async def test_no_tool_reaches_another_user(
    store: Store, key: str, named: str, expected: str, mode: str
) -> None:
    keys = fill(store)
    names = {*MARKS, "eve"}
    before, said = {user: store.export_user(user) for user in names}, dict[str, str]()
    async with running(store, admin_key=keys["environment's"]) as world:
        with refusal() as refused:
            async with connected(world, named, keys[key], mode) as mcp:
                assert (
                    {tool.name for tool in (await mcp.list_tools()).tools} == {*AIMED} == {*TOOLS}
                )
                said = {
                    name: text_of(await mcp.call_tool(name, dict(arguments)))
                    for name, arguments in AIMED.items()
                }
    assert refused == [INVALID] * (expected == INVALID)
    for user in names - {expected}:
        assert store.export_user(user) == before[user]
        assert MARKS.get(user, "no mark") not in json.dumps(said)
    if expected not in names:
        assert all(line.startswith(expected) for line in said.values())
        return
    mark = MARKS.get(expected, "no such user")  # eve has no records before she adds one
    assert mark in said["search_records"]
    assert mark in said["list_records"]
    assert expected in said["describe_user"]
    ids = {record.id for record in store.records(expected)[1]}
    if expected == "bob":
        assert ids == {"shared", "feedback:req_bob"}
    else:
        assert "only-bob" not in ids
        assert said["delete_record"] == "no such record"
        assert said["give_feedback"].startswith("no such request")
    assert "shared" in ids


async def test_a_session_does_not_outlive_its_key(store: Store) -> None:
    store.add_records("ada", records_of("ada", 3))
    key, secret = make_key(store, users=["ada"])
    async with running(store) as world:
        for mode in (AUTO, LEGACY):
            async with connected(world, key=secret, mode=mode) as mcp:
                assert (await call(mcp, "list_records"))["total"] == 3
                if mode == LEGACY:
                    store.revoke_key(key.id)
                    for name in ("list_records", "describe_user"):
                        with pytest.raises(MCPError, match="this key is not valid"):
                            await mcp.call_tool(name, {})
        reply = await world.http.post("/mcp", json=ASK, headers=ACCEPT)
        assert "mcp-session-id" not in reply.headers
        for method in ("GET", "DELETE"):  # of a session
            own = {"authorization": f"Bearer {make_key(store, admin=True)[1]}"}
            reply = await world.http.request(method, "/mcp", headers=own | ACCEPT)
            assert (reply.status_code, reply.headers["allow"]) == (405, "POST")


# ---- faults


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("nope", {}, "there is no tool of that name: search_records, list_records,"),
        ("add_records", {}, "records: Field required"),
        ("add_records", {"records": []}, "records: List should have at least 1 item"),
        ("add_records", {"records": [{"input": "a"}]}, "records.0.output: Field required"),
        ("add_records", {"records": [{"input": "a", "output": "b", "x": 1}]}, "records.0.x: Extra"),
        ("add_records", {"user": "bob", "records": [{"input": "a", "output": "b"}]}, "user: Extra"),
        ("delete_record", {"id": "a\nb"}, "id: holds a control character"),
        ("delete_record", {"id": "nobody's"}, "no such record"),
        ("search_records", {"query": ""}, "query: String should have at least 1 character"),
        ("search_records", {"query": "a", "limit": 65}, "limit: Input should be less than"),
        ("list_records", {"limit": "many"}, "limit: Input should be a valid integer"),
        ("describe_user", {"user": "bob"}, "user: Extra inputs are not permitted"),
        ("give_feedback", {"request_id": "r"}, "give exactly one of chosen, rating, edited"),
        ("give_feedback", {"request_id": "r", "rating": 1}, "no such request"),
    ],
)
async def test_a_fault_is_a_tools_error_in_one_line(
    store: Store, name: str, arguments: dict[str, Any], line: str
) -> None:
    store.add_records("ada", records_of("ada", 3))
    async with running(store) as world, connected(world, "ada") as mcp:
        assert (await fault(mcp, name, **arguments)).startswith(line)


async def test_the_limits_and_their_words_are_those_of_the_endpoints(store: Store) -> None:
    record = {"id": "1", "input": "a", "output": "b"}
    sent: list[list[dict[str, Any]]] = [
        [{**record, "id": "feedback:req_1"}],
        [{**record, "time": "202401"}],
        [{**record, "output": ""}],
        [{**record, "input": "x" * 21}],
        [{**record, "id": str(place)} for place in range(4)],
        [{**record, "id": str(place)} for place in range(3)],
    ]
    limits = {"max_text": 20, "max_records": 2, "max_records_per_request": 3}
    async with running(store, **limits) as world, connected(world, "ada") as mcp:
        for records in sent:
            body = json.dumps({"records": records})
            reply = await world.http.post(
                "/v1/users/ada/records", content=body, headers={"content-type": "application/json"}
            )
            said = await fault(mcp, "add_records", records=records)
            assert said == reply.json()["error"]["message"]
        for name in ("list_records", "describe_user", "search_records", "list_answers"):
            query = {"query": "a"} if name == "search_records" else {}
            assert await fault(mcp, name, **query) == "no such user"
    assert store.users() == []


async def test_a_bug_is_told_without_what_it_quotes(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("aard" + "vark")

    store.add_records("ada", records_of("ada", 3))
    async with running(store) as world, connected(world, "ada") as mcp:
        monkeypatch.setattr(store, "latest_requests", broken)
        assert await fault(mcp, "list_answers") == "something went wrong here"
        figures = (await world.http.get("/metrics")).text
    assert 'hydra_failures_total{part="tool"} 1.0' in figures
    assert "aardvark" not in caplog.text


async def test_a_line_of_the_log_names_the_tool_and_no_content(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hydra_llm.gateway.requests")
    async with running(store) as world, connected(world, "ada") as mcp:
        await call(mcp, "add_records", records=[{"input": "aardvark", "output": "b"}])
        await fault(mcp, "delete_record", id="baboon")
        await fault(mcp, "aardvark")
    lines = [getattr(record, "request", {}) for record in caplog.records]
    told = [line for line in lines if line.get("route") == "/mcp"]
    assert len(told) >= 4
    tools = [
        (line["tool"], line.get("tool_error"), line["status"]) for line in told if "tool" in line
    ]
    assert tools == [("add_records", None, 200), ("delete_record", "record_not_found", 200)]
    assert told[-1]["tool_error"] == "no_tool"
    assert "aardvark" not in json.dumps(told)
    assert "ada" not in json.dumps(told)


# ---- the door


@pytest.mark.parametrize(
    ("root", "sent"),
    [("", "/mcp/"), ("/llm", "/mcp/"), ("/llm", "/llm/mcp/"), ("/llm", "/llm/mcp")],
)
async def test_a_slash_at_the_end_is_the_same(store: Store, root: str, sent: str) -> None:
    """Also behind a root path, whether the proxy has removed it or not; no redirect."""
    key = {"authorization": f"Bearer {make_key(store, admin=True)[1]}"}
    async with running(store, root_path=root) as world:
        reply = await world.http.post(sent, json=ASK, headers=ACCEPT | key)
        assert (reply.status_code, reply.json()["id"]) == (200, 1)
        refused = await world.http.post(sent, json=ASK, headers=ACCEPT)
        assert refused.status_code == 401
        assert refused.json()["jsonrpc"] == "2.0"


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://evil.example", 403),
        ("http://gateway.example", 403),  # the server's own name, as in DNS rebinding
        ("null", 403),
        ("https://app.example", 200),
        ("http://localhost:6274", 200),
        (None, 200),
    ],
)
async def test_a_foreign_page_is_refused_with_a_key_too(
    store: Store, origin: str | None, status: int
) -> None:
    key = {"authorization": f"Bearer {make_key(store, admin=True)[1]}"}
    headers = ACCEPT | key | ({"origin": origin} if origin else {})
    async with running(store, on_loopback=False, cors_origins=("https://app.example",)) as world:
        reply = await world.http.post("http://gateway.example/mcp", json=ASK, headers=headers)
        assert reply.status_code == status
        if status == 403:
            said = reply.json()
            assert (said["jsonrpc"], said["id"]) == ("2.0", None)
            fix = "pages of this origin may not call /mcp: add it to the setting cors_origins"
            assert said["error"]["message"] == fix


@pytest.mark.parametrize("headers", [{"origin": "https://evil.example"}, {"host": "evil.example"}])
async def test_without_keys_only_this_machine_is_served(
    store: Store, headers: dict[str, str]
) -> None:
    async with running(store) as world:
        reply = await world.http.post("/mcp", json=ASK, headers=ACCEPT | headers)
        assert reply.status_code == 403
        assert "without keys only this machine is served" in reply.json()["error"]["message"]


async def test_sizes_and_rates_are_limited_and_the_client_is_told(store: Store) -> None:

    async def pieces() -> AsyncIterator[bytes]:  # of no length that is told
        for _ in range(5):
            yield b" " * 1000

    headers = ACCEPT | {"content-type": "application/json"}
    async with (
        running(store, max_body_bytes=4096, requests_per_minute=3) as world,
        connected(world, "ada") as mcp,
    ):
        with pytest.raises(MCPError, match="the body has more than 4096 bytes"):
            await mcp.call_tool("search_records", {"query": "x" * 5000})
        reply = await world.http.post("/mcp", content=pieces(), headers=headers)
        assert reply.status_code == 413
        with pytest.raises(MCPError, match="more than 3 requests a minute"):
            await mcp.list_tools()


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"7", b"\xff", b'{"method": 1}', b'[{"jsonrpc": "2.0"}]']
    + [json.dumps({**ASK, "method": "tools/call", "params": it}).encode() for it in (None, 1, {})],
)
@pytest.mark.parametrize("version", [None, "2025-06-18", "2026-07-28", "1999-01-01"])
async def test_no_body_is_answered_with_a_500(
    store: Store, body: bytes, version: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    headers = ACCEPT | {"content-type": "application/json"}
    headers |= {"mcp-protocol-version": version} if version else {}
    async with running(store) as world:
        reply = await world.http.post("/mcp", content=body, headers=headers)
        assert reply.status_code < 500, reply.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_client_that_leaves_within_its_request_is_no_bug(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="hydra_llm.gateway")
    scope = {"type": "http", "method": "POST", "path": "/mcp", "raw_path": b"/mcp", "headers": []}
    scope |= {
        "query_string": b"",
        "asgi": {"version": "3.0"},
        "scheme": "http",
        "server": ("g", 80),
    }
    sent = []

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async with running(store) as world:
        await world.app(scope, receive, send)
    assert sent == []
    assert [getattr(record, "request", {}).get("status") for record in caplog.records] == [499]


async def test_without_the_extra_the_reply_says_what_to_install(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(store) as world:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "mcp", None)
            reply = await world.http.post("/mcp", json=ASK, headers=ACCEPT)
    assert reply.status_code == 501
    assert reply.json()["error"]["message"].endswith("pip install 'hydra-llm[mcp]'")
