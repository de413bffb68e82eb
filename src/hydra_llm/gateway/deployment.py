"""What requests are answered with: a bundle's pipeline, or BM25 alone without a bundle."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.gateway.batching import MicroBatcher
from hydra_llm.gateway.prefetch import Prefetcher
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.timed_reads import TimedReads
from hydra_llm.gateway.user_cache import UserCache
from hydra_llm.model.feature_cache import forget_features
from hydra_llm.model.scorer import Scorer
from hydra_llm.pipeline import Pipeline
from hydra_llm.retrieve import Forgetful, make_retriever
from hydra_llm.store.store import Store
from hydra_llm.tasks.base import Task
from hydra_llm.types import Record

ANY_TASK = Task("chat", "generation", "{input}")  # what is answered without a bundle
WITHOUT_BUNDLE = {"parsing": "strict", "prompt_style": "turns", "max_prompt_tokens": 4096}
"""Of a conversation's answer every line counts, and conversations are longer than tasks."""


@dataclass(frozen=True)
class Deployment:
    """A bundle at work; replaced as a whole when the bundle changes."""

    folder: str | None  # where the bundle lies; None where there is none
    id: str  # SHA-256 of its weights, to which heads belong; empty where there is none
    pipeline: Pipeline
    users: UserCache
    batcher: MicroBatcher
    scorers: Mapping[str, Scorer]
    bundle: Bundle | None = None
    prefetcher: Prefetcher | None = None  # where scoring needs a user's history encoded

    @property
    def task(self) -> Task:
        return self.pipeline.task

    @property
    def settings(self) -> Settings:
        return self.pipeline.settings

    @property
    def selects(self) -> bool:
        """Whether there is an adapter, so that several candidates are worth asking for."""
        return "adapter" in self.scorers

    def readable(self, records: tuple[Record, ...]) -> list[Record]:
        """The records that this bundle can read: with labels, those whose answer is one."""
        if self.task.free_history:
            return list(records)
        return [record for record in records if self.task.is_answer(record.output)]

    def forget(self, user: str) -> None:
        """Drop a user from memory; and every index, as none says whose it is."""
        self.users.drop(user)
        if isinstance(self.pipeline.retriever, Forgetful):
            self.pipeline.retriever.forget()

    def forget_texts(self, store: Store, texts: Sequence[str], *, but: str | None = None) -> int:
        """Delete the features of texts that nobody (but that one user) has; returns how many.

        Raises:
            UserFault: they cannot be deleted.
        """
        in_use = store.texts_in_use(texts, except_user=but)
        cache = self.settings.cache / "features.sqlite"
        forget = self.bundle.store.forget if self.bundle else partial(forget_features, cache)
        return forget([text for text in texts if text not in in_use])

    def close(self) -> None:
        """End the scoring thread."""
        self.batcher.close()


def named(folder: Path, weights: str) -> str:
    """How the store names a bundle: another one in the same folder has another name."""
    return f"{weights[:16]}:{folder}"


def folder_of(name: str) -> str:
    """The folder in a name that `named` gave."""
    return name.partition(":")[2]


def open_deployment(
    store: Store,
    reads: TimedReads,
    folder: str | Path | None,
    settings: ServeSettings,
    here: Settings,
) -> Deployment:
    """Load a bundle and serve a store's users with it. `here` has the settings that a bundle does
    not carry, such as the folder of features.

    Raises:
        BundleError: it is not there, damaged, or newer.
    """
    size, queue, overrides = settings.users_in_memory, settings.scoring_queue, _overrides(settings)
    if folder is None:
        chosen = here.model_copy(update=WITHOUT_BUNDLE | overrides)
        pipeline = Pipeline(ANY_TASK, make_retriever("bm25"), chosen)
        users = UserCache(store, None, size)
        return Deployment(None, "", pipeline, users, MicroBatcher(None, queue), {})
    loaded = Bundle.load(folder, here=here)
    chosen = loaded.settings.model_copy(update=overrides)
    # The bundle's own users are the store's like any others: the store's records and heads count.
    bundle = replace(loaded.without_people(str), settings=chosen)
    users, features = UserCache(store, bundle, size), bundle.store
    features.keep = False  # only the prefetcher writes features to disk: those of users' records
    pairs = features.pairs if chosen.features == "cross" else None
    batcher = MicroBatcher(features.texts, queue, pairs)
    tower = chosen.features == "tower"
    prefetcher = Prefetcher(store, reads, users, features, batcher) if tower else None
    parts = bundle.pipeline(), users, batcher, bundle.scorers
    return Deployment(str(folder), bundle.weights, *parts, bundle, prefetcher)


def _overrides(settings: ServeSettings) -> dict[str, Any]:
    """What the gateway's settings change of the bundle's; None and `auto` change nothing."""
    names = ("retrieved", "k", "temperature", "abstention_threshold", "max_prompt_tokens")
    chosen = {name: getattr(settings, name) for name in names}
    placement = None if settings.placement == "auto" else settings.placement
    chosen |= {"samples": settings.candidates, "prompt_style": placement}
    return {name: value for name, value in chosen.items() if value is not None}
