"""Gain and harm by age, gender, length of history and activity on MovieLens-100K, and whether a
calibration of heads by group shrinks the gap. No LLM: the scorer alone picks among the labels.

    python benchmarks/fairness.py [--train 200] [--tuned 200] [--new 500] [--seed 0] [--json]

The base is learned from `--train` users. A user's gain is the mean change of the task's gain, 1 −
|answer − rating| / 4, on at most 10 queries, by the user's records and head, over the same model
without both. Means are over the users of a group, intervals over its users; groups of less than two
users have no part in a gap.

    as fitted    each user's head as `fit` makes it
    by group     heads times a number of the user's group, 0 to 1 (0: the floor, the shared head),
                 which `training.group_scales` chooses on `--tuned` other training users, of whom
                 the base has seen nothing: the one of the greatest gain, if it is above 1's by
                 more than noise (its paired 95 % interval excludes 0)
    by group, best   the one of the greatest gain on these users, noise or not

`gap change`: of the gap between the groups that are best and worst as fitted, with the 95 %
interval of the bootstrap over the users of both; `best group`: paired change of the best group.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from measure import finish, options

from hydra_llm.bench.report.groups import ACTIVITY, HISTORY, ByGroup, by_group, grouped, values_of
from hydra_llm.bench.runlog import Sample
from hydra_llm.bench.stats import interval
from hydra_llm.bundle import Bundle
from hydra_llm.config import load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.demo import RATING, movielens, people
from hydra_llm.datasets.native import load, save
from hydra_llm.llm.none import NoLLM
from hydra_llm.select import all_labels, select
from hydra_llm.training.api import fit, learn
from hydra_llm.training.group_scales import SCALES, calibrated
from hydra_llm.types import Candidate, Query

FIELDS = ("gender", "age", HISTORY, ACTIVITY)
NAMES = "hydra", "shared"
Gains = dict[str, float]  # by user


@dataclass(frozen=True)
class Answers:
    """What is answered to some users' queries, by the scale of their heads; None: no records."""

    users: Sequence[str]
    samples: Mapping[float | None, Sequence[Sample]]

    def pairs(self, scale_of: Mapping[str, float]) -> list[tuple[Sample, Sample]]:
        """Each sample by its user's scale, and that of the baseline."""
        base = self.samples[None]
        return [(self.samples[scale_of[own.user]][place], own) for place, own in enumerate(base)]

    def gains(self, scale: float) -> Gains:
        """User → mean change of gain over the baseline."""
        changes: dict[str, list[float]] = {}
        for own, base in self.pairs(dict.fromkeys(self.users, scale)):
            change = RATING.gain(own.answer, own.gold) - RATING.gain(base.answer, base.gold)
            changes.setdefault(own.user, []).append(change)
        return {user: float(np.mean(own)) for user, own in changes.items()}


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument("--train", type=int, default=200)
    parser.add_argument("--tuned", type=int, default=200)
    parser.add_argument("--new", type=int, default=500)
    args = parser.parse_args()
    data = movielens(args.train + args.tuned, args.new, args.seed)
    settings = load_settings(rerank="never", seed=args.seed, users=args.train)
    bundle = learn(data, "none", settings).bundle
    train = data.users("train")
    tuned, new = (answers(bundle, data, own) for own in (train[args.train :], data.users("test")))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "movielens"
        save(data, place, people())
        reread = load(place)
        groups = {field: grouped(values_of(reread, place, field, data.users())) for field in FIELDS}
    rows = [row for field in FIELDS for row in measured(field, groups[field], tuned, new)]
    finish(args, {"rows": rows}, [text for row in rows for text in lines(row)], [])


