"""A head that moves with feedback goes where a new fit would put it, in whatever order the feedback
came.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra_llm.model.heads import LinearBank, LowRankBank, make_bank
from hydra_llm.model.interactions import Groups, LabelBilinear
from hydra_llm.model.scorer import Loss, Scorer
from hydra_llm.training import convex as fit
from hydra_llm.training.convex import fit_all, fit_heads
from hydra_llm.training.dataset import Table
from hydra_llm.training.newton import losses
from hydra_llm.training.online import WINDOW, moved, supports_online_update

_spec = importlib.util.spec_from_file_location(
    "simulated", Path(__file__).with_name("simulated.py")
)
assert _spec is not None
assert _spec.loader is not None
simulated: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(simulated)


def labels_table(users: int, groups: int) -> Table:
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
    return Table(
        cases,
        names,
        torch.arange(groups).repeat(users),
        torch.zeros(count, dtype=torch.bool),
        target,
    )


def scorer_and_table(head: str, features: str, loss: Loss = "listwise") -> tuple[Scorer, Table]:
    if features == "cross":
        table, _ = simulated.simulate(24, 40, differ=1.0, shared=1.0, loss=loss)
        return simulated.cross_scorer(head, table, loss=loss, rank=4), table
    table = labels_table(24, 40)
    interaction = LabelBilinear(6, 4, 6)
    interaction.prepare(table.groups)
    return Scorer(interaction, make_bank(head, interaction, rank=12), (), loss=loss), table


CASES = [
    ("linear", "cross", "listwise"),
    ("linear", "cross", "binary"),
    ("lowrank", "cross", "listwise"),
    ("linear", "label", "listwise"),
]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "RIDGES", (3.0,))
    monkeypatch.setattr(fit, "PRECISIONS", (0.3, 1.0, 3.0))


def late_loss(scorer: Scorer, late: Table) -> float:
    assert late.groups.target is not None
    scores = scorer.score(late.groups, late.users).masked_fill(~late.groups.mask, 0)
    return float(losses(scores, late.groups.target, late.groups.mask, scorer.loss).mean())


def served(scorer: Scorer, user: str, known: int, judged: Table) -> torch.Tensor:
    return moved(scorer, scorer.row(user), known, judged)


@pytest.mark.parametrize(("head", "features", "loss"), CASES)
@pytest.mark.parametrize("known", [0, 10])
def test_feedback_brings_most_of_what_a_new_fit_would(
    head: str, features: str, loss: Loss, known: int, quick: None
) -> None:
    scorer, table = scorer_and_table(head, features, loss)
    names = table.names()
    fit_all(scorer, table.of(names[:16]))
    assert supports_online_update(scorer)
    new = table.of(names[16:])
    first, feedback, late = (
        new.take([i for i, place in enumerate(new.positions.tolist()) if low <= place < high])
        for low, high in ((0, known), (known, 20), (20, 40))
    )
    fit_heads(scorer, first, new.names())
    before = late_loss(scorer, late)
    heads = {user: served(scorer, user, known, feedback.of([user])) for user in new.names()}
    assert isinstance(scorer.bank, LinearBank | LowRankBank)
    bias = scorer.bank.bias.clone() if isinstance(scorer.bank, LinearBank) else torch.zeros(0)
    for user, head_of_user in heads.items():
        scorer.bank.weight[scorer.row(user)] = head_of_user
    online = late_loss(scorer, late)
    fit_heads(
        scorer,
        new.take([i for i, place in enumerate(new.positions.tolist()) if place < 20]),
        new.names(),
    )
    if loss == "binary":
        scorer.bank.bias.copy_(bias)  # it waits for the next fit: no choice depends on it
    exact = late_loss(scorer, late)
    assert exact < before
    assert before - online > 0.6 * (before - exact), (before, online, exact)


@pytest.mark.parametrize(("head", "features", "loss"), CASES)
def test_the_order_of_feedback_does_not_matter(
    head: str, features: str, loss: Loss, quick: None
) -> None:
    scorer, table = scorer_and_table(head, features, loss)
    names = table.names()
    fit_all(scorer, table.of(names[:16]))
    own = table.of(names[16:17])
    fit_heads(scorer, own.take(range(10)), own.names())
    judged = own.take(range(10, 40))
    shuffled = judged.take(torch.randperm(30, generator=torch.Generator().manual_seed(5)))
    one, other = served(scorer, names[16], 10, judged), served(scorer, names[16], 10, shuffled)
    assert not torch.equal(one, scorer.bank.weight[scorer.row(names[16])])
    assert torch.allclose(one, other, atol=1e-3)


def test_nothing_judged_moves_nothing_and_only_the_latest_count(quick: None) -> None:
    scorer, table = scorer_and_table("linear", "cross")
    fit_all(scorer, table)
    own = table.of(["u000"])
    assert isinstance(scorer.bank, LinearBank)
    assert torch.equal(
        served(scorer, "u000", 40, own.take([])), scorer.bank.weight[scorer.row("u000")]
    )
    many = own.take([*range(40), *range(40)])
    assert torch.equal(
        served(scorer, "u000", 40, many),
        served(scorer, "u000", 40, many.take(range(80 - WINDOW, 80))),
    )
    kernel, _ = scorer_and_table("kernel", "cross")
    assert not supports_online_update(kernel)


def test_the_longer_the_history_the_less_one_judgement_moves(quick: None) -> None:
    scorer, table = scorer_and_table("linear", "label")
    fit_all(scorer, table)
    one = table.of(["u000"]).take([3])
    assert isinstance(scorer.bank, LinearBank)
    head = scorer.bank.weight[scorer.row("u000")]
    far = [
        float((served(scorer, "u000", known, one) - head).norm()) for known in (0, 10, 100, 1000)
    ]
    assert far == sorted(far, reverse=True)
    assert far[0] > 3 * far[3] > 0


def test_without_a_history_it_is_the_fit_itself(quick: None) -> None:
    for head, features in (("linear", "cross"), ("linear", "label"), ("lowrank", "cross")):
        scorer, table = scorer_and_table(head, features)
        names = table.names()
        fit_all(scorer, table.of(names[:16]))
        own = table.of(names[16:17])
        online = moved(scorer, -1, 0, own)
        fit_heads(scorer, own, own.names())
        assert isinstance(scorer.bank, LinearBank | LowRankBank)
        assert torch.allclose(online, scorer.bank.weight[scorer.row(names[16])], atol=2e-3)


def test_the_curvature_of_pairs_is_the_mean_of_their_hessians(quick: None) -> None:
    scorer, table = scorer_and_table("linear", "cross")
    fit_all(scorer, table)
    groups, rows = table.groups, scorer.rows(table.users)

    def loss(v: torch.Tensor) -> torch.Tensor:
        assert groups.target is not None
        scores = (
            scorer.core(groups, rows).detach()
            + scorer.interaction.dot(scorer.interaction(groups)[None], v[None])[0]
        )
        return losses(scores, groups.target, groups.mask, "listwise").mean()

    hessian = torch.autograd.functional.hessian(loss, torch.zeros(scorer.interaction.size))
    c = scorer.curvature
    assert torch.allclose(c.right_vectors @ c.right.diag() @ c.right_vectors.T, hessian, atol=1e-5)


def test_a_scorer_keeps_its_curvature_and_one_of_before_has_none(quick: None) -> None:
    scorer, table = scorer_and_table("linear", "label")
    fit_all(scorer, table)
    again = Scorer.restore(scorer.config(), scorer.tensors())
    assert torch.equal(again.curvature.right_vectors, scorer.curvature.right_vectors)
    old = {
        name: value for name, value in scorer.tensors().items() if not name.startswith("curvature.")
    }
    assert not supports_online_update(Scorer.restore(scorer.config(), old))
