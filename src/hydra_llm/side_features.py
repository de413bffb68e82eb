"""What is known of a pair beside its text: the user's history and the LLM's votes, as numbers
(DESIGN 5).

The history's part is the prior mean of a user's score as a function of the history (DESIGN 4,
`Prior.mean(history)`): it personalizes before any head is fitted, and no training is needed when
the history changes. Every number is computed from records that the query may see; learning and
answering call the same functions, so that they cannot drift apart.

Letters: n visible records, C candidates, L labels, D width. Knows no scorer and no LLM.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hydra_llm.errors import DataError
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.tasks.base import Task
from hydra_llm.types import Candidate, Query, Ranked, Record

Floats = NDArray[np.float64]

BANDWIDTHS = (0.05, 0.15, 0.5)
"""τ of exp(cos / τ): from "the nearest record alone" to "nearly all alike"; the weights of each are
learned.
"""
RECENT_MEMORIES = 16
"""Histories as vectors that are kept at hand: the reranker and the adapter of a question see the
same one.
"""
PSEUDO_COUNT = 2.0
"""How many records the population's label shares count for."""


@dataclass(frozen=True)
class CohortStats:
    """What the training users have in common: stands in where a user's history is short."""

    label_shares: tuple[float, ...] = ()
    """[L] in the task's order of labels."""
    reference: float = 0.45
    """A usual cosine between a query and the nearest records of its user."""
    words: float = 10.0
    """Median length of an answer (generation)."""


@dataclass(frozen=True)
class HistoryVectors:
    """A user's visible records as numbers, oldest first."""

    inputs: NDArray[np.float32]
    """[n, D] unit rows."""
    answers: NDArray[np.float32]
    """[n, D] unit rows; [n, 0] for tasks with labels."""
    labels: NDArray[np.int64]
    """[n] index of each record's label; empty for generation."""
    words: Floats = field(default_factory=lambda: np.zeros(0))
    """[n] length of each answer in words (generation)."""

    def __len__(self) -> int:
        return len(self.inputs)


