"""Two methods on the same queries: paired differences, users better and worse, queries needed.

Knows neither tables nor LLMs; the statistics are those of `stats`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.special import stdtrit

from hydra_llm.bench.method import per_sample
from hydra_llm.bench.metrics import Metric
from hydra_llm.bench.runlog import Sample
from hydra_llm.bench.runner import scored
from hydra_llm.bench.stats import Paired, paired
from hydra_llm.tasks.base import Task

POWER = 2.8  # standard errors of a difference found with power 0.8 at the 5 % level: 1.96 + 0.84

Pair = tuple[Sample, Sample]


@dataclass(frozen=True)
class Comparison:
    """A method minus a baseline, on the queries that both answered.

    `needed`: metric → queries that would show the difference as it is; None if there is none.
    """

    metrics: Mapping[str, Paired]
    wins: int  # users whose mean gain is higher
    ties: int
    losses: int
    worst_tenth: float  # mean change of gain of the tenth of users who lose most (at least one)
    needed: Mapping[str, int | None]

    def to_json(self) -> dict[str, Any]:
        metrics = {name: change._asdict() for name, change in self.metrics.items()}
        return {**asdict(self), "metrics": metrics}


def compare(task: Task, own: Sequence[Sample], base: Sequence[Sample]) -> Comparison:
    """How the samples of one method differ from those of another."""
    pairs = pair(own, base)
    queries = len({(sample.user, sample.query) for sample, _ in pairs})
    ours, theirs, users = scored_pairs(task, pairs)
    metrics = {name: paired(ours[name], theirs[name], users) for name in ours}
    changes = np.sort(list(changes_by_user(task, pairs).values()))
    worst = changes[: max(1, len(changes) // 10)]
    return Comparison(
        metrics,
        wins=int((changes > 0).sum()),
        ties=int((changes == 0).sum()),
        losses=int((changes < 0).sum()),
        worst_tenth=float(worst.mean()) if len(worst) else math.nan,
        needed={name: queries_needed(change, queries) for name, change in metrics.items()},
    )


def scored_pairs(
    task: Task, pairs: Sequence[Pair]
) -> tuple[dict[str, Metric], dict[str, Metric], list[str]]:
    """The metrics of both sides, and the user of each pair."""
    ours, theirs = (scored(task, [both[side] for both in pairs]) for side in (0, 1))
    return ours, theirs, [sample.user for sample, _ in pairs]


def pair(own: Sequence[Sample], base: Sequence[Sample]) -> list[Pair]:
    """The samples of the same query and seed. Each is paired with each of the other side's if one
    side has a single seed, or answers once per sample and thus has no seeds.
    """
    sides: list[dict[tuple[str, str], dict[int, Sample]]] = []  # (user, query) → seed → sample
    for samples in (own, base):
        sides.append({})
        for sample in samples:
            sides[-1].setdefault((sample.user, sample.query), {})[sample.seed] = sample
    no_seeds = any(per_sample(samples[0].method) for samples in (own, base) if samples)
    pairs: list[Pair] = []
    for query, ours in sides[0].items():
        theirs = sides[1].get(query, {})
        if 1 in (len(ours), len(theirs)) or (no_seeds and ours.keys() != theirs.keys()):
            seeds = list(product(sorted(ours), sorted(theirs)))
        else:
            seeds = [(seed, seed) for seed in sorted(ours.keys() & theirs.keys())]
        pairs += [(ours[one], theirs[other]) for one, other in seeds]
    return pairs


def changes_by_user(task: Task, pairs: Sequence[Pair]) -> dict[str, float]:
    """User → mean change of gain, over the pairs in which neither call failed."""
    changes: dict[str, list[float]] = {}
    for own, base in pairs:
        if not own.error and not base.error:
            change = task.gain(own.answer, own.gold) - task.gain(base.answer, base.gold)
            changes.setdefault(own.user, []).append(change)
    # rounded, as 1/3 + 1/3 − 2/3 is no difference
    return {user: round(float(np.mean(values)), 12) for user, values in changes.items()}


def queries_needed(change: Paired, queries: int) -> int | None:
    """Queries, of more users, that show the difference with power 0.8; None without one."""
    if change.users < 2 or not change.difference:
        return None
    error = (change.high - change.low) / (2 * float(stdtrit(change.users - 1, 0.975)))
    needed = queries * (POWER * error / abs(change.difference)) ** 2
    return math.ceil(round(needed, 6)) if error > 0 else None
