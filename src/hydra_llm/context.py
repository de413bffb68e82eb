"""What is known when one question is asked: made once, carried through every stage.

Which records a query may see is decided before (`history.before`); here it is only carried. Knows
no LLM and no scorer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from hydra_llm.side_features import HistoryVectors
from hydra_llm.types import Query, Record

Vectorize = Callable[[Sequence[Record]], HistoryVectors]


@dataclass(frozen=True)
class Context:
    """One question of one user. A copy (`dataclasses.replace`) carries no vectors: for keeping."""

    query: Query
    visible: tuple[Record, ...] = ()
    """Every record that the query may see, oldest first."""
    vectorize: Vectorize | None = field(default=None, repr=False, compare=False)
    """Makes `vectors`; None where no stage is learned."""

    @cached_property
    def vectors(self) -> HistoryVectors:
        """The visible records as arrays, computed at first use.

        Raises:
            ValueError: there is no encoder here.
        """
        if self.vectorize is None:
            raise ValueError("a learned stage needs a context with `vectorize`")
        return self.vectorize(self.visible)
