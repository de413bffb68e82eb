"""What requests are answered with: a bundle's pipeline, or a retriever alone without a bundle."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from anyio.to_thread import run_sync

from hydra_llm.config import Settings
from hydra_llm.errors import HydraError, SettingsError
from hydra_llm.extras import require
from hydra_llm.gate import LexicalGate
from hydra_llm.gateway.batching import MicroBatcher
from hydra_llm.gateway.kept_fits import KeptFits
from hydra_llm.gateway.picture_cache import forget_too
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.user_cache import TimedReads, UserCache, UserSnapshot, texts_of
from hydra_llm.gateway.user_data import forget_unused
from hydra_llm.model.feature_cache import FeatureCache, forget_features
from hydra_llm.pipeline import Pipeline
from hydra_llm.retrieve import Forgetful, Retriever, make_retriever, needs_encoder
from hydra_llm.store.change import StaleVersion
from hydra_llm.store.store import Store
from hydra_llm.tasks.base import Task
from hydra_llm.types import Record

if TYPE_CHECKING:
    from hydra_llm.bundle import Bundle

ANY_TASK = Task("chat", "generation", "{input}")  # what is answered without a bundle
WITHOUT_BUNDLE = {"parsing": "strict", "prompt_style": "turns", "max_prompt_tokens": 4096}
WITHOUT_BUNDLE |= {"retriever": "bm25"}
"""Of a conversation's answer every line counts, and conversations are longer than tasks."""
RECORDS_AT_ONCE = 4  # whose features are written in one transaction
CHARACTERS_AT_ONCE = 300  # encoded in one go: about a hundredth of a second that requests wait


@dataclass(frozen=True, eq=False)
class Deployment:
    """A pipeline in use, with its users and scoring thread; replaced as a whole with the bundle.

    Where scoring needs a user's history encoded, that is done when no request waits, a few texts
    at a time. Vectors are written to disk in a transaction that locks the user: a deletion, by any
    server, comes before it, and then nothing is written, or after it, and then it removes them too.
    """

    store: Store
    reads: TimedReads
    pipeline: Pipeline
    users: UserCache
    batcher: MicroBatcher
    bundle: "Bundle | None" = None
    features: FeatureCache | None = None  # of the bundle, or of a retriever that needs an encoder
    searches_vectors: bool = False  # then BM25 searches until a user's history is encoded
    words: Retriever = field(default_factory=lambda: make_retriever("bm25"), init=False)
    fits: KeptFits = field(default_factory=KeptFits, init=False)
    prefetching: dict[str, asyncio.Task[None]] = field(default_factory=dict, init=False)  # by user

    @property
    def id(self) -> str:
        """SHA-256 of the bundle's weights, to which heads belong; empty without a bundle."""
        return self.bundle.weights if self.bundle else ""

    @property
    def private(self) -> bool:
        """Whether the LLM never sees a record."""
        return self.pipeline.settings.private

    @property
    def gate(self) -> str:
        """How questions are judged, for people."""
        mode = self.pipeline.settings.gate
        if mode == "off" or (self.bundle and self.bundle.gate):
            return mode
        if self.bundle is None:
            return f"{mode}, by words"
        why = self.bundle.report.get("gate", {}).get("skipped", "learn it again")
        return f"{mode}, by words (the bundle has none: {why})"

    def readable(self, records: Sequence[Record]) -> list[Record]:
        """The records that this bundle can read: with labels, those whose answer is one."""
        task = self.pipeline.task
        return [record for record in records if task.free_history or task.is_answer(record.output)]

    # ---- features of users' texts

    def prefetch(self, user: str) -> None:
        """Encode the user's records that have no features yet, in a task."""
        if self.features and self.users.need_features and user not in self.prefetching:
            encoding = self._prefetch(user, self.features)
            task = self.prefetching[user] = asyncio.create_task(encoding)
            task.add_done_callback(lambda _: self.prefetching.pop(user, None))

    async def _prefetch(self, name: str, features: FeatureCache) -> None:
        def write(user: UserSnapshot, texts: list[str]) -> None:
            with self.store.change(name, version=user.version):
                features.texts(texts, keep=True)

        start = 0
        with suppress(HydraError):  # the user's next request begins again
            while user := await self.reads.read(partial(self.users.current, name)):
                if not (texts := texts_of(user.records[start : start + RECORDS_AT_ONCE])):
                    return
                for part in _portions(texts):
                    encode = partial(features.texts, part, keep=False)
                    await self.batcher.run(encode, user=name, idle=True)
                with suppress(StaleVersion):  # the user has changed: read again
                    await run_sync(write, user, texts)
                    start += RECORDS_AT_ONCE

    async def forget(self, *users: str) -> None:
        """Drop what is in memory of users. When this returns, nothing more of them is encoded, and
        what the scoring thread had begun is done.
        """
        if tasks := {self.prefetching[user] for user in users if user in self.prefetching}:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)  # then what they had in the queue is cancelled too
        await self.batcher.run(partial(self.drop, *users), user="")

    def drop(self, *users: str) -> None:
        """Drop users from memory, and every index, as none says whose it is (scoring thread)."""
        self.users.drop(*users)
        self.fits.drop(*users)
        others = (own.retriever for own in self.pipeline.beside)
        learned = self.bundle.featurizer if self.bundle else None
        for part in (self.pipeline.retriever, *others, self.words, self.pipeline.gate, learned):
            if isinstance(part, Forgetful):
                part.forget()

    async def forget_removed(self) -> None:
        """Drop from memory whom another server has deleted or changed, and the features of texts
        that nobody has any more.
        """
        self.fits.clear()  # whose have changed is not known of all
        stale = await self.reads.read(self.users.stale)
        await self.forget(*(user.name for user in stale))
        if self.features:
            self.features.forget_passing()  # what deleted users have asked, and got
        if texts := [text for user in stale for text in texts_of(user.records)]:
            await run_sync(self.forget_texts, texts)

    def forget_texts(self, texts: Sequence[str], *, but: str | None = None) -> int:
        """Delete features of texts that only `but` has, if anyone: how many; else `UserFault`."""
        cache = self.pipeline.settings.cache / "features.sqlite"
        forget = self.features.forget if self.features else partial(forget_features, cache)
        return forget_unused(self.store, forget_too(cache.parent, forget), texts, but)


