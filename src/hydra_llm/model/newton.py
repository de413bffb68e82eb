"""Solvers for regularised heads on frozen features, for many users at once.

    minimise over v   Σ_g loss(target_g, offset_g + φ_g·v)  +  ½ Σ precision · v²

or, in the place of the last term, ½ vᵀ precision(v) with a symmetric linear map.

`newton_cg`: Newton's method with conjugate gradients, so that no V×V matrix is formed and label
features stay compressed; all users of a call advance together, and one that has converged stands
still. `lbfgs`: for one user whose Hessian is about known.
Letters: U users, G groups (padded), C candidates, V coordinates.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

Loss = Literal["listwise", "binary"]
Apply = Callable[[Tensor], Tensor]
Precision = float | Tensor | Apply  # of the prior: of each coordinate [V], or as a linear map
TOLERANCE = 1e-4  # of the gradient's largest entry, relative to that at v = 0 (or to 1 if larger)
CONTINUED = 1e-5  # of a fit that goes on: else what each one leaves would add up
MEMORY = 8  # steps whose change of gradient `lbfgs` keeps
HALVINGS = 12  # of a step, at most, until the objective falls (Armijo)


@dataclass(frozen=True, slots=True)
class Problem:
    """U convex problems of the same shape."""

    dot: Apply  # [U, V] → [U, G, C]
    outer: Apply  # [U, G, C] → [U, V], its transpose
    size: int  # V
    offset: Tensor  # [U, G, C] scores at v = 0
    target: Tensor  # [U, G, C]
    mask: Tensor  # [U, G, C]; a group without any candidate, or without any target, counts nothing
    loss: Loss


def with_bias(problem: Problem) -> Problem:
    """The problem with a bias as last coordinate; unchanged for the listwise loss."""
    if problem.loss == "listwise":
        return problem
    dot, outer = problem.dot, problem.outer
    return replace(
        problem,
        dot=lambda v: dot(v[:, :-1]) + v[:, -1, None, None],
        outer=lambda r: torch.cat([outer(r), r.sum((1, 2))[:, None]], 1),
        size=problem.size + 1,
    )


def losses(scores: Tensor, target: Tensor, mask: Tensor, loss: Loss) -> Tensor:
    """[..., G, C] → [..., G] loss of each group: cross-entropy, or the sum of logistic losses."""
    if loss == "binary":
        pairs = binary_cross_entropy_with_logits(scores, target, reduction="none")
        return (pairs * mask).sum(-1)
    logp = scores.masked_fill(~mask, -1e30).log_softmax(-1)
    return -(target * logp * mask).sum(-1)


def grad_and_hvp(scores: Tensor, problem: Problem) -> tuple[Tensor, Apply]:
    """Gradient of the losses by the scores, and the product of their Hessian with a vector."""
    mask, target = problem.mask, problem.target
    if problem.loss == "binary":
        p = torch.sigmoid(scores)
        return (p - target) * mask, lambda u: p * (1 - p) * mask * u
    p = scores.masked_fill(~mask, -1e30).softmax(-1) * mask
    mass = (target * mask).sum(-1, keepdim=True)
    return mass * p - target * mask, lambda u: mass * p * (u - (p * u).sum(-1, keepdim=True))


def newton_cg(
    problem: Problem,
    precision: Precision,
    *,
    start: Tensor | None = None,
    steps: int = 25,
    products: int = 40,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """The minimiser [U, V] of each problem under a Gaussian prior N(0, 1/precision); `start` [U, V]
    is a first guess, by default 0. At most `products` with the Hessian are taken in each step.
    """
    value_at = partial(objective, problem=problem, precision=precision)
    v = problem.offset.new_zeros(len(problem.offset), problem.size) if start is None else start
    value, floor = value_at(v), None
    for _ in range(steps):
        by_score, hvp = grad_and_hvp(problem.offset + problem.dot(v), problem)
        gradient = problem.outer(by_score) + times(precision, v)
        worst = gradient.abs().amax(-1)
        floor = worst.clamp_min(1.0) * tolerance if floor is None else floor
        active = worst > floor
        if not active.any():
            break
        hessian = partial(_hessian_product, problem=problem, hvp=hvp, precision=precision)
        step = _conjugate_gradients(hessian, -gradient * active[:, None], steps=products)
        v, value = _line_search(v, step, value, gradient, value_at)
    return v


def times(precision: Precision, v: Tensor) -> Tensor:
    """A prior's precision times v [U, V]."""
    return (
        precision(v) if callable(precision) and not isinstance(precision, Tensor) else precision * v
    )


