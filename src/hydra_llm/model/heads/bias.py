"""δ = one number c that scales the shared head's score: a temperature per user.

    s = (1 + c) · (θ₀·φ + b₀)

A constant added to every candidate of a group would change no order and no listwise loss, so the
one number multiplies what does differ between candidates. c > 0: the user is more like the
training users than they are on average; c = −1: what others want says nothing about this one;
c < −1: the opposite. It is the smallest head that there is: the lower bound of what a head can
give, and an example of how to add one.
"""

from typing import Self

import torch
from torch import Tensor

from hydra_llm.model.heads.additive import AdditiveHead
from hydra_llm.model.interactions import Interaction
from hydra_llm.model.newton import Apply


class BiasHead(AdditiveHead):
    """s = (1 + c)·(θ₀·φ + b₀): 1 number a user."""

    name = "bias"
    coordinates = 1

    @classmethod
    def create(cls, interaction: Interaction, rank: int) -> Self:
        return cls(interaction.size)

    def score_numbers(self, interaction: Interaction, x: Tensor, numbers: Tensor) -> Tensor:
        return self.shared_score(interaction, x) * (1 + numbers)

    def design(self, interaction: Interaction, x: Tensor) -> tuple[Apply, Apply]:
        shared = self.shared_score(interaction, x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return (
            lambda c: shared * c[:, :, None],
            lambda r: torch.einsum("ugc,ugc->u", shared, r)[:, None],
        )

    def explicit(self, interaction: Interaction, x: Tensor) -> Tensor | None:
        return self.shared_score(interaction, x)[..., None]
