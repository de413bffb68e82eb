"""Heads whose score is the shared one plus a linear function of the user's numbers.

    s = shared(φ) + ψ(φ)·δ

Fitting one is a convex problem, its posterior is Gaussian to second order (model/laplace.py), and
feedback moves it without a new fit:

    minimise over δ   Σ over the judged groups of loss(δ) + ½ (δ − δ_fit)ᵀ (λ + N·F) (δ − δ_fit)

δ_fit is the head as it was fitted on N records, λ the prior's precision, F the mean Fisher
information of a group. The result depends on the set of judged groups, not on their order.

Letters: U users, G groups, C candidates, V length of the shared head, K coordinates of δ.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from hydra_llm.model.heads.base import Head, HeadKind, HeadProblem
from hydra_llm.model.interactions import Interaction
from hydra_llm.model.laplace import LaplacePosterior, mean_fisher
from hydra_llm.model.newton import Apply, Problem, hessian_inverse, lbfgs, newton_cg


class VectorShared(HeadKind):
    """Kinds whose shared head is a vector θ₀ [V] and a bias."""

    def __init__(self, size: int):
        super().__init__()
        self.shared = nn.Parameter(torch.zeros(size))
        self.shared_bias = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def set_shared(self, weight: Tensor, bias: Tensor) -> None:
        self.shared.copy_(weight)
        self.shared_bias.copy_(bias)

    def joint_parameters(self) -> list[nn.Parameter]:
        return [self.shared, self.shared_bias]

    def shared_score(self, interaction: Interaction, x: Tensor) -> Tensor:
        v = self.shared.expand(len(x), -1)
        return interaction.dot(x[:, None], v)[:, 0] + self.shared_bias


class AdditiveHead(VectorShared):
    """s = shared(φ) + ψ(φ)·δ; a kind says what ψ is."""

    updates_online = True
    coordinates: int
    """K."""

    @property
    def numbers_per_user(self) -> int:
        return self.coordinates

    @property
    def joint_numbers(self) -> int:
        return self.coordinates

    def design(self, interaction: Interaction, x: Tensor) -> tuple[Apply, Apply]:
        """ψ of x [U, G, ...] as a linear map [U, K] → [U, G, C], and its transpose."""
        raise NotImplementedError

    def explicit(self, interaction: Interaction, x: Tensor) -> Tensor | None:
        """ψ [G, C, K]; None where it would be mostly zeros."""
        raise NotImplementedError

    def score(self, interaction: Interaction, x: Tensor, heads: Sequence[Head | None]) -> Tensor:
        return self.score_numbers(interaction, x, gather(heads, self.numbers_per_user))

    @torch.no_grad()
    def fit(self, problem: HeadProblem) -> list[np.ndarray]:
        return list(newton_cg(self._convex(problem), problem.precision).numpy())

    def _convex(self, problem: HeadProblem) -> Problem:
        dot, outer = self.design(problem.interaction, problem.x)
        shared = self.shared_score(problem.interaction, problem.x.flatten(0, 1))
        offset = shared.view_as(problem.offset) + problem.offset
        size = self.coordinates
        return Problem(dot, outer, size, offset, problem.target, problem.mask, problem.loss)

    def fisher(
        self, interaction: Interaction, x: Tensor, share: Tensor, binary: bool
    ) -> tuple[Tensor, Tensor] | None:
        rows = self.explicit(interaction, x)
        if rows is None:
            return interaction.fisher(x, share, binary)
        return torch.ones(1, 1), mean_fisher(rows, share, binary)

    def covariance(
        self,
        interaction: Interaction,
        x: Tensor,
        posterior: LaplacePosterior,
        precision: Tensor,
        records: int,
    ) -> Tensor | None:
        count = self.shared_score(interaction, x).shape[1]
        _, outer = self.design(interaction, x[None].expand(count, *x.shape))
        return posterior.covariance(outer(torch.eye(count)[:, None]), precision, records)

    @torch.no_grad()
    def online_update(
        self, problem: HeadProblem, posterior: LaplacePosterior, head: Head | None
    ) -> Head:
        fitted = head or Head.of(self.empty())
        interaction, x = problem.interaction, problem.x[0]
        dot, outer = self.design(interaction, problem.x)
        scores = self.score(interaction, x, [fitted] * len(x))
        turned = Problem(
            lambda v: dot(posterior.turn(v)),
            lambda r: posterior.back(outer(r)),
            self.coordinates,
            problem.offset + scores,
            problem.target,
            problem.mask,
            problem.loss,
        )
        precision = problem.precision + fitted.records * posterior.values
        rows = self.explicit(interaction, x)
        delta = (
            newton_cg(turned, precision)
            if rows is None
            else _by_lbfgs(turned, rows @ posterior.right_vectors, precision)
        )
        numbers = torch.tensor(fitted.numbers)
        numbers[: self.coordinates] += posterior.turn(delta)[0]
        return Head.of(numbers, fitted.records, fitted.until)


def _by_lbfgs(problem: Problem, rows: Tensor, precision: Tensor) -> Tensor:
    """The same with explicit features [G, C, K]: the Hessian hardly changes on the way, so a few
    gradients are enough where features are as wide as the encoder.
    """
    flat = rows.flatten(0, 1)
    explicit = replace(
        problem,
        dot=lambda v: (flat @ v[0]).view(problem.offset.shape),
        outer=lambda r: (r.flatten() @ flat)[None],
    )
    return lbfgs(explicit, precision, hessian_inverse(explicit, rows, precision))


def gather(heads: Sequence[Head | None], size: int) -> Tensor:
    """[G, size] the heads' numbers, zeros for None: reads only what is asked for.

    Raises:
        ValueError: a head has another number of numbers.
    """
    out = np.zeros((len(heads), size), dtype=np.float32)
    for row, head in enumerate(heads):
        if head is not None:
            if len(head.numbers) != size:
                raise ValueError(f"a head of {len(head.numbers)} numbers, where {size} are needed")
            out[row] = head.numbers
    return torch.from_numpy(out)
