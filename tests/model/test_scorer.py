"""The scorer: what is written is read back bit by bit, nobody's numbers reach another, and padding
means nothing.
"""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_llm.errors import UnknownUser
from hydra_llm.model.heads import KernelBank, make_bank
from hydra_llm.model.interactions import Groups, make_interaction
from hydra_llm.model.scorer import Loss, Scorer

KINDS = [
    (head, features)
    for head in ("linear", "lowrank", "mlp", "kernel")
    for features in ("tower", "cross", "label")
]
KINDS.remove(("mlp", "label"))
NAMES = ["ann", "bob", "cid", "dee"]
EVIDENCE = ("near", "llm_votes")
SHAPES = {
    "tower": {"width": 6, "size": 5},
    "cross": {"width": 6},
    "label": {"width": 6, "labels": 4, "rank": 3},
}


def random_groups(count: int = 6, features: str = "tower", seed: int = 0) -> Groups:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(count, 4, generator=draw) < 0.6
    mask[:, 0] = True
    if features == "label":
        mask[:] = True
    right = torch.randn(count, 4, 6, generator=draw) * mask[..., None]
    return Groups(
        torch.randn(count, 6, generator=draw),
        right,
        torch.randn(count, 4, 2, generator=draw) * mask[..., None],
        mask,
    )


def scorer_of(head: str = "linear", features: str = "tower", loss: Loss = "listwise") -> Scorer:
    """A scorer of four users in which every number is random."""
    torch.manual_seed(0)
    interaction = make_interaction({"kind": features, **SHAPES[features]})
    interaction.prepare(random_groups(40, features, seed=5))
    scorer = Scorer(interaction, make_bank(head, interaction, rank=2), EVIDENCE, loss=loss)
    scorer.enrol(NAMES)
    for value in [
        *scorer.bank.parameters(),
        *scorer.bank.buffers(),
        scorer.side_weight,
        scorer.side_mean,
        scorer.vote_weight,
    ]:
        value.data.copy_(torch.randn(value.shape))
    scorer.scale = torch.tensor(1.7)
    if isinstance(scorer.bank, KernelBank):
        width, answers = (4, 4) if features == "label" else (interaction.size, 1)
        for row in range(4):
            scorer.bank.vectorize(row, torch.randn(3, width), torch.randn(3, answers))
    return scorer.eval()


def through_disk(scorer: Scorer) -> Scorer:
    from safetensors.torch import load, save

    tensors = load(save({name: value.contiguous() for name, value in scorer.tensors().items()}))
    return Scorer.restore(json.loads(json.dumps(scorer.config())), tensors)


@pytest.mark.parametrize(("head", "features"), KINDS)
def test_what_is_written_is_read_back_bit_by_bit(head: str, features: str) -> None:
    scorer, groups = scorer_of(head, features), random_groups(features=features)
    users = [*NAMES, "stranger", "ann"]
    again = through_disk(scorer)
    assert torch.equal(again.score(groups, users), scorer.score(groups, users))
    assert again.config() == scorer.config()
    assert set(again.tensors()) == set(scorer.tensors())
    assert not again.training


@pytest.mark.parametrize("head", ["linear", "lowrank", "mlp", "kernel"])
def test_a_scorer_without_users_and_users_without_heads_are_read_back(head: str) -> None:
    interaction = make_interaction({"kind": "tower", **SHAPES["tower"]})
    empty = Scorer(interaction, make_bank(head, interaction, rank=2), ()).eval()
    assert through_disk(empty).users == {}
    empty.enrol(NAMES)
    groups = random_groups()
    groups = Groups(groups.left, groups.right, groups.evidence[..., :0], groups.mask)
    assert torch.equal(
        through_disk(empty).score(groups, [*NAMES, "", ""]), empty.score(groups, [*NAMES, "", ""])
    )


def test_numbers_that_do_not_fit_are_refused() -> None:
    scorer = scorer_of()
    tensors = scorer.tensors()
    with pytest.raises(RuntimeError):
        Scorer.restore(
            scorer.config(),
            {name: value for name, value in tensors.items() if name != "bank.shared"},
        )
    with pytest.raises(RuntimeError):
        Scorer.restore({**scorer.config(), "users": NAMES[:2]}, tensors)
    with pytest.raises(KeyError):
        Scorer.restore({"users": []}, tensors)


@pytest.mark.parametrize("head", ["linear", "lowrank", "mlp", "kernel"])
@settings(max_examples=15, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["forget", "enrol", "disk"]), st.sampled_from([*NAMES, "eve"])),
        max_size=8,
    )
)
def test_forgetting_enrolling_and_saving_in_any_order_keep_everyone_elses_scores(
    head: str, steps: list[tuple[str, str]]
) -> None:
    scorer, groups = scorer_of(head), random_groups(1)
    shared = scorer.score(groups, ["stranger"])
    expected = {name: scorer.score(groups, [name]) for name in NAMES}
    for what, name in steps:
        if what == "disk":
            scorer = through_disk(scorer)
        elif what == "enrol":
            scorer.enrol([name])
            expected.setdefault(name, shared)
        elif name in expected:
            scorer.forget(name)
            del expected[name]
        else:
            with pytest.raises(UnknownUser):
                scorer.forget(name)
    for name in [*NAMES, "eve"]:
        assert torch.equal(scorer.score(groups, [name]), expected.get(name, shared)), name