class Featurizer:
    """Makes the side features of both scorers for one task."""

    def __init__(self, task: Task, store: FeatureCache, population: CohortStats):
        self.task, self.store, self.population = task, store, population
        self.label_index = {label: i for i, label in enumerate(task.labels)}
        self._recent: dict[tuple[int, ...], tuple[tuple[Record, ...], HistoryVectors]] = {}
        self._version = store.version

    # ---- the user's history

    def vectorize(self, records: Sequence[Record]) -> HistoryVectors:
        """Visible records as vectors; texts that were seen before cost a look-up, the last few
        histories not even that.
        """
        if self._version != self.store.version:
            self._recent, self._version = {}, self.store.version
        key = tuple(map(id, records))
        if key not in self._recent:
            while len(self._recent) >= RECENT_MEMORIES:
                self._recent.pop(next(iter(self._recent)), None)
            self._recent[key] = (
                tuple(records),
                self._vectors(records),
            )  # the records are kept: else another might get the same id
        return self._recent[key][1]

    def _vectors(self, records: Sequence[Record]) -> HistoryVectors:
        inputs = self.store.texts([record.input for record in records])
        if self.task.labels:
            return self._labelled_memory(records, inputs)
        words = np.array([len(record.output.split()) for record in records], dtype=np.float64)
        return HistoryVectors(
            inputs,
            self.store.texts([record.output for record in records]),
            np.zeros(0, dtype=np.int64),
            words,
        )

    def _labelled_memory(
        self, records: Sequence[Record], inputs: NDArray[np.float32]
    ) -> HistoryVectors:
        """Where a task's histories hold no labels (LaMP-1's papers), they tell nothing about
        labels.
        """
        if self.task.extra.get("free_history"):
            labelled = [i for i, record in enumerate(records) if record.output in self.label_index]
            records, inputs = [records[i] for i in labelled], inputs[labelled]
        return HistoryVectors(inputs, inputs[:, :0], self._indices(records))

    def _indices(self, records: Sequence[Record]) -> NDArray[np.int64]:
        try:
            return np.array([self.label_index[record.output] for record in records], dtype=np.int64)
        except KeyError as error:
            raise DataError(
                f"a record's output {error} is none of the labels of task '{self.task.name}'"
            ) from None

    def label_shares(self, query: NDArray[np.float32], memory: HistoryVectors) -> list[Floats]:
        """For each bandwidth, and for none: [L] the share of each label among like records, shrunk
        to the population's.
        """
        prior = self._prior
        onehot = np.eye(len(prior))[memory.labels]
        closeness = memory.inputs @ query - self.population.reference
        weights = [np.exp(closeness / bandwidth) for bandwidth in BANDWIDTHS] + [
            np.ones(len(memory))
        ]
        return [
            (weight @ onehot + PSEUDO_COUNT * prior) / (weight.sum() + PSEUDO_COUNT)
            for weight in weights
        ]

    @cached_property
    def _prior(self) -> Floats:
        count = len(self.task.labels)
        return np.asarray(self.population.label_shares or [1 / count] * count, dtype=np.float64)

    @cached_property
    def _scale(self) -> Floats | None:
        """[L] the labels as numbers from 0 to 1; None where they are no numbers."""
        if self.task.kind != "rating":
            return None
        values = np.array([float(label) for label in self.task.labels])
        scaled: Floats = (values - values.min()) / max(float(np.ptp(values)), 1e-9)
        return scaled

    # ---- the adapter: candidates

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The columns of `adapter`; `llm_` marks what only the LLM's samples tell."""
        if not self.task.labels:
            own = ("own_nearest", "own_mean", "length", "length_signed", "cosine")
            return (*own, "llm_agreement", "llm_votes", "llm_greedy")
        spans = [*(f"share_{bandwidth}" for bandwidth in BANDWIDTHS), "share_all"]
        near = [name.replace("share", "near") for name in spans] if self._scale is not None else []
        return (*spans, *near, "llm_votes", "llm_greedy", *(["llm_near"] if near else []))

    def adapter(
        self, query: Query, candidates: Sequence[Candidate], memory: HistoryVectors
    ) -> Floats:
        """[C, E] evidence of each candidate. For tasks with labels a candidate without a parsed
        answer gets the lowest.
        """
        if not self.task.labels:
            return self._of_texts(query, candidates, memory)
        vector = self.store.texts([query.input])[0]
        table = np.concatenate(
            [self._of_labels(vector, memory), self._of_votes(candidates)], axis=1
        )
        index = [self.label_index.get(candidate.answer or "", -1) for candidate in candidates]
        worst = table.min(0)
        return np.stack([table[i] if i >= 0 else worst for i in index])

    def _of_labels(self, vector: NDArray[np.float32], memory: HistoryVectors) -> Floats:
        shares = self.label_shares(vector, memory)
        columns = [np.log(share + 1e-4) for share in shares]
        if self._scale is not None:
            columns += [-np.abs(self._scale - share @ self._scale) for share in shares]
        return np.stack(columns, 1)

    def _of_votes(self, candidates: Sequence[Candidate]) -> Floats:
        """[L, 2 or 3]: all zero where nobody was asked."""
        votes, greedy = np.zeros(len(self.task.labels)), np.zeros(len(self.task.labels))
        for candidate in candidates:
            if (i := self.label_index.get(candidate.answer or "", -1)) >= 0:
                votes[i], greedy[i] = candidate.votes, float(candidate.greedy)
        total = votes.sum()
        logs = np.log((votes + 0.5) / (total + 0.5 * len(votes)) * len(votes)) if total else votes
        columns = [logs, greedy]
        if self._scale is not None:
            columns.append(-np.abs(self._scale - votes @ self._scale / total) if total else votes)
        return np.stack(columns, 1)

    def _of_texts(
        self, query: Query, candidates: Sequence[Candidate], memory: HistoryVectors
    ) -> Floats:
        texts = [candidate.text for candidate in candidates]
        vectors = self.store.texts(texts)
        own = vectors @ memory.answers.T if len(memory) else np.zeros((len(texts), 1))
        usual = np.log1p(np.median(memory.words) if len(memory) else self.population.words)
        length = np.log1p([len(text.split()) for text in texts]) - usual
        gains = np.asarray(self.task.gain_matrix(texts))
        others = (gains.sum(0) - gains.diagonal()) / max(1, len(texts) - 1)
        votes = np.array([candidate.votes for candidate in candidates], dtype=np.float64)
        columns = [
            own.max(1),
            own.mean(1),
            -np.abs(length),
            length,
            vectors @ self.store.texts([query.input])[0],
        ]
        columns += [
            others,
            votes / max(1.0, votes.sum()),
            np.array([float(c.greedy) for c in candidates]),
        ]
        return np.stack(columns, 1).astype(np.float64)

    # ---- the reranker: records

    @property
    def reranker_names(self) -> tuple[str, ...]:
        """The columns of `reranker`."""
        common = ("retriever", "reciprocal_rank", "cosine", "recency")
        return (
            (*common, "answer_share", "answer_near")
            if self.task.labels
            else (*common, "answer_cosine", "answer_words")
        )

    def reranker(self, query: Query, ranked: Sequence[Ranked], memory: HistoryVectors) -> Floats:
        """[M, E] evidence of each retrieved record. `memory` holds the visible records."""
        vector = self.store.texts([query.input])[0]
        records = [item.record for item in ranked]
        best = max((item.score for item in ranked), default=0.0)
        columns = [
            np.array([item.score / best if best > 0 else 0.0 for item in ranked]),
            np.array([1 / (1 + item.rank) for item in ranked]),
            self.store.texts([record.input for record in records]) @ vector,
            _recency(records),
            *(
                self._answers_as_labels(vector, records, memory)
                if self.task.labels
                else self._answers_as_texts(vector, records)
            ),
        ]
        return np.stack(columns, 1).astype(np.float64)

    def _answers_as_labels(
        self, vector: NDArray[np.float32], records: Sequence[Record], memory: HistoryVectors
    ) -> list[Floats]:
        """How likely each record's own answer is the right one for this query, by the user's like
        records.
        """
        if self.task.extra.get("free_history"):
            return [np.zeros(len(records)), np.zeros(len(records))]
        share = self.label_shares(vector, memory)[1]
        index = self._indices(records)
        near = (
            -np.abs(self._scale - share @ self._scale)
            if self._scale is not None
            else share - share.max()
        )
        return [np.log(share + 1e-4)[index], near[index]]

    def _answers_as_texts(
        self, vector: NDArray[np.float32], records: Sequence[Record]
    ) -> list[Floats]:
        lengths = np.log1p([len(record.output.split()) for record in records])
        return [
            self.store.texts([record.output for record in records]) @ vector,
            lengths - np.log1p(self.population.words),
        ]


