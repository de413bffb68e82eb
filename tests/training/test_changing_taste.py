"""Old records count less in a head, a change of taste is found, and a question is chosen."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hydra_llm.config import Settings
from hydra_llm.errors import SettingsError
from hydra_llm.model.change import change_of
from hydra_llm.model.forgetting import counted, weights
from hydra_llm.model.heads import Head, make_head
from hydra_llm.model.interactions import Cross
from hydra_llm.model.newton import losses
from hydra_llm.model.questions import _design, _information, in_turn
from hydra_llm.model.scorer import FEEDBACK_WINDOW, Scorer
from hydra_llm.training.api import learn
from hydra_llm.training.calibration import FitReport
from hydra_llm.training.convex import fit_base, fit_heads, heads_for, measure_posterior
from hydra_llm.training.dataset import TrainingSet
from hydra_llm.training.discounts import choose_discount, rates_of, set_discount
from hydra_llm.training.strengths import Strengths, fit_scorer

_spec = importlib.util.spec_from_file_location(
    "simulated", Path(__file__).with_name("simulated.py")
)
assert _spec is not None
assert _spec.loader is not None
simulated: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(simulated)

HALF = 15  # groups of a user, then as many after the change
QUICK = Strengths(ridges=(3.0,), side_ridges=(1.0,), precisions=(0.3,))


def one_taste(users: int = 16) -> TrainingSet:
    table, _ = simulated.simulate(users, 2 * HALF, differ=2.0, shared=0.5)
    return table


def two_tastes(users: int = 16) -> TrainingSet:
    """The later half of each user's groups is the next user's."""
    table = one_taste(users)
    later = table.positions >= HALF
    take = torch.where(later, torch.arange(len(table)).roll(-2 * HALF), torch.arange(len(table)))
    return replace(table.take(take), users=table.users)


def fitted_scorer(table: TrainingSet) -> Scorer:
    scorer = simulated.cross_scorer("linear", table)
    fit_base(scorer, table, 3.0)
    scorer.prior_precision = torch.tensor(0.3)
    measure_posterior(scorer, table, fit_heads(scorer, table, table.names()))
    return scorer


def part(table: TrainingSet, low: int, high: int) -> TrainingSet:
    return table.take(((table.positions >= low) & (table.positions < high)).nonzero()[:, 0])


def loss(scorer: Scorer, late: TrainingSet, heads: dict[str, Head]) -> float:
    scores = scorer.core(late.groups, heads_for(late, heads)).detach()
    return float(losses(scores, late.target, late.groups.mask, "listwise").mean())


# ---- discount


@pytest.mark.parametrize("rate", ["0", "1", 0.0, 1, 1.5, -0.5, "often", "nan"])
def test_a_rate_that_is_none_gets_one_line(rate: Any) -> None:
    with pytest.raises(SettingsError, match=r"'discount': write none, auto, or a rate above 0"):
        Settings.checked({"discount": rate})


def test_the_choices_of_a_setting() -> None:
    assert rates_of(Settings()) == (None,)
    assert rates_of(Settings(discount="auto"))[0] is None
    assert rates_of(Settings.checked({"discount": "0.9"})) == (0.9,)


def test_a_loss_of_pairs_has_no_discount() -> None:
    settings = Settings(discount=0.9, loss="binary")
    with pytest.raises(SettingsError, match="'discount' needs loss=listwise"):
        learn("nowhere", settings=settings)


def test_the_latest_counts_one() -> None:
    positions = torch.tensor([[0, 2, 3], [5, 7, 0]])
    known = torch.tensor([[True, True, True], [True, True, False]])
    own = weights(positions, known, 0.5)
    assert own[0].tolist() == [0.125, 0.5, 1.0]
    assert own[1, :2].tolist() == [0.25, 1.0]
    before = weights(positions, known, None, 3)
    assert before[0].tolist() == pytest.approx([0.1, 0.1, 1.0])
    assert counted(3, 0.5) == pytest.approx(1.75)
    assert counted(3, None) == 3.0


def test_a_discount_follows_a_change_of_taste() -> None:
    table = two_tastes()
    scorer = fitted_scorer(one_taste())
    early, late = part(table, 0, HALF + 7), part(table, HALF + 7, 2 * HALF)
    plain = fit_heads(scorer, early, table.names())
    set_discount(scorer, 0.8)
    own = fit_heads(scorer, early, table.names())
    assert loss(scorer, late, own) < 0.8 * loss(scorer, late, plain)
    set_discount(scorer, None)
    again = fit_heads(scorer, early, table.names())
    assert all(np.array_equal(again[user].numbers, plain[user].numbers) for user in plain)


@pytest.mark.parametrize(("table", "changes"), [(two_tastes, True), (one_taste, False)])
def test_training_users_choose_the_rate(table: Any, changes: bool) -> None:
    data, strengths = part(table(), 0, 24), replace(QUICK, discounts=(None, 0.7))
    scorer = simulated.cross_scorer("linear", data)
    report, _ = fit_scorer(scorer, data, strengths=strengths)
    assert report.discount == scorer.rate or changes
    assert (report.discount is not None) is changes
    assert set(report.to_json()["discounts"]) == {"none", "0.7"}


def test_one_user_alone_chooses_no_rate() -> None:
    """Of one user the error over users would be 0, and the least difference more than that."""
    scorer = fitted_scorer(one_taste(4))

    def later(*owners: str) -> tuple[torch.Tensor, list[str]]:
        losses = torch.tensor([0.5, 0.4]) if scorer.rate else torch.tensor([0.6, 0.51])
        return losses, list(owners)

    choose_discount(scorer, (None, 0.9), FitReport(), lambda: later("a", "a"))
    assert scorer.rate is None
    choose_discount(scorer, (None, 0.9), FitReport(), lambda: later("a", "b"))
    assert scorer.rate == pytest.approx(0.9)


def test_a_scorer_keeps_its_rate() -> None:
    scorer = fitted_scorer(one_taste(4))
    assert "discount" not in scorer.tensors()
    assert "discount" not in fit_scorer(scorer, one_taste(4), strengths=QUICK)[0].to_json()
    set_discount(scorer, 0.9)
    restored = Scorer.restore(scorer.config(), scorer.tensors())
    assert restored.rate == pytest.approx(0.9)
    groups = part(one_taste(4), 0, 1).groups[:1]
    many = Head.of(np.zeros(scorer.head.numbers_per_user or 0), 500)
    wide = restored.covariance(groups, many)
    set_discount(scorer, None)
    narrow = scorer.covariance(groups, many)
    assert wide is not None
    assert narrow is not None
    # 500 records count as 10
    assert float(wide.trace()) > 3 * float(narrow.trace())


# ---- change


def test_a_rise_of_the_loss_is_a_change() -> None:
    draw = np.random.default_rng(0)
    low, high = (0.3 + 0.2 * draw.random(40)).tolist(), (1.8 + 0.4 * draw.random(10)).tolist()
    assert change_of([]) is None
    assert change_of(low) is None
    assert change_of([*high, *low]) is None
    found = change_of([*low, *high])
    assert found is not None
    assert 34 <= found <= 42


def test_feedback_after_a_change_moves_a_head_faster() -> None:
    table, scorer = two_tastes(), fitted_scorer(one_taste())
    fitted = fit_heads(scorer, part(table, 0, HALF), table.names())
    judged, late = part(table, HALF - 5, HALF + 5), part(table, HALF + 5, 2 * HALF)

    def updated(changed: int | None) -> float:
        own = {
            user: scorer.online_update(head, judged.of([user]).groups, changed)
            for user, head in fitted.items()
        }
        return loss(scorer, late, own)

    assert updated(5) < 0.9 * updated(None)


def test_an_update_counts_a_window_of_feedback() -> None:
    """Memory and time do not grow: what came before the window changes nothing."""
    table, scorer = one_taste(4), fitted_scorer(one_taste(4))
    groups = table.groups[:100]
    set_discount(scorer, 0.95)
    last = scorer.online_update(None, groups[-FEEDBACK_WINDOW:])
    assert np.allclose(scorer.online_update(None, groups).numbers, last.numbers)
    changed = scorer.online_update(None, groups, 90).numbers
    window = scorer.online_update(None, groups[-FEEDBACK_WINDOW:], 90 - 100 + FEEDBACK_WINDOW)
    assert np.allclose(changed, window.numbers, atol=1e-5)
    assert not np.allclose(changed, last.numbers, atol=1e-3)


# ---- questions


def label_pool() -> tuple[Scorer, TrainingSet]:
    table = one_taste(6)
    return fitted_scorer(table), table


def test_questions_lower_the_uncertainty_of_the_pool() -> None:
    scorer, table = label_pool()
    pool = table.groups[:40]
    order = list(in_turn(scorer, pool))
    assert sorted(place for place, _ in order) == list(range(40))
    with torch.no_grad():
        phi, share = _design(scorer, pool, None)
    of_pool = _information(phi, share)

    def left(places: list[int]) -> float:
        own = torch.eye(phi.shape[-1]) + _information_of(phi, share, places)
        return float((torch.linalg.inv(own) @ of_pool).trace())

    # the worth is exactly what the question takes away, given those before it
    taken = [place for place, _ in order]
    for count in (0, 1, 5):
        falls = left(taken[:count]) - left(taken[: count + 1])
        assert order[count][1] == pytest.approx(falls, rel=1e-3)
        others = [left(taken[:count]) - left([*taken[:count], i]) for i in taken[count:]]
        assert order[count][1] == pytest.approx(max(others), rel=1e-3)
    draw = np.random.default_rng(0)
    by_lot = [left(draw.permutation(40)[:4].tolist()) for _ in range(50)]
    assert left(taken[:4]) < np.quantile(by_lot, 0.05)


def _information_of(phi: torch.Tensor, share: torch.Tensor, places: list[int]) -> torch.Tensor:
    own = [_information(phi[[place]], share[[place]]) for place in places]
    return sum(own, torch.zeros(phi.shape[-1], phi.shape[-1]))


def test_what_is_answered_is_worth_less() -> None:
    scorer, table = label_pool()
    pool = table.groups[:20]
    (first, worth), *_ = in_turn(scorer, pool)
    same = pool[[first] * 10]
    again = dict(in_turn(scorer, pool, same))
    assert again[first] < 0.5 * worth
    assert next(in_turn(scorer, pool, same))[0] != first


def test_only_known_candidates_can_be_asked() -> None:
    from hydra_llm.model.questions import can_ask

    table = one_taste(4)
    assert not can_ask(None)
    assert not can_ask(fitted_scorer(table))  # pairs: each question has candidates of its own
    assert not can_ask(Scorer(Cross(5), make_head("kernel", Cross(5)), ()))
