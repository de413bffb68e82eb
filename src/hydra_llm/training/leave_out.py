"""A user's adapter head without some of the user's records, for `reasons`: exactly what `fit` makes
of the other records, and quickly, to first order, without each one alone.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from hydra_llm.bundle import Bundle
from hydra_llm.context import Context
from hydra_llm.llm.none import NoLLM
from hydra_llm.model.head import Head
from hydra_llm.model.heads.additive import AdditiveHead
from hydra_llm.reasons import Refit
from hydra_llm.training.dataset import LabelledGroup, in_set_order
from hydra_llm.training.fitting import ADAPTER, asks_llm, plain_pipeline, weak_groups
from hydra_llm.training.train_scorer import head_data, solve_heads
from hydra_llm.types import Record

SAME = 1e-3  # two fits of the same problem differ by less: the solver stops near the minimum


def refit_of(bundle: Bundle) -> Refit | None:
    """Fits a user's adapter head again without some records; None where no head can be fitted
    without asking the LLM again, or none by a convex problem in a fixed number of coordinates.
    """
    scorer = bundle.adapter
    if scorer is None or not isinstance(scorer.head, AdditiveHead) or asks_llm(bundle, ADAPTER):
        return None

    def refit(context: Context) -> LeaveOut | None:
        head = context.heads.get(ADAPTER)
        if head is None or not head.numbers.any():  # of a user without groups to learn from
            return None
        own = LeaveOut(bundle, head, context.visible[: head.records])
        # Learned from labels of the LLM, or from feedback too: what a refit makes is another head.
        return own if np.allclose(own.without(()).numbers, head.numbers, atol=SAME) else None

    return refit


@dataclass(frozen=True)
class LeaveOut:
    """One user's head, and the records that it was fitted on, oldest first."""

    bundle: Bundle
    head: Head
    records: tuple[Record, ...]

    def without(self, gone: Collection[str]) -> Head:
        """The head that `fit` makes of the other records; `gone` are ids."""
        kept = tuple(record for record in self.records if record.id not in gone)
        bundle, user = replace(self.bundle, records={self._user: kept}), self._user
        labelled = head_data(bundle, ADAPTER, self._groups(kept))
        return solve_heads(bundle, ADAPTER, labelled, [user])[user]

    @cached_property
    def near(self) -> Mapping[str, Head]:
        """Record → about the head without it. Side features of later records are as they were."""
        scorer, groups = self.bundle.scorers[ADAPTER], in_set_order(self._groups(self.records))
        assert isinstance(scorer.head, AdditiveHead)
        labelled = head_data(self.bundle, ADAPTER, groups)
        index = torch.arange(len(groups))[None]
        problem = scorer.head_problem(labelled.groups, [self._user], index)
        rows = scorer.head.left_out(problem.discounted(labelled.positions[None]), self.head).numpy()
        own = self.head
        return {
            group.query: Head.of(numbers, own.records, own.until)
            for group, numbers in zip(groups, rows, strict=True)
        }

    @property
    def _user(self) -> str:
        return self.records[0].user

    def _groups(self, records: tuple[Record, ...]) -> list[LabelledGroup]:
        plain = plain_pipeline(self.bundle, NoLLM(), ADAPTER)
        plain = replace(plain, records={self._user: records})
        return weak_groups(ADAPTER, plain, self.bundle.featurizer, [self._user])
