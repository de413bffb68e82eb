"""Private mode of the gateway: no byte of a record reaches the upstream, by any route."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from hydra_llm.config import Settings
from hydra_llm.errors import SettingsError
from hydra_llm.gateway.deployment import open_deployment
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.user_cache import TimedReads
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.store.store import Store
from hydra_llm.types import Message

from .conftest import TAGS, World, anything, records_of, running
from .test_mcp import call, connected

pytestmark = pytest.mark.anyio
MARK = "zq7"  # in every record, and nowhere else
QUESTION = "whales under the waves at night"
TURN = [{"role": "user", "content": QUESTION}]
ASK = {"model": "m", "user": "ada", "messages": TURN}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
REQUESTS: dict[str, Any] = {
    "/v1/chat/completions": {**ASK, "n": 2, "personalization": {"k": 4, "explain": True}},
    "/v1/chat/completions?stream": {**ASK, "stream": True},
    "/v1/chat/completions?tools": {**ASK, "tools": [TOOL]},
    "/v1/responses": {"model": "m", "user": "ada", "input": QUESTION},
    "/v1/messages": {**ASK, "max_tokens": 9},
    "/v1/completions": {"model": "m", "user": "ada", "prompt": QUESTION},
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def uses_all(world: World) -> list[str]:
    """Everything that the upstream is asked, and the LLM of fits."""
    asked = list[str]()

    def noted(messages: Sequence[Message], index: int, rng: random.Random) -> str:
        asked.append(str(messages))
        return anything(messages, index, rng)

    worker, deployment = world.app.state.worker, world.app.state.gateway.deployment
    worker._llm = RuleLLM(noted)
    settings = deployment.bundle.learned_with.model_copy(update={"fit_labels": "llm"})
    asking = replace(deployment.bundle, learned_with=settings)
    world.app.state.gateway.deployment = replace(deployment, bundle=asking)
    for path, body in REQUESTS.items():
        answer = await world.http.post(path, json=body, headers={"anthropic-version": "1"})
        assert answer.status_code == 200, answer.text
    answer = (await world.http.post("/v1/chat/completions", json=ASK)).json()
    judged = {"request_id": answer["id"], "edited": "another title"}
    assert (await world.http.post("/v1/feedback", json=judged)).status_code == 200
    async with connected(world, user="ada") as mcp:
        found = await call(mcp, "search_records", query=QUESTION)
        assert found["records"], "what the caller may read does not change"
        await call(mcp, "describe_user")
    job = (await world.http.post("/v1/users/ada/fit")).json()["id"]
    while (state := (await world.http.get(f"/v1/users/ada/jobs/{job}")).json())["state"] != "done":
        assert state["state"] != "failed", state
        await anyio.sleep(0.02)
    upstream = world.upstream
    return [*asked, *map(str, upstream.bodies), *map(str, upstream.passed)]


@pytest.mark.parametrize("private", [True, False])
async def test_the_upstream_sees_no_record(
    store: Store, bundles: dict[str, Path], private: bool
) -> None:
    own = [replace(r, input=f"{MARK} {r.input}", output=f"{MARK} title") for r in records_of("ada")]
    store.add_records("ada", own)
    async with running(store, bundles["titles"], private=private or None) as world:
        asked = await uses_all(world)
    assert any(QUESTION in text for text in asked)
    seen = [text for text in asked if MARK in text]
    assert bool(seen) is not private, "with the mode off the same requests show records"


async def test_the_answer_is_picked_from_samples_without_records(
    store: Store, bundles: dict[str, Path]
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], private=True) as world:
        answer = await world.ask(QUESTION)
        told = answer.json()["personalization"]
        assert answer.headers["x-hydra-personalized"] == "true"
        assert told["records"] == []
        assert told["candidates"] > 1
        assert None not in told["scores"][:1]
        assert all(body["messages"] == TURN for body in world.upstream.bodies)
        assert answer.json()["choices"][0]["message"]["content"] in TAGS.labels


async def test_it_needs_a_bundle(store: Store) -> None:
    for settings, here in (
        (ServeSettings(private=True), Settings()),
        (None, Settings(private=True)),
    ):
        with pytest.raises(SettingsError, match=r"^setting 'private': without a bundle .*--bundle"):
            open_deployment(store, TimedReads(5.0), None, settings or ServeSettings(), here)


async def test_a_private_machine_serves_every_bundle_so(
    store: Store, bundles: dict[str, Path]
) -> None:
    """HYDRA_PRIVATE holds for the gateway too; a flag stands above it."""
    for flag, private in ((None, True), (False, False)):
        settings, here = ServeSettings(private=flag), Settings(private=True)
        deployment = open_deployment(store, TimedReads(5.0), bundles["tags"], settings, here)
        assert deployment.private is private
        deployment.batcher.close()
