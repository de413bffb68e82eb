"""Heads that are linear in the user's numbers: the user's vector is a combination of directions.

    s = (θ₀ + a·B)·φ + b₀ + a·b     a: the user's K numbers; B [K, V] and b [K]: the directions

The kinds differ in B alone. Fitting a is a convex problem, its posterior is Gaussian to second
order (model/laplace.py), and feedback moves it without a new fit:

    minimise over a   Σ over the judged groups of loss(a) + ½ (a − a_fit)ᵀ (λ + n·F) (a − a_fit)

a_fit is the head as it was fitted on n records, λ the prior's precision (of each coordinate, where
the basis is learned), F the mean Fisher information of a group. Where the records count k times
what they did (a discount, a change of taste) n is k·n, and a_fit is k (λ + n·F) / (λ + k·n·F) times
what it was: the minimum of the prior and of what is left of the records.
Letters: U users, G groups, C candidates, V length of θ₀, K coordinates.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from hydra_llm.model.forgetting import counted
from hydra_llm.model.head import Head
from hydra_llm.model.heads.base import HeadProblem, VectorShared
from hydra_llm.model.interactions import Interaction
from hydra_llm.model.laplace import LaplacePosterior, mean_fisher
from hydra_llm.model.newton import (
    CONTINUED,
    TOLERANCE,
    Apply,
    Problem,
    grad_and_hvp,
    hessian_inverse,
    lbfgs,
    newton_cg,
    with_bias,
)


class AdditiveHead(VectorShared):
    """The base of these kinds; a kind gives its directions."""

    updates_online = True
    own_bias = False  # whether one more number, the last, is a bias of the user

    def __init__(self, size: int, coordinates: int | None = None):
        super().__init__(size)
        self.coordinates = size if coordinates is None else coordinates

    def directions(self) -> tuple[Tensor, Tensor] | None:
        """B [K, V] and b [K]; None where the coordinates are the vector itself."""
        raise NotImplementedError

    @property
    def numbers_per_user(self) -> int:
        return self.coordinates + 1 if self.own_bias else self.coordinates

    @property
    def joint_numbers(self) -> int:
        return self.coordinates

    def score_numbers(self, interaction: Interaction, x: Tensor, numbers: Tensor) -> Tensor:
        coordinates = numbers[:, : self.coordinates]
        # the user's bias; joint training passes the coordinates alone, and the sum over none is 0
        bias = numbers[:, self.coordinates :].sum(-1)
        own, basis = coordinates, self.directions()
        if basis is not None:
            own = coordinates @ basis[0]
            bias = bias + coordinates @ basis[1]
        scores = interaction.dot(x[:, None], self.shared + own)[:, 0]
        return scores + (self.shared_bias + bias)[:, None]

    def design(self, interaction: Interaction, x: Tensor) -> tuple[Apply, Apply]:
        """The score's linear part for x [U, G, ...], [U, K] → [U, G, C], and its transpose."""
        if (basis := self.directions()) is None:
            return partial(interaction.dot, x), partial(interaction.outer, x)
        B, b = basis

        def dot(a: Tensor) -> Tensor:
            return interaction.dot(x, a @ B) + (a @ b)[:, None, None]

        def outer(r: Tensor) -> Tensor:
            return interaction.outer(x, r) @ B.T + r.sum((1, 2))[:, None] * b

        return dot, outer

    def explicit(self, interaction: Interaction, x: Tensor) -> Tensor | None:
        """The features of the coordinates [G, C, K]; None where they would be mostly zeros."""
        if (basis := self.directions()) is None:
            return interaction.explicit(x)
        return interaction.on_basis(x, basis[0]) + basis[1]

    @torch.no_grad()
    def fit(self, problem: HeadProblem) -> list[np.ndarray]:
        convex = self.convex_problem(problem)
        start = None if problem.start is None else problem.start[:, : convex.size]
        tolerance = TOLERANCE if start is None else CONTINUED
        precisions = self.precisions(problem.precision)
        values = newton_cg(convex, precisions, start=start, tolerance=tolerance)
        return list(pad(values, (0, self.numbers_per_user - convex.size)).numpy())

    def convex_problem(self, problem: HeadProblem) -> Problem:
        """What `fit` minimises, by the users' numbers (without the bias where it has no effect)."""
        interaction, x = problem.interaction, problem.x
        shared = self.shared_score(interaction, x.flatten(0, 1)).view_as(problem.offset)
        convex = self._convex(problem, shared, *self.design(interaction, x))
        return with_bias(convex) if self.own_bias else convex

    @torch.no_grad()
    def left_out(self, problem: HeadProblem, head: Head) -> Tensor:
        """[G, P] one user's numbers (U = 1) without each group, to first order around the head that
        was fitted on all of them, oldest first: influence functions (Koh and Liang, ICML 2017).
        """
        convex, numbers = self.convex_problem(problem), torch.tensor(head.numbers)
        size, count = convex.size, self.coordinates
        x = problem.x.expand(count, *problem.x.shape[1:])
        rows = self.design(problem.interaction, x)[0](torch.eye(count))
        rows = torch.cat([rows, torch.ones(size - count, *rows.shape[1:])])
        by_score, hvp = grad_and_hvp(convex.offset + convex.dot(numbers[None, :size]), convex)
        hessian = hvp(rows).flatten(1) @ rows.flatten(1).T
        hessian += torch.diag(torch.ones(size) * self.precisions(problem.precision))
        gradients = torch.einsum("vgc,gc->vg", rows, by_score[0])
        if problem.discount is not None:  # without a group those before it are less old
            gradients = gradients - (1 / problem.discount - 1) * (gradients.cumsum(1) - gradients)
        changes = torch.linalg.solve(hessian, gradients).T
        return numbers + pad(changes, (0, self.numbers_per_user - size))

    def _convex(self, problem: HeadProblem, scores: Tensor, dot: Apply, outer: Apply) -> Problem:
        """The problem in the coordinates of `dot`, from heads that give these scores."""
        offset, target, mask = scores + problem.offset, problem.target, problem.mask
        return Problem(dot, outer, self.coordinates, offset, target, mask, problem.loss)

    def fisher(
        self, interaction: Interaction, x: Tensor, share: Tensor, binary: bool
    ) -> tuple[Tensor, ...] | None:
        if (rows := self.explicit(interaction, x)) is None:
            return interaction.fisher(x, share, binary)
        return torch.ones(1, 1), mean_fisher(rows, share, binary)

    def covariance(
        self, interaction: Interaction, x: Tensor, posterior: LaplacePosterior, precision: Tensor
    ) -> Tensor | None:
        count = self.shared_score(interaction, x).shape[1]
        _, outer = self.design(interaction, x[None].expand(count, *x.shape))
        return posterior.covariance(outer(torch.eye(count)[:, None]), precision)

    @torch.no_grad()
    def online_update(
        self, problem: HeadProblem, posterior: LaplacePosterior, head: Head | None
    ) -> Head:
        fitted = Head.of(self.empty()) if head is None else head
        interaction, x = problem.interaction, problem.x[0]
        prior, seen = self.precisions(problem.precision), counted(fitted.records, problem.discount)
        fisher = seen * posterior.values
        if problem.keep < 1:
            fitted = self._faded(fitted, posterior, prior / (prior + fisher), problem.keep)
        dot, outer = self.design(interaction, problem.x)
        scores = self.score(interaction, x, [fitted] * len(x))
        convex = self._convex(
            problem, scores, lambda v: dot(posterior.turn(v)), lambda r: posterior.back(outer(r))
        )
        precision = prior + problem.keep * fisher
        if (features := self.explicit(interaction, x)) is None:
            change = newton_cg(convex, precision)
        else:
            change = _minimise_explicit(convex, features @ posterior.right_vectors, precision)
        numbers = torch.tensor(fitted.numbers)
        numbers[: self.coordinates] += posterior.turn(change)[0]
        return Head.of(numbers, fitted.records, fitted.until)

    def _faded(self, head: Head, posterior: LaplacePosterior, prior: Tensor, keep: float) -> Head:
        """The head as if its records counted `keep` of what they do: nearer to the shared one the
        less they tell of a direction; `prior` [K] is the prior's share of the precision.
        """
        numbers = torch.tensor(head.numbers)
        own = posterior.back(numbers[None, : self.coordinates])
        own = own * keep / (prior + keep * (1 - prior))
        numbers[: self.coordinates] = posterior.turn(own)[0]
        return Head.of(numbers, head.records, head.until)


def _minimise_explicit(problem: Problem, rows: Tensor, precision: Tensor) -> Tensor:
    """The minimiser [1, K] of one user's problem with features `rows` [G, C, K], as wide as the
    encoder: the Hessian hardly changes on the way, so that a few gradients are enough.
    """
    flat, shape = rows.flatten(0, 1), problem.offset.shape
    explicit = replace(
        problem, dot=lambda v: (flat @ v[0]).view(shape), outer=lambda r: (r.flatten() @ flat)[None]
    )
    return lbfgs(explicit, precision, hessian_inverse(explicit, rows, precision))
