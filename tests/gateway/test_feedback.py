"""Feedback on choices that are equal, and on requests that an earlier version kept."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydra_llm.bundle import Bundle
from hydra_llm.gateway.feedback import FITTED, heads_after, with_choices
from hydra_llm.store.store import Store
from hydra_llm.store.values import Request, StoredFeedback
from hydra_llm.tasks.base import Task
from hydra_llm.training.labelling import choice_groups
from hydra_llm.types import Choice

from .conftest import World, learn_bundle, records_of, running

pytestmark = pytest.mark.anyio

QUESTION = "the battle for the bridge in winter"
SCORES = {"calm": "1", "loud": "3", "odd": "5"}


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """A bundle for ratings by the same users."""
    task = Task("scores", "rating", "{input}", ("1", "2", "3", "4", "5"))
    learn_bundle(task, tmp_path / "numbers", SCORES)
    return tmp_path / "numbers"


async def choose(world: World, request: str, index: int) -> tuple[int, Any]:
    answer = await world.http.post("/v1/feedback", json={"request_id": request, "chosen": index})
    return answer.status_code, answer.json()


async def test_every_returned_choice_can_be_chosen(store: Store, bundles: dict[str, Path]) -> None:
    """Equal answers are one candidate; which of them was taken is kept as it was written."""
    store.add_records("ada", records_of("ada"))
    says = ["calm\nas ever", "loud", "calm\nat last"]
    async with running(store, bundles["titles"], candidates=3) as world:
        world.upstream.rule = lambda body, index: says[index]
        for index in range(3):
            reply = (await world.ask(QUESTION, n=3)).json()
            texts = [choice["message"]["content"] for choice in reply["choices"]]
            assert sorted(texts) == sorted(says)
            request = reply["personalization"]["request_id"]
            assert reply["personalization"]["candidates"] == 2
            status, taken = await choose(world, request, index)
            assert status == 200, taken
            assert {r.id: r.output for r in store.records("ada")[1]}[taken["record"]] == texts[
                index
            ]
        assert (await choose(world, request, 3))[0] == 400
        two = (await world.ask(QUESTION, n=2)).json()["personalization"]["request_id"]
        assert (await choose(world, two, 2))[0] == 400, "it was not shown"


async def test_feedback_with_another_time_corrects_it(
    store: Store, bundles: dict[str, Path]
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["titles"], candidates=3) as world:
        request = (await world.ask(QUESTION)).json()["personalization"]["request_id"]
        given = {"request_id": request, "edited": "<think>calm?</think>\nloud"}
        repeated = []
        for time_of_it in (None, "2020", "2020", 2021):
            body = {**given, "time": time_of_it}
            answer = await world.http.post("/v1/feedback", json=body)
            repeated.append(answer.json()["repeated"])
        assert repeated == [False, False, True, False]
        kept = {r.id: r for r in store.records("ada")[1]}[answer.json()["record"]]
        assert (kept.output, kept.time) == ("loud", "2021")


async def test_a_request_of_an_earlier_version_still_takes_feedback(
    store: Store, bundles: dict[str, Path]
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["titles"], candidates=3) as world:
        candidates = [
            {"said": text, "text": text, "answer": text, "votes": 1, "greedy": False, "score": 0.0}
            for text in ("calm", "loud")
        ]
        bundle = world.app.state.gateway.deployment.id
        store.add_request(
            Request(
                "req_old",
                "ada",
                time.time(),
                bundle,
                QUESTION,
                {"candidates": candidates, "visible": 3},
            )
        )
        assert (await choose(world, "req_old", 2))[0] == 400
        assert (await choose(world, "req_old", 1))[1]["record"]


def test_feedback_of_another_bundle_leaves_the_fitted_head(bundles: dict[str, Path]) -> None:
    bundle = Bundle.load(bundles["tags"])
    fitted = bundle.heads["adapter"][bundle.trained_on[0]]
    elsewhere = StoredFeedback("r1", 0.0, {"said": {}, "bundle": "another", "group": {"left": "?"}})
    nothing = StoredFeedback("r2", 0.0, {"said": {}, "bundle": bundle.weights, "group": None})
    for judged in ([], [elsewhere], [elsewhere, nothing]):
        heads = heads_after(bundle, "ada", {"adapter": fitted}, judged)
        assert heads == {FITTED: fitted, "adapter": fitted}


async def test_a_chosen_answer_is_an_imported_choice(
    store: Store, bundles: dict[str, Path]
) -> None:
    """The stored group is that of the same choice in a data set, but for the LLM's votes."""
    store.add_records("ada", records_of("ada"))
    says = ["calm", "loud", "odd"]
    async with running(store, bundles["titles"], candidates=3) as world:
        world.upstream.rule = lambda body, index: says[index]
        reply = (await world.ask(QUESTION, n=3)).json()
        await choose(world, reply["personalization"]["request_id"], 1)
    shown = tuple(choice["message"]["content"] for choice in reply["choices"])
    (judged,) = store.unlearned_feedback("ada", or_learned=True)
    assert judged.content["choice"] == {"candidates": list(shown), "chosen": shown[1]}
    records = with_choices(store.records("ada")[1], [judged])
    (choice,) = [record for record in records if isinstance(record, Choice)]
    assert (choice.input, choice.candidates, choice.chosen) == (QUESTION, shown, 1)
    featurizer = Bundle.load(bundles["titles"]).featurizer
    (group,) = choice_groups(featurizer, records)
    stored = judged.content["group"]
    assert stored["left"] == group.left
    assert stored["rights"] == group.rights
    assert stored["gains"] == group.gains == [0.0, 1.0, 0.0]
    assert stored["exact"]
    assert group.exact
    votes = [name in ("llm_votes", "llm_greedy") for name in featurizer.adapter_names]
    rows = np.array(stored["evidence"])
    assert rows[:, ~np.array(votes)] == pytest.approx(
        group.side_features[:, ~np.array(votes)], abs=1e-6
    )


async def test_an_answer_that_is_no_number_is_kept_unlearned(store: Store, numbers: Path) -> None:
    store.add_records("ada", [replace(r, output=SCORES[r.output]) for r in records_of("ada")])
    says = ["3", "no idea", "5"]
    async with running(store, numbers, candidates=3) as world:
        world.upstream.rule = lambda body, index: says[index % 3]
        told = []
        for given in ("chosen", "no idea", "9", "4"):
            reply = (await world.ask(QUESTION, n=3)).json()
            texts = [choice["message"]["content"] for choice in reply["choices"]]
            said = {"edited": given} if given != "chosen" else {"chosen": texts.index("no idea")}
            request = reply["personalization"]["request_id"]
            answer = await world.http.post("/v1/feedback", json={"request_id": request, **said})
            assert answer.status_code == 200, answer.text
            told.append(answer.json())
        assert [own["head_moved"] for own in told] == [False, False, False, True]
        kept = {record.id: record.output for record in store.records("ada")[1]}
        assert [kept[own["record"]] for own in told] == ["no idea", "no idea", "9", "4"]
        assert (await world.ask(QUESTION)).status_code == 200, "the records are left out"
