"""A fit that is stopped: by the end of the server, or of the user."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import anyio.lowlevel
import pytest

from hydra_llm.config import load_settings
from hydra_llm.gateway.deployment import Deployment, open_deployment
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.spend import Ledger
from hydra_llm.gateway.store_training import Worker
from hydra_llm.gateway.telemetry import Telemetry
from hydra_llm.gateway.user_cache import TimedReads
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.llm.prices import load_prices
from hydra_llm.store.store import Store
from hydra_llm.types import Generation, Message, Record

from .conftest import anything, records_of


class FarAway(RuleLLM):
    """One that is waited for, so that a call can be taken back."""

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        await anyio.lowlevel.checkpoint()
        return await super().generate(messages, sampling)


@pytest.fixture
def deployment(
    store: Store, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Deployment]:
    monkeypatch.setenv("HYDRA_CONCURRENCY", "1")  # one question after the other
    opened = open_deployment(
        store, TimedReads(5.0), bundles["titles"], ServeSettings(), load_settings()
    )
    bundle = opened.bundle
    assert bundle is not None
    assert bundle.learned_with is not None
    assert bundle.word_model, "by histories alone a fit asks nothing"
    asking = bundle.learned_with.model_copy(update={"fit_labels": "llm"})
    yield replace(opened, bundle=replace(bundle, learned_with=asking))
    opened.batcher.close()


def calls_of_fit(
    store: Store, deployment: Deployment, first: Callable[[Worker], None], job_id: str = "fit"
) -> int:
    """How often a fit of ada asks the LLM, where something happens at the first time."""
    count = 0

    def rule(messages: Sequence[Message], index: int, rng: random.Random) -> str:
        nonlocal count
        if not count:
            first(worker)
        count += 1
        return anything(messages, index, rng)

    spent = sum(group.spend.calls for group in store.spend())  # by those who came before
    ledger = Ledger(store, load_prices(), Telemetry())
    worker = Worker(store, lambda: deployment, FarAway(rule), ledger)
    store.add_records("ada", records_of("ada"))
    store.add_job(job_id, "ada", "fit")
    job = store.claim_job()
    assert job is not None
    worker.run(job)
    ledger.flush()
    assert [group.by for group in store.spend("kind")] in ([], [{"kind": "job"}])
    calls = sum(group.spend.calls for group in store.spend()) - spent
    assert calls <= count, "a call that was taken back tells nothing"
    return count


def test_a_fit_of_a_user_who_is_deleted_asks_the_llm_no_more(
    store: Store, deployment: Deployment
) -> None:
    whole = calls_of_fit(store, deployment, lambda worker: None)
    deployment.fits.clear()
    job = store.job("ada", "fit")
    assert job is not None
    assert job.state == "done"
    store.delete_user("ada")
    assert deployment.bundle is not None
    before = len(deployment.bundle.features._passing), len(deployment.bundle.features._memory)
    assert (
        0
        < calls_of_fit(store, deployment, lambda worker: store.delete_user("ada") and None)
        <= whole / 2
    )
    assert store.job("ada", "fit") is None
    assert (
        (len(deployment.bundle.features._passing), len(deployment.bundle.features._memory))
        == before
        == (0, 0)
    ), "a fit has a memory of its own"


def test_a_fit_amid_which_the_server_ends_waits_for_the_next(
    store: Store, deployment: Deployment
) -> None:
    def end(worker: Worker) -> None:
        worker._ended = True

    assert calls_of_fit(store, deployment, end) > 0
    job = store.job("ada", "fit")
    assert job is not None
    assert (job.state, job.error) == ("waiting", "")


def test_a_fit_after_one_more_record_asks_for_that_alone(
    store: Store, deployment: Deployment
) -> None:
    """Until something of the user is deleted."""
    whole = calls_of_fit(store, deployment, lambda worker: None)
    store.add_records("ada", [Record("ada", "new", "a storm of the sea", "loud")])
    again = calls_of_fit(store, deployment, lambda worker: None, "second")
    assert deployment.bundle is not None
    queries = deployment.bundle.settings.queries_per_user
    assert queries > 1
    assert 0 < again * queries == whole
    assert store.heads("ada", deployment.id)["adapter"].known == len(store.records("ada")[1])
    assert deployment.fits.of("ada")
    deployment.drop("ada")
    assert not deployment.fits.of("ada")
    assert calls_of_fit(store, deployment, lambda worker: None, "third") == whole
