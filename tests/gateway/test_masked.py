"""The gateway with `mask`: personal data of records and questions stays here; answers have it."""

import json
import threading
from typing import Any

import anyio
import pytest

from hydra_llm.config import Settings
from hydra_llm.errors import SettingsError
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.masking import detectors
from hydra_llm.plugins import DETECTORS
from hydra_llm.store.store import Store
from hydra_llm.types import Record

from .conftest import Scripted, World, running

pytestmark = pytest.mark.anyio
OWN, OTHER = "ada@x.org", "bob@y.org"
QUESTION = f"who wrote to {OWN} about the storm at sea?"
ASK: Any = {"model": "m", "user": "ada", "messages": [{"role": "user", "content": QUESTION}]}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def echoing(world: World) -> Scripted:
    """An upstream that says the last message again."""
    world.upstream.rule = lambda body, index: str(body["messages"][-1]["content"])
    return world.upstream


@pytest.mark.parametrize("mask", ["email", None])
async def test_values_stay_and_answers_have_them(store: Store, mask: str | None) -> None:
    text = f"the storm at sea, said {OTHER}"
    store.add_records("ada", [Record("ada", "r", text, f"by {OTHER}")])
    async with running(store, mask=mask, placement="block") as world:
        upstream = echoing(world)
        answer = (await world.http.post("/v1/chat/completions", json=ASK)).json()
        assert answer["personalization"]["records"] == ["r"]
        stream = await world.http.post("/v1/chat/completions", json={**ASK, "stream": True})
        responses = {"model": "m", "user": "ada", "input": QUESTION}
        other = await world.http.post("/v1/responses", json=responses)
        nobody = await world.ask(QUESTION, user=None)
        pieces = [json.loads(own[6:]) for own in stream.text.split("\n\n") if own[6:7] == "{"]
        deltas = [own["choices"][0]["delta"].get("content") or "" for own in pieces]
        whole = (answer["choices"][0]["message"]["content"], other.text, nobody.text)
        for told in (*whole, "".join(deltas)):
            assert OWN in told
            assert "[EMAIL_" not in told
    assert len(upstream.bodies) == 4
    seen = [body for body in upstream.bodies if OWN in str(body) or OTHER in str(body)]
    assert len(seen) == (0 if mask else 4)
    kept = store.latest_requests("ada", 3)
    assert all(OWN in request.question for request in kept)


async def test_the_setting_of_every_command_holds_here(store: Store) -> None:
    assert ServeSettings(mask="card, email").mask == "card,email"
    with pytest.raises(SettingsError, match="unknown detector 'emails'"):
        ServeSettings.checked({"mask": "emails"})
    from hydra_llm.gateway.deployment import open_deployment
    from hydra_llm.gateway.user_cache import TimedReads

    for flag, chosen in ((None, "email"), ("", ""), ("card", "card")):
        settings, here = ServeSettings(mask=flag), Settings(mask="email")
        deployment = open_deployment(store, TimedReads(5.0), None, settings, here)
        assert deployment.pipeline.settings.mask == chosen
        deployment.batcher.close()


async def test_others_go_on_while_a_long_text_is_searched(store: Store) -> None:
    slow = threading.Event()

    def waits(text: str) -> list[tuple[int, int]]:
        assert slow.wait(30), "the loop stood still"
        return []

    DETECTORS.add("waits", waits)
    try:
        async with running(store, mask="waits") as world, anyio.create_task_group() as group:
            group.start_soon(world.ask, QUESTION)
            await anyio.sleep(0.05)
            assert (await world.http.get("/v1/users")).status_code == 200
            slow.set()
    finally:
        del DETECTORS.added["waits"]
        detectors.cache_clear()
