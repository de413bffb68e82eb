"""Whatever the endpoints' own description allows, and much that it does not: no request is answered
with a 500.
"""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydra_llm.gateway.app import make_app
from hydra_llm.gateway.auth import Access
from hydra_llm.gateway.mcp_tools import TOOLS, Tool
from hydra_llm.store.store import Store
from hydra_llm.store.values import Key, StoredResponse
from hydra_llm.types import Record
from tests.waiting import FOREVER

from .conftest import Scripted, endpoints, records_of

ID = "m"
KNOWN = {"user": "ada", "id": ID}
"""Parts of paths that lead somewhere, beside made-up ones: a record, a job, a response, a model."""
TIMES = settings(
    max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@dataclass(frozen=True)
class Served:
    """A real server on loopback, with a bundle and one user."""

    app: FastAPI
    store: Store
    url: str

    def fill(self) -> None:
        """Put in place what KNOWN names: an earlier request may have deleted it."""
        self.store.delete_user("ada")
        self.store.add_records("ada", [*records_of("ada"), Record("ada", ID, "a battle", "calm")])
        self.store.add_job(ID, "ada", "fit")
        kept = {"input": [{"id": "in_0", "role": "user"}], "response": {"output": []}}
        response = StoredResponse(ID, "ada", time.time(), None, kept)
        assert self.store.add_response(response, version=None)
        if self.store.key(ID) is None:
            self.store.add_key(Key(ID, "no hash", "", False, ("bob",), time.time(), None))


KEY = "an-admin-key-for-fuzz"
HEADERS = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, bundles: dict[str, Path]) -> Iterator[Served]:
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('fuzz') / 'store.db'}")
    access = Access(admin_key=KEY)  # a key that is made by a request must not end the others
    app = make_app(store, Scripted(), bundle=bundles["tags"], access=access)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Served(app, store, f"http://127.0.0.1:{port}")
    server.should_exit = True
    thread.join()
    store.close()


@pytest.fixture
def served(serving: Served) -> str:
    serving.fill()
    return serving.url


@pytest.mark.slow
def test_no_request_is_answered_with_a_500(serving: Served, served: str) -> None:
    import schemathesis  # here, as importing it takes longer than most tests

    schema = schemathesis.openapi.from_url(f"{served}/openapi.json")
    tested, reached = set[tuple[str, str]](), set[tuple[str, str]]()
    for result in schema.get_all_operations():
        operation = result.ok()
        serving.fill()

        @TIMES
        @given(case=operation.as_strategy(), known=st.booleans())
        def answer(case: schemathesis.Case, known: bool) -> None:
            if known:
                own = {part: KNOWN.get(part, value) for part, value in case.path_parameters.items()}
                case.path_parameters = own
            response = case.call(headers=HEADERS, timeout=FOREVER)
            assert response.status_code < 500, (case.method, case.path, case.body, response.text)
            if response.status_code >= 400 and case.path.startswith("/v1"):
                assert response.json()["error"]["message"]
            if response.status_code != 404:
                reached.add((case.method.upper(), case.path))

        answer()
        tested.add((operation.method.upper(), operation.path))
    assert tested == endpoints(serving.app) - {("POST", "/mcp")}, "/mcp has a test of its own"
    assert not tested - reached, "an endpoint of which every request ended in a 404"


@pytest.mark.slow
def test_no_tool_call_is_answered_with_a_500(served: str) -> None:
    """The tools of /mcp are no endpoints: here each is one of a description that is made for it."""
    import schemathesis

    def described(tool: Tool) -> dict[str, Any]:
        content = {"application/json": {"schema": tool.arguments.model_json_schema()}}
        responses = {"200": {"description": "a result"}}
        body = {"requestBody": {"required": True, "content": content}, "responses": responses}
        return {"post": body}

    paths = {f"/{name}": described(tool) for name, tool in TOOLS.items()}
    about = {"openapi": "3.1.0", "info": {"title": "tools", "version": "1"}, "paths": paths}
    schema = schemathesis.openapi.from_dict(about)
    headers = {"accept": "application/json, text/event-stream", "x-hydra-user": "ada"}
    headers |= {"mcp-protocol-version": "2025-06-18", **HEADERS}
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call"}
    with httpx2.Client(base_url=served, headers=headers, timeout=FOREVER) as http:
        for result in schema.get_all_operations():
            operation = result.ok()

            @TIMES
            @given(case=operation.as_strategy())
            def answer(case: schemathesis.Case) -> None:
                params = {"name": case.path.removeprefix("/"), "arguments": case.body}
                body = json.dumps({**call, "params": params}, default=str)  # a body may be none
                reply = http.post(
                    "/mcp", content=body, headers={"content-type": "application/json"}
                )
                assert reply.status_code in (200, 400), (params, reply.text)
                assert "something went wrong" not in reply.text, (params, reply.text)

            answer()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'{"model": "m"}', 400),
        (b'{"model": "m", "messages": [1]}', 400),
        (b'{"model": 7, "messages": [{"role": "user", "content": "x"}]}', 400),
        (b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "n": 0}', 400),
        (
            (
                b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "personalization":'
                b' {"k": -1}}'
            ),
            400,
        ),
        (
            b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}], "user": "ada"}',
            200,
        ),
        (
            b'{"model": "m", "messages": [{"role": "user", "content": {"a": 1}}], "user": "ada"}',
            400,
        ),
        (
            b'{"model": "m", "messages": [{"role": "user", "content": "\\u0000"}], "user": "ada"}',
            200,
        ),
        (b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "user": "\\ud800"}', 400),
        (b"\xff\xfe", 400),
    ],
)
def test_malformed_bodies(served: str, body: bytes, status: int) -> None:
    url, headers = f"{served}/v1/chat/completions", {**HEADERS, "content-type": "application/json"}
    answer = httpx2.post(url, content=body, headers=headers, timeout=FOREVER)
    assert answer.status_code == status, answer.text
    if status >= 400:
        assert answer.json()["error"]["type"] == "invalid_request_error"
