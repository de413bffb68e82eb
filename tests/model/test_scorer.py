"""The scorer is pure and read back bit by bit; users and padding do not change other scores."""

import json

import pytest
import torch

from hydra_llm.model.heads import Head, make_head
from hydra_llm.model.heads.kernel import pack
from hydra_llm.model.interactions import Groups, LabelBilinear, make_interaction
from hydra_llm.model.laplace import LaplacePosterior
from hydra_llm.model.scorer import Loss, Scorer
from hydra_llm.plugins import HEADS

KINDS = [(head, features) for head in HEADS.builtin for features in ("tower", "cross", "label")]
KINDS.remove(("mlp", "label"))
NAMES = ["ann", "bob", "cid", "dee"]
SIDE_FEATURES = ("near", "llm_votes")
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
    """A scorer in which every number is random."""
    torch.manual_seed(0)
    interaction = make_interaction({"kind": features, **SHAPES[features]})
    interaction.prepare(random_groups(40, features, seed=5))
    scorer = Scorer(interaction, make_head(head, interaction, rank=2), SIDE_FEATURES, loss=loss)
    own = (scorer.side_weight, scorer.side_mean, scorer.vote_weight)
    for value in [*scorer.head.parameters(), *scorer.head.buffers(), *own]:
        value.data.copy_(torch.randn(value.shape))
    scorer.scale, scorer.scale_alone = torch.tensor(1.7), torch.tensor(0.6)
    return scorer.eval()


def heads_of(scorer: Scorer) -> dict[str, Head]:
    """Four users' heads in which every number is random."""
    draw = torch.Generator().manual_seed(8)
    size, label = scorer.head.numbers_per_user, isinstance(scorer.interaction, LabelBilinear)
    width, depth = (4, 4) if label else (scorer.interaction.size, 1)
    return {
        name: Head.of(
            torch.randn(size, generator=draw)
            if size is not None
            else pack(torch.randn(3, width, generator=draw), torch.randn(3, depth, generator=draw))
        )
        for name in NAMES
    }


def scored(scorer: Scorer, groups: Groups, users: list[str]) -> torch.Tensor:
    heads = heads_of(scorer)
    return scorer.score(groups, [heads.get(user) for user in users])


def through_disk(scorer: Scorer) -> Scorer:
    from safetensors.torch import load, save

    tensors = load(save({name: value.contiguous() for name, value in scorer.tensors().items()}))
    return Scorer.restore(json.loads(json.dumps(scorer.config())), tensors)


@pytest.mark.parametrize(("head", "features"), KINDS)
def test_what_is_written_is_read_back_bit_by_bit(head: str, features: str) -> None:
    scorer, groups = scorer_of(head, features), random_groups(features=features)
    scorer.posterior = LaplacePosterior.of(torch.eye(2), torch.diag(torch.arange(3.0)))
    users = [*NAMES, "stranger", "ann"]
    again = through_disk(scorer)
    assert torch.equal(scored(again, groups, users), scored(scorer, groups, users))
    assert again.config() == scorer.config()
    theirs = again.tensors()
    assert {name: value.tolist() for name, value in scorer.tensors().items()} == {
        name: value.tolist() for name, value in theirs.items()
    }
    assert not again.training


def test_numbers_that_do_not_fit_are_refused() -> None:
    scorer = scorer_of()
    config, tensors = scorer.config(), scorer.tensors()
    lacking = {name: value for name, value in tensors.items() if name != "head.shared"}
    with pytest.raises(RuntimeError):
        Scorer.restore(config, lacking)
    with pytest.raises(RuntimeError):
        Scorer.restore({**config, "head": "kernel"}, tensors)
    with pytest.raises(KeyError):
        Scorer.restore({"head": "linear"}, tensors)


