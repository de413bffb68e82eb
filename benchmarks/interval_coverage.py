"""Coverage of the benchmark's 95 % intervals, per metric, for as few users as the committed runs
have, compared with other intervals.

    python benchmarks/interval_coverage.py [--users 13] [--queries 5] [--runs 400] [--json]

Simulated users with different preferences are answered by two methods of known accuracy. The true
value is the same metric on very many users. Then `runs` small benchmarks are drawn, each with an
interval for one method and for the paired difference of both:
    ours         `hydra_llm.bench.stats`
    percentile   the expanded percentile bootstrap over users, for every metric
    bca          the bias-corrected and accelerated bootstrap over users
Prints the share of intervals that contain the true value, and their mean width. Uses no LLM and no
data set; takes two to four minutes.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from hydra_llm.bench import stats
from hydra_llm.bench.stats import Metric, score
from hydra_llm.tasks.base import Floats, Task

LABELS = tuple(f"label {n}" for n in range(15))
STARS = ("1", "2", "3", "4", "5")
WORDS = [f"w{n}" for n in range(60)]
TASKS = (
    Task("labels", "classification", "{input}", LABELS),
    Task("stars", "rating", "{input}", STARS),
    Task("texts", "generation", "{input}", metrics=("rouge1", "bleu")),
)
SKILL = (0.0, 0.12)
"""Per method: added to the probability of a correct answer."""
DRAWS = 1000
MANY = 3000
"""Number of users that gives the true value."""


@dataclass(frozen=True)
class Answers:
    """One simulated benchmark: gold answers, the answers of both methods, and their users."""

    golds: list[str]
    given: tuple[list[str], list[str]]
    users: list[str]


def simulate(task: Task, users: int, queries: int, rng: np.random.Generator) -> Answers:
    """Users' preferences are Dirichlet around a common one, so that some labels are rare and each
    user has few of them.
    """
    options = task.labels or WORDS
    world = np.random.default_rng(
        0
    )  # label frequencies and difficulties, the same in all benchmarks
    common, easy = (
        world.dirichlet(np.full(len(options), 1.5)),
        world.uniform(0.3, 0.7, len(options)),
    )
    golds, given = list[str](), (list[str](), list[str]())
    for _ in range(users):
        preference = rng.dirichlet(common * 4 + 1e-3)
        ease = rng.normal(0, 0.1)
        for _ in range(queries):
            gold = rng.choice(len(options), size=1 if task.labels else 8, p=preference)
            luck, other = rng.random(len(gold)), rng.integers(len(options), size=len(gold))
            golds.append(" ".join(options[index] for index in gold))
            for skill, answers in zip(SKILL, given, strict=True):
                answered = np.where(luck < np.clip(easy[gold] + ease + skill, 0, 1), gold, other)
                answers.append(" ".join(options[index] for index in answered))
    return Answers(golds, given, [f"u{n // queries}" for n in range(users * queries)])


# ---- other intervals, over sums by user [U, S]


def sums_by_user(rows: Floats, users: list[str]) -> Floats:
    _, indices = np.unique(users, return_inverse=True)
    sums = np.zeros((indices.max() + 1, rows.shape[1]))
    np.add.at(sums, indices, rows)
    return sums


def other_intervals(
    sums: Floats, statistic: Callable[[Floats], Floats]
) -> dict[str, tuple[float, float]]:
    users, value = len(sums), statistic(sums.sum(0, keepdims=True))[0]
    drawn = statistic(
        np.random.default_rng(0).multinomial(users, np.full(users, 1 / users), size=DRAWS) @ sums
    )
    z = np.sqrt(users / (users - 1)) * stdtrit(users - 1, np.array([0.025, 0.975]))
    without = statistic(sums.sum(0, keepdims=True) - sums)
    off = without.mean() - without
    acceleration = (off**3).sum() / max(1e-300, 6 * (off**2).sum() ** 1.5)
    bias = ndtri(
        np.clip(((drawn < value).mean() + (drawn == value).mean() / 2), 1 / DRAWS, 1 - 1 / DRAWS)
    )
    corrected = ndtr(bias + (bias + z) / (1 - acceleration * (bias + z)))
    return {
        "percentile": tuple(np.quantile(drawn, ndtr(z))),
        "bca": tuple(np.quantile(drawn, corrected)),
    }


# ---- coverage


def intervals(a: Metric, b: Metric, users: list[str]) -> dict[tuple[str, str], tuple[float, float]]:
    """("one" method or "difference", kind of interval) → its ends."""
    width, own = a.rows.shape[1], stats.interval(a, users, draws=DRAWS)
    ends_by_key: dict[tuple[str, str], tuple[float, float]] = {("one", "ours"): (own.low, own.high)}
    difference = stats.paired(b, a, users, draws=DRAWS)
    ends_by_key["difference", "ours"] = difference.low, difference.high
    ends_by_key |= {
        ("one", name): ends
        for name, ends in other_intervals(sums_by_user(a.rows, users), a.spec.statistic).items()
    }
    both = sums_by_user(np.concatenate([a.rows, b.rows], axis=1), users)

    def difference_of(sums: Floats) -> Floats:
        return a.spec.statistic(sums[:, width:]) - a.spec.statistic(sums[:, :width])

    return ends_by_key | {
        ("difference", name): ends for name, ends in other_intervals(both, difference_of).items()
    }


def scored(task: Task, answers: Answers) -> tuple[dict[str, Metric], dict[str, Metric]]:
    first, second = (score(task, given, answers.golds) for given in answers.given)
    return first, second


def coverage(task: Task, users: int, queries: int, runs: int) -> list[dict[str, object]]:
    first, second = scored(task, simulate(task, MANY, queries, np.random.default_rng(99)))
    truth = {
        name: {"one": first[name].value, "difference": second[name].value - first[name].value}
        for name in first
    }
    rng, draws = np.random.default_rng(1), list[dict[tuple[str, str, str], tuple[float, float]]]()
    for _ in range(runs):
        answers = simulate(task, users, queries, rng)
        one, two = scored(task, answers)
        draws.append(
            {
                (name, *key): ends
                for name in one
                for key, ends in intervals(one[name], two[name], answers.users).items()
            }
        )
    rows = []
    for name, what, which in draws[0]:
        ends = np.array([draw[name, what, which] for draw in draws])
        covered = (ends[:, 0] <= truth[name][what]) & (truth[name][what] <= ends[:, 1])
        row: dict[str, object] = {
            "metric": name,
            "of": what,
            "interval": which,
            "covers": float(covered.mean()),
        }
        rows.append(
            row
            | {"width": float((ends[:, 1] - ends[:, 0]).mean()), "truth": float(truth[name][what])}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("users", 13), ("queries", 5), ("runs", 400)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [row for task in TASKS for row in coverage(task, args.users, args.queries, args.runs)]
    if args.json:
        print(
            json.dumps(
                {"users": args.users, "queries": args.queries, "runs": args.runs, "rows": rows},
                indent=1,
            )
        )
        return
    for row in rows:
        report = (
            f"{row['metric']:9} {row['of']:11} {row['interval']:11} covers {row['covers']:.3f},"
            f" width {row['width']:.3f}"
        )
        print(f"{report} (truth {row['truth']:.3f})")


if __name__ == "__main__":
    main()
