"""Fitting base and heads to users whose preferences are known: what must be recovered, and what
must not be invented.
"""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hydra_llm.model.heads import Head, make_head
from hydra_llm.model.interactions import Groups, LabelBilinear
from hydra_llm.model.newton import losses
from hydra_llm.model.scorer import Loss, Scorer
from hydra_llm.training.calibration import FitReport, HeldOut, calibrate
from hydra_llm.training.convex import fit_base, fit_heads
from hydra_llm.training.dataset import TrainingSet
from hydra_llm.training.strengths import Strengths, fit_scorer
from tests.marks import slow_except

HEADS = slow_except(["linear", "lowrank", "kernel"], "linear")

_spec = importlib.util.spec_from_file_location(
    "simulated", Path(__file__).with_name("simulated.py")
)
assert _spec is not None
assert _spec.loader is not None
simulated: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(simulated)
simulate, cross_scorer = simulated.simulate, simulated.cross_scorer


QUICK = Strengths(ridges=(3.0, 30.0), side_ridges=(1.0,), precisions=(1.0, 10.0, 100.0))
"""Few strengths, where the choice among them is not the subject; one for side features that are not
there.
"""
Heads = dict[str, Head]


def quickly(scorer: Scorer, table: TrainingSet, **options: Any) -> tuple[FitReport, Heads]:
    if scorer.head.name == "kernel":
        scorer.head.tuning_steps = 30  # type: ignore[assignment]
    return fit_scorer(scorer, table, **{"strengths": QUICK, **options})


def scored(scorer: Scorer, table: TrainingSet, heads: Heads, users: Sequence[str] = ()) -> Tensor:
    return scorer.score(table.groups, [heads.get(user) for user in users or table.users])


def loss_of(scorer: Scorer, table: TrainingSet, heads: Heads, users: Sequence[str] = ()) -> float:
    assert table.groups.target is not None
    scores = scored(scorer, table, heads, users).masked_fill(~table.groups.mask, 0)
    return float(losses(scores, table.groups.target, table.groups.mask, scorer.loss).mean())


def uniform_loss(table: TrainingSet, loss: Loss) -> float:
    assert table.groups.target is not None
    return float(
        losses(
            torch.zeros_like(table.groups.target), table.groups.target, table.groups.mask, loss
        ).mean()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "loss"),
    [(h, loss) for h in ("linear", "lowrank") for loss in ("listwise", "binary")]
    + [("kernel", "listwise")],
)
def test_new_users_are_predicted_best_by_their_own_heads(head: str, loss: Loss) -> None:
    table, _ = simulate(20, 20, differ=1.5, shared=2.0, loss=loss)
    train, new = table.of(table.names()[:10]), table.of(table.names()[10:])
    early, late = new.split_late(0.4)
    scorer = cross_scorer(head, table, loss=loss, rank=5)
    report, _ = quickly(scorer, train)
    shared_before = {name: value.clone() for name, value in scorer.tensors().items()}
    heads = fit_heads(scorer, early, new.names())
    own, shared, uniform = (
        loss_of(scorer, late, heads),
        loss_of(scorer, late, {}),
        uniform_loss(late, loss),
    )
    assert own < (0.95 if head == "kernel" else 0.85) * shared
    assert shared < uniform
    assert report.loss_user < report.loss_shared < report.loss_uniform
    assert all(
        torch.equal(value, shared_before[name]) for name, value in scorer.tensors().items()
    )  # a new user changes nothing shared
    swapped = dict(zip(new.names(), new.names()[1:] + new.names()[:1], strict=True))
    assert (
        loss_of(scorer, late, heads, [swapped[user] for user in late.users]) > shared
    )  # another user's head is worse than none


def test_a_users_weights_are_recovered() -> None:
    table, truth = simulate(16, 60, differ=1.5)
    scorer = cross_scorer("linear", table)
    _, heads = quickly(scorer, table)
    for name, weights in truth.items():
        learned = scorer.tensors()["head.shared"] + torch.tensor(heads[name].numbers[:-1])
        assert torch.cosine_similarity(learned, weights, dim=0) > 0.9, name


