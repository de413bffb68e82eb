"""Fitting heads as small convex problems on frozen features, for many users at once (DESIGN 4 and
5).

    minimise over δ   Σ_g loss(target_g, offset_g + φ_g·δ) + ½ Σ λ δ²

`solve`: Newton's method; each step's linear system is solved by conjugate gradients, so that no V×V
matrix is ever formed and label features stay compressed. All users of a call advance together; one
that has converged stands still.
`descend`: L-BFGS, for one user whose second derivative is about known: a few gradients are all that
it takes.

Letters: U users, G groups (padded), C candidates, V length of a head. Knows no texts, users' names
or files.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_llm.model.interactions import Interaction
from hydra_llm.model.scorer import Loss

Apply = Callable[[Tensor], Tensor]
TOLERANCE = 1e-4
"""Of the gradient's largest entry, beside that at δ = 0 (or beside 1, if that is larger)."""
MEMORY = 8
"""Steps whose change of gradient `descend` remembers."""


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


def head_problem(
    interaction: Interaction, x: Tensor, offset: Tensor, target: Tensor, mask: Tensor, loss: Loss
) -> Problem:
    """A head on features x [U, G, ...]; with the binary loss its last number is a bias."""
    if loss == "listwise":  # a bias moves all candidates of a group alike: it cannot matter
        return Problem(
            lambda v: interaction.dot(x, v),
            lambda r: interaction.outer(x, r),
            interaction.size,
            offset,
            target,
            mask,
            loss,
        )
    return Problem(
        lambda v: interaction.dot(x, v[:, :-1]) + v[:, -1, None, None],
        lambda r: torch.cat([interaction.outer(x, r), r.sum((1, 2))[:, None]], 1),
        interaction.size + 1,
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
    """Loss of each group: [..., G, C] → [..., G]. Listwise cross-entropy, or the sum of the pairs'
    logistic losses.
    """
    if loss == "binary":
        return (
            torch.nn.functional.binary_cross_entropy_with_logits(scores, target, reduction="none")
            * mask
        ).sum(-1)
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


def solve(
    problem: Problem, precision: float | Tensor, *, steps: int = 25, tolerance: float = TOLERANCE
) -> Tensor:
    """The minimiser [U, V] of each problem under a Gaussian prior N(0, 1/precision) (a number, or
    one per coordinate [V]).

    Stops for a user when the gradient is small, see `TOLERANCE`.
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
        step = _conjugate_gradients(hessian, -gradient * active[:, None])
        v, value = _search(v, step, value, gradient, problem, precision)
    return v


def _objective(v: Tensor, problem: Problem, precision: float | Tensor) -> Tensor:
    return _penalised(problem.offset + problem.dot(v), v, problem, precision)


def _penalised(scores: Tensor, v: Tensor, problem: Problem, precision: float | Tensor) -> Tensor:
    """The objective [U] of heads whose scores are known."""
    return losses(scores, problem.target, problem.mask, problem.loss).sum(-1) + 0.5 * (
        precision * v * v
    ).sum(-1)


def descend(
    problem: Problem,
    precision: Tensor,
    inverse: Apply,
    *,
    steps: int = 200,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """What `solve` finds for one user [1, V], by L-BFGS (Nocedal and Wright, Numerical
    Optimization, algorithm 7.5).

    `inverse` is about the inverse of the objective's second derivative, [1, V] → [1, V]: a step has
    the right direction from the first on.
    """
    v = problem.offset.new_zeros(1, problem.size)
    value, gradient = _value_and_gradient(v, problem, precision)
    floor = float(gradient.abs().max().clamp_min(1.0)) * tolerance
    past: list[tuple[Tensor, Tensor, float]] = []
    for _ in range(steps):
        if float(gradient.abs().max()) <= floor:
            break
        step = -_bent(gradient, past, inverse)
        size, slope = 1.0, float((gradient * step).sum())
        for _ in range(12):  # halved until the objective falls, as in `_search`
            found, after = _value_and_gradient(v + size * step, problem, precision)
            if found <= value + 1e-4 * size * slope + 1e-6 * abs(value):
                break
            size /= 2
        moved, change = size * step, after - gradient
        curvature = float((moved * change).sum())
        if curvature <= 0 or found > value + 1e-6 * abs(value):  # rounding is all that is left
            break
        v, value, gradient = v + moved, found, after
        past = [*past[1 - MEMORY :], (moved, change, 1 / curvature)]
    return v


def _value_and_gradient(v: Tensor, problem: Problem, precision: Tensor) -> tuple[float, Tensor]:
    scores = problem.offset + problem.dot(v)
    return float(_penalised(scores, v, problem, precision)), problem.outer(
        slope(scores, problem)[0]
    ) + precision * v


def _bent(gradient: Tensor, past: list[tuple[Tensor, Tensor, float]], inverse: Apply) -> Tensor:
    """The gradient times the inverse second derivative as the past steps have corrected it (ibid.,
    algorithm 7.4).
    """
    shares = []
    for moved, change, rate in reversed(past):
        shares.append(rate * float(moved[0] @ gradient[0]))
        gradient = gradient - shares[-1] * change
    gradient = inverse(gradient)
    for (moved, change, rate), share in zip(past, reversed(shares), strict=True):
        gradient = gradient + moved * (share - rate * float(change[0] @ gradient[0]))
    return gradient


def _conjugate_gradients(
    hessian: Apply, b: Tensor, *, steps: int = 40, tolerance: float = 1e-2
) -> Tensor:
    """Solve hessian(x) = b for each user [U, V]; inexact, as Newton's method allows."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), (b * b).sum(-1)
    stop = rr * tolerance**2
    for _ in range(steps):
        going = rr > stop
        if not going.any():
            break
        hp = hessian(p)
        alpha = torch.where(going, rr / (p * hp).sum(-1).clamp_min(1e-30), 0.0)[:, None]
        x, r = x + alpha * p, r - alpha * hp
        new = (r * r).sum(-1)
        p, rr = r + (new / rr.clamp_min(1e-30))[:, None] * p, torch.where(going, new, rr)
    return x


def _search(
    v: Tensor,
    step: Tensor,
    value: Tensor,
    gradient: Tensor,
    problem: Problem,
    precision: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Halve each user's step until the objective falls (Armijo); a user for whom it never does
    stands still.
    """
    size, slope = v.new_ones(len(v)), (gradient * step).sum(-1)
    for _ in range(12):
        trial = v + size[:, None] * step
        found = _objective(trial, problem, precision)
        good = found <= value + 1e-4 * size * slope + 1e-6 * value.abs()
        if good.all():
            break
        size = torch.where(good, size, size / 2)
    return torch.where(good[:, None], trial, v), torch.where(good, found, value)
