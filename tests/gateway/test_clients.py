"""What clients rely on: how they name a user, the completion's id in feedback, corrections."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from hydra_llm.gateway.chunks import with_id
from hydra_llm.gateway.identity import NamedUser, hide_user, named_user
from hydra_llm.gateway.schemas import ApiError, FeedbackIn
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.llm.sse import Event, EventReader
from hydra_llm.store.store import Store
from tests.waiting import async_until

from .conftest import World, records_of, running

pytestmark = pytest.mark.anyio

QUESTION = "the battle for the bridge in winter"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]


def named(body: dict[str, Any], *headers: tuple[str, bytes], **settings: Any) -> NamedUser:
    raw = [(name.encode(), value) for name, value in headers]
    return named_user(raw, body, ServeSettings(**settings))


@pytest.mark.parametrize(
    "body",
    [
        {"user": "ada"},
        {"safety_identifier": "ada"},
        {"metadata": {"user_id": "ada", "tags": ["x"]}},
        {"metadata": {"user": "ada"}},
        {"metadata": {"userId": "ada"}},
        {"metadata": {"user": {"id": "ada", "name": "Ada"}}},
        {"metadata": {"trace_user_id": "ada"}},
        {"metadata": '{"user_id": "ada"}'},
        {"litellm_metadata": {"user_id": "ada"}},
        {"litellm_metadata": '{"user": "ada"}'},
        {"user": "", "metadata": {"user_id": "ada"}},
    ],
)
def test_a_body_names_the_user(body: dict[str, Any]) -> None:
    assert named(body) == NamedUser("ada")
    hidden = hide_user(body, "salt", ServeSettings().user_fields)
    assert '"ada' not in json.dumps(hidden).replace("\\", ""), "the upstream sees a pseudonym"
    assert [type(value) for value in hidden.values()] == [type(value) for value in body.values()]
    assert named(hidden).id != named(hide_user(body, "other", ServeSettings().user_fields)).id


def test_a_number_is_the_id_that_it_is_written_as() -> None:
    assert named({"metadata": {"user_id": 42}}) == NamedUser("42")
    assert named({"metadata": {"user_id": True}}) == NamedUser(None, "metadata.user_id")


async def test_a_number_and_odd_metadata_are_no_invalid_request(store: Store) -> None:
    store.add_records("42", records_of("42", 3))
    async with running(store) as world:
        reply = await world.ask(QUESTION, 42)
        assert reply.headers["x-hydra-personalized"] == "true"
        reply = await world.ask(QUESTION, None, metadata=[{"user_id": "42"}])
        said = "false; reason=user-not-recognized; field=metadata"
        assert reply.headers["x-hydra-personalized"] == said


@pytest.mark.parametrize("verdict", [{"chosen": True}, {"chosen": 1.0}, {"rating": "1"}])
def test_what_is_no_number_is_no_verdict(verdict: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FeedbackIn.model_validate({"request_id": "r", **verdict})


def test_headers_come_before_fields_in_the_order_of_the_settings() -> None:
    open_webui, own = ("X-OpenWebUI-User-Id", b"ada"), ("x-hydra-user", b"bob")
    assert named({"user": "eve"}, open_webui).id == "ada"
    assert named({"user": "eve"}, open_webui, own).id == "bob"
    assert named({}, ("x-litellm-end-user-id", b"ada")).id == "ada"
    assert named({}, ("X-Sso", b"ada"), user_headers="X-SSO, x-other").id == "ada"
    assert named({"a": {"b": "ada"}, "user": "eve"}, user_fields="a.b").id == "ada"
    assert hide_user({"a": {"b": "ada"}, "user": "eve"}, "salt", ["a.b"])["user"] == "eve"


def test_a_header_is_utf_8_and_given_once() -> None:
    """As Latin-1 these bytes would be a third user's id, or two users would be one."""
    assert named({}, ("x-hydra-user", "zoë".encode())).id == "zoë"
    with pytest.raises(ApiError, match="not UTF-8: send UTF-8, or name the user in the body"):
        named({}, ("x-hydra-user", "zoë".encode("latin-1")))
    with pytest.raises(ApiError, match="'x-hydra-user' names different users"):
        named({}, ("x-hydra-user", b"ada"), ("X-Hydra-User", b"bob"))
    assert named({}, ("x-hydra-user", b"ada"), ("x-hydra-user", b"ada")).id == "ada"


