"""Head `linear`: the user's own weight vector and bias, and coordinates on a learned basis."""

from functools import partial

import torch
from torch import Tensor

from hydra_llm.model.heads.additive import AdditiveHead
from hydra_llm.model.interactions import Interaction
from hydra_llm.model.laplace import mean_fisher
from hydra_llm.model.newton import Apply


class LinearHead(AdditiveHead):
    """A weight vector and a bias per user: for long histories.

        δ = Sᵀ a + ε    a ~ N(0, I),  ε ~ N(0, I/λ)

    The rows of S [K, V] are learned from the training users' records (training/prior.py), so that
    δ ~ N(0, Sᵀ S + I/λ). Without them, K = 0, δ is ε. A user's numbers are a, ε and the bias. ε has
    the interaction's `own_size` numbers where there is a basis, else V.

    The bias has an effect under the binary loss only: it moves all candidates of a group alike.
    Online updates leave it out.
    """

    name = "linear"
    own_bias = True
    learns_prior = True
    basis: Tensor | None

    def __init__(self, size: int, own_size: int | None = None):
        super().__init__(size, size if own_size is None else own_size)
        self.register_buffer("basis", None)

    @classmethod
    def create(cls, interaction: Interaction, rank: int) -> "LinearHead":
        return cls(interaction.size, interaction.own_size)

    def set_basis(self, basis: Tensor | None) -> None:
        """Take a learned basis [K, V] as part of the prior; None for none."""
        self.coordinates += (0 if basis is None else len(basis)) - self.learned
        self.basis = basis

    @property
    def learned(self) -> int:
        """K."""
        return 0 if self.basis is None else len(self.basis)

    def precisions(self, precision: float) -> float | Tensor:
        if self.basis is None:
            return precision
        values = torch.full((self.coordinates,), precision)
        values[: self.learned] = 1.0
        return values

    def directions(self) -> None:
        return None

    def score_numbers(self, interaction: Interaction, x: Tensor, numbers: Tensor) -> Tensor:
        own = numbers[:, self.learned : self.coordinates]
        if self.basis is None and own.shape[1] == interaction.size:
            return super().score_numbers(interaction, x, numbers)
        vector = self.shared.expand(len(x), -1)
        if self.basis is not None:
            vector = vector + numbers[:, : self.learned] @ self.basis
        scores = interaction.dot(x[:, None], vector) + interaction.own_dot(x[:, None], own)
        bias = self.shared_bias + numbers[:, self.coordinates :].sum(-1)
        return scores[:, 0] + bias[:, None]

    def design(self, interaction: Interaction, x: Tensor) -> tuple[Apply, Apply]:
        if (basis := self.basis) is None:
            if self.coordinates == interaction.size:
                return super().design(interaction, x)
            return partial(interaction.own_dot, x), partial(interaction.own_outer, x)
        rows = interaction.on_basis(x.flatten(0, 1), basis)
        rows = rows.view(*x.shape[:2], *rows.shape[1:])  # [U, G, C, K]

        def dot(v: Tensor) -> Tensor:
            own = interaction.own_dot(x, v[:, len(basis) :])
            return torch.einsum("ugck,uk->ugc", rows, v[:, : len(basis)]) + own

        def outer(r: Tensor) -> Tensor:
            on_basis = torch.einsum("ugck,ugc->uk", rows, r)
            return torch.cat([on_basis, interaction.own_outer(x, r)], 1)

        return dot, outer

    def fisher(
        self, interaction: Interaction, x: Tensor, share: Tensor, binary: bool
    ) -> tuple[Tensor, ...] | None:
        own = interaction.fisher(x, share, binary)
        if self.basis is None:
            return own
        return *own, mean_fisher(interaction.on_basis(x, self.basis), share, binary)
