"""What answers are made with: a bundle's parts, or BM25 alone where there is no bundle. Replaced as
a whole when the bundle changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

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

ANY_TASK = Task("chat", "generation", "{input}")
"""What is answered where no bundle says more."""


@dataclass(frozen=True)
class Deployment:
    """A bundle at work."""

    folder: str | None
    """Where the bundle lies; None where there is none."""
    id: str
    """SHA-256 of its weights: heads belong to it. Empty where there is none."""
    pipeline: Pipeline
    people: UserCache
    together: MicroBatcher
    scorers: Mapping[str, Scorer]
    bundle: Bundle | None = None
    warming: Prefetcher | None = None
    """Where scoring needs a user's records encoded."""

    @property
    def task(self) -> Task:
        return self.pipeline.task

    @property
    def settings(self) -> Settings:
        return self.pipeline.settings

    @property
    def picks(self) -> bool:
        """Whether there is an adapter, so that several candidates are worth asking for."""
        return "adapter" in self.scorers

    def readable(self, records: tuple[Record, ...]) -> list[Record]:
        """The records that this bundle can read: with labels, those whose answer is one."""
        if self.task.free_history:
            return list(records)
        return [record for record in records if self.task.is_answer(record.output)]

    def forget(self, user: str) -> None:
        """Let go of all that is in memory of a user; of other users' indexes too, which nobody can
        tell from this one's.
        """
        self.people.drop(user)
        if isinstance(self.pipeline.retriever, Forgetful):
            self.pipeline.retriever.forget()

    def forget_texts(self, store: Store, texts: Sequence[str], *, but: str | None = None) -> int:
        """Forget the features of texts that nobody (but that one) has; those that others have stay,
        and their answers with them.

        Returns how many there were.

        Raises:
            UserFault: they cannot be deleted.
        """
        held = store.texts_in_use(texts, except_user=but)
        forget = (
            self.bundle.store.forget
            if self.bundle
            else partial(forget_features, self.settings.cache / "features.sqlite")
        )
        return forget([text for text in texts if text not in held])

    def close(self) -> None:
        """End the scoring thread."""
        self.together.close()


def named(folder: Path, weights: str) -> str:
    """How the store names a bundle: another one in the same folder is another one."""
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
    """Load a bundle and put it to work on a store's users. `here` tells what a bundle does not
    carry: the folder of features, say.

    Raises:
        BundleError: it is not there, damaged, or newer.
    """
    asked = {
        name: wanted
        for name in ("retrieved", "k")
        if (wanted := getattr(settings, name)) is not None
    }
    if folder is None:
        plain, people = (
            here.model_copy(update={"parsing": "strict", **asked}),
            UserCache(store, None, settings.users_in_memory),
        )
        pipeline = Pipeline(ANY_TASK, make_retriever("bm25"), plain)
        return Deployment(
            None, "", pipeline, people, MicroBatcher(None, settings.scoring_queue), {}
        )
    loaded = Bundle.load(folder, here=here)
    own = {"abstention_threshold": settings.abstention_threshold, **asked}
    chosen = loaded.settings.model_copy(update=own)
    # Whoever the bundle was learned with is a user of the store like any other: its records and
    # heads are the ones that count.
    bundle = replace(loaded.without_people(str), settings=chosen)
    people = UserCache(store, bundle, settings.users_in_memory)
    # Questions and answers come and go: of users' records alone something is kept in the file, by
    # warming.
    bundle.store.keep = False
    together = MicroBatcher(
        bundle.store.texts,
        settings.scoring_queue,
        bundle.store.pairs if chosen.features == "cross" else None,
    )
    warming = (
        Prefetcher(store, reads, people, bundle.store, together)
        if chosen.features == "tower"
        else None
    )
    return Deployment(
        str(folder),
        bundle.weights,
        bundle.pipeline(),
        people,
        together,
        bundle.scorers,
        bundle,
        warming,
    )
