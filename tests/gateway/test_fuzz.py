"""Whatever the endpoints' own description allows, and much that it does not: no request is answered
with a 500.
"""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings

from hydra_llm.gateway.app import make_app
from hydra_llm.gateway.auth import Access
from hydra_llm.store.store import Store
from tests.waiting import FOREVER

from .conftest import Scripted, records_of

KEY = "an-admin-key-for-fuzz"
HEADERS = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, bundles: dict[str, Path]) -> Iterator[str]:
    """A real server on loopback, with a bundle and one user."""
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('fuzz') / 'store.db'}")
    store.add_records("ada", records_of("ada"))
    access = Access(admin_key=KEY)  # a key that is made by a request must not end the others
    app = make_app(store, Scripted(), bundle=bundles["tags"], access=access)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
    store.close()


@pytest.mark.slow
def test_no_request_is_answered_with_a_500(served: str) -> None:
    import schemathesis  # here, as importing it takes longer than most tests

    schema = schemathesis.openapi.from_url(f"{served}/openapi.json")
    tested = []
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy())
        def answer(case: schemathesis.Case) -> None:
            response = case.call(headers=HEADERS, timeout=FOREVER)
            assert response.status_code < 500, (case.method, case.path, case.body, response.text)
            if response.status_code >= 400 and case.path.startswith("/v1"):
                assert response.json()["error"]["message"]

        answer()
        tested.append(f"{operation.method} {operation.path}".lower())
    assert len(tested) >= 35


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
