"""The gateway as applications meet it: the official SDK, the headers, what the upstream sees, and
what happens when parts fail.
"""

import asyncio
import json
import re
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import openai
import pytest

from hydra_llm import learn
from hydra_llm.bundle import Bundle
from hydra_llm.cli.main import run
from hydra_llm.config import load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.gateway.auth import make_key
from hydra_llm.gateway.batching import Overloaded
from hydra_llm.gateway.deployment import Deployment
from hydra_llm.gateway.upstream import UpstreamError, learn_samples, usage_of
from hydra_llm.gateway.user_cache import texts_of
from hydra_llm.llm.endpoint import Capabilities, CapabilityCache, Endpoint
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.store.store import Store
from hydra_llm.types import Record
from tests.waiting import FOREVER, async_until

from .conftest import (
    TAGS,
    TITLES,
    TOPICS,
    World,
    anything,
    endpoints,
    records_of,
    running,
    streamed,
    tastes,
)
from .dashboard import ADMIN_ENDPOINTS

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


QUESTION = "the battle for the bridge in winter"


async def fitted(world: World, user: str) -> None:
    """Fit a user's heads, and wait for it."""
    answer = await world.http.post(f"/v1/users/{user}/fit")
    assert answer.status_code == 202
    end = time.monotonic() + FOREVER
    while time.monotonic() < end:
        job = (await world.http.get(f"/v1/users/{user}/jobs/{answer.json()['id']}")).json()
        if job["state"] in ("done", "failed"):
            assert job["state"] == "done", job
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the job does not end")


# ---- without a bundle


async def test_only_users_with_a_history_have_records_in_the_prompt(store: Store) -> None:
    async with running(store) as world:
        for user, reason in ((None, "no-user"), ("ada", "unknown-user")):
            answer = await world.ask(QUESTION, user)
            assert answer.headers["x-hydra-personalized"] == f"false; reason={reason}"
            assert [m["content"] for m in world.upstream.bodies[-1]["messages"]] == [QUESTION]
        store.add_records(
            "ada",
            [
                Record("ada", "bridge", "the battle for the bridge in spring", "odd"),
                *records_of("ada"),
            ],
        )
        answer = await world.ask(QUESTION, personalization={"k": 2})
        assert answer.headers["x-hydra-personalized"] == "true"
        forwarded = world.upstream.bodies[-1]
        assert [m["role"] for m in forwarded["messages"]] == ["user", "assistant"] * 2 + ["user"]
        assert "battle" in forwarded["messages"][2]["content"], (
            "the nearest record stands next to the question"
        )
        assert forwarded["messages"][-1] == {"role": "user", "content": QUESTION}
        assert "personalization" not in forwarded
        assert len(answer.json()["personalization"]["records"]) == 2


async def test_messages_and_unknown_fields_arrive_as_they_are(store: Store) -> None:
    store.add_records("ada", records_of("ada"))
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "look"},
                {"type": "image_url", "image_url": {"url": "data:x"}},
            ],
        },
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": QUESTION, "extra": 1},
    ]
    async with running(store, placement="block") as world:
        body = {
            "model": "m",
            "messages": messages,
            "user": "ada",
            "top_p": 0.3,
            "made_up": {"a": [1]},
        }
        answer = await world.http.post("/v1/chat/completions", json=body)
        assert answer.headers["x-hydra-personalized"] == "true"
        forwarded = world.upstream.bodies[-1]
        *before, last = forwarded["messages"]
        assert before == messages[:-1]
        assert last == {**messages[-1], "content": last["content"]}
        assert last["content"].startswith("Here is what this person wrote for earlier texts.")
        assert last["content"].endswith(f"\n{QUESTION}")
        assert (forwarded["top_p"], forwarded["made_up"]) == (0.3, {"a": [1]})
        off = await world.http.post(
            "/v1/chat/completions", json={**body, "personalization": {"enabled": False}}
        )
        assert off.headers["x-hydra-personalized"] == "false; reason=disabled"


@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ({}, {"x-hydra-user": "ada"}),
        ({"user": "ada"}, {}),
        ({"safety_identifier": "ada"}, {}),
        ({"metadata": {"user_id": "ada", "other": "x"}}, {}),
        ({"user": "unknown"}, {"x-hydra-user": "ada"}),
    ],
)
async def test_the_user_is_identified_and_hidden_from_the_upstream(
    store: Store, fields: dict[str, Any], headers: dict[str, str]
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store) as world:
        body = {"model": "m", "messages": [{"role": "user", "content": QUESTION}], **fields}
        answer = await world.http.post("/v1/chat/completions", json=body, headers=headers)
        assert answer.headers["x-hydra-personalized"] == "true"
        assert '"ada"' not in json.dumps(world.upstream.bodies[-1])
        assert set(fields) <= set(world.upstream.bodies[-1])


async def test_the_official_sdk(either: Store) -> None:
    either.add_records("ada", records_of("ada"))
    async with running(either) as world:
        client = world.sdk()
        completion = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": QUESTION}], user="ada", n=2
        )
        assert len(completion.choices) == 2
        assert completion.usage is not None
        assert completion.usage.total_tokens == 12
        assert completion.model_extra is not None
        assert "personalization" in completion.model_extra
        stream = await client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": QUESTION}],
            user="ada",
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert (
            "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            == "calm"
        )
        assert chunks[-1].usage is not None
        assert [model.id async for model in client.models.list()] == ["m"]
        assert (await client.models.retrieve("m")).id == "m"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")
        with pytest.raises(openai.BadRequestError, match="messages"):
            await client.chat.completions.create(model="m", messages=[])
        world.upstream.faults = [
            UpstreamError(
                429, {"error": {"message": "slow down", "type": "x"}}, {"retry-after": "7"}
            )
        ]
        with pytest.raises(openai.RateLimitError, match="slow down") as limited:
            await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "x"}]
            )
        assert limited.value.response.headers["retry-after"] == "7"
        with pytest.raises(openai.NotFoundError):
            await client.get("/feedback", cast_to=object)  # of the gateway: not passed on


# ---- with a bundle


@pytest.mark.slow
async def test_users_get_their_own_of_several_candidates(
    store: Store, bundles: dict[str, Path]
) -> None:
    users = [f"user{i}" for i in range(6)]
    for user in users:
        store.add_records(user, records_of(user))
    async with running(store, bundles["tags"], candidates=3, abstention_threshold=0) as world:
        right = alone = 0
        for user in users:
            await fitted(world, user)
            for topic, texts in TOPICS.items():
                answer = (await world.ask(f"{texts[0]} told twice", user)).json()
                right += answer["choices"][0]["message"]["content"] == tastes(user)[topic]
                alone += tastes(user)[topic] == "calm"  # what the upstream says first
        assert right > alone + 4
        assert right >= 14
        details = answer["personalization"]
        assert (details["candidates"], details["scores_reason"]) == (3, None)
        assert details["scores"] == sorted(details["scores"], reverse=True), "the pick first"
        assert answer["usage"]["total_tokens"] == 11 + 12, "what all candidates cost"
        assert "why" not in details
        why = (await world.ask(QUESTION, "user0", personalization={"explain": True})).json()
        why = why["personalization"]
        one, other = why["scores"][:2]
        assert sum(why["why"]["parts"].values()) == pytest.approx(one - other, abs=1e-4)
        assert why["why"]["pick"] == why["texts"][0]
        assert {own["id"] for own in why["why"]["records"]} > {own["id"] for own in why["shown"]}
        kept = store.request(details["request_id"])
        assert kept is not None
        assert {"shared", "head"} < set(kept.content["why"]["parts"])
        three = (await world.ask(QUESTION, "user0", n=3)).json()
        assert [choice["index"] for choice in three["choices"]] == [0, 1, 2]
        assert {choice["message"]["content"] for choice in three["choices"]} == set(TAGS.labels)


