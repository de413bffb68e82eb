"""Heads calibrated by group: on users who say that a group is better off with less of its heads."""

import numpy as np

from hydra_llm.model.head import Head
from hydra_llm.training.group_scales import LEAST_USERS, calibrated, scaled

USERS = 60


def gains(losing: str) -> tuple[dict[float, dict[str, float]], dict[str, str]]:
    """Heads help all users by .1; those of one group would gain .1 more without. Noise of .02."""
    dice = np.random.default_rng(0)
    group_of = {f"u{i}": "xy"[i % 2] for i in range(USERS)}
    return {
        scale: {
            user: 0.1 + 0.1 * (1 - scale) * (1 if own == losing else -1) + dice.normal(0, 0.02)
            for user, own in group_of.items()
        }
        for scale in (1.0, 0.5, 0.0)
    }, group_of


def test_a_group_that_gains_without_its_heads_goes_without() -> None:
    """And the gap shrinks without a loss of the other group."""
    known, group_of = gains(losing="x")
    scales = calibrated(known, group_of)
    assert scales == {"x": 0.0, "y": 1.0}

    def means(of: dict[str, float]) -> dict[str, float]:
        own = {g: [known[of[g]][u] for u in group_of if group_of[u] == g] for g in "xy"}
        return {group: float(np.mean(values)) for group, values in own.items()}

    assert means(scales)["x"] > means({"x": 1.0, "y": 1.0})["x"] + 0.05
    assert means(scales)["y"] == means({"x": 1.0, "y": 1.0})["y"]


def test_noise_and_few_users_change_no_scale() -> None:
    dice, group_of = np.random.default_rng(1), {f"u{i}": "xy"[i % 2] for i in range(USERS)}
    noise = {s: {user: dice.normal(0, 0.1) for user in group_of} for s in (1.0, 0.5)}
    assert calibrated(noise, group_of) == {"x": 1.0, "y": 1.0}
    assert 0.5 in calibrated(noise, group_of, sure=False).values()
    known, groups = gains(losing="x")
    few = [user for user in groups if groups[user] == "x"][: LEAST_USERS - 1]
    small = {
        s: {u: own[u] for u in own if groups[u] == "y" or u in few} for s, own in known.items()
    }
    assert calibrated(small, groups)["x"] == 1.0
    assert calibrated(small, groups, sure=False)["x"] == 0.0


def test_scaled_heads() -> None:
    """0 is the shared head, 1 changes no bit, and so does no scale."""
    numbers = np.array([0.1, -2.0], dtype=np.float32)
    heads = {user: Head.of(numbers, 3, 5.0) for user in "abc"}
    found = scaled(heads, {"a": 0.0, "b": 0.5})
    assert not found["a"].numbers.any()
    assert (found["b"].numbers == numbers / 2).all()
    assert (found["c"].numbers == numbers).all()
    assert {(own.records, own.until) for own in found.values()} == {(3, 5.0)}
