"""The gateway and the library answer alike: for the same user, records, question and samples they
ask the LLM the same, score the same and pick the same.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydra_llm import learn
from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.gateway.user_cache import to_stored
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.model.heads import Head
from hydra_llm.pipeline import UserPipeline
from hydra_llm.prompt import estimate
from hydra_llm.side_features import Featurizer
from hydra_llm.store.store import Store
from hydra_llm.tasks.base import Task
from hydra_llm.types import Answer, Generation, Message, Query, Record, Usage
from tests.learning import ONE_STRENGTH

from .conftest import World, records_of, running
from .conftest import streamed as streamed_events

pytestmark = pytest.mark.anyio

LABELS = ("calm", "loud", "odd")
TASKS = {
    "label": Task("tags", "classification", "Which tag? text: {input}\nOne word.", LABELS),
    "rating": Task("stars", "rating", "How many stars?\n{input}", ("1", "2", "3", "4", "5")),
    "text": Task("titles", "generation", "Title of: {input}"),
}
REPLIES = {
    "label": ["The tag is loud.", "odd", "odd"],
    "rating": ["3 stars", "4.4", "2"],
    "text": ['Title: "A calm sea"', "the odd storm", "loud war of old"],
}
"""What the LLM says: first at temperature 0, then sampled. Not all are answers as they stand."""
Heads = Mapping[str, Head]
QUESTION = "the battle for the bridge in winter"
LEARNED = {"samples": 3, "retrieved": 6, "k": 3, "queries_per_user": 2, "max_length": 32}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def history(task: Task, user: str, count: int = 20) -> list[Record]:
    outputs = dict(zip(LABELS, task.labels or LABELS, strict=False))
    records = enumerate(records_of(user, count))
    return [replace(r, output=outputs[r.output], position=i) for i, r in records]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle for each kind of task, learned with settings that are not the gateway's own."""
    out = {}
    for kind, task in TASKS.items():

        def rule(messages: Sequence[Message], index: int, rng: random.Random) -> str:
            return rng.choice(task.labels or LABELS)  # noqa: B023

        users = [f"train{i}" for i in range(6)]
        records = [record for user in users for record in history(task, user, 12)]
        data = DataSet.from_records(task, dict.fromkeys(users, "train"), records, [])
        settings = {**LEARNED, "temperature": 0.7, "rerank": "always", "max_prompt_tokens": 700}
        settings["ask"] = "always"  # as the gateway, which has to return a completion
        out[kind] = tmp_path_factory.mktemp("parity") / kind
        of_kind = Settings(width=16, **settings)
        learn(data, RuleLLM(rule), of_kind, out=out[kind], strengths=ONE_STRENGTH)
    return out


@dataclass
class Scripted:
    """An LLM that notes what it was asked, and says what a test wants."""

    replies: Sequence[str]
    identity: Mapping[str, Any] = field(default_factory=lambda: {"kind": "fake", "model": "s"})
    calls: list[tuple[Sequence[Message], Sampling]] = field(default_factory=list)

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        self.calls.append((messages, sampling))
        own = sampling.temperature == 0
        return Generation(tuple(self.replies[:1] if own else self.replies[1:]), Usage(calls=1))

    async def aclose(self) -> None: ...


@dataclass
class Features:
    """The side features that both scorers have read, in order."""

    arrays: list[np.ndarray] = field(default_factory=list)

    def taken(self) -> list[np.ndarray]:
        taken, self.arrays = self.arrays, []
        return taken


@pytest.fixture
def features(monkeypatch: pytest.MonkeyPatch) -> Features:
    seen, rerank, adapt = Features(), Featurizer.reranker, Featurizer.adapter

    def reranker(self: Featurizer, *arguments: Any) -> np.ndarray:
        seen.arrays.append(rerank(self, *arguments))
        return seen.arrays[-1]

    def adapter(self: Featurizer, *arguments: Any) -> np.ndarray:
        seen.arrays.append(adapt(self, *arguments))
        return seen.arrays[-1]

    monkeypatch.setattr(Featurizer, "reranker", reranker)
    monkeypatch.setattr(Featurizer, "adapter", adapter)
    return seen