@pytest.mark.slow
async def test_what_waits_together_is_encoded_together_pairs_too(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = [f"train{i}" for i in range(4)]
    data = DataSet.from_records(
        TITLES,
        dict.fromkeys(users, "train"),
        [r for user in users for r in records_of(user, 8)],
        [],
    )
    small = {
        "samples": 3,
        "retrieved": 4,
        "k": 2,
        "queries_per_user": 1,
        "max_length": 32,
        "cache": tmp_path / "cache",
    }
    learn(
        data,
        RuleLLM(anything),
        load_settings(features="cross", rerank="always", **small),
        out=tmp_path / "cross",
    )
    askers = [f"asker{i}" for i in range(6)]
    for user in askers:
        store.add_records(user, records_of(user))
    async with running(store, tmp_path / "cross", candidates=3) as world:
        deployment = world.app.state.gateway.deployment
        alone = [(await world.ask(QUESTION, user)).json()["personalization"] for user in askers]
        deployment.bundle.features.forget([QUESTION])  # all pairs are with it
        batches: list[int] = []
        encode = deployment.bundle.features.encoder.encode_pairs

        def noted(left: Sequence[str], right: Sequence[str]) -> Any:
            batches.append(len(left))
            return encode(left, right)

        monkeypatch.setattr(deployment.bundle.features.encoder, "encode_pairs", noted)
        waiting, release, run = 0, threading.Event(), deployment.batcher.run

        async def counted(*work: Any, **more: Any) -> Any:
            nonlocal waiting
            waiting += 1
            if waiting == len(askers):  # release the thread when this one is in the queue too
                asyncio.get_running_loop().call_soon(release.set)
            return await run(*work, **more)

        busy = asyncio.create_task(run(release.wait, user=""))
        monkeypatch.setattr(deployment.batcher, "run", counted)
        replies = await asyncio.gather(*(world.ask(QUESTION, user) for user in askers))
        answers = [answer.json()["personalization"] for answer in replies]
        await busy
    assert batches[0] > 4, "records of several users went through the encoder at once"
    assert len(batches) < len(askers)
    for one, other in zip(answers, alone, strict=True):
        assert one["records"] == other["records"]
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-4)


async def test_a_stream_of_the_pick_begins_at_once_and_ends_with_it(
    store: Store, bundles: dict[str, Path]
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], candidates=3) as world:
        stream = await world.sdk().chat.completions.create(
            model="m", messages=[{"role": "user", "content": QUESTION}], user="ada", stream=True
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) in TAGS.labels
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert chunks[-1].model_extra is not None
        assert chunks[-1].model_extra["personalization"]["request_id"]


