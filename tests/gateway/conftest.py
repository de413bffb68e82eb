"""A gateway in this process with a bundle that was learned from a fake LLM, and an upstream that
says what a test wants.
"""

import asyncio
import io
import json
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from filelock import FileLock

from hydra_llm import learn
from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.gateway.app import make_app
from hydra_llm.gateway.auth import Access
from hydra_llm.gateway.embedded import EmbeddedUpstream
from hydra_llm.gateway.request_log import logging_to_stderr
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.tracing import Tracing
from hydra_llm.gateway.upstream import Head, Passed, UpstreamError
from hydra_llm.gateway.user_cache import texts_of
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.store.store import Store
from hydra_llm.tasks.base import Task
from hydra_llm.types import Message, Record
from tests.learning import ONE_STRENGTH
from tests.waiting import FOREVER

TOPICS = {
    "sea": (
        "whales under the waves",
        "a sailor and his boat",
        "the storm at the harbour",
        "fishermen on the ocean",
    ),
    "war": (
        "soldiers in the trenches",
        "a general and his army",
        "the battle for the bridge",
        "bombs over the city",
    ),
    "love": (
        "a wedding in spring",
        "two hearts and a kiss",
        "the bride runs away",
        "letters to a sweetheart",
    ),
}
TAGS = Task("tags", "classification", "{input}", ("calm", "loud", "odd"))
TITLES = Task("titles", "generation", "{input}")


def tastes(user: str) -> dict[str, str]:
    """Which answer a user gives to a topic."""
    labels = list(TAGS.labels)
    random.Random(user).shuffle(labels)
    return dict(zip(TOPICS, labels, strict=True))


def records_of(user: str, count: int = 20) -> list[Record]:
    """A user who keeps to a taste."""
    dice, taste = random.Random(f"{user} records"), tastes(user)
    out = []
    for i in range(count):
        topic = dice.choice(list(TOPICS))
        out.append(
            Record(
                user,
                f"r{i}",
                f"{dice.choice(TOPICS[topic])} {dice.choice(('again', 'at night', 'of old'))}",
                taste[topic],
            )
        )
    return out


def anything(messages: Sequence[Message], index: int, rng: random.Random) -> str:
    return rng.choice(TAGS.labels)


def learn_bundle(task: Task, folder: Path, outputs: Mapping[str, str] | None = None) -> None:
    """Learn from eight users; `outputs`: what stands for each label."""
    users = [f"train{i}" for i in range(8)]
    records = [record for user in users for record in records_of(user)]
    if outputs:
        records = [replace(record, output=outputs[record.output]) for record in records]
    data = DataSet.from_records(task, dict.fromkeys(users, "train"), records, [])
    settings = Settings(samples=3, retrieved=4, k=2, queries_per_user=2, max_length=32, width=16)
    with ThreadPoolExecutor(1) as pool:  # in this thread an event loop may run: playwright's
        own: Any = partial(learn, out=folder, strengths=ONE_STRENGTH)
        pool.submit(own, data, RuleLLM(anything), settings).result()


@pytest.fixture(autouse=True, scope="session")
def one_encoder(shared_minilm: None) -> None:
    """Every gateway has the same MiniLM."""


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def caches(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of all gateways, so that the few texts are encoded once; a test of what is
    in it takes a folder of its own by HYDRA_CACHE.
    """
    assert isinstance(cache_folder, Path), "a fixture of a module has this one's name"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_folder))
    return cache_folder


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle for tags, and one for titles (the same answers, as texts); learned once for all
    workers of a run.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    out = {task.name: folder / "bundles" / task.name for task in (TAGS, TITLES)}
    with FileLock(folder / "bundles.lock"):
        for task in (TAGS, TITLES):
            if not out[task.name].exists():
                learn_bundle(task, out[task.name])
    return out


@dataclass
class Scripted:
    """An upstream that a test can break; it notes what it was asked."""

    limiter: Any = None
    rule: Callable[[Mapping[str, Any], int], str] = lambda body, index: TAGS.labels[
        (index + ("temperature" in body)) % 3
    ]
    """The caller's own request gets the first label, samples the others."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    faults: list[Exception | None] = field(default_factory=list)
    """For each call in turn; None, or none left, is no fault."""
    most: int = 64
    """Choices that it gives at once."""
    passed: list[Passed] = field(default_factory=list)
    """Requests that were passed on."""
    pieces: Sequence[bytes] = (b'{"object": ', b'"passed"}')
    """How it answers them."""

    async def complete(self, body: Mapping[str, Any]) -> Any:
        self.bodies.append(dict(body))
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None:
            raise fault
        count = min(body.get("n") or 1, self.most)
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": self.rule(body, i)},
                "finish_reason": "stop",
            }
            for i in range(count)
        ]
        usage = {"prompt_tokens": 10, "completion_tokens": count, "total_tokens": 10 + count}
        return {
            "id": "c",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": choices,
            "usage": usage,
        }

    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[bytes]:
        completion = await self.complete(body)
        embedded = EmbeddedUpstream(
            RuleLLM(lambda m, i, r: completion["choices"][0]["message"]["content"], name="m")
        )
        async for piece in embedded.stream({**body, "model": "fake:m"}):
            yield piece

    async def models(self, id: str | None = None) -> Any:
        if id not in (None, "m"):
            raise UpstreamError(404, f"no model {id}")
        model = {"id": "m", "object": "model", "created": 1, "owned_by": "tests"}
        return model if id else {"object": "list", "data": [model]}

    async def forward(self, sent: Passed) -> tuple[Head, AsyncIterator[bytes]]:
        content = sent.content
        if not isinstance(content, bytes):
            content = b"".join([piece async for piece in content])
        self.passed.append(replace(sent, content=content))

        async def pieces() -> AsyncIterator[bytes]:
            for piece in self.pieces:
                yield piece

        return Head(200, {"content-type": "application/json"}), pieces()

    async def aclose(self) -> None:
        pass


