"""Equal question and answer make one record of a user, however often the answer is wanted."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydra_llm.store.store import Store
from hydra_llm.types import Record

from .conftest import World, records_of, running
from .test_gateway import fitted

pytestmark = pytest.mark.anyio
QUESTION = "the battle for the bridge in winter"


async def asked(world: World, question: str = QUESTION) -> str:
    answer = await world.ask(question)
    return str(answer.json()["personalization"]["request_id"])


async def say(world: World, request: str, **verdict: Any) -> dict[str, Any]:
    answer = await world.http.post("/v1/feedback", json={"request_id": request, **verdict})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def equal(store: Store, output: str, question: str = QUESTION) -> list[str]:
    records = store.records("ada", off_too=True)[1]
    return [own.id for own in records if (own.input, own.output) == (question, output)]


def head(world: World) -> np.ndarray:
    stored = world.store.heads("ada", world.app.state.gateway.deployment.id)["adapter"]
    return np.frombuffer(stored.delta, "<f4")


def feedback(store: Store) -> list[str]:
    return [own.request for own in store.unlearned_feedback("ada", or_learned=True)]


async def test_an_answer_that_is_rated_well_again_is_one_record(
    either: Store, bundles: dict[str, Path]
) -> None:
    """Every rating counts: the head goes on moving, at once and after a fit."""
    either.add_records("ada", records_of("ada"))
    async with running(either, bundles["tags"], candidates=3) as world:
        requests = [await asked(world) for _ in range(3)]
        ids, heads = [], []
        for request in requests:
            taken = await say(world, request, rating=1.0)
            assert taken["head_moved"]
            ids.append(taken["record"])
            heads.append(head(world))
        assert ids == [f"feedback:{requests[0]}"] * 3
        assert equal(either, "calm") == ids[:1]
        assert len(either.records("ada")[1]) == 21
        assert not any(np.array_equal(*pair) for pair in pairwise(heads))
        assert feedback(either) == requests
        assert (await say(world, requests[1], rating=1.0))["repeated"]
        await fitted(world, "ada")
        assert [own.request for own in either.unlearned_feedback("ada")] == requests[1:]
        other = await asked(world, "a sailor and his boat by night")
        assert (await say(world, other, rating=1.0))["record"] == f"feedback:{other}"


async def test_deleting_the_record_deletes_all_that_it_stands_for(
    either: Store, bundles: dict[str, Path]
) -> None:
    either.add_records("ada", [*records_of("ada"), Record("ada", "mine", QUESTION, "odd")])
    async with running(either, bundles["tags"], candidates=3) as world:
        requests = [await asked(world) for _ in range(4)]
        for request, said in zip(requests, ("calm", "calm", "odd", "loud"), strict=True):
            await say(world, request, edited=said)
        assert equal(either, "odd") == ["mine"], "a record that came in another way counts too"
        for id, left in ((f"feedback:{requests[0]}", requests[2:]), ("mine", requests[3:])):
            assert (await world.http.delete(f"/v1/users/ada/records/{id}")).status_code == 200
            assert feedback(either) == left
            assert not either.heads("ada", world.app.state.gateway.deployment.id)
        assert [bool(either.request(request)) for request in requests] == [False] * 3 + [True]
        changed = {"id": f"feedback:{requests[3]}", "input": "other", "output": "loud"}
        again = await asked(world)
        assert (await say(world, again, edited="loud"))["record"] == changed["id"]
        await world.http.post("/v1/users/ada/records", json={"records": [changed]})
        assert feedback(either) == [], "the record says something else now"


async def test_a_record_stays_for_the_feedback_that_is_left(
    either: Store, bundles: dict[str, Path]
) -> None:
    either.add_records("ada", records_of("ada"))
    async with running(either, bundles["tags"], candidates=3) as world:
        first, second, third = [await asked(world) for _ in range(3)]
        for request in (first, second, third):
            await say(world, request, edited="calm")
        assert (await say(world, first, edited="odd"))["record"] == f"feedback:{first}"
        assert equal(either, "calm") == [f"feedback:{second}"]
        assert (await say(world, second, rejected=True))["record"] is None
        assert equal(either, "calm") == [f"feedback:{third}"]
        assert (await say(world, third, edited="odd"))["record"] == f"feedback:{first}"
        assert equal(either, "calm") == []
        assert equal(either, "odd") == [f"feedback:{first}"]
        assert (await say(world, first, rejected=True))["record"] is None
        assert equal(either, "odd") == [f"feedback:{third}"]


async def test_a_record_that_is_off_stays_off(either: Store, bundles: dict[str, Path]) -> None:
    """The same answer wanted again makes no other record, and no head learns from it."""
    either.add_records("ada", records_of("ada"))
    async with running(either, bundles["tags"], candidates=3) as world:
        first, second, third = [await asked(world) for _ in range(3)]
        id = (await say(world, first, edited="calm"))["record"]
        await say(world, second, edited="calm")
        where = f"/v1/users/ada/records/{id}/personalization"
        await world.http.put(where, json={"enabled": False})
        bundle = world.app.state.gateway.deployment.id
        assert either.unlearned_feedback("ada", bundle=bundle) == []
        taken = await say(world, third, edited="calm")
        assert (taken["record"], taken["head_moved"]) == (id, False)
        assert either.off_records("ada") == {id}
        await world.http.put(where, json={"enabled": True})
        assert len(either.unlearned_feedback("ada", bundle=bundle)) == 3
