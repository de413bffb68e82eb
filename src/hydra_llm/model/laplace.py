"""Laplace approximation of a head's posterior: how much one labelled group says about a head, on
average over the training users.

    F = mean over groups of the Fisher information = A ⊗ B, kept as eigenvectors (K-FAC)

For pair features A is the number 1. For label features φ = e_a ⊗ z, A is over the labels and B over
z: the mean of the products is taken as the product of the means. On the eigenvectors precision +
n·F is diagonal for any n: a head needs no Hessian of its own. Coordinates on a learned basis stand
before these, as a block of their own (`top`); what F has between the two blocks is left out.
Letters: U users, G groups, C candidates, V coordinates of a head.
"""

import torch
from torch import Tensor, nn


class LaplacePosterior(nn.Module):
    """F by its eigenvalues and eigenvectors; empty until it is measured."""

    left: Tensor
    left_vectors: Tensor
    right: Tensor
    right_vectors: Tensor
    top: Tensor | None
    top_vectors: Tensor | None

    def __init__(self, left: int = 0, right: int = 0, top: int = 0):
        super().__init__()
        self.register_buffer("left", torch.zeros(left))
        self.register_buffer("left_vectors", torch.eye(left))
        self.register_buffer("right", torch.zeros(right))
        self.register_buffer("right_vectors", torch.eye(right))
        self.register_buffer("top", torch.zeros(top) if top else None)
        self.register_buffer("top_vectors", torch.eye(top) if top else None)

    @classmethod
    def of(cls, left: Tensor, right: Tensor, top: Tensor | None = None) -> "LaplacePosterior":
        """From the two factors of F and its block of a learned basis, symmetric matrices."""
        posterior = cls()
        if top is not None:
            values, posterior.top_vectors = torch.linalg.eigh(top)
            posterior.top = values.clamp_min(0)
        posterior.left, posterior.left_vectors = torch.linalg.eigh(left)
        posterior.right, posterior.right_vectors = torch.linalg.eigh(right)
        posterior.left, posterior.right = posterior.left.clamp_min(0), posterior.right.clamp_min(0)
        return posterior

    @property
    def known(self) -> bool:
        """Whether it was measured."""
        return len(self.right) > 0

    @property
    def values(self) -> Tensor:
        """[V] the eigenvalues of F, in the order in which `turn` takes coordinates."""
        own = (self.left[:, None] * self.right).flatten()
        return own if self.top is None else torch.cat([self.top, own])

    def turn(self, w: Tensor) -> Tensor:
        """Coordinates on the eigenvectors [U, V] → heads [U, V]."""
        return self._turned(w, self.left_vectors, self.right_vectors.T, self.top_vectors)

    def back(self, v: Tensor) -> Tensor:
        """The inverse of `turn`, which is its transpose: [U, V] → [U, V]."""
        top = None if self.top_vectors is None else self.top_vectors.T
        return self._turned(v, self.left_vectors.T, self.right_vectors, top)

    def _turned(self, v: Tensor, left: Tensor, right: Tensor, top: Tensor | None) -> Tensor:
        first = 0 if top is None else len(top)
        own = v[:, first:].view(len(v), len(self.left), len(self.right))
        turned = (left @ own @ right).flatten(1)
        return turned if top is None else torch.cat([v[:, :first] @ top.T, turned], 1)

    def covariance(self, rows: Tensor, precision: Tensor) -> Tensor:
        """[C, C] φ Λ⁻¹ φᵀ for features `rows` [C, V]; Λ is diagonal on the eigenvectors."""
        turned = self.back(rows) * precision.rsqrt()
        return turned @ turned.T


def mean_fisher(phi: Tensor, share: Tensor, binary: bool) -> Tensor:
    """[V, V] mean over groups: phi [G, C, V], shares [G, C] (binary: Bernoulli variances)."""
    inner = torch.einsum("gc,gch,gck->hk", share, phi, phi)
    if not binary:
        middle = torch.einsum("gc,gch->gh", share, phi)
        inner = inner - middle.T @ middle
    return inner / max(1, len(phi))
