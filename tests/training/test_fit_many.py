"""Many users fitted together have the heads that each has alone."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from hydra_llm.llm.none import NoLLM
from hydra_llm.model.heads import SGDConfig, make_head
from hydra_llm.model.interactions import Cross, Groups, Interaction, LabelBilinear
from hydra_llm.model.newton import Loss
from hydra_llm.model.scorer import Scorer
from hydra_llm.plugins import HEADS
from hydra_llm.training import work
from hydra_llm.training.api import fit, learn
from hydra_llm.training.convex import fit_heads
from hydra_llm.training.dataset import TrainingSet
from tests.learning import ONE_STRENGTH
from tests.made_choices import choice_data

SIZES = (1, 9, 2, 30, 17, 3, 9, 24, 1, 12)  # groups of each user
WIDTH, LABELS, SIDE = 12, 4, 2
SGD = SGDConfig(epochs=2)


def drawn_set(loss: Loss, *, by_label: bool) -> TrainingSet:
    draw = torch.Generator().manual_seed(0)
    count, candidates = sum(SIZES), LABELS
    left = torch.randn(count, WIDTH, generator=draw)
    mask = torch.ones(count, candidates, dtype=torch.bool)
    if not by_label:
        mask[:, 2:] = torch.rand(count, candidates - 2, generator=draw) < 0.6
    right = torch.randn(count, candidates, WIDTH, generator=draw) * mask[..., None]
    best = torch.randint(0, 2, (count,), generator=draw)
    target = one_hot(best, candidates).float()
    if loss == "binary":
        target = (torch.rand(count, candidates, generator=draw) < 0.4).float() * mask
    side = torch.randn(count, candidates, SIDE, generator=draw)
    groups = Groups(left, None if by_label else right, side, mask, target)
    users = tuple(f"u{i}" for i, size in enumerate(SIZES) for _ in range(size))
    places = torch.cat([torch.arange(size) for size in SIZES])
    return TrainingSet(groups, users, places, torch.zeros(count, dtype=torch.bool), target)


def drawn_scorer(head: str, loss: Loss, data: TrainingSet, *, by_label: bool) -> Scorer:
    interaction: Interaction = LabelBilinear(WIDTH, LABELS, 6) if by_label else Cross(WIDTH)
    interaction.prepare(data.groups)
    kind = make_head(head, interaction, rank=3)
    if head == "lowrank":
        kind.set_basis(torch.zeros(3, interaction.size))
    draw = torch.Generator().manual_seed(1)
    for value in [*kind.parameters(), *(own for own in kind.buffers() if own.dim())]:
        value.data.copy_(0.3 * torch.randn(value.shape, generator=draw))
    return Scorer(interaction, kind, [f"side{n}" for n in range(SIDE)], loss=loss)


@pytest.mark.parametrize("loss", ["listwise", "binary"])
@pytest.mark.parametrize("by_label", [False, True], ids=["pairs", "labels"])
@pytest.mark.parametrize("head", HEADS.builtin)
def test_many_at_once_are_as_one_by_one(head: str, by_label: bool, loss: Loss) -> None:
    """Of each kind, with unlike numbers of groups: the longest decides the padding."""
    if by_label and head == "mlp":
        pytest.skip("mlp does not go with features of labels")
    data = drawn_set(loss, by_label=by_label)
    scorer = drawn_scorer(head, loss, data, by_label=by_label)
    together = fit_heads(scorer, data, data.names(), sgd=SGD)
    assert any(np.abs(own.numbers).max() > 1e-4 for own in together.values())
    for user in data.names():
        alone = fit_heads(scorer, data.of([user]), [user], sgd=SGD)[user]
        assert alone.records == together[user].records
        np.testing.assert_allclose(together[user].numbers, alone.numbers, rtol=0, atol=1e-6)


def test_blocks_hold_each_user_once_in_order() -> None:
    records: dict[str, Any] = {f"u{n}": [None] * n for n in range(12)}
    users = list(records)
    for most in (1, 7, 1000):
        found = list(work.blocks(users, records, most))
        assert [user for block in found for user in block] == users
        assert all(sum(map(len, map(records.get, block[:-1]))) < most for block in found)
    assert list(work.blocks([], records)) == []


@pytest.mark.slow
@pytest.mark.usefixtures("shared_minilm")
def test_fit_in_blocks_is_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    data = choice_data()
    bundle = learn(data, NoLLM(), strengths=ONE_STRENGTH).bundle
    users = data.users()[:5]
    together = fit(data, bundle, NoLLM(), users=users).bundle
    monkeypatch.setattr(work.blocks, "__defaults__", (1,))
    done = list[tuple[str, int, int]]()
    told = lambda stage, count, total: done.append((stage, count, total))  # noqa: E731
    in_blocks = fit(data, bundle, NoLLM(), users=users, progress=told).bundle
    assert [entry for entry in done if entry[0] == "fit adapter"] == [
        ("fit adapter", count + 1, 5) for count in range(5)
    ]
    for user in users:
        alone = fit(data, bundle, NoLLM(), users=[user]).bundle
        for name, head in alone.heads_of(user).items():
            for other in (together.heads_of(user)[name], in_blocks.heads_of(user)[name]):
                assert (other.records, other.until) == (head.records, head.until)
                np.testing.assert_allclose(other.numbers, head.numbers, rtol=0, atol=1e-6)
