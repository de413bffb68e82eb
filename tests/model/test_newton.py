"""The solver against scipy's L-BFGS, autograd and explicit features."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from hydra_llm.model.heads import HeadProblem, make_head
from hydra_llm.model.interactions import Cross, Interaction, LabelBilinear
from hydra_llm.model.newton import (
    Loss,
    Problem,
    grad_and_hvp,
    lbfgs,
    losses,
    newton_cg,
    objective,
    with_bias,
)

LOSSES: tuple[Loss, ...] = ("listwise", "binary")
SIZE = 4
Case = tuple[Problem, Tensor]


def problem_of(
    loss: Loss,
    users: int = 3,
    groups: int = 5,
    candidates: int = 4,
    seed: int = 0,
    scale: float = 1.0,
) -> tuple[Problem, Tensor]:
    """Random problems with padding (the last user has one group only), and their explicit features
    [U, G, C, V].
    """
    draw = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(users, groups, candidates, SIZE, generator=draw, dtype=torch.float64)
    mask = torch.rand(users, groups, candidates, generator=draw) < 0.75
    mask[..., 0] = True
    mask[-1, 1:] = False
    target = torch.rand(users, groups, candidates, generator=draw, dtype=torch.float64) * mask
    if loss == "listwise":
        target = target / target.sum(-1, keepdim=True).clamp_min(1e-9)
        target[0, 2] = 0  # a group that says nothing
    offset = torch.randn(users, groups, candidates, generator=draw, dtype=torch.float64)
    problem = head_problem(Cross(SIZE), x, offset, target, mask, loss)
    return problem, x if loss == "listwise" else torch.cat([x, torch.ones_like(x[..., :1])], -1)


def head_problem(
    interaction: Interaction, x: Tensor, offset: Tensor, target: Tensor, mask: Tensor, loss: Loss
) -> Problem:
    """A head on features x; with the binary loss its last number is a bias."""
    dot, outer = (lambda v: interaction.dot(x, v)), (lambda r: interaction.outer(x, r))
    return with_bias(Problem(dot, outer, interaction.size, offset, target, mask, loss))


def by_scipy(problem: Problem, phi: Tensor, precision: Tensor) -> np.ndarray:
    """Each user's minimiser, with a loss that is written anew."""
    rows = []
    for user in range(len(phi)):
        f, offset, target, mask = (
            t[user].numpy() for t in (phi, problem.offset, problem.target, problem.mask)
        )

        def objective(
            v: np.ndarray,
            f: np.ndarray = f,
            o: np.ndarray = offset,
            t: np.ndarray = target,
            m: np.ndarray = mask,
        ) -> float:
            total = 0.5 * float((precision.numpy() * v * v).sum())
            for g in range(len(f)):
                s = (o[g] + f[g] @ v)[m[g]]
                y = t[g][m[g]]
                if problem.loss == "listwise":
                    total += float((y * (np.logaddexp.reduce(s) - s)).sum()) if len(s) else 0.0
                else:
                    total += float((np.logaddexp(0, s) - y * s).sum())
            return total

        minimum = minimize(
            objective,
            np.zeros(phi.shape[-1]),
            method="L-BFGS-B",
            options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 2000},
        )
        rows.append(minimum.x)
    return np.stack(rows)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("strong", [0.3, 5.0])
def test_the_minimiser_is_that_of_scipy(loss: Loss, strong: float) -> None:
    problem, phi = problem_of(loss)
    precision = torch.full((phi.shape[-1],), strong, dtype=torch.float64)
    expected = by_scipy(problem, phi, precision)
    assert np.abs(expected).max() > 0.05
    assert newton_cg(problem, strong, tolerance=1e-9).numpy() == pytest.approx(expected, abs=1e-5)
    assert newton_cg(problem, strong).numpy() == pytest.approx(
        expected, abs=2e-3
    )  # as learning calls it


@pytest.mark.parametrize("loss", LOSSES)
def test_each_coordinate_has_its_own_precision(loss: Loss) -> None:
    problem, phi = problem_of(loss)
    precision = torch.logspace(-1, 3, phi.shape[-1], dtype=torch.float64)
    assert newton_cg(problem, precision, tolerance=1e-9).numpy() == pytest.approx(
        by_scipy(problem, phi, precision), abs=1e-5
    )


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    precision=st.sampled_from([0.01, 1.0, 100.0]),
)
def test_several_users_at_once_are_as_one_by_one(
    loss: Loss, seed: int, scale: float, precision: float
) -> None:
    problem, _ = problem_of(loss, seed=seed, scale=scale)
    together = newton_cg(problem, precision, steps=60, tolerance=1e-8)
    for user in range(3):
        alone, _ = problem_of(loss, seed=seed, scale=scale)
        one = slice(user, user + 1)
        x = torch.stack(
            [
                problem.dot(row.expand(3, -1))
                for row in torch.eye(problem.size, dtype=torch.float64)
            ],
            -1,
        )[one]
        single = Problem(
            lambda v, x=x: torch.einsum("ugcv,uv->ugc", x, v),
            lambda r, x=x: torch.einsum("ugcv,ugc->uv", x, r),
            alone.size,
            alone.offset[one],
            alone.target[one],
            alone.mask[one],
            loss,
        )
        assert torch.allclose(
            newton_cg(single, precision, steps=60, tolerance=1e-8)[0], together[user], atol=1e-4
        )


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.1, 1.0, 100.0]),
    precision=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_the_objective_never_ends_above_its_start(
    loss: Loss, seed: int, scale: float, precision: float
) -> None:
    problem, _ = problem_of(loss, seed=seed, scale=scale)
    v = newton_cg(problem, precision)
    assert v.isfinite().all()
    start, end = (
        objective(torch.zeros_like(v), problem, precision),
        objective(v, problem, precision),
    )
    assert (end <= start * (1 + 1e-5)).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_low_rank_heads_are_heads_on_projected_features(loss: Loss) -> None:
    problem, phi = problem_of(loss)
    phi = phi[..., :SIZE]
    kind = make_head("lowrank", Cross(SIZE), rank=2).double()
    basis = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    kind.load_state_dict({**kind.state_dict(), "basis": basis})
    users, parts = ("a", "b", "c"), (problem.offset, problem.target, problem.mask)
    heads = kind.fit(HeadProblem(users, Cross(SIZE), phi, *parts, loss))
    assert np.stack(heads).shape == (3, 2)
    expected = by_scipy(problem, phi @ basis.T, torch.ones(2, dtype=torch.float64))
    assert np.stack(heads) == pytest.approx(expected, abs=2e-3)


