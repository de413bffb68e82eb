"""Encode the texts of histories before they are needed, with progress and the time that remains:
else minutes pass without a word. Knows no users and no LLM.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from hydra_llm.bundle import Bundle
from hydra_llm.llm.concurrency import StageProgress
from hydra_llm.model.encoder import Encoder
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.rerank import record_text
from hydra_llm.tasks.base import Task
from hydra_llm.tasks.choices import choices_of
from hydra_llm.training.engine import Engine, open_engine
from hydra_llm.types import Record

STAGE = "encode texts"
AT_ONCE = 1024  # texts that are kept together: a stopped run loses no more


def encode_ahead(
    features: FeatureCache, texts: Iterable[str], progress: StageProgress, engine: str = "local"
) -> None:
    """Encode those of the texts that are not kept, by an engine; nothing where they would not be
    kept.
    """
    distinct = list(dict.fromkeys(texts))
    if not features.holds(len(distinct)) or not features.missing(distinct):
        return
    if (spread := open_engine(engine)).spreads:
        _encode_apart(spread, features, distinct, progress)
        return
    before, kept = features.progress, 0

    def report(done: int, total: int) -> None:
        progress(STAGE, kept + done, len(distinct))

    try:
        features.progress = report
        for start in range(0, len(distinct), AT_ONCE):
            kept = start
            report(0, 0)
            features.texts(distinct[start : start + AT_ONCE])
    finally:
        features.progress = before
    progress(STAGE, len(distinct), len(distinct))


def _encode_apart(
    engine: Engine, features: FeatureCache, distinct: Sequence[str], progress: StageProgress
) -> None:
    """The same by workers: they get the same batches, and this process keeps the vectors."""
    starts = range(0, len(distinct), AT_ONCE)
    parts = [features.absent(distinct[start : start + AT_ONCE]) for start in starts]
    done = len(distinct) - sum(map(len, parts))
    progress(STAGE, done, len(distinct))
    parts = list(filter(None, parts))
    for part, vectors in zip(parts, engine.each(_encoded, features.encoder, parts), strict=True):
        features.add(part, vectors)
        done += len(part)
        progress(STAGE, done, len(distinct))


def _encoded(encoder: Encoder, texts: Sequence[str]) -> NDArray[np.floating]:
    return encoder.encode(texts)


def encode_histories(
    bundle: Bundle, records: Sequence[Record], progress: StageProgress, *, ranks: bool
) -> None:
    """Encode what a bundle's stages read of records. `ranks`: whether a reranker is among them."""
    if not records:
        return
    texts = vectorized(bundle.task, records)
    if ranks and bundle.settings.features == "tower":
        answers = bundle.settings.record_answer
        texts += [record_text(record, with_answer=answers) for record in records]
    encode_ahead(bundle.features, texts, progress, bundle.settings.engine)


def vectorized(task: Task, records: Sequence[Record]) -> list[str]:
    """The texts whose vectors the task's side features compare."""
    texts = list[str]()

    def collect(some: Sequence[str]) -> NDArray[np.floating]:
        texts.extend(some)
        return np.zeros((len(some), 1))

    task.strategy.vectorize(records, collect)
    offered = [] if task.labels else choices_of(records)
    return texts + [text for choice in offered for text in choice.candidates]
