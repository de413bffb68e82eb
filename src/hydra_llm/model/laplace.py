"""How sharply one labelled group bends the loss of a head, on average over the training users: what
a history weighs against feedback.

    F = mean over groups of ∂²loss/∂v² = A ⊗ B, kept as eigenvectors

For pair features A is the number 1 and B is V×V. For label features φ = e_a ⊗ z the two parts are A
over the labels and B over z: the mean of the products is taken as the product of the means, so that
a hundred labels cost no more than ten. On these vectors precision + n·F is a diagonal, for any n: a
head needs no curvature of its own (learning/online.py).

Letters: U users, G groups, C candidates, V length of a head's vector, L labels, K rank. Knows no
users.
"""

import torch
from torch import Tensor, nn

from hydra_llm.model.heads import HeadBank, LowRankBank
from hydra_llm.model.interactions import Groups, Interaction

MOST_GROUPS = 2000
"""A mean over so many groups is good enough."""


class LaplacePosterior(nn.Module):
    """F by eigenvalues and eigenvectors; empty until it was measured."""

    left: Tensor
    left_vectors: Tensor
    right: Tensor
    right_vectors: Tensor

    def __init__(self, left: int = 0, right: int = 0):
        super().__init__()
        self.register_buffer("left", torch.zeros(left))
        self.register_buffer("left_vectors", torch.eye(left))
        self.register_buffer("right", torch.zeros(right))
        self.register_buffer("right_vectors", torch.eye(right))

    @property
    def known(self) -> bool:
        """Whether it was measured."""
        return len(self.right) > 0

    @torch.no_grad()
    def measure(
        self,
        interaction: Interaction,
        bank: HeadBank,
        groups: Groups,
        scores: Tensor,
        *,
        binary: bool,
    ) -> None:
        """The mean over groups at the scores [G, C] that they have; a low-rank bank's is that of
        its K coefficients.
        """
        index = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))[
            :MOST_GROUPS
        ]
        groups, scores = groups[index], scores[index].masked_fill(~groups.mask[index], -1e30)
        share = scores.sigmoid() * (scores.sigmoid() * -1 + 1) if binary else scores.softmax(-1)
        x = interaction(groups)
        if interaction.kind == "label":
            over_labels = share.mean(0).diag() - (0 if binary else share.T @ share / len(share))
            self._keep(over_labels, x.T @ x / len(x))
            return
        inner = torch.einsum("gc,gch,gck->hk", share, x, x)
        if not binary:
            middle = torch.einsum("gc,gch->gh", share, x)
            inner = inner - middle.T @ middle
        inner = inner / max(1, len(x))
        self._keep(
            torch.ones(1, 1),
            bank.basis @ inner @ bank.basis.T if isinstance(bank, LowRankBank) else inner,
        )

    @property
    def values(self) -> Tensor:
        """[V] the eigenvalues of F, in the order in which `turn` takes coordinates."""
        return (self.left[:, None] * self.right).flatten()

    def turn(self, w: Tensor) -> Tensor:
        """Coordinates on the eigenvectors [U, V] → heads [U, V]."""
        return (
            self.left_vectors
            @ w.view(len(w), len(self.left), len(self.right))
            @ self.right_vectors.T
        ).flatten(1)

    def back(self, v: Tensor) -> Tensor:
        """The inverse of `turn`, which is its transpose: [U, V] → [U, V]."""
        return (
            self.left_vectors.T
            @ v.view(len(v), len(self.left), len(self.right))
            @ self.right_vectors
        ).flatten(1)

    def _keep(self, left: Tensor, right: Tensor) -> None:
        (self.left, self.left_vectors), (self.right, self.right_vectors) = (
            torch.linalg.eigh(part) for part in (left, right)
        )
        self.left, self.right = self.left.clamp_min(0), self.right.clamp_min(0)