def test_compressed_label_features_are_as_explicit_ones() -> None:
    draw = torch.Generator().manual_seed(0)
    interaction = LabelBilinear(6, 3, 2)
    z = torch.randn(2, 5, 3, generator=draw, dtype=torch.float64)
    mask, offset = (
        torch.ones(2, 5, 3, dtype=torch.bool),
        torch.randn(2, 5, 3, generator=draw, dtype=torch.float64),
    )
    target = torch.eye(3, dtype=torch.float64)[torch.randint(3, (2, 5), generator=draw)]
    problem = head_problem(interaction, z, offset, target, mask, "listwise")
    phi = torch.einsum("lk,ugd->uglkd", torch.eye(3, dtype=torch.float64), z).flatten(-2)
    expected = by_scipy(problem, phi, torch.ones(9, dtype=torch.float64))
    assert newton_cg(problem, 1.0, tolerance=1e-9).numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_and_hessian_products_are_autograds(loss: Loss) -> None:
    problem, _ = problem_of(loss)
    scores = torch.randn(problem.offset.shape, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(problem.offset.shape, dtype=torch.float64)

    def total(s: Tensor) -> Tensor:
        return losses(s, problem.target, problem.mask, loss).sum()

    (gradient,) = torch.autograd.grad(total(scores), scores)
    _, product = torch.autograd.functional.hvp(total, scores, direction)
    by_score, hessian = grad_and_hvp(scores.detach(), problem)
    assert torch.allclose(by_score, gradient, atol=1e-10)
    assert torch.allclose(hessian(direction), product, atol=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_sees_no_padding(loss: Loss) -> None:
    problem, _ = problem_of(loss)
    scores = torch.randn(problem.offset.shape, dtype=torch.float64)
    noisy = torch.where(problem.mask, scores, 1e4)
    assert torch.equal(
        losses(noisy, problem.target, problem.mask, loss),
        losses(scores, problem.target, problem.mask, loss),
    )
    assert (losses(scores, problem.target, problem.mask, loss)[-1, 1:] == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_no_groups_or_infinite_precision_give_the_shared_head(loss: Loss) -> None:
    problem, _ = problem_of(loss)
    nothing = Problem(
        problem.dot,
        problem.outer,
        problem.size,
        problem.offset,
        problem.target,
        problem.mask.clone(),
        loss,
    )
    nothing.mask[1] = False
    minimum = newton_cg(nothing, 0.5)
    assert not minimum[1].any()
    assert minimum[0].any()
    assert not newton_cg(problem, float("inf")).any()
    assert newton_cg(problem, 1e12).abs().max() < 1e-9


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("known", ["exactly", "badly"])
def test_lbfgs_finds_scipys_minimum_with_any_preconditioner(loss: Loss, known: str) -> None:
    problem, phi = problem_of(loss, users=1, groups=12, seed=3, scale=2.0)
    precision = torch.linspace(0.05, 2.0, problem.size, dtype=torch.float64)
    zero = torch.zeros(problem.size, dtype=torch.float64)
    bent = torch.autograd.functional.hessian(
        lambda v: objective(v[None], problem, precision).sum(), zero
    )
    inverse = (
        torch.linalg.inv(bent)
        if known == "exactly"
        else torch.diag(torch.logspace(-2, 1, problem.size, dtype=torch.float64))
    )
    expected = by_scipy(problem, phi, precision)
    assert lbfgs(
        problem, precision, lambda r: r @ inverse, tolerance=1e-9
    ).numpy() == pytest.approx(expected, abs=1e-5)
    assert lbfgs(problem, precision, lambda r: r @ inverse).numpy() == pytest.approx(
        expected, abs=2e-3
    )  # as feedback calls it


def test_lbfgs_stays_where_the_start_is_the_minimum() -> None:
    problem, _ = problem_of("listwise", users=1)
    precision = torch.full((problem.size,), 1e12, dtype=torch.float64)
    assert lbfgs(problem, precision, lambda r: r / precision).abs().max() < 1e-6
