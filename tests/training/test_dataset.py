"""Tables of labelled groups: targets by hand, order and padding, and that nothing later ever stands
in the early part.
"""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_llm.model.interactions import Cross, Groups, LabelBilinear, Tower
from hydra_llm.model.newton import Loss
from hydra_llm.training.dataset import (
    FEW_GROUPS,
    LabelledGroup,
    TrainingSet,
    chunks_of_users,
    folds,
    make_training_set,
    targets,
    within_group_spread,
)

FULL = torch.ones(1, 3, dtype=torch.bool)


class Store:
    """Texts that are numbers, as vectors."""

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([[float(text), 1.0] for text in texts], dtype=np.float32).reshape(-1, 2)

    def pairs(self, left: Sequence[str], right: Sequence[str]) -> np.ndarray:
        return np.array(
            [[float(a), float(b)] for a, b in zip(left, right, strict=True)], dtype=np.float32
        ).reshape(-1, 2)


def softmax(*values: float) -> list[float]:
    odds = [math.exp(value) for value in values]
    return [odd / sum(odds) for odd in odds]


@pytest.mark.parametrize(
    ("loss", "rule", "gains", "expected"),
    [
        ("listwise", "exact", [0, 1, 0], [0, 1, 0]),
        ("listwise", "exact", [1, 0.5, 1], [0.5, 0, 0.5]),
        ("listwise", "exact", [0.75, 0.5, 0.25], [0, 0, 0]),  # none is right
        ("listwise", "exact", [1, 1, 1], [0, 0, 0]),
        ("listwise", "above-mean", [0.9, 0.6, 0.0], [0.5, 0.5, 0]),
        ("listwise", "above-mean", [0.2, 0.2, 0.2], [0, 0, 0]),
        ("listwise", "graded", [0.3, 0.0, 0.6], softmax(0, -1.5, 1.5)),  # spread 0.2
        ("listwise", "graded", [0, 0, 0], [0, 0, 0]),
        ("binary", "exact", [1, 0.5, 0], [1, 0, 0]),
        ("binary", "exact", [0.75, 0.5, 0], [0, 0, 0]),
        ("binary", "above-mean", [0.9, 0.6, 0.0], [1, 1, 0]),
        ("binary", "above-mean", [1, 1, 1], [1, 1, 1]),  # right and wrong are absolute
        ("binary", "above-mean", [0, 0, 0], [0, 0, 0]),
        ("binary", "above-mean", [0.4, 0.4, 0.4], [0, 0, 0]),
        ("binary", "graded", [0.3, 0.0, 0.6], [0.3, 0.0, 0.6]),
    ],
)
def test_targets_by_hand(loss: str, rule: str, gains: list[float], expected: list[float]) -> None:
    actual = targets(torch.tensor([gains]), FULL, rule=rule, loss=loss, spread=0.2)  # type: ignore[arg-type]
    assert actual[0].tolist() == pytest.approx(expected, abs=1e-6)
    padded = torch.tensor([[*gains, 0.0, 0.0]])  # and with padding, which gets nothing
    mask = torch.tensor([[True, True, True, False, False]])
    actual = targets(padded, mask, rule=rule, loss=loss, spread=0.2)  # type: ignore[arg-type]
    assert actual[0].tolist() == pytest.approx([*expected, 0, 0], abs=1e-6)


def test_the_spread_is_the_deviation_within_groups_that_differ() -> None:
    gains = torch.tensor([[0.0, 1.0, 0.0], [0.4, 0.4, 0.4], [0.0, 0.6, 0.3]])
    mask = torch.tensor([[True, True, False], [True, True, True], [True, True, True]])
    assert within_group_spread(gains, mask) == pytest.approx(
        math.sqrt((0.25 + 0.25 + 0.09 + 0.09) / 5)
    )
    assert within_group_spread(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)) == 1.0
    actual = targets(gains, mask, rule="graded", loss="listwise")
    scale = math.sqrt(0.68 / 5)
    assert actual[2].tolist() == pytest.approx(softmax(-0.3 / scale, 0.3 / scale, 0), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(["exact", "above-mean", "graded"]),
)
def test_a_listwise_target_is_a_distribution_or_nothing(rows: list[list[float]], rule: str) -> None:
    mask = torch.tensor([[c < len(row) for c in range(4)] for row in rows])
    gains = torch.tensor([[*row, *[0.0] * (4 - len(row))] for row in rows])
    actual = targets(gains, mask, rule=rule, loss="listwise")
    assert actual.isfinite().all()
    assert (actual[~mask] == 0).all()
    for row, target in zip(rows, actual, strict=True):
        assert float(target.sum()) == pytest.approx(
            0 if len(set(row)) == 1 else float(target.sum() > 0.5), abs=1e-5
        )
        if target.sum() > 0.5:
            assert all(
                target[i] == target.max() for i, gain in enumerate(row) if gain == max(row)
            )  # none gets more than the best


