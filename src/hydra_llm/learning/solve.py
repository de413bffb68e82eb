"""Fitting heads as small convex problems on frozen features, for many users at once (DESIGN 4 and 5).

    minimise over δ   Σ_g loss(target_g, offset_g + φ_g·δ) + ½ Σ λ δ²

Newton's method; each step's linear system is solved by conjugate gradients, so that no V×V matrix is ever formed and label
features stay compressed. All users of a call advance together; one that has converged stands still.

Letters: U users, G groups (padded), C candidates, V length of a head. Knows no texts, users' names or files.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_llm.model.combine import Combiner
from hydra_llm.model.scorer import Loss

Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Problem:
    """U convex problems of the same shape."""

    dot: Apply
    """[U, V] → [U, G, C]."""
    outer: Apply
    """[U, G, C] → [U, V], its transpose."""
    size: int
    """V."""
    offset: Tensor
    """[U, G, C] scores before the user's own part."""
    target: Tensor
    """[U, G, C]."""
    mask: Tensor
    """[U, G, C]; a group without any candidate, or without any target, counts nothing."""
    loss: Loss


def head_problem(combiner: Combiner, x: Tensor, offset: Tensor, target: Tensor, mask: Tensor, loss: Loss) -> Problem:
    """A head on features x [U, G, ...]; with the binary loss its last number is a bias."""
    if loss == "listwise":  # a bias moves all candidates of a group alike: it cannot matter
        return Problem(lambda v: combiner.dot(x, v), lambda r: combiner.outer(x, r), combiner.size, offset, target, mask, loss)
    return Problem(
        lambda v: combiner.dot(x, v[:, :-1]) + v[:, -1, None, None],
        lambda r: torch.cat([combiner.outer(x, r), r.sum((1, 2))[:, None]], 1),
        combiner.size + 1,
        offset,
        target,
        mask,
        loss,
    )


def in_basis(problem: Problem, basis: Tensor) -> Problem:
    """The same problem for coefficients [U, K] on a basis [K, V] that all users share."""
    return Problem(
        lambda c: problem.dot(c @ basis),
        lambda r: problem.outer(r) @ basis.T,
        len(basis),
        problem.offset,
        problem.target,
        problem.mask,
        problem.loss,
    )


def losses(scores: Tensor, target: Tensor, mask: Tensor, loss: Loss) -> Tensor:
    """Loss of each group: [..., G, C] → [..., G]. Listwise cross-entropy, or the sum of the pairs' logistic losses."""
    if loss == "binary":
        return (torch.nn.functional.binary_cross_entropy_with_logits(scores, target, reduction="none") * mask).sum(-1)
    logp = scores.masked_fill(~mask, -1e30).log_softmax(-1)
    return -(target * logp * mask).sum(-1)


def slope(scores: Tensor, problem: Problem) -> tuple[Tensor, Apply]:
    """Gradient of the losses by the scores, and the product with their Hessian."""
    mask, target = problem.mask, problem.target
    if problem.loss == "binary":
        p = torch.sigmoid(scores)
        return (p - target) * mask, lambda u: p * (1 - p) * mask * u
    p = scores.masked_fill(~mask, -1e30).softmax(-1) * mask
    mass = (target * mask).sum(-1, keepdim=True)
    return mass * p - target * mask, lambda u: mass * p * (u - (p * u).sum(-1, keepdim=True))


def solve(problem: Problem, precision: float | Tensor, *, steps: int = 25, tolerance: float = 1e-4, inverse: Apply | None = None) -> Tensor:
    """The minimiser [U, V] of each problem under a Gaussian prior N(0, 1/precision) (a number, or one per coordinate [V]).

    `inverse`: about the inverse of the objective's second derivative, [U, V] → [U, V]; with it the linear systems take fewer steps.
    Stops for a user when the gradient's largest entry is below `tolerance` times that at δ = 0 (or 1, if that is larger).
    """
    U, size = len(problem.offset), problem.size
    v = problem.offset.new_zeros(U, size)
    value = _objective(v, problem, precision)
    floor: Tensor | None = None
    for _ in range(steps):
        g_scores, curvature = slope(problem.offset + problem.dot(v), problem)
        gradient = problem.outer(g_scores) + precision * v
        worst = gradient.abs().amax(-1)
        floor = worst.clamp_min(1.0) * tolerance if floor is None else floor
        active = worst > floor
        if not active.any():
            break
        hessian = lambda d, c=curvature: problem.outer(c(problem.dot(d))) + precision * d  # noqa: E731
        step = _conjugate_gradients(hessian, -gradient * active[:, None], inverse)
        v, value = _search(v, step, value, gradient, problem, precision)
    return v


def _objective(v: Tensor, problem: Problem, precision: float | Tensor) -> Tensor:
    fit = losses(problem.offset + problem.dot(v), problem.target, problem.mask, problem.loss).sum(-1)
    return fit + 0.5 * (precision * v * v).sum(-1)


def _conjugate_gradients(hessian: Apply, b: Tensor, inverse: Apply | None = None, *, steps: int = 40, tolerance: float = 1e-2) -> Tensor:
    """Solve hessian(x) = b for each user [U, V], preconditioned by `inverse`; inexact, as Newton's method allows."""
    x, r = torch.zeros_like(b), b.clone()
    z = r if inverse is None else inverse(r)
    p, rz = z.clone(), (r * z).sum(-1)
    stop = (b * b).sum(-1) * tolerance**2
    for _ in range(steps):
        going = (r * r).sum(-1) > stop
        if not going.any():
            break
        hp = hessian(p)
        alpha = torch.where(going, rz / (p * hp).sum(-1).clamp_min(1e-30), 0.0)[:, None]
        x, r = x + alpha * p, r - alpha * hp
        z = r if inverse is None else inverse(r)
        new = (r * z).sum(-1)
        p, rz = z + (new / rz.clamp_min(1e-30))[:, None] * p, torch.where(going, new, rz)
    return x


def _search(v: Tensor, step: Tensor, value: Tensor, gradient: Tensor, problem: Problem, precision: float | Tensor) -> tuple[Tensor, Tensor]:
    """Halve each user's step until the objective falls (Armijo); a user for whom it never does stands still."""
    size, slope = v.new_ones(len(v)), (gradient * step).sum(-1)
    for _ in range(12):
        trial = v + size[:, None] * step
        found = _objective(trial, problem, precision)
        good = found <= value + 1e-4 * size * slope + 1e-6 * value.abs()
        if good.all():
            break
        size = torch.where(good, size, size / 2)
    return torch.where(good[:, None], trial, v), torch.where(good, found, value)
