"""δ = c·B with a basis B [K, V] that all users share: K numbers a user. For a million users with
short histories.
"""

from collections.abc import Iterable
from typing import Self

import numpy as np
import torch
from torch import Tensor

from hydra_llm.model.heads.additive import AdditiveHead
from hydra_llm.model.heads.base import HeadKind, HeadProblem
from hydra_llm.model.heads.linear import LinearHead
from hydra_llm.model.interactions import Interaction
from hydra_llm.model.newton import Apply


class LowRankHead(AdditiveHead):
    """s = (θ₀ + c·B)·φ + b₀; the basis comes from the training users' own linear heads."""

    name = "lowrank"
    basis: Tensor

    def __init__(self, size: int, rank: int):
        super().__init__(size)
        self.coordinates = self.rank = rank
        self.register_buffer("basis", torch.zeros(rank, size))

    @classmethod
    def create(cls, interaction: Interaction, rank: int) -> Self:
        return cls(interaction.size, min(rank, interaction.size))

    def score_numbers(self, interaction: Interaction, x: Tensor, numbers: Tensor) -> Tensor:
        v = self.shared + numbers @ self.basis
        return interaction.dot(x[:, None], v)[:, 0] + self.shared_bias

    def design(self, interaction: Interaction, x: Tensor) -> tuple[Apply, Apply]:
        return (
            lambda c: interaction.dot(x, c @ self.basis),
            lambda r: interaction.outer(x, r) @ self.basis.T,
        )

    def explicit(self, interaction: Interaction, x: Tensor) -> Tensor | None:
        return interaction.on_basis(x, self.basis)

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
        self.basis.zero_()
        top = min(len(self.basis), len(directions))
        self.basis[:top] = directions[:top]