@pytest.mark.parametrize(("head", "features"), KINDS)
def test_scoring_changes_nothing(head: str, features: str) -> None:
    scorer, groups = scorer_of(head, features), random_groups(features=features)
    before = {name: value.clone() for name, value in scorer.tensors().items()}
    heads = heads_of(scorer)
    numbers = {name: own.numbers.copy() for name, own in heads.items()}
    given = [heads.get(user) for user in [*NAMES, "?", "ann"]]
    first = scorer.score(groups, given)
    scorer.shares(first)
    scorer.covariance(groups[:1], given[0])
    assert torch.equal(scorer.score(groups, given), first)
    assert all(torch.equal(value, before[name]) for name, value in scorer.tensors().items())
    assert all((own.numbers == numbers[name]).all() for name, own in heads.items())


def test_no_head_is_the_shared_head() -> None:
    scorer, groups = scorer_of(), random_groups()
    expected = scorer.calibrated(scorer.core(groups), groups).detach()
    assert torch.allclose(scorer.score(groups, [None] * 6), expected, atol=1e-6)
    own = scored(scorer, groups, ["ann"] * 6)
    assert not torch.allclose(own[groups.mask], expected[groups.mask])


def test_the_score_is_its_formula() -> None:
    scorer, groups = scorer_of("linear", "cross"), random_groups()
    groups.side_features[4:, :, 1] = 0.0  # nobody asked the LLM
    at = {name: value.double() for name, value in scorer.tensors().items()}
    heads = heads_of(scorer)
    own = [heads.get(user) for user in [*NAMES, "?", "ann"]]
    scores = scorer.score(groups, own)
    assert groups.right is not None
    for g, head in enumerate(own):
        numbers = torch.zeros(7) if head is None else torch.tensor(head.numbers)
        v = at["head.shared"] + numbers[:-1].double()
        b = at["head.shared_bias"] + numbers[-1].double()
        for c in range(4):
            phi = (groups.right[g, c].double() - at["interaction.mean"]) * at["interaction.scale"]
            known = groups.side_features[g, c].double()
            core = phi @ v + b + ((known - at["side_mean"]) / at["side_scale"]) @ at["side_weight"]
            expected = (1.7 if g < 4 else 0.6) * core + known @ at["vote_weight"]
            assert (
                float(scores[g, c]) == pytest.approx(float(expected), abs=1e-4)
                if groups.mask[g, c]
                else scores[g, c] == -torch.inf
            )


@pytest.mark.parametrize("loss", ["listwise", "binary"])
@pytest.mark.parametrize(("head", "features"), KINDS)
def test_a_distribution_sums_to_one_over_the_present_candidates(
    head: str, features: str, loss: Loss
) -> None:
    scorer, groups = scorer_of(head, features, loss), random_groups(features=features)
    heads = [*heads_of(scorer).values(), None, None]
    scores = scorer.score(groups, heads)
    shares = scorer.shares(scores)
    assert torch.allclose(shares.sum(-1), torch.ones(6), atol=1e-5)
    assert (shares[~groups.mask] == 0).all()
    assert torch.equal(scores == -torch.inf, ~groups.mask)
    odds = scores.exp() if loss == "listwise" else torch.sigmoid(scores)
    assert torch.allclose(shares, odds / odds.sum(-1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize(("head", "features"), KINDS)
def test_a_groups_scores_depend_on_neither_padding_nor_company(head: str, features: str) -> None:
    scorer, groups = scorer_of(head, features), random_groups(features=features)
    users = [*NAMES, "?", "ann"]
    whole = scored(scorer, groups, users)
    assert groups.right is not None
    for g in range(6):
        there = groups.mask[g].nonzero()[:, 0]
        alone = Groups(
            groups.left[[g]],
            groups.right[[g]][:, there],
            groups.side_features[[g]][:, there],
            groups.mask[[g]][:, there],
        )
        assert torch.allclose(scored(scorer, alone, [users[g]])[0], whole[g, there], atol=1e-4)
    noise = groups.mask.logical_not()[..., None] * 1e3
    noisy = Groups(groups.left, groups.right + noise, groups.side_features + noise, groups.mask)
    assert torch.equal(scored(scorer, noisy, users), whole)
    shuffled = torch.tensor([3, 5, 0, 1, 4, 2])
    assert torch.allclose(
        scored(scorer, groups[shuffled], [users[i] for i in shuffled]), whole[shuffled], atol=1e-4
    )
