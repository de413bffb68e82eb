"""What does not belong to the task passes the gateway unchanged, in one upstream call."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hydra_llm.bundle import Bundle
from hydra_llm.gate import FORM_WIDTH, Floor, GateWeights
from hydra_llm.store.store import Store
from hydra_llm.types import Record

from .conftest import records_of, running, streamed

pytestmark = pytest.mark.anyio

TICKETS = (
    "The printer on the second floor prints blank pages",
    "Nobody in accounting can open the shared drive since this morning",
    "The server room is at 41 degrees and the alarm is on",
    "New employee starts on Monday and needs a laptop",
    "Mail server rejects all attachments",
    "Password reset for the payroll system does not work",
    "The projector in the meeting room flickers",
    "VPN drops every ten minutes for the sales team",
    "Website shows an error after the payment",
    "Monitor stays black when the laptop is docked",
)
LABELS = ("low", "high", "urgent")


def tickets(user: str = "ada") -> list[Record]:
    return [Record(user, f"t{i}", text, LABELS[i % 3]) for i, text in enumerate(TICKETS)]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


OFF_TASK = ("What is the capital of France?", "Hi, how are you?", "你好", "2+2", "make it shorter")


@pytest.mark.parametrize("question", OFF_TASK)
@pytest.mark.parametrize("count", [2, 10])
async def test_a_generic_request_passes_through(store: Store, question: str, count: int) -> None:
    store.add_records("ada", tickets()[:count])
    async with running(store, gate="auto") as world:
        answer = await world.ask(question)
        told = answer.headers["x-hydra-personalized"]
        assert told in ("false; reason=off-task", "false; reason=not-relevant")
        assert world.upstream.bodies == [
            {
                "model": "m",
                "messages": [{"role": "user", "content": question}],
                "user": world.upstream.bodies[0]["user"],
                "stream": False,
            }
        ]
        assert "personalization" not in answer.json()


@pytest.mark.parametrize("count", [2, 10])
async def test_a_question_of_the_users_kind_is_personal(store: Store, count: int) -> None:
    store.add_records("ada", tickets()[:count])
    async with running(store, gate="auto") as world:
        for question in (TICKETS[0], "The printer on the first floor prints only black pages"):
            answer = await world.ask(question)
            assert answer.headers["x-hydra-personalized"] == "true"
            assert "t0" in answer.json()["personalization"]["records"]


async def test_off_lets_everything_pass(store: Store) -> None:
    store.add_records("ada", tickets())
    async with running(store, gate="off") as world:
        answer = await world.ask(OFF_TASK[0])
        assert answer.headers["x-hydra-personalized"] == "true"


async def test_a_bundle_without_a_gate_compares_words(
    store: Store, bundles: dict[str, Path]
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], gate="auto") as world:
        answer = await world.ask("soldiers in the trenches in winter")
        assert answer.headers["x-hydra-personalized"] == "true"
        before = len(world.upstream.bodies)
        answer = await world.ask("What is the capital of France?")
        assert answer.headers["x-hydra-personalized"] == "false; reason=off-task"
        assert len(world.upstream.bodies) == before + 1  # no sample was drawn


async def test_a_stream_names_the_reason(store: Store) -> None:
    store.add_records("ada", tickets())
    async with running(store, gate="auto") as world:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        body = {"model": "m", "messages": messages, "user": "ada", "stream": True}
        answer = await world.http.post("/v1/chat/completions", json=body)
        assert answer.headers["x-hydra-personalized"] == "false; reason=off-task"
        events = [event async for event in streamed(world.app, body)]
        assert not any("personalization" in event for event in events)


FOLLOW_UPS = ("Could you explain that again, but simpler?", "make it shorter", "Und das zweite?")


@pytest.mark.parametrize("follow_up", FOLLOW_UPS)
async def test_only_the_last_question_of_a_conversation_counts(
    store: Store, follow_up: str
) -> None:
    store.add_records("ada", tickets())
    async with running(store, gate="auto") as world:
        talk = [
            {"role": "user", "content": TICKETS[0]},
            {"role": "assistant", "content": "low"},
            {"role": "user", "content": follow_up},
        ]
        body = {"model": "m", "user": "ada", "messages": talk}
        answer = await world.http.post("/v1/chat/completions", json=body)
        assert answer.headers["x-hydra-personalized"] == "false; reason=off-task"
        body["messages"] = [*talk, {"role": "assistant", "content": "?"}, talk[0]]
        answer = await world.http.post("/v1/chat/completions", json=body)
        assert answer.headers["x-hydra-personalized"] == "true"


@pytest.mark.parametrize(("threshold", "told"), [(-1.0, "true"), (1.0, "false; reason=off-task")])
async def test_a_bundles_own_gate_is_kept_and_used(
    store: Store, bundles: dict[str, Path], tmp_path: Path, threshold: float, told: str
) -> None:
    loaded = Bundle.load(bundles["tags"])
    numbers = np.zeros(loaded.features.encoder.width + FORM_WIDTH)
    learned = GateWeights(numbers, threshold, Floor(0.5, 0.25, 0.125))
    replace(loaded, gate=learned).save(tmp_path / "b")
    again = Bundle.load(tmp_path / "b").gate
    assert again is not None
    assert again.config() == learned.config()
    assert (again.weights == learned.weights).all()
    store.add_records("ada", records_of("ada"))
    async with running(store, tmp_path / "b", gate="auto") as world:
        assert world.app.state.gateway.deployment.gate == "auto"
        answer = await world.ask("the battle for the bridge in winter")
        assert answer.headers["x-hydra-personalized"] == told
        answer = await world.ask(records_of("ada")[0].input)  # the same as a record
        assert answer.headers["x-hydra-personalized"] == "true"
