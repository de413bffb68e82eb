"""What was deleted stays deleted, whatever was under way or waited at that moment."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.gateway.batching import MicroBatcher
from hydra_llm.gateway.user_cache import texts_of
from hydra_llm.store.store import Store
from hydra_llm.types import Record
from tests.waiting import FOREVER, async_until

from .conftest import World, running

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def own_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A features file of its own, empty."""
    monkeypatch.setenv("HYDRA_CACHE", str(tmp_path / "cache"))


@asynccontextmanager
async def busy(together: MicroBatcher, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """A scoring thread that never has time for what is for later."""
    monkeypatch.setattr("hydra_llm.gateway.batching.IDLE_SECONDS", 1e9)
    ended = False

    async def ask() -> None:
        while not ended:
            await together.run(partial(time.sleep, 0.01), user="")

    asking = [asyncio.create_task(ask()) for _ in range(3)]
    yield
    ended = True
    await asyncio.gather(*asking)


def storms(count: int) -> list[Record]:
    return [
        Record("ada", f"r{i}", f"storm number {i} of the sea", f"loud {i}") for i in range(count)
    ]


async def send(world: World, records: list[Record]) -> None:
    sent = [{"id": r.id, "input": r.input, "output": r.output} for r in records]
    assert (
        await world.http.post("/v1/users/ada/records", json={"records": sent})
    ).status_code == 200


def feature_count(folder: Path) -> int:
    """Features in the file."""
    with sqlite3.connect(folder / "cache" / "features.sqlite") as file:
        return int(file.execute("SELECT count(*) FROM features").fetchone()[0])


async def test_a_request_in_flight_restores_no_deleted_features(
    store: Store, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its candidates come, and are scored, after the deletion."""
    bob = [Record("bob", "b0", "storm number 1 of the sea", "loud 1")]
    store.add_records("bob", bob)
    async with running(store, bundles["titles"], candidates=2) as world:
        features = world.app.state.gateway.deployment.bundle.features
        of_bob = set(features._passing)
        await send(world, storms(6))
        await async_until(lambda: not world.app.state.gateway.deployment.prefetching)
        reached, deleted, complete = asyncio.Event(), asyncio.Event(), world.upstream.complete

        async def late(body: Mapping[str, Any]) -> Any:
            reached.set()
            await deleted.wait()
            return await complete(body)

        monkeypatch.setattr(world.upstream, "complete", late)
        asking = asyncio.create_task(world.ask("a question of the deep"))
        await asyncio.wait_for(reached.wait(), FOREVER)
        assert (await world.http.delete("/v1/users/ada")).status_code == 200
        deleted.set()
        reply = await asking
        assert reply.status_code == 200
        assert reply.headers["x-hydra-personalized"] == "true", "it had begun before"
        answer = reply.json()["choices"][0]["message"]["content"]
        texts = [text for text in texts_of(storms(6)) if text not in texts_of(bob)]
        assert features.missing([*texts, "a question of the deep", answer]) == len(set(texts)) + 2
        assert features.missing(texts_of(bob)) == 0, "what another user has stays"
        assert set(features._passing) <= of_bob


@pytest.mark.parametrize("how", ["the user", "a record", "a record's text"])
async def test_a_deletion_while_the_warming_waits_leaves_no_features(
    store: Store,
    bundles: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    how: str,
) -> None:
    records = storms(6)
    async with running(store, bundles["titles"], warm=False, candidates=2) as world:
        deployment = world.app.state.gateway.deployment
        async with busy(deployment.batcher, monkeypatch):
            await send(world, records)
            await async_until(lambda: bool(deployment.batcher._later))
            if how == "the user":
                assert (await world.http.delete("/v1/users/ada")).status_code == 200
            elif how == "a record":
                assert (await world.http.delete("/v1/users/ada/records/r0")).status_code == 200
            else:
                await send(world, [Record("ada", "r0", "a calm at last", "calm")])
        await async_until(lambda: not world.app.state.gateway.deployment.prefetching)
        await deployment.batcher.run(lambda: None, user="")
        gone = texts_of(records if how == "the user" else records[:1])
        assert deployment.bundle.features.missing(gone) == len(gone)
        if how == "the user":
            assert feature_count(tmp_path) == 0


async def test_no_server_writes_features_of_a_user_deleted_on_another(
    store: Store, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two servers, one store and one features file: the other's queue is out of reach."""
    other = Store(str(store.url))
    async with (
        running(store, bundles["titles"]) as world,
        running(other, bundles["titles"], warm=False) as second,
    ):
        deployment = second.app.state.gateway.deployment
        async with busy(deployment.batcher, monkeypatch):
            await send(second, storms(6))
            await async_until(lambda: bool(deployment.batcher._later))
            assert (await world.http.delete("/v1/users/ada")).status_code == 200
        await async_until(lambda: not deployment.prefetching)
        assert feature_count(tmp_path) == 0
    other.close()


async def test_what_changes_amid_the_warming_is_warmed_too(
    store: Store, bundles: dict[str, Path], tmp_path: Path
) -> None:
    async with running(store, bundles["titles"], warm=False) as world:
        for place in range(0, 12, 2):
            await send(world, storms(12)[place : place + 2])
        await async_until(lambda: not world.app.state.gateway.deployment.prefetching)
        assert feature_count(tmp_path) == len(set(texts_of(storms(12))))


async def test_a_deletion_reports_the_number_of_deleted_features(
    store: Store, bundles: dict[str, Path], tmp_path: Path
) -> None:
    async with running(store, bundles["titles"], warm=False) as world:
        await send(world, storms(6))
        await async_until(lambda: not world.app.state.gateway.deployment.prefetching)
        count = feature_count(tmp_path)
        assert count == 18
        assert (await world.http.delete("/v1/users/ada")).json()["deleted"]["features"] == count
    async with running(store) as world:
        await send(world, storms(1))
        assert (await world.http.delete("/v1/users/ada")).json()["deleted"]["features"] == 0


def in_store(file: Path, needle: bytes) -> bool:
    """Whether these bytes are in SQLite's file, or in its log."""
    return any(needle in path.read_bytes() for path in file.parent.glob(f"{file.name}*"))


@pytest.mark.slow
async def test_a_reader_that_blocks_sqlites_checkpoint_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(f"sqlite:///{tmp_path / 'read.db'}", timeout=1.0)
    async with running(store) as world:
        for reading in (True, False):
            await send(world, storms(3))
            with store.reading() if reading else nullcontext() as reader:
                if reader is not None:
                    reader.exec_driver_sql("SELECT count(*) FROM records")
                # 503: a checkpoint in the background, which waits for the reader, blocks writers.
                while (answer := await world.http.delete("/v1/users/ada")).status_code == 503:
                    continue
            report = answer.json()
            assert report["deleted"]["records"] == 3
            assert ("warning" in report) is reading
            assert in_store(tmp_path / "read.db", b"storm number") is reading
    store.close()
    assert caplog.text.count("after a deletion") == 1
    assert "storm" not in caplog.text
