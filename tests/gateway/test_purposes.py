"""What a key is for, and the log of who has read or deleted what."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest

from hydra_llm.cli.main import run
from hydra_llm.errors import StoreError
from hydra_llm.gateway.auth import make_key, pseudonym
from hydra_llm.store.store import Store
from hydra_llm.store.values import PURPOSES, Accessed
from tests.made_choices import write_choices

from .conftest import World, endpoints, records_of, running
from .test_mcp import call, connected, fault

pytestmark = pytest.mark.anyio
ASK = {"model": "m", "user": "ada", "messages": [{"role": "user", "content": "whales"}]}
FEEDBACK = {"request_id": "none", "rejected": True}
NEW = {"records": [{"id": "new", "input": "a storm", "output": "calm"}]}
NEEDED: Mapping[str, Any] = {
    "answer": {
        "POST /v1/chat/completions": ASK,
        "POST /v1/completions": {"model": "m", "prompt": "whales"},
        "POST /v1/embeddings": {"model": "m", "input": "whales"},
        "POST /v1/responses": {"model": "m", "input": "whales"},
        "POST /v1/messages": {**ASK, "max_tokens": 9},
        "POST /v1/responses/resp_x/cancel": None,
        "GET /v1/files": None,
    },
    "write": {
        "POST /v1/users/ada/records": NEW,
        "POST /v1/feedback": FEEDBACK,
        "POST /v1/users/ada/fit": None,
        "GET /v1/users/ada/jobs/x": None,
        "PUT /v1/users/ada/personalization": {"enabled": True},
        "PUT /v1/users/ada/records/new/personalization": {"enabled": True},
    },
    "read": {
        "GET /v1/users": None,
        "GET /v1/users/ada": None,
        "GET /v1/users/ada/export": None,
        "GET /v1/users/ada/records": None,
        "GET /v1/users/ada/requests": None,
        "GET /v1/users/ada/next-question": None,
        "POST /v1/users/ada/search": {"query": "whales"},
        "GET /v1/responses/resp_x": None,
        "GET /v1/responses/resp_x/input_items": None,
        "GET /v1/spend": None,
    },
    "delete": {
        "DELETE /v1/responses/resp_x": None,
        "DELETE /v1/users/ada/records/r0": None,
        "DELETE /v1/users/ada": None,
    },
}
OF_ADMINISTRATORS = {
    "GET /v1/keys": None,
    "POST /v1/keys": {"admin": True},
    "DELETE /v1/keys/x": None,
    "GET /v1/jobs": None,
    "GET /v1/activity": None,
    "GET /v1/audit": None,
    "GET /v1/limits": None,
    "PUT /v1/limits": {"user": "ada", "limits": None},
}
NEEDS_NONE = {"GET /v1/models", "GET /v1/models/{id}", "POST /v1/messages/count_tokens"}
NEEDS_NONE |= {"POST /mcp"}  # its tools do


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def sent(world: World, request: str, body: Any, key: str) -> httpx2.Response:
    method, path = request.split()
    headers = {"authorization": f"Bearer {key}"}
    return await world.http.request(method, path, json=body, headers=headers)


async def test_a_key_opens_what_it_is_for_and_nothing_else(store: Store) -> None:
    store.add_records("ada", records_of("ada", 3))
    keys = {own: make_key(store, admin=True, purposes=[own])[1] for own in PURPOSES}
    async with running(store) as world:
        for purpose, key in keys.items():
            for needed, requests in NEEDED.items():
                for request, body in requests.items():
                    answer = await sent(world, request, body, key)
                    refused = answer.status_code == 403
                    assert refused is (needed != purpose), (purpose, request, answer.text)
                    if refused:
                        assert f"not made to {needed}, but for: {purpose}" in answer.text
            for request, body in OF_ADMINISTRATORS.items():
                assert (await sent(world, request, body, key)).status_code == 403, request


def test_every_endpoint_is_for_a_purpose(store: Store) -> None:
    """One that is new has to be in a table above: which purpose does it need?"""
    from hydra_llm.gateway.app import make_app

    from .conftest import Scripted

    known = {*OF_ADMINISTRATORS, *(request for own in NEEDED.values() for request in own)}
    patterns = {
        f"{method} {path}"
        for method, path in endpoints(make_app(store, Scripted()))
        if method != "HEAD" and not path.startswith(("/health/", "/metrics", "/v1/{path}"))
    }
    names = ("ada", "r0", "new", "resp_x", "x")
    tried = {tuple("*" if part in names else part for part in own.split("/")) for own in known}
    for pattern in patterns - NEEDS_NONE:
        parts = tuple("*" if part.startswith("{") else part for part in pattern.split("/"))
        assert parts in tried, pattern


async def test_an_explanation_shows_records_and_needs_read(
    store: Store, bundles: dict[str, Path]
) -> None:
    store.add_records("ada", records_of("ada"))
    _, answers = make_key(store, users=["ada"], purposes=["answer"])
    _, reads = make_key(store, users=["ada"], purposes=["answer", "read"])
    ask = {**ASK, "personalization": {"explain": True}}
    async with running(store, bundles["tags"]) as world:
        assert (await sent(world, "POST /v1/chat/completions", ASK, answers)).status_code == 200
        assert (await sent(world, "POST /v1/chat/completions", ask, answers)).status_code == 403
        assert (await sent(world, "POST /v1/chat/completions", ask, reads)).status_code == 200
    assert [own.action for own in store.accesses(10)] == ["explain"]


async def test_a_key_that_may_not_read_gets_no_ids_of_records(
    store: Store, bundles: dict[str, Path]
) -> None:
    """An id may say what its record does: an assistant's is a hash of the content."""
    store.add_records("ada", records_of("ada"))
    _, answers = make_key(store, users=["ada"], purposes=["answer"])
    _, reads = make_key(store, users=["ada"], purposes=["answer", "read"])
    async with running(store, bundles["tags"]) as world:
        for ask in (ASK, {**ASK, "stream": True}):
            for key, told in ((answers, False), (reads, True)):
                answer = await sent(world, "POST /v1/chat/completions", ask, key)
                assert answer.headers["x-hydra-personalized"] == "true"
                assert ('"r1' in answer.text.replace(" ", "")) is told, answer.text