def _recency(records: Sequence[Record]) -> Floats:
    """1 for the latest of the records, towards 0 for the oldest."""
    order = np.argsort(
        np.argsort([record.position for record in records], kind="stable"), kind="stable"
    )
    return (order + 1) / max(1, len(records))


def fit_stats(
    task: Task, store: FeatureCache, histories: Sequence[Sequence[Record]]
) -> CohortStats:
    """The population's figures from the training users' records."""
    records = [record for history in histories for record in history]
    if not task.labels:
        lengths = [len(record.output.split()) for record in records]
        return CohortStats(
            (), _usual_cosine(store, histories), float(np.median(lengths)) if lengths else 10.0
        )
    counts = (
        np.array([sum(record.output == label for record in records) for label in task.labels]) + 1.0
    )
    return CohortStats(tuple((counts / counts.sum()).tolist()), _usual_cosine(store, histories))


def _usual_cosine(store: FeatureCache, histories: Sequence[Sequence[Record]]) -> float:
    """The mean cosine of a record to the nearest tenth of its user's other records."""
    nearest: list[float] = []
    for history in histories[:200]:
        vectors = store.texts([record.input for record in history[-200:]])
        if len(vectors) >= 2:
            cosine = np.sort(vectors @ vectors.T, axis=1)[:, :-1]  # the last is the record itself
            nearest.append(float(cosine[:, -max(1, cosine.shape[1] // 10) :].mean()))
    return float(np.mean(nearest)) if nearest else CohortStats().reference