def objective(v: Tensor, problem: Problem, precision: Precision) -> Tensor:
    """[U] the regularised loss at v [U, V]."""
    return _penalised(problem.offset + problem.dot(v), v, problem, precision)


def _penalised(scores: Tensor, v: Tensor, problem: Problem, precision: Precision) -> Tensor:
    data = losses(scores, problem.target, problem.mask, problem.loss).sum(-1)
    return data + 0.5 * (times(precision, v) * v).sum(-1)


def _hessian_product(d: Tensor, problem: Problem, hvp: Apply, precision: Precision) -> Tensor:
    """The objective's Hessian times d [U, V]; `hvp` multiplies with that by the scores."""
    return problem.outer(hvp(problem.dot(d))) + times(precision, d)


def _conjugate_gradients(
    hessian: Apply, b: Tensor, *, steps: int, tolerance: float = 1e-2
) -> Tensor:
    """Solve hessian(x) = b for each user [U, V]; inexactly, as Newton's method allows."""
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
        p = r + (new / rr.clamp_min(1e-30))[:, None] * p
        rr = torch.where(going, new, rr)
    return x


def _line_search(
    v: Tensor, step: Tensor, value: Tensor, gradient: Tensor, of: Apply
) -> tuple[Tensor, Tensor]:
    """Halve each user's step until the objective falls; a user for whom it never does stays."""
    size, slope = v.new_ones(len(v)), (gradient * step).sum(-1)
    for _ in range(HALVINGS):
        trial = v + size[:, None] * step
        after = of(trial)
        good = after <= value + 1e-4 * size * slope + 1e-6 * value.abs()
        if good.all():
            break
        size = torch.where(good, size, size / 2)
    return torch.where(good[:, None], trial, v), torch.where(good, after, value)


def lbfgs(
    problem: Problem, precision: Tensor, inverse: Apply, *, tolerance: float = TOLERANCE
) -> Tensor:
    """The minimiser [1, V] for one user by L-BFGS (Nocedal and Wright, Numerical Optimization,
    algorithm 7.5); `inverse` is about the inverse of the Hessian, [1, V] → [1, V].
    """
    v = problem.offset.new_zeros(1, problem.size)
    value, gradient = _value_and_gradient(v, problem, precision)
    floor = float(gradient.abs().max().clamp_min(1.0)) * tolerance
    past: list[tuple[Tensor, Tensor, float]] = []
    for _ in range(200):
        if float(gradient.abs().max()) <= floor:
            break
        step = -_two_loop(gradient, past, inverse)
        size, slope = 1.0, float((gradient * step).sum())
        for _ in range(HALVINGS):
            trial, after = _value_and_gradient(v + size * step, problem, precision)
            if trial <= value + 1e-4 * size * slope + 1e-6 * abs(value):
                break
            size /= 2
        taken, change = size * step, after - gradient
        curvature = float((taken * change).sum())
        if curvature <= 0 or trial > value + 1e-6 * abs(value):  # rounding is all that is left
            break
        v, value, gradient = v + taken, trial, after
        past = [*past[1 - MEMORY :], (taken, change, 1 / curvature)]
    return v


def _value_and_gradient(v: Tensor, problem: Problem, precision: Tensor) -> tuple[float, Tensor]:
    scores = problem.offset + problem.dot(v)
    gradient = problem.outer(grad_and_hvp(scores, problem)[0]) + precision * v
    return float(_penalised(scores, v, problem, precision)), gradient


def _two_loop(gradient: Tensor, past: list[tuple[Tensor, Tensor, float]], inverse: Apply) -> Tensor:
    """The gradient times the inverse Hessian, corrected by past steps (ibid., algorithm 7.4)."""
    shares = []
    for taken, change, rate in reversed(past):
        shares.append(rate * float(taken[0] @ gradient[0]))
        gradient = gradient - shares[-1] * change
    gradient = inverse(gradient)
    for (taken, change, rate), share in zip(past, reversed(shares), strict=True):
        gradient = gradient + taken * (share - rate * float(change[0] @ gradient[0]))
    return gradient


def hessian_inverse(problem: Problem, rows: Tensor, precision: Tensor) -> Apply:
    """The inverse of the objective's Hessian at v = 0, for explicit features `rows` [G, C, V]."""
    _, hvp = grad_and_hvp(problem.offset, problem)
    data = hvp(rows.permute(2, 0, 1)).flatten(1) @ rows.flatten(0, 1)
    jitter = 1e-6 * data.diagonal().mean()
    factor = torch.linalg.cholesky(data + torch.diag(precision + jitter))
    return lambda r: torch.cholesky_solve(r.T, factor).T