@pytest.mark.slow
def test_strengths_follow_how_much_users_differ() -> None:
    alike, _ = simulate(24, 10, differ=0.0, shared=1.5)
    unlike, _ = simulate(24, 10, differ=4.0, shared=0.5)
    reports = [fit_scorer(cross_scorer("linear", table), table)[0] for table in (alike, unlike)]
    assert reports[0].precision >= 100 > reports[1].precision
    assert reports[0].loss_user == pytest.approx(
        reports[0].loss_shared, abs=0.02
    )  # nothing is lost where there is nothing to learn
    assert {report.precision for report in reports} <= set(Strengths().precisions)


@pytest.mark.slow
def test_the_reports_figures_are_per_group_that_was_held_out() -> None:
    table, _ = simulate(6, 10)
    report, _ = fit_scorer(cross_scorer("linear", table), table)
    assert (report.users, report.groups, report.held_out_groups) == (6, 60, 18)
    late = table.split_late()[1]
    assert report.loss_uniform == pytest.approx(uniform_loss(late, "listwise"), rel=1e-5)
    assert math.isfinite(report.loss_calibrated)
    assert report.to_json()["precision"] == report.precision


def expected_calibration_error(chances: Tensor, hits: Tensor, bins: int = 10) -> float:
    place = (chances * bins).long().clamp(0, bins - 1)
    total = 0.0
    for b in range(bins):
        own = place == b
        if own.any():
            total += (
                float(own.sum()) / len(chances) * abs(float(chances[own].mean() - hits[own].mean()))
            )
    return total


@pytest.mark.parametrize(
    ("head", "rank"),
    [
        ("linear", 1),
        ("lowrank", 5),
        pytest.param("lowrank", 1, marks=pytest.mark.slow),
        pytest.param("kernel", 1, marks=pytest.mark.slow),
    ],
)
def test_scores_may_be_read_as_chances(head: str, rank: int) -> None:
    """On later cases of new users, where the truth is known; undoing the calibration by a factor of
    2 must be seen.
    """
    table, _ = simulate(220, 14, differ=1.0, candidates=3)
    train, new = table.of(table.names()[:80]), table.of(table.names()[80:])
    early, late = new.split_late(0.5)
    scorer = cross_scorer(head, table, rank=rank)
    report, _ = quickly(scorer, train)
    heads = fit_heads(scorer, early, new.names())
    assert loss_of(scorer, late, heads) == pytest.approx(
        report.loss_calibrated, rel=0.1
    )  # judged with the kind of head that serves
    assert late.groups.target is not None
    there, hits = late.groups.mask, late.groups.target[late.groups.mask]

    def error() -> float:
        shares = scorer.shares(scored(scorer, late, heads))
        return expected_calibration_error(shares[there], hits)

    calibrated = error()
    assert calibrated < 0.035
    scorer.scale_alone = scorer.scale_alone * 2
    assert error() > calibrated + 0.03


@pytest.mark.parametrize("head", HEADS)
def test_the_same_table_and_seed_give_the_same_numbers(head: str) -> None:
    table, _ = simulate(8, 8)
    one, other = cross_scorer(head, table), cross_scorer(head, table)
    (report, heads), (again, theirs) = (quickly(scorer, table, seed=3) for scorer in (one, other))
    assert report.to_json() == again.to_json()
    assert all((head.numbers == theirs[name].numbers).all() for name, head in heads.items())
    assert one.tensors().keys() == other.tensors().keys()
    assert all(torch.equal(value, other.tensors()[name]) for name, value in one.tensors().items())


def test_one_user_or_uninformative_groups_are_enough() -> None:
    table, _ = simulate(1, 5)
    scorer = cross_scorer("linear", table)
    _, heads = quickly(scorer, table)
    assert loss_of(scorer, table, heads) < uniform_loss(table, "listwise")
    blank = replace(
        table, groups=replace(table.groups, target=torch.zeros(table.groups.mask.shape))
    )
    scorer = cross_scorer("linear", table)
    quickly(scorer, blank)
    assert all(value.isfinite().all() for value in scorer.tensors().values())


