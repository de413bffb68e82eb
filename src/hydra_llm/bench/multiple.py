"""Many tests at once: Holm's correction, and an exact paired test of each user.

Holm 1979, "A simple sequentially rejective multiple test procedure". The test of a user is the
sign-flip (Fisher-Pitman) permutation test: if two methods are alike, the sign of each query's
difference is a coin's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hydra_llm.bench.results import Pair, worth
from hydra_llm.tasks.base import Task

ALPHA = 0.05
ENUMERATED = 14  # differing queries up to which all signs are tried
DRAWS = 20_000  # signs tried beyond that
TINY = 1e-9


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: below α if the hypothesis is rejected at the family-wise level α. NaN, of
    a test that could not be made, stays NaN and does not count.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    adjusted, highest = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        adjusted[place] = highest
    return adjusted


def sign_flip_p(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value of paired differences: exact for few that are not 0, else by random signs
    (Phipson and Smyth 2010: never 0); 1 if all are 0.
    """
    values = np.array([value for value in differences if abs(value) > TINY])
    count = len(values)
    if not count:
        return 1.0
    reached = abs(values.sum()) - TINY
    if count <= ENUMERATED:
        bits = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        return float((abs((2 * bits - 1) @ values) >= reached).mean())
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(DRAWS, count))
    return float(((abs(signs @ values) >= reached).sum() + 1) / (DRAWS + 1))


@dataclass(frozen=True)
class UsersTested:
    """How many users have a significantly worse or better method than a baseline's."""

    users: int
    worse: int  # after Holm's correction over users, at 5 %
    better: int
    worse_alone: (
        int  # with p < 5 % before the correction; 2.5 % of the users are expected by chance
    )
    better_alone: int
    testable: int  # users whose queries could reach significance after the correction at all

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_users(task: Task, pairs: Sequence[Pair]) -> UsersTested:
    """Each user's queries by gain, the mean over seeds; failed calls are left out."""
    changes: dict[str, dict[str, list[float]]] = {}
    for own, base in pairs:
        if not own.error and not base.error:
            change = worth(task, own) - worth(task, base)
            changes.setdefault(own.user, {}).setdefault(own.query, []).append(change)
    by_user = {user: [float(np.mean(v)) for v in own.values()] for user, own in changes.items()}
    return _tested(by_user)


def _tested(by_user: Mapping[str, Sequence[float]]) -> UsersTested:
    alone = [sign_flip_p(values) for values in by_user.values()]
    means = np.array([np.mean(values) for values in by_user.values()])
    adjusted, single = np.array(holm(alone)), np.array(alone)
    least = [2.0 ** (1 - len(values)) for values in by_user.values()]
    return UsersTested(
        users=len(by_user),
        worse=int(((adjusted < ALPHA) & (means < 0)).sum()),
        better=int(((adjusted < ALPHA) & (means > 0)).sum()),
        worse_alone=int(((single < ALPHA) & (means < 0)).sum()),
        better_alone=int(((single < ALPHA) & (means > 0)).sum()),
        testable=sum(p * len(by_user) < ALPHA for p in least),
    )
