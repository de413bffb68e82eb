"""Order retrieved records by how useful they are for this user (paper section 3.2).

Usefulness is the gain of the LLM's answer when it sees that one record; the scorer has learned it
from the LLM. Knows no LLM. `KeepOrder` is the null part: the retriever's order stands.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from hydra_llm.model.grouping import make_groups
from hydra_llm.model.scorer import Scorer
from hydra_llm.side_features import Featurizer
from hydra_llm.types import Query, Ranked, Record, as_one_text


class Reranker(Protocol):
    """Anything that orders retrieved records for a user."""

    def order(
        self, query: Query, retrieved: Sequence[Ranked], visible: Sequence[Record]
    ) -> list[Ranked]:
        """The same records, most useful first. `visible` are all records that the query may see."""
        ...


class KeepOrder:
    """The retriever's order."""

    def order(
        self, query: Query, retrieved: Sequence[Ranked], visible: Sequence[Record]
    ) -> list[Ranked]:
        return list(retrieved)


class LearnedReranker:
    """Orders by the user's factorized scorer."""

    def __init__(self, scorer: Scorer, evidence: Featurizer, *, with_answer: bool = True):
        self.scorer, self.evidence, self.with_answer = scorer, evidence, with_answer

    def order(
        self, query: Query, retrieved: Sequence[Ranked], visible: Sequence[Record]
    ) -> list[Ranked]:
        if not retrieved:
            return []
        evidence = self.evidence.reranker(query, retrieved, self.evidence.vectorize(visible))
        texts = [record_text(item.record, with_answer=self.with_answer) for item in retrieved]
        groups = make_groups(
            self.evidence.store,
            self.scorer.interaction,
            [query.input],
            [texts],
            [evidence.tolist()],
        )
        scores = self.scorer.score(groups, [query.user], [len(visible)])[0].tolist()
        scored = [
            replace(item, usefulness=score) for item, score in zip(retrieved, scores, strict=True)
        ]
        return sorted(scored, key=lambda item: (-(item.usefulness or 0.0), item.rank))


def record_text(record: Record, *, with_answer: bool) -> str:
    """What the reranker reads of a record. The authors leave the answer out; it is what makes a
    record useful (DESIGN 5).
    """
    return as_one_text(record.input, record.output) if with_answer else record.input
