"""Order retrieved records by how useful they are for this user (paper, section 3.2).

Usefulness is the gain of the LLM's answer when it sees that one record. The scorer estimates it: as
learned from histories, where a record's own answer stands for the LLM's, or, with
`reranker_labels=llm`, from the LLM's answers. Knows no LLM. `KeepOrder` is the null part.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from hydra_llm.context import Context
from hydra_llm.side_features import Featurizer
from hydra_llm.types import Ranked, Record, as_one_text

if TYPE_CHECKING:
    from hydra_llm.model.scorer import Scorer


class Reranker(Protocol):
    """Anything that orders retrieved records for a user."""

    def order(self, context: Context, retrieved: Sequence[Ranked]) -> list[Ranked]:
        """The same records, most useful first."""
        ...

    def pairs(self, context: Context, retrieved: Sequence[Ranked]) -> list[tuple[str, str]]:
        """What `order` will have encoded as pairs of texts; by default nothing."""
        return []


class KeepOrder(Reranker):
    """The retriever's order."""

    def order(self, context: Context, retrieved: Sequence[Ranked]) -> list[Ranked]:
        return list(retrieved)


class LearnedReranker(Reranker):
    """Orders by the user's factorized scorer; ties keep the retriever's order."""

    def __init__(self, scorer: "Scorer", featurizer: Featurizer, *, with_answer: bool = True):
        self.scorer, self.featurizer, self.with_answer = scorer, featurizer, with_answer

    def order(self, context: Context, retrieved: Sequence[Ranked]) -> list[Ranked]:
        if not retrieved:
            return []
        from hydra_llm.model.interactions import make_groups  # torch: a gateway may lack it

        query = context.query
        features = self.featurizer.reranker(query, retrieved, context.vectors)
        names = self.featurizer.reranker_names
        # A scorer learned before the word model lacks its column.
        features = features[:, [names.index(name) for name in self.scorer.side_names]]
        store, interaction = self.featurizer.features, self.scorer.interaction
        groups = make_groups(store, interaction, [query.input], [self.texts(retrieved)], [features])
        scores = self.scorer.score(groups, [context.heads.get("reranker")])[0].tolist()
        rows = zip(retrieved, scores, strict=True)
        scored = [replace(item, usefulness=score) for item, score in rows]
        return sorted(scored, key=lambda item: (-(item.usefulness or 0.0), item.rank))

    def pairs(self, context: Context, retrieved: Sequence[Ranked]) -> list[tuple[str, str]]:
        cross = self.scorer.interaction.reads_pairs
        return [(context.query.input, text) for text in self.texts(retrieved)] if cross else []

    def texts(self, retrieved: Sequence[Ranked]) -> list[str]:
        """What the scorer reads of each record."""
        return [record_text(item.record, with_answer=self.with_answer) for item in retrieved]


def record_text(record: Record, *, with_answer: bool) -> str:
    """What the reranker reads of a record; the authors' code leaves the answer out."""
    return as_one_text(record.input, record.output) if with_answer else record.input