async def test_a_key_that_may_not_answer_learns_of_no_response(store: Store) -> None:
    _, key = make_key(store, users=["ada"], purposes=["write"])
    ask = {"model": "m", "input": "go on", "previous_response_id": "resp_x"}
    async with running(store) as world:
        assert (await sent(world, "POST /v1/responses", ask, key)).status_code == 403


async def test_a_deletion_that_fails_in_the_end_is_logged(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user is gone by then, whatever the reply says; what is refused is not logged."""
    for user in ("ada", "bob"):
        store.add_records(user, records_of(user, 1))
    async with running(store) as world:

        async def failing(*_: object) -> None:
            raise ValueError("memory is broken")

        assert (await world.http.delete("/v1/users/nobody")).status_code == 404
        monkeypatch.setattr(type(world.app.state.gateway.deployment), "forget", failing)
        assert (await world.http.delete("/v1/users/ada")).status_code == 500
        assert store.state("ada").version is None
        assert [own.action for own in store.accesses(10)] == ["user"]

        def full(*_: object) -> None:
            raise StoreError("the disk is full")

        monkeypatch.undo()
        monkeypatch.setattr(store, "add_accesses", full)
        answer = await world.http.delete("/v1/users/bob")
        assert answer.status_code == 503
        assert "nothing was changed" not in answer.text


async def test_an_assistant_gets_the_tools_that_its_key_is_for(store: Store) -> None:
    store.add_records("ada", records_of("ada", 3))
    _, key = make_key(store, users=["ada"], purposes=["write"])
    async with running(store) as world, connected(world, key=key) as mcp:
        names = {tool.name for tool in (await mcp.list_tools()).tools}
        assert names == {"add_records", "give_feedback"}
        await call(mcp, "add_records", records=[{"input": "a storm", "output": "calm"}])
        assert "not made to read, but for: write" in await fault(mcp, "list_records")


async def test_reads_and_deletions_are_logged_without_content(store: Store) -> None:
    store.add_records("ada", records_of("ada", 3))
    store.add_records("bob", records_of("bob", 1))
    admin, secret = make_key(store, admin=True)
    own, key = make_key(store, users=["ada"])
    async with running(store) as world:
        for request, with_key, code in (
            ("GET /v1/users/ada/records", key, 200),
            ("GET /v1/users/bob/records", key, 403),  # who is refused has read nothing
            ("GET /v1/users/bob/export", secret, 200),
            ("GET /v1/users/eve/export", secret, 404),
            ("DELETE /v1/users/ada/records/r0", key, 200),
            ("DELETE /v1/users/ada", secret, 200),
        ):
            assert (await sent(world, request, None, with_key)).status_code == code
        answer = await sent(world, "GET /v1/audit?user=ada", None, secret)
        page = (await sent(world, "GET /v1/audit?limit=1", None, secret)).json()
        rest = await sent(world, f"GET /v1/audit?after={page['next']}", None, secret)
        of_key = await sent(world, f"GET /v1/audit?key={own.id}", None, secret)
    done = [(one["key"], one["purpose"], one["action"]) for one in answer.json()["data"]]
    reads = (own.id, "read", "records")
    assert done == [(admin.id, "delete", "user"), (own.id, "delete", "record"), reads]
    assert len(page["data"]) == 1
    assert len(rest.json()["data"]) == 3
    assert len(of_key.json()["data"]) == 2
    entries = store.accesses(10)
    persons = {pseudonym(store.salt(), user) for user in ("ada", "bob")}
    assert {entry.person for entry in entries} == persons
    assert "ada" not in str(entries), "nothing names who was deleted"


async def test_what_cannot_be_logged_is_not_told(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add_records("ada", records_of("ada", 1))
    async with running(store) as world:

        def full(*_: object) -> None:
            raise StoreError("the disk is full")

        monkeypatch.setattr(store, "add_accesses", full)
        answer = await world.http.get("/v1/users/ada/records")
    assert answer.status_code == 503
    assert "output" not in answer.text


async def test_the_first_key_can_make_others(store: Store) -> None:
    async with running(store) as world:
        made = await world.http.post("/v1/keys", json={"admin": True, "purposes": ["read"]})
        assert made.status_code == 400
        assert "every purpose" in made.json()["error"]["message"]
        made = await world.http.post("/v1/keys", json={"admin": True, "purposes": []})
        assert made.status_code == 400
        made = await world.http.post("/v1/keys", json={"admin": True})
        assert made.json()["purposes"] == list(PURPOSES)


def test_commands_are_logged(store: Store, tmp_path: Path) -> None:
    data = write_choices(tmp_path / "data", users=1)
    at = ["--store", str(store.url)]
    for command in (["list"], ["import", str(data)], ["import", str(data), "--replace"]):
        assert run(["users", *command, *at]) == 0
    user = next(iter(store.users()))
    for command in ("show", "export", "delete"):
        assert run(["users", command, user, *at]) == 0
    entries = store.accesses(10)[::-1]
    actions = ["users", "import", "profile", "export", "user"]
    assert [own.action for own in entries] == actions
    assert {own.key for own in entries} == {"cli"}
    assert [own.person == "" for own in entries] == [True, *[False] * 4]


def test_old_entries_go(either: Store) -> None:
    either.add_accesses("k", [("read", "export", "p"), ("delete", "user", "p")])
    either.prune_accesses(time.time() - 60)
    entries = either.accesses(10, person="p", key="k")
    assert {entry.action for entry in entries} == {"export", "user"}
    assert isinstance(entries[0], Accessed)
    either.prune_accesses(time.time() + 60)
    assert not either.accesses(10)


def test_purposes_are_kept_with_the_key(either: Store) -> None:
    some, _ = make_key(either, admin=True, purposes=["delete", "read"])
    every, _ = make_key(either, users=["ada"])
    kept = {key.id: key.purposes for key in either.latest_keys(10)}
    assert kept == {some.id: ("read", "delete"), every.id: PURPOSES}
    assert {key.id: key.purposes for key in either.keys([*kept])} == kept