@pytest.mark.parametrize(
    ("body", "header", "place"),
    [
        ({"metadata": {"userName": "ada"}}, "", "metadata.userName"),
        ({"metadata": {"user_id": {"session": 1}}}, "", "metadata.user_id"),
        ({"metadata": {"user": ["ada"]}}, "", "metadata.user"),
        ({"metadata": {"uid": 7}}, "", "metadata.uid"),
        ({"metadata": {"user\n<id>": "ada"}}, "", "metadata"),
        ({"metadata": "ada"}, "", "metadata"),
        ({"end_user": "ada"}, "", "end_user"),
        ({"metadata": {"session": {"user_id": "ada"}}}, "", "metadata.session.user_id"),
        ({"metadata": {"context": '{"user": {"name": "ada"}}'}}, "", "metadata.context.user"),
        ({"extra_body": {"user": "ada"}}, "", "extra_body.user"),
        ({}, "x-forwarded-email", "x-forwarded-email"),
        ({}, "x-user-id", "x-user-id"),
        ({}, "x-forwarded-user", "x-forwarded-user"),
        ({"metadata": {"tags": ["x"], "user_agent": "y"}}, "user-agent", ""),
        ({"metadata": {"user_id": None}, "user": ""}, "x-request-id", ""),
    ],
)
def test_what_seems_to_name_a_user_and_is_not_read_is_told(
    body: dict[str, Any], header: str, place: str
) -> None:
    assert named(body, *[(header, b"ada")] * bool(header)) == NamedUser(None, place)


async def test_the_reply_says_which_field_was_not_read(store: Store) -> None:
    async with running(store) as world:
        for stream in (False, True):
            reply = await world.ask("hi", None, metadata={"userName": "ada"}, stream=stream)
            said = "false; reason=user-not-recognized; field=metadata.userName"
            assert reply.headers["x-hydra-personalized"] == said
        figures = (await world.http.get("/metrics")).text
        assert 'hydra_answers_total{reason="user-not-recognized"} 2.0' in figures
        assert "userName" not in figures


@pytest.mark.parametrize(
    "id", ["%20", "%09", "%C2%A0", "a%0Ab", "a%00", "a%C2%85b", "a%E2%80%A8b", "%FF", "q" * 201]
)
async def test_an_id_is_refused_in_every_place_or_in_none(store: Store, id: str) -> None:
    from urllib.parse import unquote

    records = {"records": [{"id": "1", "input": "a", "output": "b"}]}
    async with running(store) as world:
        assert (await world.http.post(f"/v1/users/{id}/records", json=records)).status_code == 400
        assert (await world.http.get(f"/v1/users/{id}/records")).status_code == 400
        if id != "%FF":
            replies = [await world.ask("hi", unquote(id))]
            replies.append(await world.ask("hi", None, metadata={"user_id": unquote(id)}))
            assert [reply.status_code for reply in replies] == [400, 400]
    assert store.users() == []


async def test_paths_that_differ_are_users_that_differ(store: Store) -> None:
    """Bytes that are not UTF-8 were all replaced by one character."""
    store.add_records("zoë", records_of("zoë"))
    async with running(store) as world:
        statuses = [
            (await world.http.get(f"/v1/users/{path}/records")).status_code
            for path in ("zo%C3%AB", "zo%EB", "zo%EF%BF%BD", "zo%C3%83%C2%AB")
        ]
    assert statuses == [200, 400, 404, 404]


async def test_an_id_of_the_gateways_own_records_is_refused(store: Store) -> None:
    async with running(store) as world:
        sent = {"records": [{"id": "feedback:req_1", "input": "a", "output": "b"}]}
        reply = await world.http.post("/v1/users/bob/records", json=sent)
        assert reply.status_code == 400
        assert "records[0].id begins with 'feedback:'" in reply.json()["error"]["message"]


@pytest.mark.parametrize("time", [893214333, 893214333.5, 893214333000, "1998-04-22T03:05:33Z"])
async def test_a_records_time_is_a_number_or_a_text(store: Store, time: Any) -> None:
    record = {"id": "1", "input": "a", "output": "b"}
    async with running(store) as world:
        url = "/v1/users/ada/records"
        sent = await world.http.post(url, json={"records": [{**record, "time": time}]})
        assert sent.status_code == 200, sent.text
        for wrong in (202401, True, [2020]):
            sent = await world.http.post(url, json={"records": [{**record, "time": wrong}]})
            assert sent.status_code == 400
            assert "records" in sent.json()["error"]["param"]
    assert 893214333 <= store.records("ada")[1][0].span[0] <= 893214334


# ---- feedback

FINAL: list[tuple[list[dict[str, Any]], bool]] = [
    ([{"chosen": 0}, {"chosen": 1}], True),
    ([{"edited": "calm at last"}, {"rejected": True}], False),
    ([{"rejected": True}, {"edited": "loud again"}], True),
    ([{"rating": 1.0}, {"rating": 0.1}, {"chosen": 2}], True),
    ([{"chosen": 1}, {"chosen": 0}, {"chosen": 1}], True),
]


async def give(world: World, request: str, **said: Any) -> Any:
    reply = await world.http.post("/v1/feedback", json={"request_id": request, **said})
    assert reply.status_code == 200, reply.text
    return reply.json()


