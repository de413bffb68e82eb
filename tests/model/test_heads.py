"""Kinds of heads and interactions against naive loops, explicit features and finite differences."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hydra_llm.errors import SettingsError
from hydra_llm.history import parse_time
from hydra_llm.model.head import usable_head
from hydra_llm.model.heads import Head, HeadKind, HeadProblem, latest_time, make_head
from hydra_llm.model.heads.kernel import KernelHead, pack
from hydra_llm.model.heads.linear import LinearHead
from hydra_llm.model.interactions import (
    Cross,
    Groups,
    Interaction,
    LabelBilinear,
    Tower,
    make_interaction,
    principal,
)
from hydra_llm.model.newton import losses
from hydra_llm.plugins import HEADS
from hydra_llm.testing import check_head
from hydra_llm.types import Query, Record

KINDS = tuple(HEADS.builtin)
USERS, ROWS = 4, [2, -1, 0, 2, 3]


def random_groups(
    count: int = 5, candidates: int = 3, width: int = 6, evidence: int = 0, seed: int = 0
) -> Groups:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(count, candidates, generator=draw) < 0.7
    mask[:, 0] = True
    left, right = (
        torch.randn(count, width, generator=draw),
        torch.randn(count, candidates, width, generator=draw),
    )
    return Groups(
        left,
        right * mask[..., None],
        torch.randn(count, candidates, evidence, generator=draw),
        mask,
    )


def randomised(kind: str, interaction: Interaction) -> HeadKind:
    """A kind whose shared numbers are random."""
    draw = torch.Generator().manual_seed(1)
    head = make_head(kind, interaction, rank=3)
    for value in [*head.parameters(), *head.buffers()]:
        value.data.copy_(0.5 * torch.randn(value.shape, generator=draw))
    return head


def some_heads(kind: HeadKind, interaction: Interaction, users: int = USERS) -> list[Head]:
    """Heads in which every number is random; those of a kernel grow from user to user."""
    draw = torch.Generator().manual_seed(2)
    if kind.numbers_per_user is not None:
        rows = 0.5 * torch.randn(users, kind.numbers_per_user, generator=draw)
        return [Head.of(row, 3) for row in rows]
    by_label = isinstance(interaction, LabelBilinear)
    width = interaction.rank + 1 if by_label else interaction.size
    depth = interaction.labels if by_label else 1
    return [
        Head.of(
            pack(
                torch.randn(user + 2, width, generator=draw),
                torch.randn(user + 2, depth, generator=draw),
            ),
            3,
        )
        for user in range(users)
    ]


def in_rows(heads: list[Head], rows: list[int]) -> list[Head | None]:
    return [heads[row] if row >= 0 else None for row in rows]


def interaction_of(kind: str) -> Interaction:
    torch.manual_seed(0)
    shapes = {
        "tower": {"width": 6, "size": 5},
        "cross": {"width": 6},
        "label": {"width": 6, "labels": 3, "rank": 4},
    }
    interaction = make_interaction({"kind": kind, **shapes[kind]})
    interaction.prepare(random_groups(40, seed=9))
    return interaction


def by_hand(
    kind: HeadKind, phi: np.ndarray, head: Head | None, key: np.ndarray, label: int
) -> float:
    """The score of one pair, number by number. `key` is what the kernel compares: φ, or z of the
    query for label features.
    """
    at = {name: value.detach().double().numpy() for name, value in kind.state_dict().items()}
    own = None if head is None else head.numbers.astype(float)
    if kind.name == "mlp":
        flat, size = at["shared"] + (0 if own is None else own), int(phi.size)
        w1, b1 = flat[: size * size].reshape(size, size), flat[size * size : size * size + size]
        w2, b2 = flat[size * size + size : size * size + 3 * size].reshape(2, size), flat[-2:]
        hidden = [
            math.tanh(sum(w1[i][j] * phi[j] for j in range(size)) + b1[i]) for i in range(size)
        ]
        logits = [sum(w2[k][i] * hidden[i] for i in range(size)) + b2[k] for k in (0, 1)]
        return float(logits[1] - logits[0])
    score = sum(a * b for a, b in zip(at["shared"], phi, strict=True)) + at["shared_bias"]
    if own is None:
        return float(score)
    if kind.name == "linear":
        score += own[:-1] @ phi + own[-1]
    elif kind.name == "lowrank":
        score += sum(own[k] * (at["basis"][k] @ phi) for k in range(len(at["basis"])))
    elif kind.name == "bias":
        score *= 1 + own[0]
    elif kind.name == "kernel":
        width, depth = int(own[0]), int(own[1])
        top, below = 0.0, math.exp(at["log_ridge"])
        for pair in own[2:].reshape(-1, width + depth):
            kept, residual = pair[:width], pair[width:]
            cosine = kept @ key / np.linalg.norm(kept) / np.linalg.norm(key)
            weight = math.exp((cosine - 1) / math.exp(at["log_bandwidth"]))
            top, below = top + weight * residual[label if depth > 1 else 0], below + weight
        score += at["strength"] * top / below
    return float(score)


@pytest.mark.parametrize("features", ["tower", "cross", "label"])
@pytest.mark.parametrize("name", KINDS)
def test_scores_agree_with_a_loop_over_pairs(name: str, features: str) -> None:
    if (name, features) == ("mlp", "label"):
        with pytest.raises(SettingsError):
            make_head(name, interaction_of(features))
        return
    interaction, groups = interaction_of(features), random_groups()
    kind = randomised(name, interaction)
    heads = in_rows(some_heads(kind, interaction), ROWS)
    x = interaction(groups).detach()
    scores = kind.score(interaction, x, heads).detach().numpy()
    for g, head in enumerate(heads):
        for c in range(scores.shape[1]):
            z = x[g].double().numpy() if features == "label" else x[g, c].double().numpy()
            phi = np.kron(np.eye(3)[c], z) if features == "label" else z
            assert scores[g, c] == pytest.approx(by_hand(kind, phi, head, z, c), abs=2e-4)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "kernel"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    interaction, groups = interaction_of("tower").double(), random_groups()
    assert groups.right is not None
    groups = Groups(groups.left.double(), groups.right.double(), groups.side_features, groups.mask)
    kind = randomised(name, interaction).double()
    state = {
        name: value.detach().clone().requires_grad_()
        for name, value in [*kind.named_parameters(), *kind.named_buffers()]
    }
    x = interaction(groups).detach().requires_grad_()
    numbers = torch.randn(5, kind.joint_numbers, dtype=torch.float64, requires_grad=True)

    class Scoring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kind = kind

        def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
            return self.kind.score_numbers(interaction, x, numbers)

    def scores(x: Tensor, numbers: Tensor, *values: Tensor) -> Tensor:
        named = {f"kind.{key}": value for key, value in zip(state, values, strict=True)}
        out: Tensor = torch.func.functional_call(Scoring(), named, (x, numbers))
        return out

    assert torch.autograd.gradcheck(scores, (x, numbers, *state.values()), atol=1e-6)


def test_the_kernels_gradients_are_those_of_finite_differences() -> None:
    interaction = interaction_of("tower")
    kind = randomised("kernel", interaction).double()
    assert isinstance(kind, KernelHead)
    draw = torch.Generator().manual_seed(4)
    x, keys, residuals = (
        torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True)
        for shape in ((4, 5), (3, 5), (3, 1))
    )
    names = ("log_bandwidth", "strength", "log_ridge")
    values = [getattr(kind, name).detach().clone().requires_grad_() for name in names]

    def smooth(x: Tensor, keys: Tensor, residuals: Tensor, *values: Tensor) -> Tensor:
        bandwidth, strength, ridge = values
        cosine = nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(keys, dim=-1).T
        weight = ((cosine - 1) / bandwidth.exp()).exp()
        return strength * (weight @ residuals) / (ridge.exp() + weight.sum(-1, keepdim=True))

    assert torch.autograd.gradcheck(smooth, (x, keys, residuals, *values), atol=1e-6)
    assert torch.allclose(kind.smooth(x, keys, residuals), smooth(x, keys, residuals, *values))


def test_numbers_per_user_are_as_documented() -> None:
    wide = Cross(768)
    sizes = {"mlp": 592_130, "linear": 769, "lowrank": 16, "bias": 1, "kernel": None}
    for name, size in sizes.items():
        assert make_head(name, wide, rank=16).numbers_per_user == size
    assert len(pack(torch.zeros(4, 768), torch.zeros(4, 1))) == 2 + 4 * 769


@pytest.mark.parametrize("name", KINDS)
def test_no_head_and_a_head_of_zeros_are_the_shared_head(name: str) -> None:
    interaction, groups = interaction_of("cross"), random_groups()
    kind = randomised(name, interaction)
    x = interaction(groups)
    shared = kind.shared_score(interaction, x)
    without = kind.score(interaction, x, [None] * 5)
    assert torch.allclose(without, shared, atol=1e-6)
    assert torch.equal(kind.score(interaction, x, [Head.of(kind.empty())] * 5), without)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_score_depends_on_no_other_user(name: str, data: st.DataObject) -> None:
    interaction, groups = interaction_of("cross"), random_groups(8, seed=3)
    kind = randomised(name, interaction)
    heads = some_heads(kind, interaction)
    rows = data.draw(st.lists(st.integers(-1, USERS - 1), min_size=8, max_size=8))
    x = interaction(groups)
    before = kind.score(interaction, x, in_rows(heads, rows))
    changed = data.draw(st.integers(0, USERS - 1))
    others = torch.tensor([row != changed for row in rows])
    heads[changed] = Head.of(heads[(changed + 1) % USERS].numbers)  # a user of its own
    after = kind.score(interaction, x, in_rows(heads, rows))
    assert torch.equal(after[others], before[others])


def test_a_head_of_another_size_is_refused() -> None:
    interaction = Cross(6)
    x = interaction(random_groups(1))
    for name in ("linear", "lowrank", "mlp", "bias"):
        with pytest.raises(ValueError, match="numbers"):
            make_head(name, interaction).score(interaction, x, [Head.of(np.ones(5))])
    with pytest.raises(ValueError, match="numbers"):
        make_head("kernel", interaction).score(interaction, x, [Head.of(np.ones(5))])


def test_a_head_is_a_read_only_copy() -> None:
    source = torch.ones(3)
    head = Head.of(source, 2, 5.0)
    source.zero_()
    assert head.numbers.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="read-only"):
        head.numbers[0] = 2
    assert (head.records, head.until) == (2, 5.0)


@pytest.mark.parametrize("name", KINDS)
def test_built_in_kinds_keep_the_contract(name: str) -> None:
    check_head(name)


class Leaky(LinearHead):
    """Keeps what it has fitted in the shared head."""

    def fit(self, problem: HeadProblem) -> list[np.ndarray]:
        numbers = super().fit(problem)
        self.set_shared(torch.tensor(numbers[0][:-1]), torch.zeros(()))
        return numbers


class Lying(LinearHead):
    """Has fewer numbers than it says."""

    def fit(self, problem: HeadProblem) -> list[np.ndarray]:
        return [numbers[:-1] for numbers in super().fit(problem)]


def test_a_kind_that_breaks_the_contract_fails_its_check() -> None:
    with pytest.raises(AssertionError):
        check_head(Leaky)
    with pytest.raises((AssertionError, ValueError)):
        check_head(Lying)


# ---- the head of one number


def test_a_bias_head_is_a_temperature_of_the_shared_score() -> None:
    interaction, groups = interaction_of("cross"), random_groups()
    kind = randomised("bias", interaction)
    x = interaction(groups)
    shared = kind.shared_score(interaction, x)
    for c, factor in ((-1.0, 0.0), (0.5, 1.5), (-3.0, -2.0)):
        scores = kind.score(interaction, x, [Head.of(np.array([c]))] * 5)
        assert torch.allclose(scores, factor * shared, atol=1e-6)


def test_bias_heads_tell_followers_from_contrarians() -> None:
    """One user wants what all want, another one the opposite, a third anything."""
    interaction = Cross(6)
    kind = make_head("bias", interaction)
    weight = torch.randn(6, generator=torch.Generator().manual_seed(3))
    kind.set_shared(weight, torch.zeros(()))
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(3, 200, 4, 6, generator=draw)
    taste = torch.tensor([2.0, -1.0, 0.0])[:, None, None] * (x @ weight)
    wanted = torch.multinomial(taste.flatten(0, 1).softmax(-1), 1, generator=draw)[:, 0]
    target = nn.functional.one_hot(wanted, 4).float().view(3, 200, 4)
    mask, zero = torch.ones(3, 200, 4, dtype=torch.bool), torch.zeros(3, 200, 4)
    problem = HeadProblem(("a", "b", "c"), interaction, x, zero, target, mask, "listwise", 0.01)
    factors = [1 + float(numbers[0]) for numbers in kind.fit(problem)]
    assert factors == pytest.approx([2.0, -1.0, 0.0], abs=0.4)
    own = [Head.of(numbers) for numbers in kind.fit(problem)]
    for user, head in enumerate(own):
        shared = losses(
            kind.shared_score(interaction, x[user]), target[user], mask[user], "listwise"
        )
        fitted = losses(
            kind.score(interaction, x[user], [head] * 200), target[user], mask[user], "listwise"
        )
        assert fitted.sum() < shared.sum()


# ---- which queries a head may answer


def test_a_head_answers_no_query_that_sees_less_than_it_learned() -> None:
    head = Head.of(np.zeros(1), 3, parse_time("2020-05-01")[0])

    def usable(time: str, visible: int) -> tuple[Head | None, str]:
        return usable_head(head, Query("u", "q", "?", time=time, span=parse_time(time)), visible)

    assert usable("2020-05-02", 3) == (head, "")
    assert usable("", 4) == (head, "")
    assert usable("2020", 3) == (head, ""), "a year may end after the head's time"
    for time, visible, word in (("2020-05-02", 2, "3 records"), ("2020-04-29", 5, "2020-05-01")):
        refused, reason = usable(time, visible)
        assert refused is None
        assert word in reason
    assert usable_head(None, Query("u", "q", "?"), 0) == (None, "")


def test_the_latest_time_is_of_records_that_have_one() -> None:
    def at(time: str) -> Record:
        return Record("u", time, "x", "y", time, parse_time(time))

    assert latest_time([]) == -math.inf
    assert latest_time([at("")]) == -math.inf
    assert latest_time([at("2020"), at("2019-05-01"), at("")]) == parse_time("2020")[0]


# ---- interactions


def test_label_features_are_one_hot_kronecker_products() -> None:
    interaction, groups = interaction_of("label"), random_groups(7)
    assert isinstance(interaction, LabelBilinear)
    z = interaction(groups)
    assert z.shape == (7, 5)
    assert torch.equal(z[:, -1], torch.ones(7))
    explicit = torch.stack(
        [torch.stack([torch.kron(torch.eye(3)[label], row) for label in range(3)]) for row in z]
    )
    v, r = torch.randn(1, interaction.size), torch.randn(1, 7, 3)
    assert torch.allclose(interaction.dot(z[None], v)[0], explicit @ v[0], atol=1e-5)
    assert torch.allclose(
        interaction.outer(z[None], r)[0], torch.einsum("glv,gl->v", explicit, r[0]), atol=1e-5
    )


def test_label_features_keep_the_principal_directions() -> None:
    draw = torch.Generator().manual_seed(0)
    long = nn.functional.normalize(torch.randn(2, 6, generator=draw), dim=-1)
    left = (
        3.0
        + torch.randn(200, 2, generator=draw) @ long
        + 0.01 * torch.randn(200, 6, generator=draw)
    )
    interaction = LabelBilinear(6, 3, 2)
    interaction.prepare(
        Groups(left, None, torch.zeros(200, 3, 0), torch.ones(200, 3, dtype=torch.bool))
    )
    plane = interaction.project / interaction.project.norm(dim=1, keepdim=True)
    assert torch.allclose(plane @ plane.T, torch.eye(2), atol=1e-4)
    assert ((long @ plane.T).norm(dim=1) > 0.999).all()
    assert (
        interaction(
            Groups(left, None, torch.zeros(200, 3, 0), torch.ones(200, 3, dtype=torch.bool))
        )[:, :2]
        .mean(0)
        .abs()
        .max()
        < 1e-4
    )


@pytest.mark.parametrize("features", ["tower", "cross", "label"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), users=st.integers(1, 3), groups=st.integers(1, 4))
def test_outer_is_the_transpose_of_dot(features: str, seed: int, users: int, groups: int) -> None:
    interaction = interaction_of(features)
    torch.manual_seed(seed)
    x = torch.randn(
        users,
        groups,
        *((5,) if features == "label" else (3, interaction.size)),
        dtype=torch.float64,
    )
    v, r = (
        torch.randn(users, interaction.size, dtype=torch.float64),
        torch.randn(users, groups, 3, dtype=torch.float64),
    )
    forward, back = (interaction.dot(x, v) * r).sum((1, 2)), (interaction.outer(x, r) * v).sum(1)
    assert torch.allclose(forward, back)  # user by user: no user's numbers reach another


def test_tower_is_its_formula() -> None:
    interaction, groups = interaction_of("tower"), random_groups()
    assert isinstance(interaction, Tower)
    assert groups.right is not None
    phi = interaction(groups)
    assert phi.shape == (5, 3, 5)
    q, r = groups.left[3], groups.right[3, 2]
    joined = torch.cat([q, r, q * r, (q - r).abs()])
    assert torch.allclose(
        phi[3, 2],
        torch.tanh(interaction.layer.weight @ (joined - interaction.mean) + interaction.layer.bias),
        atol=1e-6,
    )


@pytest.mark.parametrize("features", ["tower", "cross"])
def test_preparation_sees_no_padding_and_scales_to_one_half(features: str) -> None:
    groups = random_groups(300, 4)
    loud = Groups(
        groups.left,
        torch.where(groups.mask[..., None], groups.right, 1e6),
        groups.side_features,
        groups.mask,
    )  # type: ignore[arg-type]
    torch.manual_seed(0)
    make: Callable[[], Interaction] = (
        (lambda: Tower(6, 5)) if features == "tower" else (lambda: Cross(6))
    )
    plain, noisy = make(), make()
    noisy.load_state_dict(plain.state_dict())
    plain.prepare(groups)
    noisy.prepare(loud)
    assert torch.equal(plain(groups), noisy(groups))
    rows = plain(groups)[groups.mask].detach()
    rows = torch.atanh(rows.clamp(-0.999999, 0.999999)) if features == "tower" else rows
    assert rows.mean().abs() < 0.05
    assert rows.std() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("features", ["tower", "cross", "label"])
def test_features_of_a_pair_do_not_depend_on_its_company(features: str) -> None:
    interaction, groups = interaction_of(features), random_groups()
    whole = interaction(groups)
    for g in range(5):
        order = groups.mask[g].nonzero()[:, 0]
        assert groups.right is not None
        full = torch.ones(1, len(order), dtype=torch.bool)
        alone = Groups(
            groups.left[[g]], groups.right[[g]][:, order], groups.side_features[[g]][:, order], full
        )
        expected = whole[g] if features == "label" else whole[g, order]
        assert torch.allclose(interaction(alone)[0], expected, atol=1e-6)


@pytest.mark.parametrize("features", ["tower", "cross", "label"])
def test_an_interaction_is_made_again_from_its_config(features: str) -> None:
    interaction, groups = interaction_of(features), random_groups()
    again = make_interaction(interaction.config())
    again.load_state_dict(interaction.state_dict())
    assert torch.equal(again(groups), interaction(groups))
    assert again.config() == interaction.config()


def test_principal_directions_do_not_depend_on_the_processor() -> None:
    rows = torch.randn(
        30, 40, generator=torch.Generator().manual_seed(1)
    )  # of rank 30: nothing varies along ten of the directions
    rows -= rows.mean(0)
    covariance = rows.T @ rows
    values, directions = principal(covariance, 64)
    again = principal(
        covariance * (1 + 1e-6 * torch.randn(40, 40, generator=torch.Generator().manual_seed(2))),
        64,
    )
    assert len(values) == len(again[0]) == 29
    assert torch.allclose(directions, again[1], atol=1e-3)
    assert torch.allclose(directions @ directions.T, torch.eye(29), atol=1e-4)
    expected = torch.linalg.svd(rows)[1][:29] ** 2
    assert torch.allclose(values, expected, rtol=1e-3)
    assert len(principal(covariance, 5)[0]) == 5


def test_label_features_drop_directions_without_variance() -> None:
    interaction = LabelBilinear(40, 3, 20)
    left = torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
    interaction.prepare(
        Groups(left, None, torch.zeros(8, 3, 0), torch.ones(8, 3, dtype=torch.bool))
    )
    assert int(interaction.project.square().sum(1).gt(0).sum()) == 7
