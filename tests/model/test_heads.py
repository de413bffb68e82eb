"""Heads and combiners against naive loops, explicit features and finite differences; no row ever
touches another.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hydra_llm.errors import SettingsError
from hydra_llm.model.heads import HeadBank, KernelBank, LinearBank, LowRankBank, MLPBank, make_bank
from hydra_llm.model.interactions import (
    Cross,
    Groups,
    Interaction,
    LabelBilinear,
    Tower,
    make_interaction,
    principal,
)

KINDS = ("linear", "lowrank", "mlp", "kernel")
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


def filled(kind: str, interaction: Interaction, users: int = USERS) -> HeadBank:
    """A bank in which every number is random."""
    draw = torch.Generator().manual_seed(1)
    bank = make_bank(kind, interaction, rank=3, users=users)
    for value in [*bank.parameters(), *bank.buffers()]:
        value.data.copy_(0.5 * torch.randn(value.shape, generator=draw))
    if isinstance(bank, KernelBank):
        width, answers = (
            (interaction.rank + 1, interaction.labels)
            if isinstance(interaction, LabelBilinear)
            else (interaction.size, 1)
        )
        for row in range(users):
            bank.remember(
                row,
                torch.randn(row + 2, width, generator=draw),
                torch.randn(row + 2, answers, generator=draw),
            )
    return bank


def combiner_of(kind: str) -> Interaction:
    torch.manual_seed(0)
    shapes = {
        "tower": {"width": 6, "size": 5},
        "cross": {"width": 6},
        "label": {"width": 6, "labels": 3, "rank": 4},
    }
    interaction = make_interaction({"kind": kind, **shapes[kind]})
    interaction.prepare(random_groups(40, seed=9))
    return interaction


def by_hand(bank: HeadBank, phi: np.ndarray, row: int, key: np.ndarray, label: int) -> float:
    """The score of one pair, number by number. `key` is what the kernel compares: φ, or z of the
    query for label features.
    """
    at = {
        name: value.detach().double().numpy()
        for name, value in bank.state_dict().items()
        if isinstance(value, Tensor)
    }
    if isinstance(bank, MLPBank):
        flat, size = at["shared"] + (at["weight"][row] if row >= 0 else 0), bank.size
        w1, b1 = flat[: size * size].reshape(size, size), flat[size * size : size * size + size]
        w2, b2 = flat[size * size + size : size * size + 3 * size].reshape(2, size), flat[-2:]
        hidden = [
            math.tanh(sum(w1[i][j] * phi[j] for j in range(size)) + b1[i]) for i in range(size)
        ]
        logits = [sum(w2[k][i] * hidden[i] for i in range(size)) + b2[k] for k in (0, 1)]
        return float(logits[1] - logits[0])
    score = sum(a * b for a, b in zip(at["shared"], phi, strict=True)) + at["shared_bias"]
    if row < 0:
        return float(score)
    if isinstance(bank, LinearBank):
        score += at["weight"][row] @ phi + at["bias"][row]
    elif isinstance(bank, LowRankBank):
        score += sum(at["weight"][row][k] * (at["basis"][k] @ phi) for k in range(len(at["basis"])))
    elif isinstance(bank, KernelBank):
        top, below = 0.0, math.exp(at["log_ridge"])
        for kept, residual in zip(
            bank.keys[row].double().numpy(), bank.residuals[row].double().numpy(), strict=True
        ):
            cosine = kept @ key / np.linalg.norm(kept) / np.linalg.norm(key)
            weight = math.exp((cosine - 1) / math.exp(at["log_bandwidth"]))
            top, below = top + weight * residual[label if len(residual) > 1 else 0], below + weight
        score += at["strength"] * top / below
    return float(score)


@pytest.mark.parametrize("features", ["tower", "cross", "label"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_agree_with_a_loop_over_pairs(kind: str, features: str) -> None:
    if (kind, features) == ("mlp", "label"):
        with pytest.raises(SettingsError):
            make_bank(kind, combiner_of(features))
        return
    interaction, groups, rows = combiner_of(features), random_groups(), torch.tensor(ROWS)
    bank = filled(kind, interaction)
    x = interaction(groups).detach()
    scores = bank(interaction, x, rows).detach().numpy()
    for g, row in enumerate(ROWS):
        for c in range(scores.shape[1]):
            z = x[g].double().numpy() if features == "label" else x[g, c].double().numpy()
            phi = np.kron(np.eye(3)[c], z) if features == "label" else z
            assert scores[g, c] == pytest.approx(by_hand(bank, phi, row, z, c), abs=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    interaction, groups, rows = combiner_of("tower").double(), random_groups(), torch.tensor(ROWS)
    groups = Groups(
        groups.left.double(),
        groups.right.double() if groups.right is not None else None,
        groups.evidence,
        groups.mask,
    )
    bank = filled(kind, interaction).double()
    if isinstance(bank, KernelBank):
        bank.keys, bank.residuals = (
            [k.double() for k in bank.keys],
            [r.double() for r in bank.residuals],
        )
    state = {
        name: value.detach().clone().requires_grad_()
        for name, value in [*bank.named_parameters(), *bank.named_buffers()]
    }
    x = interaction(groups).detach().requires_grad_()

    def scores(x: Tensor, *values: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(
            bank, dict(zip(state, values, strict=True)), (interaction, x, rows)
        )
        return out

    assert torch.autograd.gradcheck(scores, (x, *state.values()), atol=1e-6)


def test_numbers_per_user_are_the_designs() -> None:
    wide = Cross(768)
    assert make_bank("mlp", wide).numbers_per_user == 592_130
    assert make_bank("linear", wide).numbers_per_user == 769
    assert make_bank("lowrank", wide, rank=16).numbers_per_user == 16
    kernel = make_bank("kernel", wide, users=2)
    assert isinstance(kernel, KernelBank)
    kernel.remember(0, torch.zeros(4, 768), torch.zeros(4, 1))
    assert kernel.numbers_per_user == 4 * 769 // 2


@pytest.mark.parametrize("kind", KINDS)
def test_row_minus_one_and_a_row_of_zeros_are_the_shared_head(kind: str) -> None:
    interaction, groups = combiner_of("cross"), random_groups()
    bank = filled(kind, interaction)
    x, nobody = interaction(groups), torch.full((5,), -1)
    shared = bank(interaction, x, nobody)
    bank.clear(1)
    assert torch.equal(bank(interaction, x, torch.full((5,), 1)), shared)
    empty = filled(kind, interaction, users=0)
    empty.load_state_dict(
        {**empty.state_dict(), **{n: p.detach() for n, p in bank.named_parameters()}}
    )
    assert torch.equal(empty(interaction, x, nobody), shared)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_growing_and_clearing_leave_the_others_bit_identical(
    kind: str, data: st.DataObject
) -> None:
    interaction, groups = combiner_of("cross"), random_groups(8, seed=3)
    bank = filled(kind, interaction)
    rows = torch.tensor(data.draw(st.lists(st.integers(-1, USERS - 1), min_size=8, max_size=8)))
    before = bank(interaction, interaction(groups), rows)
    untouched = torch.ones(8, dtype=torch.bool)
    for step in data.draw(st.lists(st.integers(-3, USERS - 1), min_size=1, max_size=4)):
        if step < 0:
            bank.grow(len(bank) - step)
        else:
            bank.clear(step)
            untouched &= rows != step
    after = bank(interaction, interaction(groups), rows)
    assert torch.equal(after[untouched], before[untouched])
    shared = bank(interaction, interaction(groups), torch.full((8,), -1))
    assert torch.equal(after[~untouched], shared[~untouched])
    new = torch.full((8,), len(bank) - 1) if len(bank) > USERS else torch.full((8,), -1)
    assert torch.equal(bank(interaction, interaction(groups), new), shared)


@pytest.mark.parametrize("kind", KINDS)
def test_growing_to_fewer_users_loses_nobody(kind: str) -> None:
    interaction, groups = combiner_of("cross"), random_groups()
    bank = filled(kind, interaction)
    before = bank(interaction, interaction(groups), torch.tensor(ROWS))
    bank.grow(1)
    assert len(bank) == USERS
    assert torch.equal(bank(interaction, interaction(groups), torch.tensor(ROWS)), before)


# ---- combiners


@pytest.mark.parametrize("kind", ["linear", "lowrank", "mlp"])
def test_enrolling_one_after_another_seldom_copies_everybody(kind: str) -> None:
    bank = make_bank(kind, Cross(3), rank=2)
    places = set()
    for users in range(1, 401):
        bank.grow(users)
        assert isinstance(bank.weight, Tensor)
        assert len(bank.weight) == users
        assert not bank.weight[-1].any()
        bank.weight[-1] = users
        places.add(bank.weight.data_ptr())
    assert torch.equal(bank.weight[:, 0], torch.arange(1.0, 401.0))
    assert len(places) < 40


def test_label_features_are_one_hot_kronecker_products() -> None:
    interaction, groups = combiner_of("label"), random_groups(7)
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
    interaction = combiner_of(features)
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
    interaction, groups = combiner_of("tower"), random_groups()
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
        groups.evidence,
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
    interaction, groups = combiner_of(features), random_groups()
    whole = interaction(groups)
    for g in range(5):
        order = groups.mask[g].nonzero()[:, 0]
        assert groups.right is not None
        full = torch.ones(1, len(order), dtype=torch.bool)
        alone = Groups(
            groups.left[[g]], groups.right[[g]][:, order], groups.evidence[[g]][:, order], full
        )
        expected = whole[g] if features == "label" else whole[g, order]
        assert torch.allclose(interaction(alone)[0], expected, atol=1e-6)


@pytest.mark.parametrize("features", ["tower", "cross", "label"])
def test_a_combiner_is_made_again_from_its_config(features: str) -> None:
    interaction, groups = combiner_of(features), random_groups()
    again = make_interaction(interaction.config())
    again.load_state_dict(interaction.state_dict())
    assert torch.equal(again(groups), interaction(groups))
    assert again.config() == interaction.config()


def test_principal_directions_are_the_same_whatever_signs_and_noise_the_processor_leaves() -> None:
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


def test_label_features_keep_no_direction_in_which_no_query_differs() -> None:
    interaction = LabelBilinear(40, 3, 20)
    left = torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
    interaction.prepare(
        Groups(left, None, torch.zeros(8, 3, 0), torch.ones(8, 3, dtype=torch.bool))
    )
    assert int(interaction.project.square().sum(1).gt(0).sum()) == 7
