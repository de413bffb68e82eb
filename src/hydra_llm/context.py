"""What is known when one question is asked: made once, carried through every stage. Which records
a query may see is decided before (`history.before`). Knows no LLM and no scorer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from hydra_llm.model.head import Head
from hydra_llm.tasks.base import HistoryVectors
from hydra_llm.types import Query, Record

Vectorize = Callable[[Sequence[Record]], HistoryVectors]


@dataclass(frozen=True)
class Context:
    """One question of one user."""

    query: Query
    visible: tuple[Record, ...] = ()  # every record that the query may see, oldest first
    heads: Mapping[str, Head] = field(default_factory=dict)  # by scorer; others are shared
    notes: tuple[str, ...] = ()  # why a shared head answers in place of the user's own
    vectorize: Vectorize | None = field(default=None, repr=False, compare=False)

    def without_vectors(self) -> "Context":
        """A copy to keep while others are answered; it would compute its vectors anew."""
        return replace(self)  # which copies fields only, no cached property

    @cached_property
    def vectors(self) -> HistoryVectors:
        """The visible records as arrays, computed at first use; ValueError without an encoder."""
        if self.vectorize is None:
            raise ValueError("a learned stage needs a context with `vectorize`")
        return self.vectorize(self.visible)
