"""What is passed on to the upstream: other paths of /v1, completions of texts, embeddings."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from hydra_llm.gateway.auth import make_key, pseudonym
from hydra_llm.gateway.embedded import EmbeddedUpstream
from hydra_llm.gateway.identity import hide_user_in_form
from hydra_llm.gateway.upstream import HttpUpstream
from hydra_llm.llm.endpoint import Endpoint
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.store.store import Store

from .conftest import World, running

pytestmark = pytest.mark.anyio


class Endpoints:
    """An endpoint of any paths, which notes its requests."""

    def __init__(self, **response: Any):
        self.requests: list[httpx2.Request] = []
        self.response = {"status_code": 200, "json": {"ok": True}} | response

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        await request.aread()
        self.requests.append(request)
        return httpx2.Response(**self.response)

    def upstream(self, url: str = "http://up/v1", query: str = "") -> HttpUpstream:
        transport = httpx2.MockTransport(self)
        return HttpUpstream(Endpoint(url, "sk-own", query), timeout=5, transport=transport)


def behind(world: World, endpoints: Endpoints, **where: str) -> World:
    world.app.state.gateway.upstream = endpoints.upstream(**where)
    return world


async def test_a_request_is_passed_on_with_the_servers_key(store: Store) -> None:
    async with running(store) as world:
        endpoints = Endpoints(headers={"x-secret": "s", "retry-after": "7"})
        behind(world, endpoints)
        body = {"model": "m", "input": "x", "user": "ada", "metadata": {"user_id": "ada"}}
        headers = {"authorization": "Bearer hk-of-the-caller", "x-hydra-user": "ada", "cookie": "c"}
        answer = await world.http.post(
            "/v1/moderations?a=1&b=&a=2", json=body, headers={**headers, "openai-beta": "v2"}
        )
        assert answer.json() == {"ok": True}
        assert answer.headers["retry-after"] == "7"
        assert "x-secret" not in answer.headers
        (request,) = endpoints.requests
        assert request.method == "POST"
        assert str(request.url) == "http://up/v1/moderations?a=1&b=&a=2"
        assert request.headers["authorization"] == "Bearer sk-own"
        assert request.headers["openai-beta"] == "v2"
        assert not {"x-hydra-user", "cookie"} & request.headers.keys()
        hidden = pseudonym(world.app.state.gateway.salt, "ada")
        assert json.loads(request.content) == {
            **body,
            "user": hidden,
            "metadata": {"user_id": hidden},
        }
        for method in ("GET", "PUT", "PATCH", "DELETE"):
            assert (await world.http.request(method, "/v1/files/file-1")).status_code == 200
            assert endpoints.requests[-1].method == method


async def test_the_user_is_hidden_in_a_form(store: Store) -> None:
    async with running(store) as world:
        endpoints = Endpoints()
        behind(world, endpoints)
        fields = {"prompt": "a user: ada", "user": "ada", "metadata[user_id]": "ada"}
        sound = b'\r\n\x00\xffname="user"\r\n'
        await world.http.post("/v1/images/edits", data=fields, files={"image": ("a.png", sound)})
        content, hidden = endpoints.requests[0].content, b"\r\n\r\n%s\r\n"
        assert sound in content
        assert b"a user: ada" in content
        assert content.count(hidden % pseudonym(world.app.state.gateway.salt, "ada").encode()) == 2
        assert hidden % b"ada" not in content


def test_a_form_is_changed_where_it_names_the_user_alone() -> None:
    other = b'--b\r\nContent-Disposition: form-data; name="users"\r\n\r\nada\r\n--b--\r\n'
    assert hide_user_in_form(other, "b", "salt", ["user"]) == other
    named = other.replace(b'"users"', b"user")
    assert hide_user_in_form(named, "b", "salt", ["user"]) == named.replace(
        b"ada", pseudonym("salt", "ada").encode()
    )


async def test_no_path_leads_out_of_v1(store: Store) -> None:
    async with running(store) as world:
        endpoints = Endpoints()
        behind(world, endpoints)
        for path in (
            *("../admin", "..%2fadmin", "%2e%2e/admin", "a/../../admin", "a/..%2f..%2fadmin"),
            *("./x", "a//b", "a/", "%2f%2fevil", "a%3fb", "a%23b", "a%0ab", "a\\b", "%252e%252e"),
            *("http:%2f%2fevil", "users/ada/other", "feedback/x", "responses/x/cancel"),
            *("messages/batches", "chat/completions/x", "...", "a/.../b"),
        ):
            raw = f"/v1/{path}".encode()
            answer = await raw_get(world, raw)
            assert answer in (404, 405), (path, answer)
        assert endpoints.requests == []
        assert await raw_get(world, b"/v1/http:x/y") == 200
        assert str(endpoints.requests[0].url) == "http://up/v1/http:x/y"


async def raw_get(world: World, raw: bytes) -> int:
    """The status of a path that no client would send as it is."""
    from urllib.parse import unquote

    status: list[int] = []
    messages = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            status.append(message["status"])

    scope = {"type": "http", "method": "GET", "path": unquote(raw.decode()), "raw_path": raw}
    scope |= {"query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http"}
    scope |= {"server": ("localhost", 80), "asgi": {"version": "3.0"}}
    await world.app(scope, receive, send)
    return status[0]


async def test_the_setting_says_whose_requests_are_passed_on(store: Store) -> None:
    admin, ada = make_key(store, admin=True)[1], make_key(store, users=["ada"])[1]
    for whose, statuses in (("admin", (200, 403)), ("all", (200, 200)), ("off", (404, 404))):
        async with running(store, passthrough=whose) as world:
            behind(world, Endpoints())
            for key, status in zip((admin, ada), statuses, strict=True):
                headers = {"authorization": f"Bearer {key}"}
                answer = await world.http.get("/v1/files", headers=headers)
                assert answer.status_code == status
                body = {"input": "x", "model": "m"}
                named = await world.http.post("/v1/embeddings", json=body, headers=headers)
                assert named.status_code == 200, "its own endpoint is open to every key"


async def test_the_endpoints_own_query_stands(store: Store) -> None:
    async with running(store) as world:
        endpoints = Endpoints()
        behind(world, endpoints, query="api-version=1")
        await world.http.get("/v1/files?api-version=2&limit=3")
        assert dict(endpoints.requests[0].url.params) == {"api-version": "1", "limit": "3"}


async def test_an_error_has_openais_shape_and_no_secret(store: Store) -> None:
    async with running(store) as world:
        error = {"error": {"message": "no file for sk-own", "type": "invalid_request_error"}}
        behind(world, Endpoints(status_code=404, json=error))
        answer = await world.http.get("/v1/files/x")
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == "no file for ***"
        behind(world, Endpoints(status_code=302, headers={"location": "http://evil"}))
        assert (await world.http.get("/v1/files/x")).status_code == 502


async def test_bodies_are_bounded_in_both_directions(store: Store) -> None:
    async def pieces(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"x" * 1024

    async with running(store, max_body_bytes=4096) as world:
        endpoints = Endpoints(json=None, content=b"y" * 5000)
        behind(world, endpoints)
        kind = {"content-type": "audio/wav"}
        small = await world.http.post("/v1/audio", content=pieces(3), headers=kind)
        assert endpoints.requests[0].content == b"x" * 3072
        assert small.content != b"y" * 5000, "an answer that is too large is cut"
        endpoints.response["content"] = b"y" * 4096
        answer = await world.http.post("/v1/audio", content=pieces(3), headers=kind)
        assert answer.content == b"y" * 4096
        large = await world.http.post("/v1/audio", content=pieces(9), headers=kind)
        assert large.status_code == 413


async def test_a_body_that_may_hide_a_user_is_refused(store: Store) -> None:
    async with running(store) as world:
        endpoints = Endpoints()
        behind(world, endpoints)
        for kind in ("application/x-www-form-urlencoded", ""):
            headers = {"content-type": kind} if kind else {}
            answer = await world.http.post("/v1/x", content=b'{"user": "ada"}', headers=headers)
            assert answer.status_code == 400
            assert "application/json" in answer.json()["error"]["message"]
        json_kind = {"content-type": "application/json"}
        broken = await world.http.post("/v1/x", content=b"{", headers=json_kind)
        assert broken.status_code == 400
        assert endpoints.requests == []


async def test_completions_and_embeddings_of_an_endpoint(store: Store) -> None:
    async with running(store) as world:
        data = [{"object": "embedding", "index": 0, "embedding": [1.0, 2.0]}]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        embedded = {"object": "list", "data": data, "model": "e", "usage": usage}
        endpoints = Endpoints(json=embedded)
        behind(world, endpoints)
        reply = await world.sdk().embeddings.create(
            model="e", input=["x"], user="ada", encoding_format="float"
        )
        assert reply.data[0].embedding == [1.0, 2.0]
        assert str(endpoints.requests[0].url) == "http://up/v1/embeddings"
        assert b"ada" not in endpoints.requests[0].content
        choice = {"index": 0, "text": "b", "logprobs": None, "finish_reason": "stop"}
        text = {"id": "c", "object": "text_completion", "created": 1, "model": "m"}
        events = f"data: {json.dumps({**text, 'choices': [choice]})}\n\ndata: [DONE]\n\n"
        behind(
            world, Endpoints(json=None, text=events, headers={"content-type": "text/event-stream"})
        )
        stream = await world.sdk().completions.create(model="m", prompt="a", stream=True)
        assert [chunk.choices[0].text async for chunk in stream] == ["b"]


async def test_an_embedded_model_completes_a_text_by_chat(store: Store) -> None:
    async with running(store) as world:
        llm = RuleLLM(lambda messages, index, dice: messages[-1]["content"].upper(), name="m")
        world.app.state.gateway.upstream = EmbeddedUpstream(llm)
        asked: Any = {"model": "fake:m", "prompt": "abc"}
        asked["model"] = (await world.http.get("/v1/models")).json()["data"][0]["id"]
        client = world.sdk().completions
        reply = await client.create(**asked, n=2)
        assert [choice.text for choice in reply.choices] == ["ABC", "ABC"]
        assert reply.object == "text_completion"
        stream = await client.create(**asked, stream=True)
        assert "".join([c.choices[0].text async for c in stream if c.choices]) == "ABC"
        plain = await client.create(**asked, best_of=1, echo=False, suffix="")
        assert plain.choices[0].text == "ABC"
        raw: tuple[dict[str, Any], ...] = ({"suffix": "x"}, {"echo": True}, {"logprobs": 0})
        for wrong in ({"prompt": [1, 2]}, {"prompt": ["a", "b"]}, *raw):
            with pytest.raises(openai.BadRequestError):
                await client.create(**{**asked, **wrong})
        with pytest.raises(openai.NotFoundError):
            await world.sdk().moderations.create(input="x")


@pytest.mark.slow
async def test_embeddings_beside_an_embedded_model_are_the_encoders(
    store: Store, bundles: dict[str, Any]
) -> None:
    async with running(store, bundles["tags"]) as world:
        world.app.state.gateway.upstream = EmbeddedUpstream(RuleLLM(lambda *_: "a", name="m"))
        texts = [f"a storm of the sea number {i}" for i in range(11)]
        client = world.sdk().embeddings
        in_base64 = await client.create(model="any", input=texts)  # as the SDK asks for them
        numbers = await client.create(model="any", input=texts, encoding_format="float")
        features = world.app.state.gateway.deployment.features
        for reply in (in_base64, numbers):
            vectors = np.array([item.embedding for item in reply.data], dtype="f4")
            assert np.allclose(vectors, features.texts(texts), atol=1e-6)
        odd: tuple[dict[str, Any], ...] = ({"dimensions": 3}, {"encoding_format": "int8"})
        for wrong in ({"input": []}, {"input": [1, 2]}, {"input": " "}, *odd):
            with pytest.raises(openai.BadRequestError):
                await client.create(**{"model": "any", "input": "x", **wrong})


async def test_without_an_encoder_its_extra_is_named(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_llm.extras._is_there", lambda module: module != "torch")
    async with running(store) as world:
        world.app.state.gateway.upstream = EmbeddedUpstream(RuleLLM(lambda *_: "a", name="m"))
        with pytest.raises(openai.NotFoundError, match=r"hydra-llm\[learn\]"):
            await world.sdk().embeddings.create(model="any", input="x")