def library(
    folder: Path, task: Task, replies: Sequence[str], heads: Heads | None = None
) -> UserPipeline:
    bundle = replace(Bundle.load(folder), records={"ada": history(task, "ada")})
    own = {name: {"ada": head} for name, head in (heads or {}).items()}
    return replace(bundle, heads=own).personalizer(Scripted(replies))


def some_heads(bundle: Bundle) -> Heads:
    """A head of ada in each scorer, whose scores are not the shared head's."""
    out = {}
    for name, scorer in bundle.scorers.items():
        empty = Head.of(scorer.head.empty()).numbers
        numbers = np.random.default_rng(1).normal(size=empty.shape).astype(np.float32)
        out[name] = Head(numbers, records=20)
    return out


def add_user(
    store: Store, task: Task, bundle: Bundle | None = None, heads: Heads | None = None
) -> None:
    store.add_records("ada", history(task, "ada"))
    if bundle and heads:
        with store.change("ada") as change:
            change.put_heads(bundle.weights, to_stored(heads))


async def answered(asker: UserPipeline, text: str = QUESTION) -> tuple[Answer, list[Any]]:
    answer = await asker.aanswer(Query("ada", "asked", text))
    assert isinstance(asker.llm, Scripted)
    return answer, sorted(asker.llm.calls, key=lambda call: call[1].temperature)


def script(world: World, replies: Sequence[str]) -> None:
    """Have the upstream give the first text to the caller's own request, the others as samples."""
    world.upstream.rule = lambda body, index: replies[1 + index] if "n" in body else replies[0]


def question_of(task: Task, text: str = QUESTION) -> list[dict[str, Any]]:
    return [{"role": "user", "content": task.ask(text)}]


