"""Coverage of the benchmark's 95 % intervals, per metric, for as few users as the committed runs
have, beside other intervals.

    python benchmarks/interval_coverage.py [--users 13] [--queries 5] [--runs 400] [--json]

Simulated users with different preferences are answered by two methods of known accuracy. The truth
is the same metric on very many users; then `runs` small benchmarks are drawn, each with an interval
for one method and for the paired difference of both:
    ours         `hydra_llm.bench.stats`
    percentile   the expanded percentile bootstrap over users, for every metric
    bca          the bias-corrected and accelerated bootstrap over users
Prints the share of intervals that contain the truth and their mean width. No LLM, no data set; two
to four minutes a size.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from hydra_llm.bench import stats as compare
from hydra_llm.bench.metrics import Metric, score
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
"""What is added to the chance that a method is right."""
DRAWS = 1000
MANY = 3000
"""Users that stand for everybody."""


@dataclass(frozen=True)
class Answers:
    """Of one benchmark: gold answers, both methods' answers, and whose they are."""

    golds: list[str]
    given: tuple[list[str], list[str]]
    users: list[str]


def made(task: Task, users: int, queries: int, dice: np.random.Generator) -> Answers:
    """Users' tastes are Dirichlet around a common one, so that some labels are rare and each user
    has few of them.
    """
    options = task.labels or WORDS
    world = np.random.default_rng(0)  # the same for all benchmarks: what is common and what is easy
    common, easy = (
        world.dirichlet(np.full(len(options), 1.5)),
        world.uniform(0.3, 0.7, len(options)),
    )
    golds, given = list[str](), (list[str](), list[str]())
    for _ in range(users):
        taste = dice.dirichlet(common * 4 + 1e-3)
        ease = dice.normal(0, 0.1)
        for _ in range(queries):
            gold = dice.choice(len(options), size=1 if task.labels else 8, p=taste)
            luck, other = dice.random(len(gold)), dice.integers(len(options), size=len(gold))
            golds.append(" ".join(options[place] for place in gold))
            for skill, answers in zip(SKILL, given, strict=True):
                answered = np.where(luck < np.clip(easy[gold] + ease + skill, 0, 1), gold, other)
                answers.append(" ".join(options[place] for place in answered))
    return Answers(golds, given, [f"u{n // queries}" for n in range(users * queries)])


# ---- other intervals, over sums by user [U, S]


def sums_by_user(rows: Floats, users: list[str]) -> Floats:
    _, place = np.unique(users, return_inverse=True)
    sums = np.zeros((place.max() + 1, rows.shape[1]))
    np.add.at(sums, place, rows)
    return sums


def others(sums: Floats, statistic: Callable[[Floats], Floats]) -> dict[str, tuple[float, float]]:
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
    """(of what, interval) → its ends."""
    width = a.rows.shape[1]
    found = {("one", "ours"): tuple(compare.interval(a, users, draws=DRAWS))}
    difference = compare.paired(b, a, users, draws=DRAWS)
    found["difference", "ours"] = difference.low, difference.high
    found |= {
        ("one", name): ends
        for name, ends in others(sums_by_user(a.rows, users), a.spec.statistic).items()
    }
    both = sums_by_user(np.concatenate([a.rows, b.rows], axis=1), users)

    def apart(sums: Floats) -> Floats:
        return a.spec.statistic(sums[:, width:]) - a.spec.statistic(sums[:, :width])

    return found | {("difference", name): ends for name, ends in others(both, apart).items()}


def scored(task: Task, answers: Answers) -> tuple[dict[str, Metric], dict[str, Metric]]:
    first, second = (score(task, given, answers.golds) for given in answers.given)
    return first, second


def coverage(task: Task, users: int, queries: int, runs: int) -> list[dict[str, object]]:
    first, second = scored(task, made(task, MANY, queries, np.random.default_rng(99)))
    truth = {
        name: {"one": first[name].value, "difference": second[name].value - first[name].value}
        for name in first
    }
    dice, found = np.random.default_rng(1), list[dict[tuple[str, str, str], tuple[float, float]]]()
    for _ in range(runs):
        answers = made(task, users, queries, dice)
        one, two = scored(task, answers)
        found.append(
            {
                (name, *key): ends
                for name in one
                for key, ends in intervals(one[name], two[name], answers.users).items()
            }
        )
    rows = []
    for name, what, which in found[0]:
        ends = np.array([each[name, what, which] for each in found])
        held = (ends[:, 0] <= truth[name][what]) & (truth[name][what] <= ends[:, 1])
        row: dict[str, object] = {
            "metric": name,
            "of": what,
            "interval": which,
            "covers": float(held.mean()),
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
    given = parser.parse_args()
    rows = [row for task in TASKS for row in coverage(task, given.users, given.queries, given.runs)]
    if given.json:
        print(
            json.dumps(
                {"users": given.users, "queries": given.queries, "runs": given.runs, "rows": rows},
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