async def fit(world: World) -> None:
    job = (await world.http.post("/v1/users/ada/fit")).json()["id"]
    await async_until(lambda: world.store.job("ada", job).state == "done")  # type: ignore[union-attr]


@pytest.mark.parametrize("fitted", [False, True])
async def test_corrected_feedback_is_as_if_it_had_been_the_only_one(
    store: Store, bundles: dict[str, Path], tmp_path: Path, fitted: bool
) -> None:
    """Also after a fit that has learned what is corrected: then by the next fit. It reads records
    in order, so there the cases are those that leave the order.
    """
    cases = [FINAL[0], FINAL[1], FINAL[4]] if fitted else FINAL
    other, states = Store(f"sqlite:///{tmp_path / 'other.db'}"), []
    for place, corrected in ((store, True), (other, False)):
        place.add_records("ada", records_of("ada", 6))
        async with running(place, bundles["titles"], candidates=3) as world:
            deployment = world.app.state.gateway.deployment
            asked = [(await world.ask(f"{QUESTION} {i}", n=3)).json() for i in range(len(cases))]
            for reply, (said, _) in zip(asked, cases, strict=True):
                for one in said[:-1] if corrected else ():
                    await give(world, reply["id"], **one)
            if fitted and corrected:
                await fit(world)
            for reply, (said, is_record) in zip(asked, cases, strict=True):
                taken = await give(world, reply["id"], **said[-1])
                assert (taken["repeated"], bool(taken["record"])) == (False, is_record)
                assert (await give(world, reply["id"], **said[-1]))["repeated"]
            if fitted:
                await fit(world)
            heads = place.heads("ada", deployment.id)
            outputs = {record.output for record in place.records("ada")[1]}
            states.append((np.frombuffer(heads["adapter"].delta, "<f4"), outputs))
    other.close()
    assert states[0][1] == states[1][1]
    assert np.abs(states[0][0]).max() > 0
    np.testing.assert_allclose(states[0][0], states[1][0], atol=1e-5)


async def test_the_completions_own_id_is_the_requests(
    store: Store, bundles: dict[str, Path]
) -> None:
    store.add_records("ada", records_of("ada"))
    for bundle in (None, bundles["titles"]):
        async with running(store, bundle, candidates=3) as world:
            whole = (await world.ask(QUESTION)).json()
            assert whole["id"] == f"chatcmpl-{whole['personalization']['request_id']}"
            assert (await give(world, whole["id"], chosen=0, time=893214333))["record"]
            stream = await world.sdk().chat.completions.create(
                model="m", messages=MESSAGES, user="ada", stream=True
            )
            ids = {chunk.id async for chunk in stream}
            assert len(ids) == 1, "one id in all chunks"
            assert (await give(world, ids.pop(), edited="calm at last"))["record"]
            wrong = {"request_id": whole["id"], "chosen": 0, "time": "202401"}
            assert (await world.http.post("/v1/feedback", json=wrong)).status_code == 400
    assert 893214333 in {record.span[0] for record in store.records("ada")[1]}


def events_of(stream: bytes) -> list[Event]:
    reader = EventReader()
    return [*reader.feed(stream), *reader.end()]


def test_only_the_id_of_a_chunk_is_replaced() -> None:
    for line, new in (
        (b'data: {"id": "c", "x": 1.0}\r\n', b'data: {"id": "q", "x": 1.0}\r\n'),
        (b'data:{"id":"c","x":"c"}\n', b'data: {"id":"q","x":"c"}\n\n'),
        (b'data:{"id":null}\n', b'data:{"id":"q"}\n'),
    ):
        (event,) = events_of(line)
        assert with_id(event, "q").rstrip() == new.rstrip()
    for line in (b": c\n", b"\n", b"data: [DONE]\n", b'data: {"x": "id"}\n', b"data: 7\n", b"{"):
        assert b"".join(with_id(event, "q") for event in events_of(line)) == line


async def test_a_reply_that_is_not_personal_keeps_the_upstreams_id(store: Store) -> None:
    async with running(store) as world:
        assert (await world.ask(QUESTION)).json()["id"] == "c"


async def test_no_feature_of_a_corrected_answer_stays(
    store: Store, bundles: dict[str, Path], caches: Path
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["titles"], candidates=3) as world:
        features = world.app.state.gateway.deployment.bundle.features
        reply = (await world.ask(QUESTION)).json()
        await give(world, reply["id"], edited="a slip of the pen")
        features.texts(["a slip of the pen"], keep=True)
        await give(world, reply["id"], edited="as it was meant")
        assert features.missing(["a slip of the pen"]) == 1


async def test_a_caller_who_knows_better_opens_the_gate(store: Store) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, gate="auto") as world:
        for gate, said in ((True, "false; reason=off-task"), (False, "true")):
            reply = await world.ask("What is 2 + 2?", personalization={"gate": gate})
            assert reply.headers["x-hydra-personalized"] == said
