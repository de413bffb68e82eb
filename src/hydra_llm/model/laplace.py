"""Laplace approximation of a head's posterior: how much one labelled group says about a head, on
average over the training users.

    F = mean over groups of the Fisher information = A ⊗ B, kept as eigenvectors (K-FAC)

For pair features A is the number 1. For label features φ = e_a ⊗ z, A is over the labels and B over
z: the mean of the products is taken as the product of the means. On the eigenvectors precision +
n·F is diagonal for any n: a head needs no Hessian of its own.
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

    def __init__(self, left: int = 0, right: int = 0):
        super().__init__()
        self.register_buffer("left", torch.zeros(left))
        self.register_buffer("left_vectors", torch.eye(left))
        self.register_buffer("right", torch.zeros(right))
        self.register_buffer("right_vectors", torch.eye(right))

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> "LaplacePosterior":
        """From the two factors of F, symmetric matrices."""
        posterior = cls()
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
        return (self.left[:, None] * self.right).flatten()

    def turn(self, w: Tensor) -> Tensor:
        """Coordinates on the eigenvectors [U, V] → heads [U, V]."""
        w = w.view(len(w), len(self.left), len(self.right))
        return (self.left_vectors @ w @ self.right_vectors.T).flatten(1)

    def back(self, v: Tensor) -> Tensor:
        """The inverse of `turn`, which is its transpose: [U, V] → [U, V]."""
        v = v.view(len(v), len(self.left), len(self.right))
        return (self.left_vectors.T @ v @ self.right_vectors).flatten(1)

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