async def ask(world: World, messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    body = {"model": "m", "user": "ada", "messages": messages, **more}
    answer = await world.http.post("/v1/chat/completions", json=body)
    assert answer.headers["x-hydra-personalized"] == "true"
    reply: dict[str, Any] = answer.json()
    return reply


def sampling_of(body: Mapping[str, Any]) -> tuple[int, float, int]:
    return body.get("n", 1), body["temperature"], body["max_tokens"]


async def test_an_llm_that_is_not_heard_changes_no_pick(learned: dict[str, Path]) -> None:
    """Of the ratings, whose votes have no weight in this bundle."""
    task = TASKS["rating"]
    bundle = Bundle.load(learned["rating"])
    assert bundle.adapter is not None
    assert not bundle.adapter.hears_llm
    pipeline = library(learned["rating"], task, REPLIES["rating"], some_heads(bundle))
    asked, calls = await answered(pipeline)
    auto = pipeline.settings.model_copy(update={"ask": "auto"})
    silent, after = await answered(replace(pipeline, settings=auto))
    assert len(calls) == len(after) == 2, "there is no further call"
    assert silent.text == asked.text
    scores = {candidate.answer: candidate.score for candidate in asked.candidates}
    assert {candidate.answer: candidate.score for candidate in silent.candidates} == scores
    assert "the LLM is not asked: its answers did not help" in silent.proposal.notes[-1]


@pytest.mark.parametrize("kind", list(TASKS))
@pytest.mark.parametrize("streamed", [False, True])
async def test_the_gateway_answers_as_the_library(
    store: Store, learned: dict[str, Path], features: Features, kind: str, streamed: bool
) -> None:
    task, replies, bundle = TASKS[kind], REPLIES[kind], Bundle.load(learned[kind])
    heads = some_heads(bundle)
    answer, calls = await answered(library(learned[kind], task, replies, heads))
    expected = features.taken()
    shared, _ = await answered(library(learned[kind], task, replies))
    assert [c.score for c in shared.candidates] != [c.score for c in answer.candidates]
    features.taken()
    add_user(store, task, bundle, heads)
    async with running(store, learned[kind]) as world:
        script(world, replies)
        options = {"temperature": 0, "max_tokens": 48, "personalization": {"explain": True}}
        if streamed:
            details, text = await read_stream(world, {"messages": question_of(task), **options})
        else:
            whole = await ask(world, question_of(task), **options)
            details, text = whole["personalization"], whole["choices"][0]["message"]["content"]
        bodies = world.upstream.bodies
    assert [body["messages"] for body in bodies] == [list(messages) for messages, _ in calls]
    assert [sampling_of(body) for body in bodies] == [
        (sampling.n, sampling.temperature, sampling.max_tokens) for _, sampling in calls
    ]
    assert details["records"] == [item.record.id for item in answer.proposal.records[:3]]
    assert len(expected) == 2, "records and candidates"
    seen = features.taken()[:2]  # then the candidates without some records, for the reasons
    for one, other in zip(seen, expected, strict=True):
        assert np.array_equal(one, other)
    scores = {task.read(t): s for t, s in zip(details["texts"], details["scores"], strict=True)}
    assert len(scores) == 3 if kind == "text" else len(scores) >= 2
    of_library = {candidate.answer: candidate.score for candidate in answer.candidates}
    assert scores == {name: of_library[name] for name in scores}
    assert task.read(text) == answer.text
    assert details["abstained"] == answer.abstained


async def read_stream(world: World, body: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The object `personalization` of a stream, and its text."""
    sent = {"model": "m", "user": "ada", "stream": True, **body}
    events = [piece async for piece in streamed_events(world.app, sent)]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if "{" in event]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    return next(c["personalization"] for c in chunks if "personalization" in c), text


async def test_candidates_of_several_prompts_are_the_librarys(
    store: Store, learned: dict[str, Path], tmp_path: Path
) -> None:
    task, names = TASKS["text"], "zero-shot,recent@1,rag-dense@2"
    bundle = Bundle.load(learned["text"])
    chosen = bundle.settings.model_copy(update={"candidate_prompts": names, "samples": 6})
    replace(bundle, settings=chosen, learned_with=chosen).save(tmp_path / "several")

    def said(messages: Sequence[Message]) -> str:
        return f"after {messages[-1]['content'].count('This person wrote')} records"

    class ByPrompt(Scripted):
        async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
            self.calls.append((messages, sampling))
            texts = [said(messages)] if sampling.temperature == 0 else self.replies[: sampling.n]
            return Generation(tuple(texts), Usage(calls=1))

    replies = ["the odd storm", "after 3 records"]
    pipeline = library(tmp_path / "several", task, replies)
    answer, calls = await answered(replace(pipeline, llm=ByPrompt(replies)))
    add_user(store, task)
    async with running(store, tmp_path / "several") as world:
        world.upstream.rule = lambda body, i: replies[i] if "n" in body else said(body["messages"])
        options = {"temperature": 0, "max_tokens": 48, "personalization": {"explain": True}}
        details = (await ask(world, question_of(task), **options))["personalization"]
        bodies = world.upstream.bodies
    assert len(bodies) == len(calls) == 5
    asked = [
        (list(messages), sampling_of(body)) for body in bodies for messages in [body["messages"]]
    ]
    of_library = [
        (list(messages), (own.n, own.temperature, own.max_tokens)) for messages, own in calls
    ]
    assert sorted(asked, key=str) == sorted(of_library, key=str)
    assert [own.votes for own in answer.candidates if own.answer == "after 3 records"] == [2]
    assert sum(own.greedy for own in answer.candidates) == 4
    scores = {own.text: own.score for own in answer.candidates}
    assert dict(zip(details["texts"], details["scores"], strict=True)) == scores


@pytest.mark.parametrize(("temperature", "greedy"), [(None, False), (0.3, False), (0, True)])
async def test_an_answer_is_greedy_at_temperature_0_only(
    store: Store, learned: dict[str, Path], temperature: float | None, greedy: bool
) -> None:
    add_user(store, TASKS["text"])
    async with running(store, learned["text"]) as world:
        script(world, REPLIES["text"])
        chosen = {} if temperature is None else {"temperature": temperature}
        reply = await ask(world, question_of(TASKS["text"]), **chosen)
        request = store.request(reply["personalization"]["request_id"])
        assert [body.get("temperature") for body in world.upstream.bodies] == [temperature, 0.7]
    assert request is not None
    flags = {candidate["said"]: candidate["greedy"] for candidate in request.content["candidates"]}
    assert flags == {
        REPLIES["text"][0]: greedy,
        REPLIES["text"][1]: False,
        REPLIES["text"][2]: False,
    }


@pytest.mark.parametrize("kind", list(TASKS))
async def test_records_without_room_are_cut_and_dropped_alike(
    store: Store, learned: dict[str, Path], kind: str
) -> None:
    """At the budget that the bundle was learned with: the best record that fits is not enough."""
    task = TASKS[kind]
    long = [
        replace(r, input=f"{r.input} {'and so on ' * (260 if i % 2 else 90)}")
        for i, r in enumerate(history(task, "ada", 6))
    ]
    asker = replace(library(learned[kind], task, REPLIES[kind]), records={"ada": long})
    _, calls = await answered(asker)
    store.add_records("ada", long)
    async with running(store, learned[kind]) as world:
        await ask(world, question_of(task))
        messages = world.upstream.bodies[0]["messages"]
    assert messages == list(calls[0][0])
    assert sum(estimate(message["content"]) for message in messages) <= 700
    assert any("…" in m["content"] or "so on" in m["content"] for m in messages), "one is shown"


async def test_a_question_without_room_is_cut_in_the_library_alone(
    store: Store, learned: dict[str, Path]
) -> None:
    """The caller's own words are the caller's: the gateway leaves the records out instead."""
    task, text = TASKS["text"], "a very long story " * 200
    _, calls = await answered(library(learned["text"], task, REPLIES["text"]), text)
    assert calls[0][0][-1]["content"].endswith("…")
    add_user(store, task)
    async with running(store, learned["text"]) as world:
        await ask(world, question_of(task, text))
        assert world.upstream.bodies[0]["messages"] == question_of(task, text)


async def test_in_a_conversation_records_have_the_learned_style(
    store: Store, learned: dict[str, Path]
) -> None:
    system, earlier = (
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "Yes?"},
    )
    for kind in ("label", "text"):
        task = TASKS[kind]
        _, calls = await answered(library(learned[kind], task, REPLIES[kind]))
        alone = [dict(message) for message in calls[0][0]]
        add_user(store, task)
        async with running(store, learned[kind]) as world:
            await ask(world, [system, earlier, *question_of(task)])
            messages = world.upstream.bodies[0]["messages"]
        if kind == "label":
            turns = [system, *alone[:-1], earlier, alone[-1]]
            assert messages == turns, "behind the system's"
        else:
            assert messages == [system, earlier, *alone], "a block in front of the question"
        store.delete_user("ada")


async def test_parts_of_a_message_stay_behind_the_block(
    store: Store, learned: dict[str, Path]
) -> None:
    task = TASKS["text"]
    store.add_records("ada", history(task, "ada"))
    image = {"type": "image_url", "image_url": {"url": "data:x"}}
    parts = [{"type": "text", "text": task.ask(QUESTION)}, image]
    async with running(store, learned["text"]) as world:
        await ask(world, [{"role": "user", "content": parts, "name": "ada"}])
        (message,) = world.upstream.bodies[0]["messages"]
    assert message["content"][1:] == parts
    assert message["content"][0]["text"].startswith("Here is what this person wrote")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, {}),
        (
            {"abstention_threshold": 1.5, "max_prompt_tokens": 900, "placement": "turns"},
            {"abstention_threshold": 1.5, "max_prompt_tokens": 900, "prompt_style": "turns"},
        ),
        ({"candidates": 5, "temperature": 0.2}, {"samples": 5, "temperature": 0.2}),
    ],
)
async def test_the_bundles_settings_hold_unless_others_are_given(
    store: Store, learned: dict[str, Path], overrides: dict[str, Any], expected: dict[str, Any]
) -> None:
    loaded = Bundle.load(learned["text"]).settings
    async with running(store, learned["text"], **overrides) as world:
        settings = world.app.state.gateway.deployment.pipeline.settings
    assert settings == loaded.model_copy(update={"gate": "off", **expected})
    async with running(store) as world:
        bare = world.app.state.gateway.deployment.pipeline.settings
    assert (bare.max_prompt_tokens, bare.prompt_style) == (4096, "turns"), "without a bundle"


async def test_an_answer_to_the_task_is_read_as_in_learning(
    store: Store, learned: dict[str, Path]
) -> None:
    """A sentence around a label is that label, as nothing but a label was asked for."""
    add_user(store, TASKS["label"])
    async with running(store, learned["label"]) as world:
        script(world, ["I would say odd.", "odd", "odd"])
        reply = await ask(world, question_of(TASKS["label"]))
        assert None not in reply["personalization"]["scores"]
        other = await ask(world, [{"role": "user", "content": "Tell me of the bridge."}])
        assert other["personalization"]["scores"] == [None], "nothing is sampled in vain"
