"""Head `lowrank`: K coordinates on a basis that all users share."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from hydra_llm.model.heads.additive import AdditiveHead
from hydra_llm.model.heads.base import HeadKind, HeadProblem, VectorShared
from hydra_llm.model.heads.linear import LinearHead
from hydra_llm.model.interactions import Interaction


class LowRankHead(AdditiveHead):
    """K numbers on a basis that is learned from the training users: for short histories.

    The basis is that of the learned prior (training/prior.py), δ = Sᵀ a with a ~ N(0, I), or the
    directions in which the training users' linear heads differ most.
    """

    name = "lowrank"
    learns_prior = True
    basis: Tensor

    def __init__(self, size: int, rank: int):
        super().__init__(size, min(rank, size))
        self.rank = self.most = self.coordinates
        self.register_buffer("basis", torch.zeros(self.rank, size))

    @classmethod
    def create(cls, interaction: Interaction, rank: int) -> "LowRankHead":
        return cls(interaction.size, rank)

    @classmethod
    def on(cls, other: VectorShared, basis: Tensor) -> "LowRankHead":
        """Heads on a basis [K, V] around the shared head of another kind."""
        head = cls(basis.shape[1], len(basis))
        head.set_basis(basis)
        head.shared, head.shared_bias = other.shared, other.shared_bias
        return head

    def set_basis(self, basis: Tensor | None) -> None:
        """Take a learned basis [K, V], under whose prior the precision is 1; None for none."""
        size = self.basis.shape[1]
        self.basis = self.basis.new_zeros(self.most, size) if basis is None else basis
        self.rank = self.coordinates = len(self.basis)

    def directions(self) -> tuple[Tensor, Tensor]:
        return self.basis, self.basis.new_zeros(self.rank)

    def precision_probe(self) -> HeadKind:
        probe = LinearHead(self.basis.shape[1])
        probe.shared, probe.shared_bias = self.shared, self.shared_bias
        return probe

    @torch.no_grad()
    def learn_shared(self, problems: Iterable[HeadProblem]) -> None:
        """The basis: the directions in which the training users' linear heads differ most."""
        probe = self.precision_probe()
        deltas = np.stack([numbers for problem in problems for numbers in probe.fit(problem)])
        own = torch.from_numpy(deltas)[:, : self.basis.shape[1]]
        _, _, directions = torch.linalg.svd(own, full_matrices=False)
        basis = torch.zeros_like(self.basis)
        top = min(len(basis), len(directions))
        basis[:top] = directions[:top]
        self.basis = basis