def group(user: str, position: int, voted: bool = False, count: int = 2) -> LabelledGroup:
    rights, gains = (
        tuple(str(10 * position + c) for c in range(count)),
        tuple(float(c == 0) for c in range(count)),
    )
    return LabelledGroup(
        user,
        f"q{position}",
        str(position),
        rights,
        gains,
        np.array([(float(c), 7.0) for c in range(count)]),
        position,
        voted,
    )


def test_a_dataset_is_padded_with_each_users_oldest_group_first() -> None:
    groups = [
        group("b", 4),
        group("a", 9, True, 3),
        group("b", 1, count=1),
        group("a", 2, count=0),
        group("a", 9),
    ]
    table = make_training_set(Store(), Tower(2, 3), groups, rule="exact", loss="listwise")  # type: ignore[arg-type]
    assert table.users == ("a", "a", "b", "b")
    assert table.positions.tolist() == [9, 9, 1, 4]
    assert table.voted.tolist() == [False, True, False, False]
    assert table.groups.mask.tolist() == [
        [True, True, False],
        [True, True, True],
        [True, False, False],
        [True, True, False],
    ]
    assert table.groups.right is not None
    assert table.groups.target is not None
    assert table.groups.left[:, 0].tolist() == [9, 9, 1, 4]
    assert table.groups.right[..., 0].tolist() == [
        [90, 91, 0],
        [90, 91, 92],
        [10, 0, 0],
        [40, 41, 0],
    ]
    assert table.groups.side_features[1].tolist() == [[0, 7], [1, 7], [2, 7]]
    assert table.groups.side_features[2].tolist() == [[0, 7], [0, 0], [0, 0]]
    assert table.groups.target.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0]]
    crossed = make_training_set(Store(), Cross(2), groups, rule="exact", loss="listwise")  # type: ignore[arg-type]
    assert crossed.groups.right is not None
    assert crossed.groups.right[1].tolist() == [[9, 90], [9, 91], [9, 92]]


tables = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.booleans()), min_size=1, max_size=20
)


def table_of(rows: list[tuple[str, int, bool]]) -> TrainingSet:
    ordered = sorted(rows)
    size = len(ordered)
    groups = Groups(
        torch.zeros(size, 1),
        None,
        torch.zeros(size, 2, 0),
        torch.ones(size, 2, dtype=torch.bool),
        torch.zeros(size, 2),
    )
    places = torch.tensor([position for _, position, _ in ordered])
    users, voted = (
        tuple(user for user, _, _ in ordered),
        torch.tensor([voted for *_, voted in ordered]),
    )
    return TrainingSet(groups, users, places, voted, torch.zeros(size, 2))


@settings(max_examples=100, deadline=None)
@given(tables, st.sampled_from([0.1, 0.3, 0.9]))
def test_a_later_group_is_never_in_the_early_part(
    rows: list[tuple[str, int, bool]], share: float
) -> None:
    table = table_of(rows)
    early, late = table.split_late(share)
    assert len(early) + len(late) == len(table)
    for user in table.names():
        mine = late.of([user]).positions.tolist()
        assert mine, "every user is evaluated"
        assert max([*early.of([user]).positions.tolist(), -1]) <= min(mine)


@settings(max_examples=100, deadline=None)
@given(tables)
def test_each_of_few_groups_is_predicted_once_from_earlier(
    rows: list[tuple[str, int, bool]],
) -> None:
    table = table_of(rows)
    cuts = table.prequential_splits()
    if max(map(len, table.index.values())) > FEW_GROUPS:
        assert [late.users for _, late in cuts] == [table.split_late()[1].users]
        return
    assert sum(len(late) for _, late in cuts) == len(table)
    for step, (early, late) in enumerate(cuts):
        for user in late.names():
            mine = early.of([user]).positions.tolist()
            assert len(mine) == step
            assert max([*mine, -1]) <= min(late.of([user]).positions.tolist())