async def test_a_stream_begins_before_a_slow_upstream_and_stays_alive(
    store: Store, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The role before anything was answered, comments while nothing is, then the pick."""
    monkeypatch.setattr("hydra_llm.gateway.chat.KEEP_ALIVE_SECONDS", 0.05)
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], candidates=3) as world:
        go, complete = asyncio.Event(), world.upstream.complete

        async def slow(body: Any) -> Any:
            await go.wait()
            return await complete(body)

        monkeypatch.setattr(world.upstream, "complete", slow)
        body = {
            "model": "m",
            "user": "ada",
            "stream": True,
            "messages": [{"role": "user", "content": QUESTION}],
        }
        pieces = streamed(world.app, body)
        first = json.loads((await anext(pieces)).removeprefix("data: "))
        assert first["choices"][0]["delta"]["role"] == "assistant"
        assert [await anext(pieces) for _ in range(3)] == [": still working"] * 3
        go.set()
        rest = [piece async for piece in pieces if piece != ": still working"]
        assert rest[-1] == "data: [DONE]"
        text = "".join(
            json.loads(piece.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
            for piece in rest[:-1]
        )
        assert text in TAGS.labels


async def test_feedback_moves_the_head_once_in_any_order(
    either: Store, bundles: dict[str, Path], tmp_path: Path
) -> None:
    other = Store(f"sqlite:///{tmp_path / 'other.db'}")
    heads = []
    for place, order in ((either, [0, 1, 2, 3]), (other, [2, 0, 3, 1])):
        place.add_records("ada", records_of("ada", 6))
        async with running(place, bundles["titles"], candidates=3) as world:
            ids = [
                (await world.ask(f"{texts[1]} again")).json()["personalization"]["request_id"]
                for texts in [*TOPICS.values()]
            ]
            ids.append((await world.ask(QUESTION)).json()["personalization"]["request_id"])
            verdicts = [
                {"chosen": 1},
                {"rejected": True},
                {"rating": 0.9},
                {"edited": "calm at last"},
            ]
            for i in order:
                answer = await world.http.post(
                    "/v1/feedback", json={"request_id": ids[i], **verdicts[i]}
                )
                assert answer.status_code == 200, answer.text
            assert answer.json()["head_moved"]
            again = await world.http.post(
                "/v1/feedback", json={"request_id": ids[0], **verdicts[0]}
            )
            assert again.json()["repeated"]
            bundle = world.app.state.gateway.deployment.id
            heads.append(place.heads("ada", bundle)["adapter"].delta)
            outputs = [record.output for record in place.records("ada")[1]]
            assert "calm at last" in outputs
            assert len(outputs) == 6 + 3, (
                "what was chosen, rated well or edited is a record; what was rejected is none"
            )
    other.close()
    assert heads[0] != b"\0" * len(heads[0])
    import numpy as np

    assert np.allclose(*(np.frombuffer(head, "<f4") for head in heads), atol=1e-4)


async def test_feedback_changes_what_is_picked(either: Store, bundles: dict[str, Path]) -> None:
    either.add_records("ada", records_of("ada"))
    async with running(either, bundles["tags"], candidates=3, abstention_threshold=0) as world:
        await fitted(world, "ada")
        before = (await world.ask(QUESTION)).json()["choices"][0]["message"]["content"]
        wanted = next(label for label in TAGS.labels if label != before)
        for _ in range(8):
            details = (await world.ask(QUESTION)).json()["personalization"]
            await world.http.post(
                "/v1/feedback", json={"request_id": details["request_id"], "edited": wanted}
            )
        after = (await world.ask(QUESTION)).json()["choices"][0]["message"]["content"]
        assert (before, after) == (tastes("ada")["war"], wanted)
        await fitted(world, "ada")
        assert (await world.ask(QUESTION)).json()["choices"][0]["message"]["content"] == wanted, (
            "a new fit knows it from the records"
        )


async def test_a_fit_remembers_what_was_rejected(store: Store, bundles: dict[str, Path]) -> None:
    """A rejected answer becomes no record: the fitted head alone would have forgotten it."""
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["titles"], candidates=3) as world:
        bundle = world.app.state.gateway.deployment.id
        for verdict in ({"rejected": True}, {"rating": 0.1}, {"edited": "calm"}):
            id = (await world.ask(QUESTION)).json()["personalization"]["request_id"]
            assert (
                await world.http.post("/v1/feedback", json={"request_id": id, **verdict})
            ).json()["head_moved"]
        await fitted(world, "ada")
        heads = store.heads("ada", bundle)
        assert heads["adapter"].delta != heads["fitted"].delta
        assert [feedback.content["said"] for feedback in store.unlearned_feedback("ada")] == [
            {"rejected": True},
            {"rating": 0.1},
        ], "the edit is a record"
        await fitted(world, "ada")
        assert store.heads("ada", bundle) == heads, "and again, from the fitted head, not on top"


@pytest.mark.parametrize(
    ("verdict", "status"),
    [
        ({}, 400),
        ({"chosen": 0, "rejected": True}, 400),
        ({"chosen": 99}, 400),
        ({"rating": 2}, 400),
        ({"chosen": 0, "request_id": "req_unknown"}, 404),
    ],
)
async def test_invalid_feedback_is_refused(
    store: Store, verdict: dict[str, Any], status: int
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store) as world:
        id = (await world.ask(QUESTION)).json()["personalization"]["request_id"]
        answer = await world.http.post("/v1/feedback", json={"request_id": id, **verdict})
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


# ---- never worse


async def test_whatever_fails_the_caller_gets_an_answer(
    store: Store, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add_records("ada", records_of("ada"))

    def broken(*_: object) -> Any:
        raise RuntimeError("a bug with ada's texts")

    async with running(store, bundles["tags"], candidates=3) as world:
        deployment = world.app.state.gateway.deployment
        fault = UpstreamError(500, "down")
        world.upstream.faults = [fault]  # the first candidate fails, the samples come
        assert (await world.ask(QUESTION)).status_code == 200
        world.upstream.faults = [None, fault]
        assert (await world.ask(QUESTION)).json()["usage"]["total_tokens"] == 11, (
            "the first candidate alone"
        )
        world.upstream.faults = [fault, fault]
        assert (await world.ask(QUESTION)).status_code == 500
        world.upstream.faults = [UpstreamError(400, "too long"), UpstreamError(400, "too long")]
        plain = await world.ask(QUESTION)
        assert plain.headers["x-hydra-personalized"] == "false; reason=upstream-refused"
        assert len(world.upstream.bodies[-1]["messages"]) == 1
        monkeypatch.setattr(deployment.pipeline.selector, "choose", broken)
        assert (await world.ask(QUESTION)).json()["choices"][0]["message"]["content"] == "calm"
        monkeypatch.setattr(deployment.pipeline.reranker, "order", broken)
        assert (await world.ask(QUESTION)).headers["x-hydra-personalized"] == "true"
        figures = (await world.http.get("/metrics")).text
        for part in ("candidates", "records", "adapter", "reranker"):
            assert f'hydra_failures_total{{part="{part}"}}' in figures
        assert '"ada"' not in figures
        store.engine.dispose()
        monkeypatch.setattr(
            world.app.state.gateway.store,
            "state",
            lambda user: (_ for _ in ()).throw(_store_error()),
        )
        answer = await world.ask(QUESTION)
        assert answer.headers["x-hydra-personalized"] == "false; reason=store-failure"


def _store_error() -> Exception:
    from hydra_llm.errors import StoreError

    return StoreError("gone")


async def test_an_upstream_of_one_choice_per_call_is_called_for_each(
    store: Store, bundles: dict[str, Path]
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], candidates=4) as world:
        world.upstream.most = 1
        assert (await world.ask(QUESTION)).json()["usage"]["total_tokens"] == 22, (
            "the caller's own and one sample"
        )
        world.upstream.bodies.clear()
        replies = iter(["odd", "loud", "calm", "odd"])
        world.upstream.rule = lambda body, index: next(replies)
        assert (await world.ask(QUESTION, seed=5)).json()["usage"]["total_tokens"] == 44
        assert [body.get("seed") for body in world.upstream.bodies] == [5, 6, 7, 8]
        assert all("n" not in body or body["n"] == 1 for body in world.upstream.bodies)


async def test_the_callers_n_is_kept_whatever_becomes_of_the_samples(
    store: Store, bundles: dict[str, Path]
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["titles"], candidates=4) as world:
        world.upstream.faults = [None, UpstreamError(500, "down")]
        assert len((await world.ask(QUESTION, n=3)).json()["choices"]) == 3
        assert [body["n"] for body in world.upstream.bodies] == [3, 1]
        world.upstream.bodies.clear()
        assert len((await world.ask(QUESTION, n=6)).json()["choices"]) == 6
        assert [body["n"] for body in world.upstream.bodies] == [6], (
            "more than candidates: there is nothing to add"
        )


async def test_a_streamed_pick_keeps_what_else_the_upstream_said(
    store: Store, bundles: dict[str, Path]
) -> None:
    store.add_records("ada", records_of("ada"))
    logprobs = {"content": [{"token": "calm", "logprob": -0.5, "bytes": None, "top_logprobs": []}]}
    async with running(store, bundles["titles"], candidates=2) as world:
        plain = world.upstream.complete

        async def with_more(body: Any) -> Any:
            completion = await plain(body)
            for choice in completion["choices"]:
                choice["message"]["refusal"], choice["logprobs"] = "I would rather not", logprobs
            return completion

        world.upstream.complete = with_more  # type: ignore[method-assign]
        messages = [{"role": "user", "content": QUESTION}]
        stream = await world.sdk().chat.completions.create(
            model="m", messages=messages, user="ada", stream=True
        )
        choices = [chunk.choices[0] async for chunk in stream if chunk.choices]
    assert "".join(choice.delta.refusal or "" for choice in choices) == "I would rather not"
    assert "".join(choice.delta.content or "" for choice in choices)
    assert [choice.logprobs.content[0].token for choice in choices if choice.logprobs] == ["calm"]


# ---- records, deletion, keys


async def test_records_are_added_listed_and_deleted(either: Store) -> None:
    async with running(either, max_records=3, max_records_per_request=2) as world:
        one = {"id": "1", "input": "a", "output": "b", "time": "2020"}
        assert (await world.http.post("/v1/users/ada/records", json={"records": [one]})).json() == {
            "added": 1,
            "changed": 0,
            "unchanged": 0,
        }
        assert (await world.http.post("/v1/users/ada/records", json={"records": [one]})).json()[
            "unchanged"
        ] == 1
        assert (await world.http.get("/v1/users/ada/records")).json()["data"] == [one]
        two = [{"id": i, "input": "a", "output": "b"} for i in ("2", "3")]
        assert (
            await world.http.post("/v1/users/ada/records", json={"records": two})
        ).status_code == 200
        assert (
            await world.http.post("/v1/users/ada/records", json={"records": [{**one, "id": "4"}]})
        ).status_code == 413
        assert (await world.http.delete("/v1/users/ada/records/1")).status_code == 200
        assert (await world.http.delete("/v1/users/ada/records/1")).status_code == 404
        for broken in (
            {"input": ""},
            {"output": "x\0y"},
            {"time": "yesterday"},
            {"id": ""},
            {"more": 1},
        ):
            answer = await world.http.post(
                "/v1/users/ada/records", json={"records": [{**one, **broken}]}
            )
            assert answer.status_code == 400, broken
            assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_records_that_the_bundle_cannot_read_are_told_of(
    store: Store, bundles: dict[str, Path]
) -> None:
    """They are kept, for a bundle that can; a task of texts reads any."""
    label, place = TAGS.labels[0], "/v1/users/ada/records"
    outputs = [label, label.upper(), "none of them"]
    sent = [{"id": f"{i}", "input": "a", "output": text} for i, text in enumerate(outputs)]
    async with running(store, bundles["tags"]) as world:
        first = (await world.http.post(place, json={"records": sent[:1]})).json()
        assert first == {"added": 1, "changed": 0, "unchanged": 0}
        reply = (await world.http.post(place, json={"records": sent})).json()
        assert (reply["added"], reply["unchanged"], reply["unreadable"]) == (2, 1, 2)
        assert reply["warning"].startswith("2 of 3 outputs are none of the bundle's labels (")
        assert label in reply["warning"]
        assert len((await world.http.get(place)).json()["data"]) == 3
    async with running(store, bundles["titles"]) as world:
        reply = (await world.http.post(place, json={"records": sent})).json()
        assert reply == {"added": 0, "changed": 0, "unchanged": 3}


async def test_the_start_says_why_a_bundle_has_no_gate(
    store: Store, bundles: dict[str, Path]
) -> None:
    async with running(store, bundles["tags"], gate="auto") as world:
        told = world.app.state.gateway.deployment.gate
        few = r"\d+ distinct training inputs, at least 100 are needed"
        assert re.fullmatch(rf"auto, by words \(the bundle has none: {few}\)", told)


async def test_a_deletion_leaves_nothing_and_changes_no_others_answers(
    store: Store, bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for user in ("ada", "bob"):
        store.add_records(user, records_of(user))
    store.add_records("ada", [records_of("marmalade", 1)[0]])
    async with running(store, bundles["tags"], candidates=3) as world:
        for user in ("ada", "bob"):
            await fitted(world, user)
        details = (await world.ask("marmalade question")).json()["personalization"]
        assert holds(tmp_path, b"marmalade question")
        await world.http.post(
            "/v1/feedback", json={"request_id": details["request_id"], "edited": "odd"}
        )
        before = (await world.ask(QUESTION, "bob")).json()
        assert (
            before["personalization"]["scores"]
            == (await world.ask(QUESTION, "bob")).json()["personalization"]["scores"]
        )
        export = (await world.http.get("/v1/users/ada/export")).json()
        assert {head["scorer"] for head in export["heads"]} >= {"adapter", "reranker", "fitted"}
        deleted = (await world.http.delete("/v1/users/ada")).json()
        assert deleted["deleted"]["feedback"] == 1
        assert deleted["in_shared_base"] is False
        assert (await world.ask(QUESTION, "ada")).headers[
            "x-hydra-personalized"
        ] == "false; reason=unknown-user"
        after = (await world.ask(QUESTION, "bob")).json()
        assert after["personalization"]["scores"] == before["personalization"]["scores"]
        assert after["choices"] == before["choices"]
        for path in ("export", "records"):
            assert (await world.http.get(f"/v1/users/ada/{path}")).status_code == 404
        store.scrub()
        assert not holds(tmp_path, b"marmalade question")


def holds(folder: Path, needle: bytes) -> bool:
    """Whether any file in a folder holds these bytes."""
    return any(needle in file.read_bytes() for file in folder.rglob("*") if file.is_file())


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def unfinished_jobs(store: Store, user: str) -> list[dict[str, Any]]:
    exported = store.export_user(user)
    jobs = exported["jobs"] if exported else []
    return [job for job in jobs if job["state"] in ("waiting", "running")]


ENDPOINTS = [
    (
        "POST",
        "/v1/chat/completions",
        {"model": "m", "messages": [{"role": "user", "content": "x"}], "user": "{user}"},
    ),
    ("POST", "/v1/users/{user}/records", {"records": [{"id": "9", "input": "a", "output": "b"}]}),
    ("GET", "/v1/users", None),
    ("GET", "/v1/spend", None),
    ("GET", "/v1/limits", None),
    ("PUT", "/v1/limits", {"user": "{user}", "limits": "500/day"}),
    ("GET", "/v1/spend?user={user}&by=day,model", None),
    ("GET", "/v1/users/{user}", None),
    ("GET", "/v1/users/{user}/records", None),
    ("PUT", "/v1/users/{user}/records/r1/personalization", {"enabled": False}),
    ("DELETE", "/v1/users/{user}/records/r1", None),
    ("POST", "/v1/feedback", {"request_id": "req_{user}", "rejected": True}),
    ("POST", "/v1/users/{user}/fit", None),
    ("GET", "/v1/users/{user}/jobs/job-{user}", None),
    ("GET", "/v1/users/{user}/export", None),
    ("GET", "/v1/users/{user}/next-question", None),
    ("DELETE", "/v1/users/{user}", None),
    ("POST", "/v1/users/{user}/search", {"query": "a"}),
    ("GET", "/v1/users/{user}/requests", None),
    ("PUT", "/v1/users/{user}/personalization", {"enabled": True}),
    ("POST", "/v1/responses", {"model": "m", "input": "x", "user": "{user}"}),
    ("GET", "/v1/responses/resp_{user}", None),
    ("GET", "/v1/responses/resp_{user}/input_items", None),
    ("POST", "/v1/responses/resp_{user}/cancel", None),
    ("DELETE", "/v1/responses/resp_{user}", None),
    (
        "POST",
        "/v1/messages",
        {
            "model": "m",
            "max_tokens": 9,
            "messages": [{"role": "user", "content": "x"}],
            "metadata": {"user_id": "{user}"},
        },
    ),
    (
        "POST",
        "/v1/messages/count_tokens",
        {"model": "m", "messages": [{"role": "user", "content": "x"}], "user": "{user}"},
    ),
    ("POST", "/v1/completions", {"model": "m", "prompt": "x", "user": "{user}"}),
    ("POST", "/v1/embeddings", {"model": "m", "input": "x", "user": "{user}"}),
    ("GET", "/v1/other", None),
    ("DELETE", "/v1/other", None),
    *[(method, "/v1/other", {"user": "{user}"}) for method in ("POST", "PUT", "PATCH")],
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/m", None),
]


OF_NOBODY = ("/v1/models", "/v1/models/m", "/v1/other", "/v1/users", "/v1/spend")
FOR_ADMINS = ("/v1/limits",)


def let_in(answer: Any) -> bool:
    """Whether the caller has reached what it asked for; no response that is kept is cancelled."""
    if answer.request.url.path.endswith("/cancel"):
        return answer.status_code == 400 and "has ended" in answer.text
    if answer.request.url.path.endswith("/next-question"):
        return answer.status_code == 409 and "question_pool" in answer.text
    return answer.status_code < 300


@pytest.mark.parametrize(("method", "path", "body"), ENDPOINTS)
async def test_no_key_reaches_another_user(
    either: Store, bundles: dict[str, Path], method: str, path: str, body: dict[str, Any] | None
) -> None:
    from hydra_llm.store.values import Request, StoredResponse

    for user in ("ada", "bob"):
        either.add_records(user, records_of(user))
        either.add_job(f"job-{user}", user, "fit")
        content = {
            "candidates": [{"text": "a", "answer": "a", "votes": 1, "greedy": True}],
            "chosen": 0,
            "visible": 1,
        }
        either.add_request(Request(f"req_{user}", user, time.time(), "", "q", content))
        kept = {"input": [], "response": {"output": []}}
        response = StoredResponse(f"resp_{user}", user, time.time(), None, kept)
        either.add_response(response, version=None)
    keys = {
        "admin": make_key(either, admin=True)[1],
        "ada": make_key(either, users=["ada"])[1],
        "two": make_key(either, users=["ada", "x"])[1],
    }
    revoked, secret = make_key(either, users=["bob"])
    either.revoke_key(revoked.id)
    keys |= {
        "revoked": secret,
        "wrong": keys["ada"][:-1] + ("a" if keys["ada"][-1] != "a" else "b"),
        "none": "",
    }

    def filled(user: str) -> tuple[str, Any]:
        return path.replace("{user}", user), json.loads(json.dumps(body).replace("{user}", user))

    of_one_answer = path.startswith(("/v1/feedback", "/v1/responses/"))
    names_user = body is not None and "/users/" not in path and not of_one_answer
    names_user = names_user and path not in FOR_ADMINS
    of_nobody = body is None and path in OF_NOBODY
    async with running(either, bundles["tags"], candidates=2, passthrough="all") as world:
        for name, key in keys.items():
            headers = {"authorization": f"Bearer {key}"} if key else {}
            where, sent = filled("bob")
            # A job that still runs would change the user between the two exports.
            await async_until(lambda: not unfinished_jobs(either, "bob"))
            before = either.export_user("bob") if name != "admin" else None
            answer = await world.http.request(method, where, json=sent, headers=headers)
            if name == "admin":
                assert let_in(answer), answer.text
                either.add_records("bob", records_of("bob"))
                continue
            wanted = (404 if of_one_answer else 403) if name in ("ada", "two") else 401
            if (name == "ada" and names_user) or (name in ("ada", "two") and of_nobody):
                # as ada: the key's only user overrides the request's; models belong to no user,
                # and the list has the key's own users
                wanted = 200
                assert "bob" not in answer.text
            assert answer.status_code == wanted, (name, answer.text)
            now = either.export_user("bob")
            assert before is not None
            assert now is not None
            assert {k: v for k, v in now.items() if k != "jobs"} == {
                k: v for k, v in before.items() if k != "jobs"
            }
        if path in FOR_ADMINS:
            return
        where, sent = filled("ada")
        answer = await world.http.request(
            method, where, json=sent, headers={"authorization": f"Bearer {keys['ada']}"}
        )
        assert let_in(answer), answer.text


@pytest.mark.parametrize(("method", "path", "body"), ENDPOINTS)
async def test_any_key_is_valid_only_until_the_first_one_is_created(
    store: Store, method: str, path: str, body: dict[str, Any] | None
) -> None:
    """On loopback: whoever tries the program on a desk needs no key; from the first one on, only
    keys that were made open the door.
    """
    store.add_records("bob", records_of("bob"))
    store.add_job("job-bob", "bob", "fit")
    where, sent = (
        path.replace("{user}", "bob"),
        json.loads(json.dumps(body).replace("{user}", "bob")),
    )
    async with running(store) as world:
        for key in ("", "any", "hk-made-up"):
            answer = await world.http.request(
                method, where, json=sent, headers={"authorization": f"Bearer {key}"} if key else {}
            )
            assert answer.status_code not in (401, 403), answer.text
            store.add_records("bob", records_of("bob"))
        _, secret = make_key(store, admin=True)
        for key in ("", "any", "hk-made-up"):
            answer = await world.http.request(
                method, where, json=sent, headers={"authorization": f"Bearer {key}"} if key else {}
            )
            assert answer.status_code == 401
        answer = await world.http.request(
            method, where, json=sent, headers={"authorization": f"Bearer {secret}"}
        )
        assert answer.status_code not in (401, 403), answer.text


async def test_beyond_loopback_every_request_needs_a_key(store: Store) -> None:
    async with running(store, on_loopback=False) as world:
        assert (await world.ask(QUESTION)).status_code == 401
        assert (await world.http.get("/health/liveness")).status_code == 200
        assert (await world.http.get("/metrics")).status_code == 200


async def test_a_key_of_one_user_needs_no_name(store: Store) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store) as world:
        _, secret = make_key(store, users=["ada"])
        completion = await world.sdk(secret).chat.completions.with_raw_response.create(
            model="m", messages=[{"role": "user", "content": QUESTION}]
        )
        assert completion.headers["x-hydra-personalized"] == "true"
        with pytest.raises(openai.AuthenticationError):
            await world.sdk("hk-nope").models.list()
        named = await world.http.post(
            "/v1/chat/completions",
            json={"model": "m", "messages": [{"role": "user", "content": QUESTION}], "user": "bob"},
            headers={"authorization": f"Bearer {secret}"},
        )
        assert named.headers["x-hydra-personalized"] == "true", (
            "the key's user stands above what the request names"
        )
        _, of_two = make_key(store, users=["ada", "eve"])
        named_otherwise: list[dict[str, Any]] = [
            {"user": "bob"},
            {"safety_identifier": "bob"},
            {"metadata": {"user_id": "bob"}},
            {"extra_headers": {"x-hydra-user": "bob"}},
        ]
        for how in named_otherwise:
            with pytest.raises(openai.PermissionDeniedError):
                await world.sdk(of_two).chat.completions.create(
                    model="m", messages=[{"role": "user", "content": "x"}], **how
                )


@pytest.mark.slow
async def test_a_history_never_encoded_is_prefetched_at_first_answer(
    store: Store, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HYDRA_CACHE", str(tmp_path / "cache"))  # an empty one
    many = [
        Record("ada", f"r{i}", f"{word} number {i} of the sea", "calm")
        for i, word in enumerate(["storm", "whale", "boat"] * 30)
    ]
    store.add_records("ada", many)
    async with running(store, bundles["tags"], warm=False, candidates=3) as world:
        first = await world.ask(QUESTION)
        assert first.headers["x-hydra-personalized"] == "true"
        details = first.json()["personalization"]
        assert (details["candidates"], details["warm"]) == (1, False)
        assert (details["scores"], details["scores_reason"]) == ([None], "not-encoded")
        end = time.monotonic() + FOREVER
        while time.monotonic() < end:
            details = (await world.ask(QUESTION)).json()["personalization"]
            assert (details["candidates"] > 1) == details["warm"]
            if details["warm"]:
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError("the history is never warm")


@pytest.mark.parametrize(("gate", "encoded"), [("off", 0), ("always", 1)])
async def test_a_first_request_encodes_a_question_that_is_compared(
    store: Store,
    bundles: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    gate: str,
    encoded: int,
) -> None:
    monkeypatch.setenv("HYDRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Deployment, "prefetch", lambda self, user: None)
    many = [Record("ada", f"r{i}", f"storm number {i} of the sea", "calm") for i in range(60)]
    store.add_records("ada", many)
    async with running(store, bundles["tags"], warm=False, gate=gate) as world:
        deployment = world.app.state.gateway.deployment
        compares = deployment.pipeline.gate.reads_vectors
        await world.ask(QUESTION)
        assert deployment.features.misses == encoded * compares


async def test_a_deletion_amid_the_warming_leaves_no_features(
    store: Store, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HYDRA_CACHE", str(tmp_path / "cache"))
    records = [Record("ada", f"r{i}", f"storm number {i} of the sea", "calm") for i in range(60)]
    async with running(store, bundles["tags"], warm=False, candidates=2) as world:
        deployment = world.app.state.gateway.deployment
        sent = [{"id": r.id, "input": r.input, "output": r.output} for r in records]
        await world.http.post("/v1/users/ada/records", json={"records": sent})
        await world.ask(QUESTION)
        assert len(deployment.pipeline.retriever._kept) == 1
        assert (await world.http.delete("/v1/users/ada/records/r0")).status_code == 200
        assert (await world.http.delete("/v1/users/ada")).status_code == 200
        await async_until(lambda: not deployment.prefetching)
        await deployment.batcher.run(lambda: None, user="")
        texts = [text for text in texts_of(records) if text != "calm"]
        assert deployment.bundle.features.missing(texts) == len(texts)
        assert len(deployment.pipeline.retriever._kept) == 0


async def test_no_way_to_the_upstreams_other_paths(store: Store) -> None:
    """The server's own key must not open what the caller's does not."""
    import httpx2

    from hydra_llm.gateway.upstream import HttpUpstream

    requested = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        requested.append(request.url.raw_path.decode())
        return httpx2.Response(200, json={"id": "x"})

    async with running(store) as world:
        world.app.state.gateway.upstream = HttpUpstream(
            Endpoint("http://up/v1", "k"), timeout=1, transport=httpx2.MockTransport(answer)
        )
        for path in (
            "..%2Ffiles",
            "..%2f..%2Fadmin",
            "a%2F..%2F..%2Ffiles",
            ".%2Fx",
            "x%3Fq=1",
            "x%23y",
            "x%0ay",
            "%2F%2Fevil",
        ):
            answered = await world.http.get(f"/v1/models/{path}")
            assert answered.status_code in (200, 404, 502), path
        assert all(
            path.startswith("/v1/models/") and "?" not in path and ".." not in path
            for path in requested
        ), requested


async def test_a_label_bundle_leaves_other_conversations_alone(
    store: Store, bundles: dict[str, Path]
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], candidates=3, abstention_threshold=0) as world:
        world.upstream.rule = lambda body, index: f"A poem, version {index}: calm is the sea."
        answer = (await world.ask("Write a poem about the battle.")).json()
        assert answer["choices"][0]["message"]["content"].startswith("A poem, version 0")


async def test_an_accepted_answer_is_stored_verbatim(
    store: Store, bundles: dict[str, Path]
) -> None:
    store.add_records("ada", records_of("ada"))
    for bundle in (None, bundles["titles"]):
        async with running(store, bundle, candidates=2) as world:
            world.upstream.rule = lambda body, index: f"Sure!\n\ndef f():\n    return {index}"
            reply = (await world.ask(QUESTION)).json()
            text = reply["choices"][0]["message"]["content"]
            request = reply["personalization"]["request_id"]
            record = (
                await world.http.post("/v1/feedback", json={"request_id": request, "chosen": 0})
            ).json()["record"]
            assert {r.id: r.output for r in store.records("ada")[1]}[record] == text
            assert (await world.http.delete(f"/v1/users/ada/records/{record}")).status_code == 200
            assert store.request(request) is None, "nor can it come back by its request"


async def test_a_question_in_the_tasks_words_is_the_text_within_them(
    store: Store, bundles: dict[str, Path], tmp_path: Path
) -> None:
    """Scorers and records know inputs: an instruction around one would make all questions alike."""
    learned = Bundle.load(bundles["tags"])
    task = replace(learned.task, prompt="Which tag? text: {input}\nOne word.")
    replace(learned, task=task, versions={}).save(tmp_path / "asking")
    store.add_records("ada", records_of("ada"))
    explained = {"personalization": {"explain": True}}
    async with running(store, bundles["tags"], candidates=3) as world:
        plain = (await world.ask(QUESTION, **explained)).json()["personalization"]
    async with running(store, tmp_path / "asking", candidates=3) as world:
        within = (await world.ask(task.ask(QUESTION), **explained)).json()["personalization"]
        assert (within["records"], within["scores"]) == (plain["records"], plain["scores"])
        messages = world.upstream.bodies[0]["messages"]
        assert all(
            message["content"].startswith("Which tag? text: ")
            for message in messages
            if message["role"] == "user"
        )
        assert messages[-1]["content"] == task.ask(QUESTION), "the caller's own is as it was"
        reply = await world.http.post(
            "/v1/feedback", json={"request_id": within["request_id"], "edited": "odd"}
        )
        assert {r.id: r.input for r in store.records("ada")[1]}[reply.json()["record"]] == QUESTION
        other = await world.ask(QUESTION, **explained)
        assert not any(
            "Which tag?" in message["content"] for message in world.upstream.bodies[-1]["messages"]
        )
        assert other.headers["x-hydra-personalized"] == "true"


async def test_records_too_long_upstream_are_left_out_of_streams_too(store: Store) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store) as world:
        world.upstream.faults = [UpstreamError(400, "too long")]
        stream = await world.sdk().chat.completions.with_raw_response.create(
            model="m", messages=[{"role": "user", "content": QUESTION}], user="ada", stream=True
        )
        assert stream.headers["x-hydra-personalized"] == "false; reason=upstream-refused"
        assert len(world.upstream.bodies[-1]["messages"]) == 1


async def test_samples_that_are_refused_are_asked_for_otherwise(
    store: Store, bundles: dict[str, Path]
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], candidates=3) as world:
        refused = UpstreamError(400, "n is not supported")
        world.upstream.faults = [None, refused]
        await world.ask(QUESTION)
        world.upstream.bodies.clear()
        world.upstream.faults = [None, refused, refused]
        await world.ask(QUESTION)
        assert [body.get("temperature") for body in world.upstream.bodies] == [None, 0.5, 0.5]
        world.upstream.bodies.clear()
        await world.ask(QUESTION)
        assert [body.get("temperature") for body in world.upstream.bodies] == [None, None, None]
        assert not any("n" in body for body in world.upstream.bodies)


def test_a_steady_caller_is_not_starved(store: Store) -> None:
    from hydra_llm.gateway.middleware import RateLimiter
    from hydra_llm.gateway.schemas import ApiError

    now = 0.0
    rates, let_in, waits = RateLimiter(store, 60, clock=lambda: now), 0, set()
    for _ in range(600):  # two a second for five minutes, where one is allowed
        now += 0.5
        try:
            rates.check("k")
            let_in += 1
        except ApiError as error:
            waits.add(error.headers["retry-after"])
    assert 355 <= let_in <= 365, "the burst of a minute, and one a second"
    assert waits == {"1"}


@pytest.mark.slow
async def test_learning_from_the_store(either: Store, tmp_path: Path) -> None:
    for i in range(6):
        either.add_records(f"user{i}", records_of(f"user{i}"))
    task = {
        "name": "tags",
        "kind": "classification",
        "prompt": "{input}",
        "labels": list(TAGS.labels),
    }
    (tmp_path / "task.json").write_text(json.dumps(task))
    command = [
        "learn",
        "--store",
        str(either.url),
        "--llm",
        "fake:rule=labels",
        "--out",
        str(tmp_path / "bundle"),
    ]
    small = [
        f"--set={pair}"
        for pair in (
            "samples=3",
            "retrieved=3",
            "k=2",
            "max_length=32",
            f"cache={tmp_path / 'cache'}",
        )
    ]
    assert (
        await asyncio.to_thread(run, [*command, "--task", str(tmp_path / "task.json"), *small]) == 0
    )
    assert not holds(tmp_path / "bundle", b"user3")
    assert {name for name in names(tmp_path) if name.startswith("bundle")} == {"bundle"}, (
        "the LLM's answers quote users"
    )
    assert (
        await asyncio.to_thread(
            run, ["bundles", "use", str(tmp_path / "bundle"), "--store", str(either.url)]
        )
        == 0
    )
    async with running(either, candidates=3, abstention_threshold=0) as world:
        right = 0
        for i in range(6):
            for topic, texts in TOPICS.items():
                answer = (await world.ask(f"{texts[0]} told twice", f"user{i}")).json()
                right += answer["choices"][0]["message"]["content"] == tastes(f"user{i}")[topic]
        assert right >= 14, "heads that were learned with the base serve at once"
        deleted = (await world.http.delete("/v1/users/user3")).json()
        assert deleted["in_shared_base"] is True


async def test_a_body_in_chunks_is_cut_off_at_the_limit(store: Store) -> None:
    """Its length is unknown in advance: what is beyond the limit is not even read."""
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'{"model": "m", "messages": [{"role": "user", "content": "'
        while True:
            sent += 10_000
            yield b"x" * 10_000

    async with running(store, max_body_bytes=100_000) as world:
        for path in ("/v1/chat/completions", "/v1/users/ada/records"):
            sent = 0
            answer = await world.http.post(
                path, content=endless(), headers={"content-type": "application/json"}
            )
            assert answer.status_code == 413
            assert "more than 100000 bytes" in answer.json()["error"]["message"]
            assert sent <= 120_000
        assert (await world.ask("x" * 1000)).status_code == 200


async def test_body_size_and_request_rate_are_limited(store: Store) -> None:
    async with running(store, max_body_bytes=2048, requests_per_minute=3) as world:
        assert (await world.ask("x" * 3000)).status_code == 413
        codes = [(await world.ask("x")).status_code for _ in range(4)]
        assert codes[-1] == 429
        assert 200 in codes


@pytest.mark.slow
async def test_a_running_server_switches_to_another_bundle(
    store: Store, bundles: dict[str, Path]
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, candidates=3) as world:
        assert (await world.ask(QUESTION)).json()["personalization"]["candidates"] == 1
        assert (
            await asyncio.to_thread(
                run, ["bundles", "use", str(bundles["tags"]), "--store", str(store.url)]
            )
            == 0
        )
        end = time.monotonic() + FOREVER
        while time.monotonic() < end:
            codes = [
                answer.status_code
                for answer in await asyncio.gather(*(world.ask(QUESTION) for _ in range(5)))
            ]
            assert codes == [200] * 5
            if (await world.ask(QUESTION)).json()["personalization"][
                "candidates"
            ] == 3:  # switched, and ada's history is encoded
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError("it does not switch")


async def test_another_servers_write_is_seen_at_the_next_request(
    either: Store, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Store(str(either.url))
    either.add_records("ada", records_of("ada", 3))
    async with (
        running(either, bundles["tags"], candidates=2) as world,
        running(other, bundles["tags"], candidates=2) as second,
    ):
        first = (await world.ask(QUESTION, personalization={"k": 64})).json()["personalization"][
            "records"
        ]
        new = records_of("ada", 9)[3:]
        sent = [{"id": r.id, "input": r.input, "output": r.output} for r in new]
        await second.http.post("/v1/users/ada/records", json={"records": sent})
        assert (
            len(
                (await world.ask(QUESTION, personalization={"k": 64})).json()["personalization"][
                    "records"
                ]
            )
            == len(first) + 6
        )
        await fitted(second, "ada")
        deployment = world.app.state.gateway.deployment
        await world.ask(QUESTION)
        monkeypatch.setattr(either, "records", None)  # the user is in memory since that request
        assert "adapter" in deployment.users.current("ada").heads
    other.close()


@pytest.mark.llm
async def test_an_embedded_model_streams_token_by_token(store: Store) -> None:
    """The real SmolLM2 through the official SDK."""
    from hydra_llm.config import Settings
    from hydra_llm.gateway.embedded import EmbeddedUpstream
    from hydra_llm.llm.gguf import smollm2

    async with running(store) as world:
        llm = smollm2("", Settings())
        world.app.state.gateway.upstream = EmbeddedUpstream(llm)
        client, messages = (
            world.sdk(),
            [{"role": "user", "content": "Tell me of a fox and the moon."}],
        )
        stream = await client.chat.completions.create(
            model=llm.model,
            messages=messages,
            max_tokens=16,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        whole = await client.chat.completions.create(
            model=llm.model, messages=messages, max_tokens=16, temperature=0
        )
        assert (
            "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            == whole.choices[0].message.content
        )
        assert len(chunks) > 10
        assert chunks[-1].usage == whole.usage
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
        assert whole.choices[0].finish_reason == "length"
        tool: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
        with pytest.raises(openai.BadRequestError, match="reads text only"):
            await client.chat.completions.create(model=llm.model, messages=messages, tools=[tool])
        with pytest.raises(openai.BadRequestError, match="the context"):
            await client.chat.completions.create(
                model=llm.model, messages=[{"role": "user", "content": "fox " * 5000}], stream=True
            )
        await llm.aclose()


async def test_the_page_of_the_docs_loads_nothing_from_elsewhere(store: Store) -> None:
    async with running(store) as world:
        page = (await world.http.get("/docs")).text
        assert "https://" not in page
        for name in re.findall(r'(?:src|href)="([^"]+)"', page):
            assert (await world.http.get(name)).status_code == 200, name


# ---- regressions


async def test_a_key_of_two_users_is_never_bound_to_the_remaining_one(either: Store) -> None:
    for user in ("ada", "bob"):
        either.add_records(user, records_of(user))
    _, admin = make_key(either, admin=True)
    _, secret = make_key(either, users=["ada", "bob"])
    async with running(either) as world:
        headers = {"authorization": f"Bearer {admin}"}
        assert (await world.http.delete("/v1/users/ada", headers=headers)).status_code == 200
        with pytest.raises(openai.PermissionDeniedError):
            await world.sdk(secret).chat.completions.create(
                model="m", messages=[{"role": "user", "content": QUESTION}], user="ada"
            )
        body = {"model": "m", "messages": [{"role": "user", "content": QUESTION}]}
        unnamed = await world.http.post(
            "/v1/chat/completions", json=body, headers={"authorization": f"Bearer {secret}"}
        )
        assert unnamed.headers["x-hydra-personalized"] == "false; reason=no-user"


async def test_a_deleted_user_leaves_no_features_whatever_was_done(
    store: Store, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HYDRA_CACHE", str(tmp_path / "cache"))
    async with running(store, bundles["titles"], candidates=3) as world:
        deployment = world.app.state.gateway.deployment
        sent = [{"id": r.id, "input": r.input, "output": r.output} for r in records_of("ada")]
        await world.http.post("/v1/users/ada/records", json={"records": sent})
        await world.http.post(
            "/v1/users/ada/records",
            json={"records": [{**sent[0], "input": "another text altogether"}]},
        )
        await fitted(world, "ada")
        assert feature_count(tmp_path) > 0
        id = (await world.ask(QUESTION)).json()["personalization"]["request_id"]
        await world.http.post("/v1/feedback", json={"request_id": id, "edited": "calm at last"})
        await world.ask(QUESTION)
        assert (await world.http.delete("/v1/users/ada")).status_code == 200
        await deployment.batcher.run(lambda: None, user="")
        assert feature_count(tmp_path) == 0


def feature_count(folder: Path) -> int:
    """Features in the file."""
    with sqlite3.connect(folder / "cache" / "features.sqlite") as file:
        return int(file.execute("SELECT count(*) FROM features").fetchone()[0])


async def test_a_replaced_record_takes_its_heads_with_it(
    either: Store, bundles: dict[str, Path]
) -> None:
    either.add_records("ada", records_of("ada"))
    async with running(either, bundles["tags"]) as world:
        await fitted(world, "ada")
        bundle = world.app.state.gateway.deployment.id
        assert either.heads("ada", bundle)
        assert (
            await world.http.post(
                "/v1/users/ada/records",
                json={"records": [{"id": "r0", "input": "x", "output": "odd"}]},
            )
        ).json()["changed"] == 1
        assert not either.heads("ada", bundle)


async def test_requests_after_a_switch_of_bundles_are_answered(
    store: Store, bundles: dict[str, Path]
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], candidates=3) as world:
        gateway = world.app.state.gateway
        plain = world.upstream.complete

        async def slow(body: Any) -> Any:
            gateway.deployment.batcher.close()  # as when the old scorers' time is up
            return await plain(body)

        world.upstream.complete = slow  # type: ignore[method-assign]
        answer = await world.ask(QUESTION)
        assert answer.json()["choices"][0]["message"]["content"] == "calm"
        assert (await world.ask(QUESTION)).headers[
            "x-hydra-personalized"
        ] == "false; reason=overloaded"


async def test_a_user_deleted_while_old_scorers_answer_costs_no_answer(
    store: Store, bundles: dict[str, Path]
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], candidates=3) as world:
        gateway = world.app.state.gateway
        plain = world.upstream.complete

        async def slow(body: Any) -> Any:
            store.delete_user("ada")
            gateway.deployment.batcher.close()
            return await plain(body)

        world.upstream.complete = slow  # type: ignore[method-assign]
        answer = await world.ask(QUESTION)
        assert answer.status_code == 200
        assert answer.json()["personalization"]["request_id"] is None


async def test_a_bug_is_an_error_in_openais_shape_without_its_text(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quoted = "".join(
        ["a", "d", "a"]
    )  # a traceback shows lines of code, which may not name her here

    def broken(name: str, **_: Any) -> Any:
        raise RuntimeError(f"a bug with {name}'s texts, that is {quoted}'s")

    store.add_records("ada", records_of("ada"))
    async with running(store) as world:
        monkeypatch.setattr(store, "records", broken)
        answer = await world.http.get("/v1/users/ada/records")
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        monkeypatch.setattr(
            store, "records", lambda name, **_: (_ for _ in ()).throw(Overloaded("full"))
        )
        assert (await world.http.get("/v1/users/ada/records")).json()["error"][
            "code"
        ] == "overloaded"
    assert "RuntimeError" in caplog.text
    assert quoted not in caplog.text


async def test_logs_and_figures_hold_no_texts_no_keys_and_no_ids(
    store: Store, bundles: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    _, secret = make_key(store, users=["marmalade"])
    store.add_records("marmalade", records_of("marmalade"))
    async with running(store, bundles["tags"], candidates=3) as world:
        world.http.headers["authorization"] = f"Bearer {secret}"
        world.upstream.faults = [None, UpstreamError(500, "marmalade again")]
        answer = await world.ask("a question of rhubarb", None)
        assert answer.headers["x-hydra-personalized"] == "true"
        verdict = {"request_id": answer.json()["personalization"]["request_id"], "edited": "loud"}
        assert (await world.http.post("/v1/feedback", json=verdict)).status_code == 200
        await fitted(world, "marmalade")
        await world.http.post("/v1/chat/completions", content=b"rhubarb")
        figures = (await world.http.get("/metrics")).text
        assert (await world.http.delete("/v1/users/marmalade")).status_code == 200
    logs = "\n".join(
        record.getMessage() for record in caplog.records if record.name != "httpx2"
    )  # which is the client's too
    for word in ("marmalade", "rhubarb", "storm", secret, secret.split("-")[-1]):
        assert word not in logs
        assert word not in figures
    assert "candidates failed" in logs


async def test_usage_that_is_none_costs_no_answer(store: Store, bundles: dict[str, Path]) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["tags"], candidates=3) as world:
        plain = world.upstream.complete

        async def odd(body: Any) -> Any:
            return {
                **await plain(body),
                "usage": {"prompt_tokens": "many", "total_tokens": 3} if body.get("n") else "n/a",
            }

        world.upstream.complete = odd  # type: ignore[method-assign]
        assert (await world.ask(QUESTION)).json()["usage"] is None, "it is not known, and not 0"


def test_usage_of_several_completions_is_summed() -> None:
    """Cached and reasoning tokens have prices of their own."""
    one = {
        "prompt_tokens": 10,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 8, "audio_tokens": None},
        "total_tokens": 12,
    }
    other = {
        **one,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    odd = {**one, "prompt_tokens_details": "n/a", "completion_tokens_details": None}
    assert usage_of([{"usage": one}, {"usage": other}, {"usage": odd}]) == {
        "prompt_tokens": 30,
        "completion_tokens": 6,
        "total_tokens": 36,
        "prompt_tokens_details": {"cached_tokens": 9},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    assert usage_of([{"usage": one}]) == one
    for untold in ({}, {"usage": None}, {"usage": {"prompt_tokens": 3}}):
        assert usage_of([{"usage": one}, untold]) is None, "a sum with an unknown part is unknown"


async def test_a_users_header_may_be_utf_8(store: Store) -> None:
    store.add_records("zoë", records_of("zoë"))
    async with running(store) as world:
        body = {"model": "m", "messages": [{"role": "user", "content": QUESTION}]}
        answer = await world.http.post(
            "/v1/chat/completions", json=body, headers={"x-hydra-user": "zoë".encode()}
        )
        assert answer.headers["x-hydra-personalized"] == "true"


def test_capabilities_are_learned_per_model_and_expire() -> None:
    now = [0.0]
    known, fine, refused = (
        CapabilityCache(lambda: now[0]),
        {"choices": [{}]},
        UpstreamError(400, "no"),
    )
    sent = {"model": "a", "n": 3, "temperature": 1.0}
    learn_samples(known, {**sent, "seed": 1}, [fine, refused])  # the seed may be at fault
    learn_samples(known, sent, [refused, refused])
    learn_samples(known, sent, [fine, UpstreamError(500, "down")])
    learn_samples(known, sent, [fine])
    assert known.of("a") == Capabilities()
    learn_samples(known, sent, [fine, refused])
    assert (known.of("a").native_n, known.of("b").native_n) == (False, True)
    assert "temperature" not in known.of("a").refused
    learn_samples(known, {"model": "a", "temperature": 1.0}, [fine, fine, refused])
    assert "temperature" in known.of("a").refused
    now[0] = 601.0
    assert known.of("a") == Capabilities()
    learn_samples(known, sent, [fine, fine])  # one text of three
    assert known.of("a") == Capabilities(native_n=False)


def test_a_refusal_that_names_a_parameter_is_believed() -> None:
    known, sent = CapabilityCache(), {"model": "a", "n": 3, "temperature": 1.0}
    content = {"error": {"message": "Unsupported value: 'temperature'", "param": "temperature"}}
    learn_samples(known, sent, [{"choices": [{}]}, UpstreamError(400, content)])
    assert known.of("a") == Capabilities(refused=frozenset({"temperature"}))


def bare(path: str) -> str:
    """A path without its query."""
    return path.partition("?")[0]


async def test_every_endpoint_is_in_the_access_tests(store: Store) -> None:
    """Also those that the description of the API leaves out."""
    async with running(store) as world:
        served = {(way, re.sub(r"{[^}]+}", "*", path)) for way, path in endpoints(world.app)}
    tested = {
        (
            method,
            re.sub(r"(users|records|jobs|models|responses)/[^/]+", r"\1/*", bare(path)).replace(
                "other", "*"
            ),
        )
        for method, path, _ in ENDPOINTS
    }
    own = {(way, re.sub(r"{[^}]+}", "*", bare(path))) for way, path, _ in ADMIN_ENDPOINTS}
    assert own <= served
    assert ("POST", "/mcp") in served, "its tools have access tests of their own: test_mcp.py"
    elsewhere = ("/health", "/metrics", "/mcp")  # figures of no user need no key
    assert {
        endpoint for endpoint in served if not endpoint[1].startswith(elsewhere)
    } == tested | own


async def test_ids_may_hold_whatever_a_url_can_encode(store: Store) -> None:
    user, id = "org/ada 1%2F?#ü", "records/1/x?%"
    async with running(store) as world:
        place = f"/v1/users/{quote(user, safe='')}"
        sent = {"records": [{"id": id, "input": "a question", "output": "b"}]}
        assert (await world.http.post(f"{place}/records", json=sent)).json()["added"] == 1
        assert store.users() == [user]
        assert (await world.ask("a question", user)).headers["x-hydra-personalized"] == "true"
        assert [
            record["id"] for record in (await world.http.get(f"{place}/records")).json()["data"]
        ] == [id]
        assert (await world.http.get(f"{place}/export")).json()["user"] == user
        own = f"{place}/records/{quote(id, safe='')}"
        off = await world.http.put(f"{own}/personalization", json={"enabled": False})
        assert off.json() == {"user": user, "id": id, "enabled": False}
        assert (await world.http.delete(own)).status_code == 200
        assert (await world.http.delete(place)).json()["deleted"]["requests"] == 1
