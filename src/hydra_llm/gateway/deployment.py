"""What requests are answered with: a bundle's pipeline, or BM25 alone without a bundle."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.gateway.batching import MicroBatcher
from hydra_llm.gateway.prefetch import Prefetcher
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.user_cache import TimedReads, UserCache
from hydra_llm.model.feature_cache import forget_features
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
    """A pipeline in use, with its users and scoring thread; replaced as a whole with the bundle."""

    pipeline: Pipeline
    users: UserCache
    batcher: MicroBatcher
    bundle: Bundle | None = None
    prefetcher: Prefetcher | None = None  # where scoring needs a user's history encoded

    @property
    def id(self) -> str:
        """SHA-256 of the bundle's weights, to which heads belong; empty without a bundle."""
        return self.bundle.weights if self.bundle else ""

    @property
    def task(self) -> Task:
        return self.pipeline.task

    @property
    def settings(self) -> Settings:
        return self.pipeline.settings

    def readable(self, records: Sequence[Record]) -> list[Record]:
        """The records that this bundle can read: with labels, those whose answer is one."""
        task = self.task
        return [record for record in records if task.free_history or task.is_answer(record.output)]

    def forget(self, user: str) -> None:
        """Drop a user from memory; and every index, as none says whose it is."""
        self.users.drop(user)
        if isinstance(self.pipeline.retriever, Forgetful):
            self.pipeline.retriever.forget()

    def forget_texts(self, store: Store, texts: Sequence[str], *, but: str | None = None) -> int:
        """Delete the features of texts that no other user (than `but`) has; returns how many.
        Raises `UserFault` if they cannot be deleted.
        """
        in_use = store.texts_in_use(texts, except_user=but)
        cache = self.settings.cache / "features.sqlite"
        forget = self.bundle.store.forget if self.bundle else partial(forget_features, cache)
        return forget([text for text in texts if text not in in_use])


def named(folder: Path, weights: str) -> str:
    """The store's name of a bundle: another one in the same folder has another name."""
    return f"{weights[:16]}:{folder}"


def folder_of(name: str) -> str:
    """The folder in a name that `named` returned."""
    return name.partition(":")[2]


def open_deployment(
    store: Store,
    reads: TimedReads,
    folder: str | Path | None,
    settings: ServeSettings,
    here: Settings,
) -> Deployment:
    """Load a bundle to answer a store's users with. `here` has the settings that a bundle does not
    carry, such as the folder of features. Raises `BundleError` if it is missing, damaged or newer.
    """
    names = {"retrieved", "k", "temperature", "abstention_threshold", "max_prompt_tokens"}
    overrides = settings.model_dump(include=names, exclude_none=True)
    if settings.candidates is not None:
        overrides["samples"] = settings.candidates
    if settings.placement != "auto":
        overrides["prompt_style"] = settings.placement
    size, queue = settings.users_in_memory, settings.scoring_queue
    if folder is None:
        chosen = here.model_copy(update=WITHOUT_BUNDLE | overrides)
        pipeline = Pipeline(ANY_TASK, make_retriever("bm25"), chosen)
        return Deployment(pipeline, UserCache(store, None, size), MicroBatcher(None, queue))
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
    return Deployment(bundle.pipeline(), users, batcher, bundle, prefetcher)