def answers(bundle: Bundle, data: DataSet, users: Sequence[str]) -> Answers:
    """By each scale; the heads are fitted to the users' histories without their queries."""
    own = DataSet.from_records(
        data.task,
        dict.fromkeys(users, "test"),
        [record for user in users for record in data.history(user)],
        [query for user in users for query in data.queries(user)],
    )
    fitted = fit(own, bundle).bundle
    plain = fitted.without_heads().personalizer(NoLLM())
    personal, alone = fitted.personalizer(NoLLM()), replace(plain, records={})
    samples: dict[float | None, list[Sample]] = {scale: [] for scale in (*SCALES, None)}
    for query in own.stream_queries():
        offered = all_labels(RATING, [])
        base = alone.select(alone.context_of(query), offered)
        samples[None].append(sample(query, base.candidates[base.chosen]))
        found = personal.select(personal.context_of(query), offered)
        scores = np.array([candidate.score for candidate in found.candidates])
        for scale in SCALES:  # a score is linear in the head's numbers
            own_scores = scores - (1 - scale) * found.parts["head"]
            shares = np.exp(own_scores - own_scores.max())
            pick = select(RATING, offered, own_scores, shares / shares.sum(), "expected-gain")
            samples[scale].append(sample(query, offered[pick]))
    return Answers(users, samples)


def sample(query: Query, pick: Candidate) -> Sample:
    return Sample("m", query.user, query.id, query.gold or "", pick.answer)


def measured(
    field: str, group_of: Mapping[str, str], tuned: Answers, new: Answers
) -> list[dict[str, Any]]:
    by_scale = {scale: tuned.gains(scale) for scale in SCALES}
    ways = {
        "as fitted": dict.fromkeys(group_of.values(), 1.0),
        "by group": calibrated(by_scale, group_of),
        "by group, best": calibrated(by_scale, group_of, sure=False),
    }
    rows, before = list[dict[str, Any]](), None
    for way, scales in ways.items():
        scale_of = {user: scales.get(group_of[user], 1.0) for user in new.users}
        found = by_group(RATING, new.pairs(scale_of), group_of, (field, *NAMES))
        gains = {user: new.gains(scale_of[user])[user] for user in new.users}
        row = {"field": field, "way": way, "scales": scales, **found.to_json()}
        if before is None:
            before = found, gains
        else:
            row |= changed(*before, gains, group_of)
        rows.append(row)
    return rows


def changed(
    found: ByGroup, before: Gains, after: Gains, group_of: Mapping[str, str], draws: int = 10_000
) -> dict[str, Any]:
    """What became of the gap and of the best group."""
    ends = [own.group for own in found.groups if own.users > 1]
    change = {
        group: np.array([after[u] - before[u] for u in after if group_of[u] == group])
        for group in (ends[0], ends[-1])
    }
    worst, best = change.values()
    rng = np.random.default_rng(0)
    drawn = [rng.choice(own, (draws, len(own))).mean(1) for own in (best, worst)]
    low, high = np.quantile(drawn[0] - drawn[1], [0.025, 0.975])
    span = interval(best.tolist(), [str(i) for i in range(len(best))])
    return {
        "gap_change": float(best.mean() - worst.mean()),
        "gap_change_interval": [float(low), float(high)],
        "best_group_change": float(best.mean()),
        "best_group_change_interval": list(span),
    }


def lines(row: dict[str, Any]) -> list[str]:
    gap = f"gap {row['gap']:+.4f} {spread(row['gap_interval'])}, p {row['gap_p']:.3f}"
    out = [f"{row['field']}, {row['way']}: {gap}; scales {row['scales']}"]
    if row["way"] == "as fitted":
        for own in row["groups"]:
            gain = f"{own['gain']:+.4f} {spread(own['gain_interval'])}"
            harm = f"{own['harm']:.4f} {spread(own['harm_interval'])}"
            out.append(
                f"    {own['group']:<12} {own['users']:>4} users   gain {gain}"
                f"   harm {harm}   worse {own['harmed']:.0%}"
            )
    else:
        out.append(
            f"    gap change {row['gap_change']:+.4f} {spread(row['gap_change_interval'])}"
            f"   best group {row['best_group_change']:+.4f}"
            f" {spread(row['best_group_change_interval'])}"
        )
    return out


def spread(ends: Sequence[float | None]) -> str:
    return "[" + ", ".join("–" if own is None else f"{own:+.4f}" for own in ends) + "]"


if __name__ == "__main__":
    main()
