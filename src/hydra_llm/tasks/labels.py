"""What kinds with a closed set of answers share: side features from the labels of similar records.

The label shares of similar records are the prior mean of a user's score as a function of the
history: they personalize before any head is fitted. Letters: n records, C candidates, L labels,
D width.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hydra_llm.errors import DataError
from hydra_llm.tasks.base import (
    CohortStats,
    Embed,
    FeatureContext,
    Floats,
    HistoryVectors,
    TaskKind,
)
from hydra_llm.types import Candidate, Record

BANDWIDTHS = (0.05, 0.15, 0.5)
"""τ of the kernel exp(cos / τ), from "the nearest record alone" to "nearly all alike"."""
PSEUDO_COUNT = 2.0
"""How many records the training users' label shares count for."""


class LabelKind(TaskKind):
    """A kind whose answers are the task's labels."""

    closed = True
    prompt_style = "turns"  # small models repeat a list of scores (benchmarks/prompt_style.py)
    target_rule = "exact"
    record_columns = ("answer_share", "answer_near")

    def check(self, file: str) -> None:
        if len(self.task.labels) < 2:
            said = f"a {self.task.kind} task needs at least two labels"
            raise DataError(said, file=file, field="labels")

    def typical(self, outputs: Sequence[str]) -> str:
        """The most frequent label, the latest of equals; without outputs the middle label."""
        if outputs:
            return max(reversed(outputs), key=list(outputs).count)
        return self.task.labels[len(self.task.labels) // 2] if self.task.labels else ""

    @cached_property
    def index(self) -> dict[str, int]:
        """Label → its place."""
        return {label: i for i, label in enumerate(self.task.labels)}

    # ---- the user's history

    def vectorize(self, records: Sequence[Record], embed: Embed) -> HistoryVectors:
        inputs = embed([record.input for record in records])
        if self.task.free_history:
            labelled = [i for i, record in enumerate(records) if record.output in self.index]
            records, inputs = [records[i] for i in labelled], inputs[labelled]
        return HistoryVectors(inputs, inputs[:, :0], self._indices(records))

    def _indices(self, records: Sequence[Record]) -> NDArray[np.int64]:
        try:
            return np.array([self.index[record.output] for record in records], dtype=np.int64)
        except KeyError as error:
            raise DataError(
                f"a record's output {error} is none of the labels of task '{self.task.name}'"
            ) from None

    def cohort_stats(self, outputs: Sequence[str], reference: float) -> CohortStats:
        counts = np.array([outputs.count(label) for label in self.task.labels]) + 1.0
        return CohortStats(tuple((counts / counts.sum()).tolist()), reference)

    def label_shares(self, context: FeatureContext) -> list[Floats]:
        """For each bandwidth, and for none: [L] share of each label among similar records, shrunk
        to that of the training users.
        """
        history, stats, count = context.history, context.stats, len(self.task.labels)
        prior = np.asarray(stats.label_shares or [1 / count] * count, dtype=np.float64)
        onehot = np.eye(count)[history.labels]
        similarity = history.inputs @ context.query - stats.reference
        weights = [np.exp(similarity / bandwidth) for bandwidth in BANDWIDTHS]
        return [
            (weight @ onehot + PSEUDO_COUNT * prior) / (weight.sum() + PSEUDO_COUNT)
            for weight in (*weights, np.ones(len(history)))
        ]

    def closeness(self, weights: Floats, total: float = 1.0) -> list[Floats]:
        """A column [L] of how near each label is to the mean of the weighted ones; none where
        labels have no order.
        """
        return []

    # ---- candidates

    @property
    def candidate_columns(self) -> tuple[str, ...]:
        shares = (*(f"share_{bandwidth}" for bandwidth in BANDWIDTHS), "share_all")
        return (*shares, "llm_votes", "llm_greedy")

    def candidate_features(
        self, context: FeatureContext, candidates: Sequence[Candidate]
    ) -> Floats:
        shares = self.label_shares(context)
        columns = [np.log(share + 1e-4) for share in shares]
        columns += [column for share in shares for column in self.closeness(share)]
        table = np.stack([*columns, *self._votes(candidates)], 1)
        worst = table.min(0)
        places = [self.index.get(candidate.answer or "", -1) for candidate in candidates]
        return np.stack([table[i] if i >= 0 else worst for i in places])

    def _votes(self, candidates: Sequence[Candidate]) -> list[Floats]:
        """Columns [L] of the LLM's samples: all zero without any."""
        votes, greedy = np.zeros(len(self.task.labels)), np.zeros(len(self.task.labels))
        for candidate in candidates:
            if (i := self.index.get(candidate.answer or "", -1)) >= 0:
                votes[i], greedy[i] = candidate.votes, float(candidate.greedy)
        total = votes.sum()
        if not total:
            return [votes, greedy, *(votes for _ in self.closeness(votes))]
        logs = np.log((votes + 0.5) / (total + 0.5 * len(votes)) * len(votes))
        return [logs, greedy, *self.closeness(votes, total)]

    # ---- records

    def record_features(self, context: FeatureContext, records: Sequence[Record]) -> Floats:
        """How likely each record's own answer is the right one, by the user's similar records."""
        if self.task.free_history:
            return np.zeros((len(records), 2))
        share = self.label_shares(context)[1]
        (near,) = self.closeness(share) or [share - share.max()]
        index = self._indices(records)
        return np.stack([np.log(share + 1e-4)[index], near[index]], 1)
