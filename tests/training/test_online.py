"""A head that moves with feedback goes where a new fit would put it, in whatever order the feedback
came.
"""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hydra_llm.model.heads import Head, make_head
from hydra_llm.model.interactions import Groups, LabelBilinear
from hydra_llm.model.newton import losses
from hydra_llm.model.scorer import FEEDBACK_WINDOW, Loss, Scorer
from hydra_llm.training.convex import fit_heads, heads_for
from hydra_llm.training.dataset import TrainingSet
from hydra_llm.training.strengths import Strengths, fit_scorer

_spec = importlib.util.spec_from_file_location(
    "simulated", Path(__file__).with_name("simulated.py")
)
assert _spec is not None
assert _spec.loader is not None
simulated: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(simulated)


def labels_table(users: int, groups: int) -> TrainingSet:
    """Users with a taste over 4 labels each, which depends on the query's vector."""
    draw = torch.Generator().manual_seed(1)
    count, width, labels = users * groups, 6, 4
    left = torch.randn(count, width, generator=draw)
    own = torch.randn(users, labels, width, generator=draw) * 1.5
    names = tuple(f"u{i:03}" for i in range(users) for _ in range(groups))
    scores = torch.einsum("gd,gld->gl", left, own.repeat_interleave(groups, 0))
    target = torch.nn.functional.one_hot(
        torch.multinomial(scores.softmax(-1), 1, generator=draw)[:, 0], labels
    ).float()
    cases = Groups(
        left,
        None,
        torch.zeros(count, labels, 0),
        torch.ones(count, labels, dtype=torch.bool),
        target,
    )
    return TrainingSet(
        cases,
        names,
        torch.arange(groups).repeat(users),
        torch.zeros(count, dtype=torch.bool),
        target,
    )


def scorer_and_table(
    head: str, features: str, loss: Loss = "listwise"
) -> tuple[Scorer, TrainingSet]:
    if features == "cross":
        table, _ = simulated.simulate(24, 40, differ=1.0, shared=1.0, loss=loss)
        return simulated.cross_scorer(head, table, loss=loss, rank=4), table
    table = labels_table(24, 40)
    interaction = LabelBilinear(6, 4, 6)
    interaction.prepare(table.groups)
    return Scorer(interaction, make_head(head, interaction, rank=12), (), loss=loss), table


CASES = [
    ("linear", "cross", "listwise"),
    ("linear", "cross", "binary"),
    ("lowrank", "cross", "listwise"),
    ("linear", "label", "listwise"),
    ("lowrank", "label", "listwise"),
]


def quickly(scorer: Scorer, table: TrainingSet) -> dict[str, Head]:
    strengths = Strengths(ridges=(3.0,), side_ridges=(1.0,), precisions=(0.3, 1.0, 3.0))
    return fit_scorer(scorer, table, strengths=strengths)[1]


def late_loss(scorer: Scorer, late: TrainingSet, heads: dict[str, Head]) -> float:
    scores = scorer.score(late.groups, heads_for(late, heads)).masked_fill(~late.groups.mask, 0)
    return float(losses(scores, late.target, late.groups.mask, scorer.loss).mean())


def weights(head: Head, scorer: Scorer) -> torch.Tensor:
    """The coordinates that feedback moves."""
    return torch.tensor(head.numbers[: scorer.head.joint_numbers])


@pytest.mark.parametrize(("head", "features", "loss"), CASES)
@pytest.mark.parametrize("known", [pytest.param(0, marks=pytest.mark.slow), 10])
def test_feedback_brings_most_of_what_a_new_fit_would(
    head: str, features: str, loss: Loss, known: int
) -> None:
    scorer, table = scorer_and_table(head, features, loss)
    names = table.names()
    quickly(scorer, table.of(names[:16]))
    assert scorer.updates_online
    new = table.of(names[16:])
    first, feedback, late = (
        new.take([i for i, place in enumerate(new.positions.tolist()) if low <= place < high])
        for low, high in ((0, known), (known, 20), (20, 40))
    )
    fitted = {
        name: replace(own, records=known)
        for name, own in fit_heads(scorer, first, new.names()).items()
    }
    before = late_loss(scorer, late, fitted)
    updated = {
        name: scorer.online_update(own, feedback.of([name]).groups) for name, own in fitted.items()
    }
    assert all((own.records, own.until) == (known, -math.inf) for own in updated.values())
    online = late_loss(scorer, late, updated)
    seen = [i for i, place in enumerate(new.positions.tolist()) if place < 20]
    anew = fit_heads(scorer, new.take(seen), new.names())
    if loss == "binary":  # the bias waits for the next fit: no choice depends on it
        anew = {
            name: Head.of(np.append(own.numbers[:-1], fitted[name].numbers[-1]))
            for name, own in anew.items()
        }
    exact = late_loss(scorer, late, anew)
    assert exact < before
    assert before - online > 0.6 * (before - exact), (before, online, exact)


