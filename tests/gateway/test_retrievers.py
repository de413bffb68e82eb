"""The gateway's retrievers: vectors with and without a bundle, words until a history is encoded."""

import sys
from pathlib import Path

import pytest

from hydra_llm.config import load_settings
from hydra_llm.errors import MissingExtra, SettingsError
from hydra_llm.gateway.deployment import open_deployment
from hydra_llm.gateway.settings import ServeSettings, load_serve_settings
from hydra_llm.gateway.user_cache import TimedReads, texts_of
from hydra_llm.retrieve import Dense, Hybrid
from hydra_llm.store.store import Store
from hydra_llm.types import Record
from tests.waiting import async_until

from .conftest import World, records_of, running

pytestmark = pytest.mark.anyio
NEAR = Record("ada", "near", "my puppy sleeps on the sofa", "calm")
WORDS = Record("ada", "words", "which form is this", "calm")
QUESTION = "which dog is this"  # has words of the one, and means the other


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HYDRA_CACHE", str(tmp_path / "cache"))


async def first_record(world: World) -> str:
    details = (await world.ask(QUESTION)).json()["personalization"]
    return str(details["records"][0])


@pytest.mark.parametrize("bundle", [None, "tags"])
async def test_dense_searches_words_until_a_history_is_encoded(
    store: Store, bundles: dict[str, Path], bundle: str | None
) -> None:
    store.add_records("ada", [NEAR, WORDS, *records_of("ada")])
    folder = bundle and bundles[bundle]
    async with running(store, folder, warm=False, retriever="dense", k=1) as world:
        deployment = world.app.state.gateway.deployment
        assert isinstance(deployment.pipeline.retriever, Dense)
        assert deployment.searches_vectors
        if bundle is None:
            assert await first_record(world) == "words"
            await async_until(lambda: not deployment.prefetching)
            assert await first_record(world) == "near"
        texts = texts_of([NEAR])
        assert deployment.features.missing(texts) == (0 if bundle is None else len(texts))
        assert (await world.http.delete("/v1/users/ada")).status_code == 200
        assert deployment.features.missing(texts) == len(texts)


async def test_hybrid_takes_both(store: Store) -> None:
    store.add_records("ada", [NEAR, WORDS, *records_of("ada")])
    async with running(store, retriever="hybrid", k=2, warm=False) as world:
        deployment = world.app.state.gateway.deployment
        assert isinstance(deployment.pipeline.retriever, Hybrid)
        await world.ask(QUESTION)
        await async_until(lambda: not deployment.prefetching)
        details = (await world.ask(QUESTION)).json()["personalization"]
        assert set(details["records"]) == {"near", "words"}


def test_a_retriever_of_vectors_names_its_extra(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    settings = ServeSettings(retriever="dense")
    line = "the retriever 'dense' needs the extra 'learn' .*: pip install 'hydra-llm.learn.'"
    with pytest.raises(MissingExtra, match=line):
        open_deployment(store, TimedReads(1.0), None, settings, load_settings())


def test_an_unknown_retriever_suggests_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"serve.retriever.*did you mean 'dense'"):
        load_serve_settings(retriever="dens")