@settings(max_examples=100, deadline=None)
@given(tables)
def test_in_blocks_every_group_is_predicted_once(rows: list[tuple[str, int, bool]]) -> None:
    table = table_of(rows)
    cuts = table.block_splits()
    assert sum(len(late) for _, late in cuts) == len(table)
    for early, late in cuts:
        for user in late.names():
            mine, theirs = early.of([user]).positions, late.of([user]).positions
            assert len(theirs) <= max(2, len(mine)), "heads know at least as much as is asked"
            assert (
                torch.cat([mine, theirs]).tolist()
                == (table.of([user]).positions.tolist()[: len(mine) + len(theirs)])
            )
    if max(map(len, table.index.values())) <= FEW_GROUPS:
        single = table.prequential_splits()
        assert [late.users for _, late in cuts] == [late.users for _, late in single]


@settings(max_examples=100, deadline=None)
@given(tables)
def test_before_the_votes_nothing_from_after_them(rows: list[tuple[str, int, bool]]) -> None:
    table = table_of(rows)
    if len({voted for *_, voted in rows}) == 1:
        assert [late.users for _, late in table.calibration_splits()] == [
            late.users for _, late in table.prequential_splits()
        ]
        return
    ((early, late),) = table.calibration_splits()
    assert late.voted.all()
    assert len(late) == sum(voted for *_, voted in rows)
    assert not early.voted.any()
    for user in table.names():
        first = min([*late.of([user]).positions.tolist(), 100])
        expected = [
            position
            for name, position, voted in sorted(rows)
            if name == user and not voted and position < first
        ]
        assert early.of([user]).positions.tolist() == expected


@settings(max_examples=60, deadline=None)
@given(tables, st.integers(1, 30))
def test_chunks_hold_each_group_of_each_user_once(
    rows: list[tuple[str, int, bool]], numbers: int
) -> None:
    table = table_of(rows)
    seen: list[int] = []
    for chunk, index in chunks_of_users(table, ["a", "b", "unknown"], numbers=numbers):
        assert len(chunk) == len(index)
        assert len(chunk) == 1 or index.numel() <= numbers
        for name, row in zip(chunk, index.tolist(), strict=True):
            own = [i for i in row if i >= 0]
            assert {table.users[i] for i in own} == {name}
            seen += own
    assert sorted(seen) == [i for i, user in enumerate(table.users) if user in "ab"]


@given(st.integers(0, 12), st.integers(1, 5), st.integers(0, 3))
def test_folds_part_the_users(count: int, parts: int, seed: int) -> None:
    names = [f"u{i}" for i in range(count)]
    actual = folds(names, parts, seed)
    assert sorted(name for part in actual for name in part) == sorted(names)
    assert len(actual) == min(parts, count)
    assert actual == folds(names, parts, seed)


def test_graded_targets_of_a_user_do_not_depend_on_other_users() -> None:
    def graded(user: str, gains: tuple[float, ...]) -> LabelledGroup:
        return LabelledGroup(user, "q", "1", ("2", "3"), gains, np.array([[0.0], [1.0]]))

    mine, other = graded("a", (0.4, 0.5)), graded("b", (0.0, 1.0))
    alone, together = (
        make_training_set(
            Store(), Tower(2, 3), groups, rule="graded", loss="listwise", spread=0.1
        ).of(["a"])  # type: ignore[arg-type]
        for groups in ([mine], [mine, other])
    )
    assert alone.groups.target is not None
    assert together.groups.target is not None
    assert torch.allclose(alone.groups.target, together.groups.target, atol=1e-5)


@pytest.mark.parametrize("loss", ["listwise", "binary"])
@pytest.mark.parametrize("rule", ["exact", "graded"])
def test_no_groups_are_an_empty_training_set(rule: str, loss: Loss) -> None:
    for interaction in (Tower(2, 3), Cross(2), LabelBilinear(2, 3, 2)):
        table = make_training_set(Store(), interaction, [], rule=rule, loss=loss)  # type: ignore[arg-type]
        assert (len(table), table.names()) == (0, [])
        assert [len(part) for split in table.prequential_splits() for part in split] == []