@pytest.mark.parametrize("head", ["linear", "lowrank", "mlp", "kernel"])
def test_a_head_that_was_kept_elsewhere_comes_back_into_a_row_that_was_freed(head: str) -> None:
    scorer, groups = scorer_of(head), random_groups(1)
    expected = {name: scorer.score(groups, [name]) for name in NAMES}
    kept = {name: (scorer.head_of(name), scorer.known.get(name, 0)) for name in NAMES}
    rows = len(scorer.bank)
    for name in NAMES:
        scorer.forget(name)
    for name in reversed(NAMES):
        scorer.put_head(name, *kept[name])
    assert len(scorer.bank) == rows
    assert {name: scorer.known[name] for name in NAMES} == {
        name: known for name, (_, known) in kept.items()
    }
    for name in NAMES:
        assert torch.equal(scorer.score(groups, [name]), expected[name])
    with pytest.raises(ValueError, match="numbers"):
        scorer.put_head("ann", torch.ones(5), 0)
    with pytest.raises(UnknownUser):
        scorer.head_of("stranger")


def test_forgetting_leaves_none_of_the_users_numbers() -> None:
    for head in ("linear", "lowrank", "mlp", "kernel"):
        scorer = scorer_of(head)
        row = scorer.row("bob")
        scorer.forget("bob")
        assert "bob" not in scorer.config()["users"]
        if isinstance(scorer.bank, KernelBank):
            assert f"bank.keys.{row}" not in scorer.tensors()
            assert f"bank.residuals.{row}" not in scorer.tensors()
        else:
            assert not scorer.tensors()["bank.weight"][row].any()
            assert head != "linear" or scorer.tensors()["bank.bias"][row] == 0


def test_an_unknown_user_gets_the_shared_head() -> None:
    scorer, groups = scorer_of(), random_groups()
    expected = scorer(groups, torch.full((6,), -1)).detach()
    assert torch.equal(scorer.score(groups, ["?"] * 6), expected)
    assert not torch.allclose(scorer.score(groups, ["ann"] * 6)[groups.mask], expected[groups.mask])


def test_the_score_is_its_formula() -> None:
    scorer, groups = scorer_of("linear", "cross"), random_groups()
    at = {name: value.double() for name, value in scorer.tensors().items()}
    rows = [0, 1, 2, 3, -1, 0]
    scores = scorer.score(groups, [*NAMES, "?", "ann"])
    assert groups.right is not None
    for g, row in enumerate(rows):
        v = at["bank.shared"] + (at["bank.weight"][row] if row >= 0 else 0)
        b = at["bank.shared_bias"] + (at["bank.bias"][row] if row >= 0 else 0)
        for c in range(4):
            phi = (groups.right[g, c].double() - at["interaction.mean"]) * at["interaction.scale"]
            known = groups.evidence[g, c].double()
            core = phi @ v + b + ((known - at["side_mean"]) / at["side_scale"]) @ at["side_weight"]
            expected = 1.7 * core + known @ at["vote_weight"]
            assert (
                float(scores[g, c]) == pytest.approx(float(expected), abs=1e-4)
                if groups.mask[g, c]
                else scores[g, c] == -torch.inf
            )


@pytest.mark.parametrize("loss", ["listwise", "binary"])
@pytest.mark.parametrize(("head", "features"), KINDS)
def test_a_distribution_sums_to_one_over_the_candidates_that_are_there(
    head: str, features: str, loss: Loss
) -> None:
    scorer, groups = scorer_of(head, features, loss), random_groups(features=features)
    scores, shares = (
        scorer.score(groups, [*NAMES, "?", "?"]),
        scorer.distribution(groups, [*NAMES, "?", "?"]),
    )
    assert torch.allclose(shares.sum(-1), torch.ones(6), atol=1e-5)
    assert (shares[~groups.mask] == 0).all()
    assert torch.equal(scores == -torch.inf, ~groups.mask)
    odds = scores.exp() if loss == "listwise" else torch.sigmoid(scores)
    assert torch.allclose(shares, odds / odds.sum(-1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize(("head", "features"), KINDS)
def test_a_groups_scores_depend_on_neither_padding_nor_company(head: str, features: str) -> None:
    scorer, groups = scorer_of(head, features), random_groups(features=features)
    users = [*NAMES, "?", "ann"]
    whole = scorer.score(groups, users)
    assert groups.right is not None
    for g in range(6):
        there = groups.mask[g].nonzero()[:, 0]
        alone = Groups(
            groups.left[[g]],
            groups.right[[g]][:, there],
            groups.evidence[[g]][:, there],
            groups.mask[[g]][:, there],
        )
        assert torch.allclose(scorer.score(alone, [users[g]])[0], whole[g, there], atol=1e-4)
    noise = groups.mask.logical_not()[..., None] * 1e3
    noisy = Groups(groups.left, groups.right + noise, groups.evidence + noise, groups.mask)
    assert torch.equal(scorer.score(noisy, users), whole)
    shuffled = torch.tensor([3, 5, 0, 1, 4, 2])
    assert torch.allclose(
        scorer.score(groups[shuffled], [users[i] for i in shuffled]), whole[shuffled], atol=1e-4
    )
