"""A record that is switched off is kept and shown, and nothing else knows it: prompts, searches and
heads are those of a user without it.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydra_llm.gateway.store_training import _dataset
from hydra_llm.store.change import FEEDBACK_ID
from hydra_llm.store.store import Store

from .conftest import TITLES, World, records_of, running
from .dashboard import answered, fill, visiting
from .test_gateway import fitted

pytestmark = pytest.mark.anyio
NOISE = 1e-5  # of numbers about 0.1: texts that are encoded in other batches
QUESTION = "the battle for the bridge in winter"


async def switch(world: World, id: str, enabled: bool, user: str = "ada") -> Any:
    where = f"/v1/users/{user}/records/{id}/personalization"
    return await world.http.put(where, json={"enabled": enabled})


def copy_of(store: Store, folder: Path) -> Store:
    """Another store with the same rows."""
    store.truncate_log()
    file = folder / "copy.db"
    shutil.copy(store.engine.url.database or "", file)
    return Store(f"sqlite:///{file}")


async def learned(world: World, requests: list[str]) -> list[Any]:
    """The user's heads after feedback, after a fit, and after more feedback."""
    bundle, out = world.app.state.gateway.deployment.id, list[Any]()
    for request in requests:
        body = {"request_id": request, "edited": "odd"}
        assert (await world.http.post("/v1/feedback", json=body)).status_code == 200
        out.append(world.store.heads("ada", bundle))
        await fitted(world, "ada")
        out.append(world.store.heads("ada", bundle))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("of_feedback", [False, True])
async def test_nothing_that_is_off_is_learned_or_used(
    store: Store, bundles: dict[str, Path], tmp_path: Path, of_feedback: bool
) -> None:
    """As if it had been deleted: the same prompts, and the same heads."""
    store.add_records("ada", records_of("ada"))
    settings = {"candidates": 3, "gate": "off"}
    async with running(store, bundles["titles"], **settings) as world:
        deployment = world.app.state.gateway.deployment
        asked = [
            (await world.ask(f"{QUESTION} {n}")).json()["personalization"]["request_id"]
            for n in range(3)
        ]
        await world.http.post("/v1/feedback", json={"request_id": asked[0], "edited": "loud"})
        await fitted(world, "ada")
        assert store.heads("ada", deployment.id)
        id = f"{FEEDBACK_ID}{asked[0]}" if of_feedback else "r3"
        other = copy_of(store, tmp_path)
        assert (await switch(world, id, False)).json() == {
            "user": "ada",
            "id": id,
            "enabled": False,
        }
        assert not store.heads("ada", deployment.id), "what was learned from it is forgotten"
        assert id not in {record.id for record in store.records("ada")[1]}
        one = await world.ask(QUESTION), world.upstream.bodies[-1]["messages"]
        off = await learned(world, asked[1:])
        assert id not in {record.id for record in _dataset(store, TITLES)[1].history("ada")}
    async with running(other, bundles["titles"], **settings) as world:
        assert (await world.http.delete(f"/v1/users/ada/records/{id}")).status_code == 200
        two = await world.ask(QUESTION), world.upstream.bodies[-1]["messages"]
        without = await learned(world, asked[1:])
    other.close()
    assert one[1] == two[1]
    assert all(answer.headers["x-hydra-personalized"] == "true" for answer in (one[0], two[0]))
    # Before the next fit a deletion does not take other feedback up again, as the switch does.
    begin = 0 if of_feedback else 1
    for one, other in zip(off[begin:], without[begin:], strict=True):
        assert one.keys() == other.keys()
        for scorer, head in one.items():
            same = other[scorer]
            assert (head.known, head.until) == (same.known, same.until)
            numbers, others = (np.frombuffer(own.delta, "<f4") for own in (head, same))
            assert np.abs(numbers - others).max() < NOISE, scorer


async def test_a_record_is_found_again_when_it_is_on(either: Store) -> None:
    either.add_records("ada", records_of("ada"))
    async with running(either) as world:

        async def used() -> tuple[bool, bool, bool]:
            """Whether an answer, a search and the list have it."""
            answer = await world.ask(mark, personalization={"explain": True, "k": 5})
            found = await world.http.post("/v1/users/ada/search", json={"query": mark})
            kept = (await world.http.get("/v1/users/ada/records")).json()["data"]
            ids = [record["id"] for record in found.json()["data"]]
            in_prompt = "marmalade" in str(world.upstream.bodies[-1]["messages"][:-1])
            assert answer.status_code == 200
            return in_prompt, "x" in ids, any(record["id"] == "x" for record in kept)

        mark = "marmalade on toast at the harbour"
        body = {"id": "x", "input": mark, "output": "calm"}
        await world.http.post("/v1/users/ada/records", json={"records": [body]})
        assert await used() == (True, True, True)
        for _ in range(2):  # twice is once
            assert (await switch(world, "x", False)).status_code == 200
            assert await used() == (False, False, True)
        listed = (await world.http.get("/v1/users/ada/records")).json()["data"]
        assert [own["id"] for own in listed if not own.get("enabled", True)] == ["x"]
        profile = (await world.http.get("/v1/users/ada")).json()
        assert profile["counts"]["records"] == 21
        assert (await switch(world, "x", True)).json()["enabled"]
        assert await used() == (True, True, True)