@pytest.mark.parametrize(("head", "features", "loss"), CASES)
def test_the_order_of_feedback_does_not_matter(head: str, features: str, loss: Loss) -> None:
    scorer, table = scorer_and_table(head, features, loss)
    names = table.names()
    quickly(scorer, table.of(names[:16]))
    own = table.of(names[16:17])
    fitted = fit_heads(scorer, own.take(range(10)), own.names())[names[16]]
    judged = own.take(range(10, 40))
    shuffled = judged.take(torch.randperm(30, generator=torch.Generator().manual_seed(5)))
    one, other = (scorer.online_update(fitted, data.groups) for data in (judged, shuffled))
    assert not np.array_equal(one.numbers, fitted.numbers)
    assert np.allclose(one.numbers, other.numbers, atol=1e-3)


@pytest.mark.slow
def test_no_feedback_changes_nothing_and_only_the_latest_counts() -> None:
    scorer, table = scorer_and_table("linear", "cross")
    fitted = quickly(scorer, table)["u000"]
    own = table.of(["u000"])
    assert scorer.online_update(fitted, own.take([]).groups) is fitted
    many = own.take([*range(40), *range(40)])
    latest = many.take(range(80 - FEEDBACK_WINDOW, 80))
    actual, expected = (scorer.online_update(fitted, data.groups) for data in (many, latest))
    assert np.array_equal(actual.numbers, expected.numbers)
    kernel, _ = scorer_and_table("kernel", "cross")
    quickly(kernel, table)
    assert not kernel.updates_online


def test_the_longer_the_history_the_less_one_judgement_moves() -> None:
    scorer, table = scorer_and_table("linear", "label")
    fitted = quickly(scorer, table)["u000"]
    one = table.of(["u000"]).take([3]).groups
    far = [
        float(np.linalg.norm(after.numbers - fitted.numbers))
        for after in (
            scorer.online_update(replace(fitted, records=known), one)
            for known in (0, 10, 100, 1000)
        )
    ]
    assert far == sorted(far, reverse=True)
    assert far[0] > 3 * far[3] > 0


@pytest.mark.parametrize(
    ("head", "features"),
    [
        ("linear", "cross"),
        ("linear", "label"),
        ("lowrank", "cross"),
        ("lowrank", "label"),
        ("bias", "cross"),
        ("bias", "label"),
    ],
)
def test_without_a_history_it_is_the_fit_itself(head: str, features: str) -> None:
    scorer, table = scorer_and_table(head, features)
    names = table.names()
    quickly(scorer, table.of(names[:16]))
    own = table.of(names[16:17])
    online = scorer.online_update(None, own.groups)
    fitted = fit_heads(scorer, own, own.names())[names[16]]
    assert online.records == 0
    assert torch.allclose(weights(online, scorer), weights(fitted, scorer), atol=2e-3)


def test_the_fisher_information_is_the_mean_of_the_hessians() -> None:
    scorer, table = scorer_and_table("linear", "cross")
    heads, groups = heads_for(table, quickly(scorer, table)), table.groups

    def loss(v: torch.Tensor) -> torch.Tensor:
        assert groups.target is not None
        scores = (
            scorer.core(groups, heads).detach()
            + scorer.interaction.dot(scorer.interaction(groups)[None], v[None])[0]
        )
        return losses(scores, groups.target, groups.mask, "listwise").mean()

    hessian = torch.autograd.functional.hessian(loss, torch.zeros(scorer.interaction.size))
    c = scorer.posterior
    assert torch.allclose(c.right_vectors @ c.right.diag() @ c.right_vectors.T, hessian, atol=1e-5)


def test_a_scorer_keeps_its_posterior() -> None:
    scorer, table = scorer_and_table("linear", "label")
    assert not scorer.updates_online
    quickly(scorer, table)
    again = Scorer.restore(scorer.config(), scorer.tensors())
    assert again.updates_online
    assert torch.equal(again.posterior.right_vectors, scorer.posterior.right_vectors)