def _portions(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in parts of at most `CHARACTERS_AT_ONCE`, or of one text."""
    part, size = list[str](), 0
    for text in texts:
        if part and size + len(text) > CHARACTERS_AT_ONCE:
            yield part
            part, size = [], 0
        part.append(text)
        size += len(text)
    if part:
        yield part


def named(folder: Path, weights: str) -> str:
    """The store's name of a bundle: another one in the same folder has another name."""
    return f"{weights[:16]}:{folder}"


def folder_of(name: str) -> Path:
    """The folder in a name that `named` returned."""
    return Path(name.partition(":")[2])


def open_deployment(
    store: Store, reads: TimedReads, folder: Path | None, settings: ServeSettings, here: Settings
) -> Deployment:
    """Load a bundle to answer a store's users with. `here` has the settings that a bundle does not
    carry, such as the folder of features. Raises `BundleError` if it is missing, damaged or newer,
    `SettingsError` if there is none in private mode.
    """
    names = {"gate", "retriever", "retrieved", "k", "temperature", "abstention_threshold"}
    names |= {"max_prompt_tokens", "samples", "private", "mask"}
    here = with_precision(here, settings)
    overrides = settings.model_dump(include=names, exclude_none=True)
    if settings.placement != "auto":
        overrides["prompt_style"] = settings.placement
    if settings.private is None and here.private:
        overrides["private"] = True  # said for every command, or the bundle before was private
    if folder is None:
        chosen = here.model_copy(update=WITHOUT_BUNDLE | overrides)
        return _without_bundle(store, reads, chosen, settings)
    require("learn", f"the bundle {folder} (reranker and adapter)")
    from hydra_llm.bundle import Bundle
    from hydra_llm.model.onnx_encoder import use_onnx

    loaded = Bundle.load(folder, here=here)
    use_onnx(features := loaded.features)
    overrides["encoder_precision"] = here.encoder_precision  # also of the bundle after this one
    chosen = loaded.settings.model_copy(update=overrides)
    # The bundle's own users are the store's like any others: the store's records and heads count.
    served = features.encoder.precision  # feedback moves heads, and jobs fit them, by these vectors
    bundle = replace(loaded.without_people(str), settings=chosen, precision=served)
    features.keep = False  # only prefetching writes features to disk: those of users' records
    pairs = features.pairs if chosen.features == "cross" else None
    dense = needs_encoder(chosen.retriever)
    vectors = dense or chosen.features == "tower" or "dense" in chosen.candidate_prompts
    encoded = features if vectors else None
    users = UserCache(store, bundle, settings.users_in_memory, encoded)
    batcher = MicroBatcher(features.texts, settings.scoring_queue, pairs)
    return Deployment(store, reads, bundle.pipeline(), users, batcher, bundle, features, dense)


def with_precision(here: Settings, settings: ServeSettings) -> Settings:
    """`here` with the encoder's precision that the server is to have, if it names one."""
    precision = settings.encoder_precision
    if precision == "fastest":
        require("learn", "encoder_precision")
        from hydra_llm.model.precision import fastest

        precision = fastest()
    return here.model_copy(update={"encoder_precision": precision}) if precision else here


def _without_bundle(
    store: Store, reads: TimedReads, chosen: Settings, settings: ServeSettings
) -> Deployment:
    """Records in prompts, and no more."""
    if chosen.private:
        why = "without a bundle records can only be put into prompts"
        raise SettingsError(f"setting 'private': {why}: give --bundle")
    cache = open_features(chosen) if needs_encoder(chosen.retriever) else None
    embed = cache.texts if cache else None
    retriever = make_retriever(chosen.retriever, embed=embed, seed=chosen.seed)
    pipeline = Pipeline(ANY_TASK, retriever, chosen, gate=LexicalGate(embed))
    users = UserCache(store, None, settings.users_in_memory, cache)
    batcher = MicroBatcher(embed, settings.scoring_queue, None)
    return Deployment(store, reads, pipeline, users, batcher, None, cache, cache is not None)


def open_features(settings: Settings, what: str = "") -> FeatureCache:
    """The encoder of the settings, for a retriever or `what` without a bundle. `MissingExtra`
    without the extra `learn`.
    """
    require("learn", what or f"the retriever '{settings.retriever}'")
    from hydra_llm.model.encoder import open_encoder
    from hydra_llm.model.onnx_encoder import use_onnx

    encoder = open_encoder(settings.encoder, **settings.of_encoder)
    features = FeatureCache(encoder, settings.cache / "features.sqlite")
    features.keep = False  # as a bundle's
    use_onnx(features)
    return features