async def test_the_switch_goes_with_the_record(either: Store) -> None:
    """It stays through changes and a second import, is in the export, and ends with the record."""
    either.add_records("ada", records_of("ada"))
    async with running(either) as world:
        await switch(world, "r3", False)
        listed = (await world.http.get("/v1/users/ada/records")).json()["data"]
        changed = [{**own, "output": "odd"} for own in listed]
        counts = await world.http.post("/v1/users/ada/records", json={"records": changed})
        assert counts.json()["changed"] > 0
        assert either.off_records("ada") == {"r3"}
        exported = (await world.http.get("/v1/users/ada/export")).json()["records"]
        assert [own["id"] for own in exported if own["off"]] == ["r3"]
        # what is listed can be sent to another user or server, with its switches
        listed = (await world.http.get("/v1/users/ada/records")).json()["data"]
        await world.http.post("/v1/users/bob/records", json={"records": listed})
        assert (await world.http.get("/v1/users/bob/records")).json()["data"] == listed
        on = [{**own, "enabled": True} for own in listed]
        await world.http.post("/v1/users/bob/records", json={"records": on})
        assert not either.off_records("bob")
        assert (await world.http.delete("/v1/users/ada/records/r3")).status_code == 200
        assert either.records("ada", off_too=True)[1] == either.records("ada")[1]


async def test_all_records_may_be_off(either: Store) -> None:
    either.add_records("ada", records_of("ada", 2))
    async with running(either) as world:
        for id in ("r0", "r1"):
            await switch(world, id, False)
        assert either.records("ada")[0] is not None
        answer = await world.ask(QUESTION)
        assert answer.headers["x-hydra-personalized"] == "false; reason=no-history"
        found = await world.http.post("/v1/users/ada/search", json={"query": QUESTION})
        assert found.json()["data"] == []
        # the limit counts them too
        assert len((await world.http.get("/v1/users/ada/records")).json()["data"]) == 2


@pytest.mark.parametrize(("user", "id"), [("ada", "none"), ("nobody", "r1"), ("ada", "a/b")])
async def test_a_record_that_is_not_there_is_not_switched(
    either: Store, user: str, id: str
) -> None:
    either.add_records("ada", records_of("ada"))
    async with running(either) as world:
        answer = await switch(world, id, False, user)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "record_not_found"
        for wrong in ({}, {"enabled": "no"}, {"enabled": None}):
            where = "/v1/users/ada/records/r1/personalization"
            assert (await world.http.put(where, json=wrong)).status_code == 400


async def test_feedback_on_an_answer_whose_record_is_off(
    store: Store, bundles: dict[str, Path]
) -> None:
    """It corrects the record, which stays off; a rejection removes it, and is learned."""
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles["titles"], candidates=3) as world:
        request = (await world.ask(QUESTION)).json()["personalization"]["request_id"]

        async def say(**verdict: Any) -> Any:
            body = {"request_id": request, **verdict}
            return (await world.http.post("/v1/feedback", json=body)).json()

        id = (await say(edited="loud"))["record"]
        await switch(world, id, False)
        assert not (await say(edited="odd"))["head_moved"]
        assert store.some_records("ada", [id])[id].output == "odd"
        assert store.off_records("ada") == {id}
        assert (await say(rejected=True))["head_moved"]
        assert not store.some_records("ada", [id])
        assert (await say(edited="odd"))["record"] == id
        assert not store.off_records("ada"), "a new record is on"


async def test_a_record_is_switched_on_the_page(store: Store) -> None:
    keys = fill(store)
    store.add_request(answered("req_x", "ada", question="marmalade"))
    async with running(store, dashboard=True) as world, visiting(world, keys["ada"]) as visitor:
        page = await visitor.get("/records")
        assert page.text.count("Switch off<") == 20
        answer = await visitor.post("/records/switch", id="r44", enabled="no")
        assert answer.headers["location"] == "/ui/records?user=ada&done=record-off"
        page = await visitor.get("/records?done=record-off")
        assert "no answer uses it" in page.text
        assert (page.text.count("Switch on<"), page.text.count(">off</span>")) == (1, 1)
        assert store.off_records("ada") == {"r44"}
        assert (await visitor.get("/records/edit?id=r44")).status_code == 200
        assert (await visitor.post("/records/switch", id="none")).status_code == 404
        await visitor.post("/records/switch", id="r44", enabled="yes")
        assert not store.off_records("ada")
