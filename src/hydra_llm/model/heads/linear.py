"""δ = (w, b): a weight vector and a bias per user, V + 1 numbers. For long histories."""

from typing import Self

import numpy as np
import torch
from torch import Tensor

from hydra_llm.model.heads.additive import AdditiveHead
from hydra_llm.model.heads.base import HeadProblem
from hydra_llm.model.interactions import Interaction
from hydra_llm.model.newton import Apply, newton_cg, with_bias


class LinearHead(AdditiveHead):
    """s = (θ₀ + w)·φ + b₀ + b. The bias matters for the binary loss alone: it moves all candidates
    of a group alike, so only a new fit changes it.
    """

    name = "linear"

    def __init__(self, size: int):
        super().__init__(size)
        self.coordinates = size

    @classmethod
    def create(cls, interaction: Interaction, rank: int) -> Self:
        return cls(interaction.size)

    @property
    def numbers_per_user(self) -> int:
        return self.coordinates + 1

    def score_numbers(self, interaction: Interaction, x: Tensor, numbers: Tensor) -> Tensor:
        v = self.shared + numbers[:, : self.coordinates]
        b = self.shared_bias + numbers[:, self.coordinates :].sum(-1)
        return interaction.dot(x[:, None], v)[:, 0] + b[:, None]

    def design(self, interaction: Interaction, x: Tensor) -> tuple[Apply, Apply]:
        return lambda v: interaction.dot(x, v), lambda r: interaction.outer(x, r)

    def explicit(self, interaction: Interaction, x: Tensor) -> Tensor | None:
        return interaction.explicit(x)

    @torch.no_grad()
    def fit(self, problem: HeadProblem) -> list[np.ndarray]:
        convex = with_bias(self._convex(problem))
        values = newton_cg(convex, problem.precision)
        missing = self.numbers_per_user - convex.size
        return list(torch.nn.functional.pad(values, (0, missing)).numpy())
