"""Calibration of heads by groups of users: each head times a number of the user's group, from 1 (as
fitted) to 0 (the floor: the shared head answers). Off unless `scaled` is called.

The numbers are chosen on users of whom the base has seen nothing, never on those that are measured.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from hydra_llm.model.head import Head

SCALES = (1.0, 0.75, 0.5, 0.25, 0.0)
STANDARD_ERRORS = 1.96  # a scale is chosen over 1 if it gains more than so many
LEAST_USERS = 20  # of a group that has a scale of its own


def calibrated(
    gains: Mapping[float, Mapping[str, float]], group_of: Mapping[str, str], *, sure: bool = True
) -> dict[str, float]:
    """Group → the scale of the greatest mean gain; `gains`: by scale and user. With `sure`, 1 where
    the users' paired difference from 1 is within noise, or they are fewer than `LEAST_USERS`.
    """
    members: dict[str, list[str]] = {}
    for user in gains[1.0]:
        members.setdefault(group_of[user], []).append(user)
    scales = {}
    for group, users in members.items():
        best = max(gains, key=lambda scale: (sum(gains[scale][u] for u in users), scale))
        more = np.array([gains[best][u] - gains[1.0][u] for u in users])
        few = len(users) < LEAST_USERS
        noise = 0.0 if few else STANDARD_ERRORS * more.std(ddof=1) / np.sqrt(len(users))
        scales[group] = 1.0 if sure and (few or more.mean() <= noise) else best
    return scales


def scaled(heads: Mapping[str, Head], scale_of: Mapping[str, float]) -> dict[str, Head]:
    """The heads times their users' scales; 1 for users without one."""
    return {
        user: replace(head, numbers=head.numbers * np.float32(scale_of.get(user, 1.0)))
        for user, head in heads.items()
    }