@pytest.mark.parametrize("head", HEADS)
def test_a_head_does_not_depend_on_who_else_is_fitted(head: str) -> None:
    table, _ = simulate(8, 6)
    table = table.take(
        [i for i in range(len(table)) if i % 6 < 1 + i // 6 % 5]
    )  # users with 1 to 5 groups
    train, new = table.of(table.names()[:4]), table.of(table.names()[4:])
    together, apart = cross_scorer(head, table), cross_scorer(head, table)
    quickly(together, train)
    quickly(apart, train)
    at_once, alone = fit_heads(together, new, new.names()), Heads()
    for name in reversed(new.names()):
        alone |= fit_heads(apart, new.of([name]), [name])
    assert torch.allclose(scored(together, new, at_once), scored(apart, new, alone), atol=1e-2)


@pytest.mark.parametrize("head", HEADS)
def test_fitting_again_replaces_what_was_there(head: str) -> None:
    table, _ = simulate(8, 8)
    train, new = table.of(table.names()[:6]), table.of(table.names()[6:7])
    twice, once = cross_scorer(head, table), cross_scorer(head, table)
    for scorer in (twice, once):
        quickly(scorer, train)
    fit_heads(twice, new.take([0, 1]), new.names())
    heads, theirs = (fit_heads(scorer, new, new.names()) for scorer in (twice, once))
    assert torch.equal(scored(twice, new, heads), scored(once, new, theirs))


@pytest.mark.parametrize("head", HEADS)
def test_a_user_whose_groups_are_gone_has_the_shared_head_again(head: str) -> None:
    table, _ = simulate(8, 8)
    scorer = cross_scorer(head, table)
    quickly(scorer, table)
    first = table.names()[0]
    heads = fit_heads(scorer, table.of(table.names()[1:]), [first])
    own = table.of([first])
    assert heads[first].records == 0
    assert torch.equal(scored(scorer, own, heads), scored(scorer, own, {}))


# ---- the kernel head


def tastes(users: int, groups: int, seed: int) -> TrainingSet:
    """Cases of four kinds (directions in space) and three labels; each user maps kinds to labels in
    an own way.
    """
    draw = torch.Generator().manual_seed(seed)
    kinds = torch.eye(4).repeat_interleave(2, 1)
    count = users * groups
    kind = torch.randint(4, (count,), generator=draw)
    left = torch.nn.functional.normalize(
        kinds[kind] + 0.2 * torch.randn(count, 8, generator=draw), dim=-1
    )
    maps = torch.randint(3, (users, 4), generator=draw)
    label = maps[torch.arange(users).repeat_interleave(groups), kind]
    cases = Groups(
        left,
        None,
        torch.zeros(count, 3, 0),
        torch.ones(count, 3, dtype=torch.bool),
        torch.eye(3)[label],
    )
    names = tuple(f"u{i}" for i in range(users) for _ in range(groups))
    return TrainingSet(
        cases,
        names,
        torch.arange(groups).repeat(users),
        torch.zeros(count, dtype=torch.bool),
        cases.target,
    )


def label_scorer(head: str, table: TrainingSet) -> Scorer:
    interaction = LabelBilinear(8, 3, 8)
    interaction.prepare(table.groups)
    return Scorer(interaction, make_head(head, interaction), ())


@pytest.mark.parametrize("head", ["kernel", "linear"])
def test_tastes_are_recovered_on_label_features(head: str) -> None:
    table = tastes(24, 20, seed=1)
    train, new = table.of(table.names()[:12]), table.of(table.names()[12:])
    early, late = new.split_late(0.5)
    scorer = label_scorer(head, table)
    quickly(scorer, train)

    def accuracy(heads: Heads, users: Sequence[str] = ()) -> float:
        right = scored(scorer, late, heads, users).argmax(-1) == late.target.argmax(-1)
        return float(right.float().mean())

    assert accuracy({}) < 0.6  # without heads
    heads = fit_heads(scorer, early, new.names())
    assert accuracy(heads) > 0.8
    swapped = dict(zip(new.names(), new.names()[1:] + new.names()[:1], strict=True))
    assert accuracy(heads, [swapped[user] for user in late.users]) < 0.6


def test_an_append_to_a_kernel_head_is_a_fit() -> None:
    table = tastes(8, 12, seed=2)
    train, new = table.of(table.names()[:7]), table.of(table.names()[7:])
    name, scorer = new.names()[0], label_scorer("kernel", table)
    quickly(scorer, train)
    half, rest, whole = (
        fit_heads(scorer, new.take(places), [name])[name]
        for places in (range(6), range(6, 12), range(12))
    )
    appended = Head.of(np.concatenate([half.numbers, rest.numbers[2:]]))
    scores, before, unfitted = (
        scorer.score(new.groups, [head] * len(new)) for head in (appended, half, None)
    )
    assert torch.allclose(scores, scorer.score(new.groups, [whole] * len(new)), atol=1e-5)
    assert not torch.allclose(scores, before)
    assert not torch.allclose(before, unfitted)


@pytest.mark.slow
@pytest.mark.parametrize("informative", [True, False])
def test_votes_count_only_where_they_help_held_out_users(informative: bool) -> None:
    """Half of the groups are voted; the votes point at the wanted candidate, or at any: then they
    help by chance, in few of the draws.
    """
    table, _ = simulate(30, 12, shared=2.0)
    voted, counted = table.positions >= 8, []
    assert table.groups.target is not None
    for seed in range(8):
        noise = torch.randn(
            table.groups.target.shape, generator=torch.Generator().manual_seed(seed)
        )
        votes = (
            (table.groups.target * 2 + noise if informative else noise)
            * voted[:, None]
            * table.groups.mask
        )
        scorer = cross_scorer("linear", table, evidence=("llm_votes",))
        groups = replace(table.groups, side_features=votes[..., None])
        report, _ = quickly(
            scorer,
            TrainingSet(groups, table.users, table.positions, voted, table.gains),
            strengths=replace(QUICK, side_ridges=Strengths.side_ridges),
        )
        weight = float(scorer.vote_weight[0])
        helped = report.loss_with_votes < report.loss_without_votes
        assert (weight != 0) == helped == bool(report.vote_weight)
        assert informative or weight <= 0.5
        if not helped:  # one β, with and without votes
            assert float(scorer.scale_alone) == pytest.approx(float(scorer.scale), abs=1e-5)
        counted.append(weight > 0.5 if informative else weight != 0)
    assert all(counted) if informative else sum(counted) <= 2


def test_fitting_reports_each_step_and_its_end() -> None:
    table, _ = simulate(4, 6)
    reports: list[tuple[int, int]] = []
    quickly(cross_scorer("linear", table), table, done=lambda *report: reports.append(report))
    (total,) = {total for _, total in reports}
    counts = [done for done, _ in reports]
    assert counts == sorted(counts)
    assert counts[:3] == [1, 2, 3]
    assert counts[-1] == total
    assert counts[-2] < total
    assert len(counts) >= total - 5, "the steps that are announced are those that are made"


def test_side_weights_are_drawn_to_their_prior() -> None:
    table, _ = simulate(users=6, groups=4)
    side = torch.randn(*table.groups.mask.shape, 2, generator=torch.Generator().manual_seed(1))
    table = replace(table, groups=replace(table.groups, side_features=side))
    scorer, believed = (
        cross_scorer("linear", table, evidence=("one", "two")),
        torch.tensor([1.0, 2.0]),
    )
    fit_base(scorer, table, 1e6, 1e8)  # so strong that nothing is learned
    assert scorer.side_weight.abs().max() < 1e-3
    scorer.side_prior = believed
    fit_base(scorer, table, 1e6, 1e8)
    expected = (believed * scorer.side_scale).tolist()
    assert scorer.side_weight.tolist() == pytest.approx(expected, abs=1e-3)
    fit_base(scorer, table, 1e6, 1e-4)
    learned = scorer.side_weight.clone()
    scorer.side_prior = torch.zeros(2)
    fit_base(scorer, table, 1e6, 1e-4)
    assert learned.tolist() == pytest.approx(scorer.side_weight.tolist(), abs=1e-2)  # labels win


def test_a_prior_needs_clear_evidence_against_it() -> None:
    table, _ = simulate(users=10, groups=3)
    draw = torch.Generator().manual_seed(1)
    side = torch.randn(*table.groups.mask.shape, 1, generator=draw)
    target = (2 * side[..., 0]).masked_fill(~table.groups.mask, -torch.inf).softmax(-1)
    groups = replace(table.groups, side_features=side, target=target)  # pairs tell nothing
    told, strengths = (
        replace(table, groups=groups),
        Strengths((1.0, 30.0, 3000.0), (1.0, 100.0), (10.0,)),
    )
    scorer = cross_scorer("linear", told, evidence=("one",))
    scorer.side_prior = torch.tensor([1.0])
    report, _ = fit_scorer(scorer, told, strengths=strengths)
    assert (report.ridge, report.evidence_ridge) == (3000.0, 1.0)  # but the weight is learned
    assert (
        1.5 < float(scorer.side_weight.detach() / scorer.side_scale) < 2
    )  # between prior and truth
    telling, _ = simulate(users=10, groups=12, differ=0.1, shared=3.0)
    side = torch.randn(*telling.groups.mask.shape, 1, generator=draw)
    telling = replace(telling, groups=replace(telling.groups, side_features=side))
    report, _ = fit_scorer(scorer, telling, strengths=strengths)
    assert report.ridge < 3000


def test_scores_without_votes_have_a_calibration_of_their_own() -> None:
    """Beside votes that know part of what the scores know, the scores count for less."""
    draw = torch.Generator().manual_seed(1)
    truth, width = torch.randn(4000, 4, generator=draw), simulated.WIDTH
    scores = truth + 0.5 * torch.randn(4000, 4, generator=draw)
    wanted = (3 * truth).softmax(-1).multinomial(1, generator=draw)[:, 0]
    target = torch.nn.functional.one_hot(wanted, 4).float()
    votes = truth[..., None] + 0.5 * torch.randn(4000, 4, 1, generator=draw)
    mask = torch.ones(4000, 4, dtype=torch.bool)
    right = torch.randn(4000, 4, width, generator=draw)
    groups = Groups(torch.zeros(4000, width), right, votes, mask, target)
    users, voted = tuple(f"u{row % 20}" for row in range(4000)), torch.ones(4000, dtype=torch.bool)
    table = TrainingSet(groups, users, torch.arange(4000), voted, target)
    scorer = cross_scorer("linear", table, evidence=("llm_votes",))
    calibrate(scorer, [HeldOut(table, scores, scores)], FitReport())
    for given in (groups, replace(groups, side_features=torch.zeros_like(votes))):
        shares = scorer.shares(scorer.calibrated(scores, given))
        hits = target.gather(1, shares.argmax(-1, keepdim=True))[:, 0]
        assert float(shares.max(-1).values.mean()) == pytest.approx(float(hits.mean()), abs=0.03)
    assert 0.2 < float(scorer.scale) < 0.8 * float(scorer.scale_alone)


def test_of_equal_scores_the_first_candidate_is_reported_as_the_pick() -> None:
    """As it is picked for an answer: noise of a processor's arithmetic chooses nothing."""
    draw, width = torch.Generator().manual_seed(1), simulated.WIDTH
    noise = 1e-7 * torch.rand(40, 4, generator=draw)
    mask, first = torch.ones(40, 4, dtype=torch.bool), torch.zeros(40, 4)
    first[:, 0] = 1.0
    left, right = torch.zeros(40, width), torch.zeros(40, 4, width)
    groups = Groups(left, right, torch.zeros(40, 4, 1), mask, first)
    users, voted = tuple(f"u{row % 20}" for row in range(40)), torch.ones(40, dtype=torch.bool)
    table = TrainingSet(groups, users, torch.arange(40), voted, first)
    scorer, report = cross_scorer("linear", table, evidence=("llm_votes",)), FitReport()
    calibrate(scorer, [HeldOut(table, noise, noise)], report)
    assert report.gain_pick == report.gain_first == 1
