"""Side features: what is known of a pair beside its text, from records that the query may see and
the LLM's votes. The task kind (`tasks/`) has its own columns. Knows no scorer and no LLM.
Letters: C candidates, M records, E columns.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from cachetools import FIFOCache

from hydra_llm.history import in_order, span_of
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.word_model import WordModel
from hydra_llm.tasks import choices
from hydra_llm.tasks.base import (
    CohortStats,
    FeatureContext,
    Floats,
    HistoryVectors,
    Task,
    WordShares,
)
from hydra_llm.types import Candidate, Choice, Query, Ranked, Record
from hydra_llm.word_counts import OwnWords, UserWords

KEPT_CHOICES = 20_000  # as numbers, in memory
STATS_USERS, STATS_RECORDS = 200, 200  # the usual cosine is measured on their latest records


class Featurizer:
    """Makes the side features of both scorers for one task."""

    def __init__(
        self,
        task: Task,
        features: FeatureCache,
        stats: CohortStats,
        word_model: WordModel | None = None,
        word_models: Mapping[str, WordModel] | None = None,
    ):
        """`word_models`: those that have not seen a training user, by user, while learning."""
        self.task, self.features, self.stats = task, features, stats
        self.word_model, self._word_models = word_model, word_models or {}
        self._own_words = OwnWords()
        self._past: FIFOCache[Choice, choices.PastChoice] = FIFOCache(KEPT_CHOICES)

    def __reduce__(self) -> tuple[Any, ...]:  # another process counts and keeps its own
        models = self.word_model, self._word_models
        return Featurizer, (self.task, self.features, self.stats, *models)

    def vectorize(self, records: Sequence[Record]) -> HistoryVectors:
        """Visible records as vectors; `Context.vectors` carries them through one question."""
        return self._completed(self._rows(records), records, self._past_choices(records))

    def of_pasts(self, records: Sequence[Record]) -> Callable[[Sequence[Record]], HistoryVectors]:
        """`vectorize` of a user's pasts: one array serves all that these records begin with."""
        whole = tuple(records)

        @cache
        def arrays() -> tuple[HistoryVectors, choices.PastChoices | None]:
            return self._rows(whole), self._past_choices(whole)

        def vectorize(visible: Sequence[Record]) -> HistoryVectors:
            rows, past = arrays()
            known = rows.places is not None or len(rows) == len(whole)  # whose row is which
            if not known or whole[: len(visible)] != tuple(visible):
                return self.vectorize(visible)
            return self._completed(rows.first(len(visible)), visible, past)

        return vectorize

    def _rows(self, records: Sequence[Record]) -> HistoryVectors:
        return self.task.strategy.vectorize(records, self.features.texts)

    def _past_choices(self, records: Sequence[Record]) -> choices.PastChoices | None:
        if not self.stats.choices:
            return None
        return choices.PastChoices([self._past_choice(own) for own in choices.choices_of(records)])

    def _completed(
        self, rows: HistoryVectors, records: Sequence[Record], past: choices.PastChoices | None
    ) -> HistoryVectors:
        """The rows of the records with the counts of their words and what their choices say."""
        if self.word_model is not None:
            rows = replace(rows, counts=self._own_words.of(records))
        if past is not None:
            rows = replace(rows, habits=past.first(len(choices.choices_of(records))))
        return rows

    def _past_choice(self, choice: Choice) -> choices.PastChoice:
        if choice not in self._past:
            self._past[choice] = choices.past_choice(choice, self.features.texts)
        return self._past[choice]

    def forget(self) -> None:
        """Drop what was made of users' records."""
        self._own_words.forget()
        self._past.clear()

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The columns of `adapter`; `llm_` marks those that need the LLM's samples."""
        strategy = self.task.strategy
        words = strategy.word_columns if self.word_model else ()
        of_choices = choices.COLUMNS if self.stats.choices else ()
        return (*strategy.candidate_columns, *words, *of_choices)

    def adapter(
        self, query: Query, candidates: Sequence[Candidate], history: HistoryVectors
    ) -> Floats:
        """[C, E] side features of each candidate; `history` holds the visible records."""
        strategy, context = self.task.strategy, self._context(query, history)
        columns = [strategy.candidate_features(context, candidates)]
        if self.word_model is not None and strategy.word_columns:
            columns.append(strategy.word_features(context, candidates))
        if self.stats.choices:
            columns.append(self._beside(query, [own.text for own in candidates], history))
        return np.concatenate(columns, 1) if len(columns) > 1 else columns[0]

    def _beside(self, query: Query, texts: Sequence[str], history: HistoryVectors) -> Floats:
        """[C, E] of `tasks.choices.COLUMNS`."""
        shown, vectors = list(query.offered) == list(texts), self.features.texts(texts)
        known: dict[str, Any] = {"shown": shown, "known": history.habits, "vectors": vectors}
        return choices.columns(query.input, texts, **known)

    @property
    def reranker_names(self) -> tuple[str, ...]:
        """The columns of `reranker`."""
        common = ("retriever", "reciprocal_rank", "cosine", "recency")
        strategy = self.task.strategy
        words = strategy.record_word_columns if self.word_model else ()
        return (*common, *strategy.record_columns, *words)

    def reranker(self, query: Query, ranked: Sequence[Ranked], history: HistoryVectors) -> Floats:
        """[M, E] side features of each retrieved record; `history` holds the visible records."""
        context, records = self._context(query, history), [item.record for item in ranked]
        best = max((item.score for item in ranked), default=0.0)
        columns = [
            np.array([item.score / best if best > 0 else 0.0 for item in ranked]),
            np.array([1 / (1 + item.rank) for item in ranked]),
            self.features.texts([record.input for record in records]) @ context.query,
            _recency(records),
        ]
        strategy = self.task.strategy
        parts = [np.stack(columns, 1), strategy.record_features(context, records)]
        if self.word_model is not None:
            parts.append(strategy.record_word_features(context, records))
        return np.concatenate(parts, 1)

    def _context(self, query: Query, history: HistoryVectors) -> FeatureContext:
        vector = self.features.texts([query.input])[0]
        shares = self.word_shares(query, history)
        return FeatureContext(vector, history, self.stats, self.features.texts, shares)

    def word_shares(self, query: Query, history: HistoryVectors) -> WordShares | None:
        """How likely the user's answer has each of some words; None without a word model."""
        if self.word_model is None:
            return None
        model = self._word_models.get(query.user, self.word_model)
        own = history.counts or UserWords()
        return lambda asked: model.probabilities(asked, query.input, own)