@dataclass
class World:
    """A gateway with clients."""

    app: FastAPI
    store: Store
    upstream: Scripted
    http: httpx2.AsyncClient

    def sdk(self, key: str = "any", **headers: str) -> openai.AsyncOpenAI:
        """The official SDK, which retries nothing here."""
        transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
        client = httpx2.AsyncClient(transport=transport)
        return openai.AsyncOpenAI(
            api_key=key,
            base_url="http://localhost/v1",
            http_client=client,
            max_retries=0,
            default_headers=headers,
        )

    async def ask(self, text: str, user: str | None = "ada", **more: Any) -> Any:
        """A chat completion with its headers."""
        named = {} if user is None else {"user": user}
        messages = [{"role": "user", "content": text}]
        return await self.http.post(
            "/v1/chat/completions", json={"model": "m", "messages": messages, **named, **more}
        )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'store.db'}")
    yield store
    store.close()


@pytest.fixture
def either(url: str) -> Iterator[Store]:
    """A store in SQLite, and one in PostgreSQL."""
    store = Store(url)
    yield store
    store.close()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What a server with `--log json` writes."""
    monkeypatch.setattr("sys.stderr", written := io.StringIO())
    with logging_to_stderr("json"):
        yield written


@asynccontextmanager
async def running(
    store: Store,
    bundle: Path | None = None,
    *,
    on_loopback: bool = True,
    admin_key: str = "",
    warm: bool = True,
    tracing: Tracing | None = None,
    **settings: Any,
) -> AsyncIterator[World]:
    """A gateway that is up, and has encoded the records that are there. Its gate is off: most tests
    ask anything at all, and test_gate.py is about what passes.
    """
    settings.setdefault("gate", "off")
    upstream = Scripted()
    app = make_app(
        store,
        upstream,
        ServeSettings(**settings),
        bundle=bundle,
        llm=RuleLLM(anything),
        access=Access(on_loopback, admin_key),
        tracing=tracing,
    )
    deployment = app.state.gateway.deployment
    if warm and deployment.bundle is not None:
        deployment.bundle.features.texts(
            [text for user in store.users() for text in texts_of(store.records(user)[1])]
        )
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http,
    ):
        yield World(app, store, upstream, http)


def endpoints(app: FastAPI) -> set[tuple[str, str]]:
    """Method and pattern of everything that the gateway answers, whether or not the description of
    its API has it; without the pages of that description.
    """
    return {
        (method, str(route.path_format))
        for route in iter_route_contexts(app.routes)
        for method in getattr(route, "methods", None) or ()
        if not str(route.path_format).startswith(("/docs", "/openapi.json"))
    }


async def streamed(app: Any, body: dict[str, Any]) -> AsyncIterator[str]:
    """The events of a stream as they go out: httpx's transport hands an answer over when it has
    ended.
    """
    out: asyncio.Queue[bytes | None] = asyncio.Queue()
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        return messages.pop(0) if messages else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await out.put(message.get("body", b""))
            if not message.get("more_body"):
                await out.put(None)

    path = "/v1/chat/completions"
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "http_version": "1.1",
    }
    scope |= {
        "headers": [(b"content-type", b"application/json")],
        "asgi": {"version": "3.0"},
        "scheme": "http",
        "server": ("g", 80),
    }
    task, text = asyncio.create_task(app(scope, receive, send)), b""
    while (piece := await asyncio.wait_for(out.get(), FOREVER)) is not None:
        text += piece
        while b"\n\n" in text:
            event, _, text = text.partition(b"\n\n")
            yield event.decode()
    await task
