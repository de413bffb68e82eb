"""The learned prior of users' heads: EM against independent implementations, and its properties."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from hydra_llm.model.heads import make_head
from hydra_llm.model.heads.linear import LinearHead
from hydra_llm.model.interactions import Groups, LabelBilinear, make_interaction, places_among
from hydra_llm.model.scorer import Scorer
from hydra_llm.training import calibration, strengths
from hydra_llm.training.calibration import HeldOut, expected_calibration_error
from hydra_llm.training.convex import fit_base, fit_heads, shared_precision
from hydra_llm.training.dataset import TrainingSet
from hydra_llm.training.prior import Ridges, learn_basis, posterior
from hydra_llm.training.strengths import Strengths, fit_scorer

WIDTH, LABELS = 6, 3


def contrasts() -> torch.Tensor:
    """Orthonormal contrasts of three labels."""
    codes = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [0.0, -2.0]])
    return codes / codes.norm(dim=0)


def features(texts: int = 0, own_rank: int = 3) -> LabelBilinear:
    interaction = LabelBilinear(WIDTH, LABELS, WIDTH, 2, texts, own_rank)
    interaction.coding = contrasts()
    return interaction


def simulated(users: int, records: int, spread: float, seed: int = 0) -> TrainingSet:
    """Users whose scores differ along one direction of the vectors, by `spread`."""
    draw = np.random.default_rng(seed)
    left = draw.normal(size=(users * records, WIDTH)).astype(np.float32)
    own = np.repeat(draw.normal(size=users) * spread, records)
    score = np.zeros((users * records, LABELS))
    score[:, 0] = own * left[:, 0] + 0.5 * left[:, 1]
    share = softmax(score, axis=1)
    label = [draw.choice(LABELS, p=row) for row in share]
    target = torch.eye(LABELS)[label]
    mask = torch.ones_like(target, dtype=torch.bool)
    side = torch.zeros(len(left), LABELS, 1)
    groups = Groups(torch.from_numpy(left), None, side, mask, target)
    names = tuple(f"u{user:03}" for user in range(users) for _ in range(records))
    positions = torch.arange(records).repeat(users)
    return TrainingSet(groups, names, positions, torch.zeros(len(left), dtype=torch.bool), target)


def scorer_for(data: TrainingSet, kind: str = "linear") -> Scorer:
    interaction = features()
    interaction.prepare(data.groups)
    return Scorer(interaction, make_head(kind, interaction, rank=4), ["none"])


def learned(data: TrainingSet, steps: int = 4) -> tuple[Scorer, torch.Tensor]:
    scorer = scorer_for(data)
    fit_base(scorer, data, 1.0)
    ridges = Ridges(shared_precision(scorer.interaction, 1.0), 1.0, 3.0)
    *_, basis = learn_basis(scorer, data, ridges, rank=2, steps=steps)
    return scorer, basis


def test_modes_and_covariances_equal_those_of_scipy() -> None:
    draw = np.random.default_rng(0)
    rows, offset = draw.normal(size=(5, LABELS, 2)), draw.normal(size=(5, LABELS))
    target = np.eye(LABELS)[draw.integers(0, LABELS, 5)]

    def loss(a: np.ndarray) -> float:
        scores = offset + rows @ a
        data = logsumexp(scores, axis=1) - (target * scores).sum(1)
        return float(data.sum() + 0.5 * a @ a)

    found = minimize(loss, np.zeros(2), tol=1e-10).x
    hessian = np.eye(2)
    for phi, score in zip(rows, offset + rows @ found, strict=True):
        p = softmax(score)
        hessian += phi.T @ (np.diag(p) - np.outer(p, p)) @ phi
    tensors = [torch.from_numpy(x).float()[None] for x in (rows, offset, target)]
    modes, covariance = posterior(*tensors, torch.ones(1, 5, LABELS, dtype=torch.bool))
    np.testing.assert_allclose(modes[0], found, atol=1e-3)
    np.testing.assert_allclose(covariance[0], np.linalg.inv(hessian), atol=1e-3)


def test_the_direction_in_which_users_differ_is_found() -> None:
    data = simulated(users=150, records=30, spread=2.0)
    scorer, basis = learned(data, steps=6)
    # the covariance of heads, as scores of label 0 against the others by each vector's component
    table = basis.view(len(basis), 2, WIDTH + 1)[..., :WIDTH] @ scorer.interaction.project
    scores = torch.einsum("kjd,lj->kld", table, contrasts())
    difference = scores[:, 0] - scores[:, 1:].mean(1)
    sigma = difference.T @ difference
    values, vectors = torch.linalg.eigh(sigma)
    assert abs(float(vectors[0, -1])) > 0.95
    assert float(values[-1].sqrt()) == pytest.approx(2.0, abs=0.6)
    assert float(values[-2]) < 0.15 * float(values[-1])


def test_the_order_of_users_does_not_matter() -> None:
    data = simulated(users=20, records=8, spread=1.5)
    index = torch.arange(len(data)).view(20, 8).flip(0).flatten()
    (_, one), (_, other) = learned(data), learned(data.take(index))
    torch.testing.assert_close(one.T @ one, other.T @ other, atol=1e-3, rtol=1e-2)


def test_a_learned_prior_helps_users_who_differ_and_is_kept() -> None:
    data = simulated(users=50, records=12, spread=2.0)
    scorer = scorer_for(data)
    few = Strengths(ridges=(1.0, 10.0), side_ridges=(1.0,), precisions=(1.0, 10.0), bases=(10.0,))
    report, heads = fit_scorer(scorer, data, rank=2, strengths=few)
    assert report.prior_steps > 0
    assert report.loss_user < 0.95 * report.loss_shared
    assert isinstance(scorer.head, LinearHead)
    assert scorer.head.learned == 2
    again = Scorer.restore(scorer.config(), scorer.tensors())
    own = [heads[user] for user in data.users]
    assert torch.equal(again.score(data.groups, own), scorer.score(data.groups, own))
    assert torch.equal(
        scorer.core(data.groups), scorer.core(data.groups, [None] * len(data))
    )  # without records the shared head
    covariance = scorer.covariance(data.groups[:1], own[0])
    assert covariance is not None
    assert bool((covariance.diagonal() > 0).all())


def test_users_who_do_not_differ_share_one_head() -> None:
    few = Strengths(ridges=(10.0,), side_ridges=(1.0,), precisions=(3.0, 30.0), bases=(30.0,))
    shared = 0
    for seed in range(4):
        data = simulated(users=40, records=8, spread=0.0, seed=seed)
        report, heads = fit_scorer(scorer_for(data), data, rank=2, strengths=few)
        assert report.loss_user <= 1.01 * report.loss_shared
        shared += report.prior.startswith("none")
        if report.prior.startswith("none"):
            assert all(np.abs(head.numbers).max() < 1e-3 for head in heads.values())
    # by chance one in six is better by more than a standard error
    assert shared >= 3


def test_a_small_set_is_calibrated_by_every_group(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[HeldOut] = []
    monkeypatch.setattr(strengths, "calibrate", lambda scorer, parts, report: seen.extend(parts))
    few = Strengths(ridges=(10.0,), side_ridges=(1.0,), precisions=(3.0,), bases=(30.0,), steps=1)
    data = simulated(users=40, records=9, spread=1.0)
    for large, each in ((2000, 9), (0, 3)):
        monkeypatch.setattr(strengths, "LARGE_SET", large)
        seen.clear()
        fit_scorer(scorer_for(data), data, rank=2, strengths=few)
        users = [user for part in seen for user in part.late.users]
        assert sorted(users) == sorted(user for user in data.names() for _ in range(each))


def test_repeating_users_groups_makes_nothing_surer() -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(30, generator=draw)
    users = [f"u{i}" for i in range(30)]
    error = calibration.error_by_users(values, users)
    assert float(error) == pytest.approx(float(values.std(correction=0)) / 30**0.5, rel=1e-5)
    again = calibration.error_by_users(values.repeat(4), users * 4)
    assert float(again) == pytest.approx(float(error), rel=1e-5)


def test_too_few_users_have_no_learned_prior() -> None:
    data = simulated(users=1, records=8, spread=1.0)
    scorer = scorer_for(data)
    ridges = Ridges(shared_precision(scorer.interaction, 1.0), 1.0, 3.0)
    assert list(learn_basis(scorer, data, ridges, rank=2, steps=2)) == []
    report, heads = fit_scorer(scorer, data, rank=2)
    assert report.prior_steps == 0
    assert report.prior == "isotropic (1 users are too few to learn how users differ)"
    assert report.to_json(convex=True)["prior"] == report.prior
    assert len(heads) == 1


def test_lowrank_heads_take_the_basis_of_the_prior() -> None:
    data = simulated(users=30, records=15, spread=2.0)
    scorer = scorer_for(data, "lowrank")
    few = Strengths(ridges=(1.0,), side_ridges=(1.0,), precisions=(1.0, 10.0), bases=(10.0,))
    report, heads = fit_scorer(scorer, data, rank=2, strengths=few)
    assert report.prior_steps > 0
    assert len(heads["u000"].numbers) == 2 == scorer.head.rank
    again = Scorer.restore(scorer.config(), scorer.tensors())
    fitted = fit_heads(again, data, ["u000"])["u000"]
    np.testing.assert_allclose(fitted.numbers, heads["u000"].numbers, atol=1e-4)


def test_known_texts_are_found_by_their_vectors() -> None:
    draw = torch.Generator().manual_seed(0)
    known = torch.randn(50, WIDTH, generator=draw)
    rows = torch.cat([known[[7, 3]] + 1e-6, torch.randn(2, WIDTH, generator=draw)])
    assert places_among(rows, known).tolist() == [7, 3, -1, -1]


def test_outer_is_the_transpose_of_dot_with_codes() -> None:
    draw = torch.Generator().manual_seed(0)
    interaction = features(texts=2)
    left = torch.randn(5, WIDTH, generator=draw)
    interaction.known = left[:2].clone()
    blank = torch.zeros(5, LABELS, 0)
    groups = Groups(left, None, blank, torch.ones(5, LABELS, dtype=torch.bool))
    interaction.prepare(groups)
    x = interaction(groups)
    assert x[:, -1].tolist() == [0, 1, -1, -1, -1]
    v, r = (
        torch.randn(1, interaction.size, generator=draw),
        torch.randn(1, 5, LABELS, generator=draw),
    )
    dotted = (interaction.dot(x[None], v) * r).sum()
    torch.testing.assert_close(dotted, (v * interaction.outer(x[None], r)).sum())
    torch.testing.assert_close(interaction.on_basis(x, v)[..., 0], interaction.dot(x[None], v)[0])
    codes = torch.randn(5, 2, 1, generator=draw)
    transposed = (interaction.code_rows(x, v) * codes).sum()
    torch.testing.assert_close(transposed, (v * interaction.code_back(x, codes)).sum())
    own = torch.randn(1, interaction.own_size, generator=draw)
    torch.testing.assert_close(
        (interaction.own_dot(x[None], own) * r).sum(),
        (own * interaction.own_outer(x[None], r)).sum(),
    )
    assert make_interaction(interaction.config()).size == interaction.size
    assert interaction.dot(x[None], v)[0].sum(-1).abs().max() < 1e-5  # contrasts


def test_padding_and_groups_without_target_count_nothing() -> None:
    data = simulated(users=12, records=6, spread=1.0)
    silent = replace(data.groups, target=data.target * (data.positions < 5)[:, None])
    with_silent = replace(data, groups=silent)
    without = data.take((data.positions < 5).nonzero()[:, 0])
    scorers = [scorer_for(data) for _ in range(2)]
    found = []
    for scorer, own in zip(scorers, (with_silent, without), strict=True):
        ridges = Ridges(shared_precision(scorer.interaction, 1.0), 1.0, 3.0)
        *_, basis = learn_basis(scorer, own, ridges, rank=1, steps=1)
        found.append(basis.T @ basis)
    torch.testing.assert_close(found[0], found[1], atol=0.05, rtol=0.05)


def test_calibration_error_is_what_bins_say() -> None:
    shares = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.65, 0.35], [0.65, 0.35]])
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    # half right at 0.95, all right at 0.65
    expected = 0.5 * 0.45 + 0.5 * 0.35
    assert expected_calibration_error(shares, target) == pytest.approx(expected)