def _recency(records: Sequence[Record]) -> Floats:
    """[M]: 1 for the latest of the records, towards 0 for the oldest; where the time is unknown,
    0.5: the order of a file says nothing about time.
    """
    known = [record for record in in_order(records) if span_of(record)[0] > -math.inf]
    place = {id(record): rank / len(known) for rank, record in enumerate(known, 1)}
    return np.array([place.get(id(record), 0.5) for record in records])


def texts_of_stats(histories: Sequence[Sequence[Record]]) -> list[str]:
    """The texts that `fit_stats` compares."""
    latest = (history[-STATS_RECORDS:] for history in histories[:STATS_USERS])
    return [record.input for history in latest for record in history]


def fit_stats(
    task: Task, features: FeatureCache, histories: Sequence[Sequence[Record]]
) -> CohortStats:
    """Statistics of the training users' records, with the usual cosine: a record's mean one to the
    nearest tenth of its user's other records.
    """
    nearest: list[float] = []
    for history in histories[:STATS_USERS]:
        vectors = features.texts(texts_of_stats([history]))
        if len(vectors) >= 2:
            cosine = np.sort(vectors @ vectors.T, axis=1)[:, :-1]  # the last is the record itself
            nearest.append(float(cosine[:, -max(1, cosine.shape[1] // 10) :].mean()))
    usual = float(np.mean(nearest)) if nearest else CohortStats().reference
    outputs = [record.output for history in histories for record in history]
    count = 0 if task.labels else sum(len(choices.choices_of(own)) for own in histories)
    return replace(task.strategy.cohort_stats(outputs, usual), choices=count)
