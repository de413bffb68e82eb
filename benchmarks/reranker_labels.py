"""Which labels to train the reranker on: the LLM's answers with single records, or weak labels (the
gain of each record's own answer).

    python benchmarks/reranker_labels.py DATA --llm SPEC [--users 20] [--queries 3] [--retrieved 5]
    [--folds 5] [--set NAME=VALUE] [--json]

The reason for a default (`reranker_labels=history`); uses training users only. For their latest
queries the LLM answers once per retrieved record, as in learning; these answers, cached or recorded
(`--llm replay:FILE`), are the evaluation. In cross-validation over users, the base is trained on
the other folds' users and the heads on the records before the evaluated queries, once on the LLM's
answers (`llm`, as published) and once on weak labels (`history`). Prints the mean gain of the LLM's
answer with the first record of each order, and its paired difference from the retriever's order
with a 95 % interval over users. `best` is the upper bound; `copy` is the record whose own answer
has the highest gain, which needs the gold answer. `by lot` is the expected gain of a random record.
Also prints the correlation of both kinds of labels within a query.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import finish, options

from hydra_llm.bench.stats import paired
from hydra_llm.bundle import Bundle
from hydra_llm.cli.options import GivenSettings
from hydra_llm.config import load_settings
from hydra_llm.datasets.native import load
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.llm.registry import open_llm
from hydra_llm.model.heads import make_head
from hydra_llm.model.interactions import Tower
from hydra_llm.model.scorer import Scorer
from hydra_llm.training.api import blank_bundle
from hydra_llm.training.convex import fit_heads, heads_for
from hydra_llm.training.dataset import (
    LabelledGroup,
    TrainingSet,
    folds,
    gain_spread,
    in_set_order,
    make_training_set,
)
from hydra_llm.training.labelling import reranker_groups, training_queries, weak_reranker_groups
from hydra_llm.training.strengths import fit_scorer


@dataclass(frozen=True)
class Case:
    """A query of a training user, with the gain of the LLM's answer for each record."""

    group: LabelledGroup
    weak_gains: Sequence[float]
    """The gain of each record's own answer."""


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument("data", type=Path)
    parser.add_argument("--llm", required=True)
    parser.add_argument(
        "--users", type=int, default=20, help="training users whose queries are evaluated"
    )
    parser.add_argument("--teachers", type=int, help="training users for weak labels; default: all")
    parser.add_argument("--queries", type=int, default=3)
    parser.add_argument("--retrieved", type=int, default=5)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument(
        "--set", action="append", metavar="NAME=VALUE", help="any setting, as for the commands"
    )
    args = parser.parse_args()
    fixed = {"retrieved": args.retrieved, "queries_per_user": args.queries, "seed": args.seed}
    settings = load_settings(**GivenSettings(set_=args.set).given(**fixed))
    data = load(args.data)
    users = [user for user in data.users("train")[: args.teachers] if data.history(user)]
    llm = open_llm(args.llm, settings)
    bundle = blank_bundle(data.task, llm, settings, {user: data.answered(user) for user in users})
    cases, weak_groups = labelled(bundle, llm, users[: args.users])
    gains = {name: np.array([case.group.gains[0] for case in cases]) for name in ("retriever",)}
    gains["by lot"] = np.array([np.mean(case.group.gains) for case in cases])
    for name, train_groups in (("llm", [case.group for case in cases]), ("history", weak_groups)):
        gains[name] = first_gains(bundle, cases, train_groups, args)
    gains["copy"] = np.array([case.group.gains[int(np.argmax(case.weak_gains))] for case in cases])
    gains["best"] = np.array([max(case.group.gains) for case in cases])
    report(args, cases, gains, len(weak_groups))


def labelled(
    bundle: Bundle, llm: Any, labelled_users: Sequence[str]
) -> tuple[list[Case], list[LabelledGroup]]:
    """The evaluated cases, and the weakly labelled groups of every user."""
    pipeline, task = bundle.personalizer(llm, rerank=False), bundle.task
    queries = [
        q
        for user in labelled_users
        for q in training_queries(task, bundle.records[user], bundle.settings.queries_per_user)
    ]
    truth = in_set_order(
        run_sync(partial(reranker_groups, pipeline, queries)).groups(bundle.featurizer)
    )
    weak_groups = [
        group
        for user in bundle.records
        for group in weak_reranker_groups(pipeline, bundle.featurizer, user)
    ]
    weak_gains = {(group.user, group.query): group.gains for group in weak_groups}
    cases = [
        Case(group, weak_gains[group.user, group.query])
        for group in truth
        if len(weak_gains.get((group.user, group.query), ())) == len(group.gains)
    ]
    return cases, weak_groups


def first_gains(
    bundle: Bundle,
    cases: Sequence[Case],
    train_groups: Sequence[LabelledGroup],
    args: argparse.Namespace,
) -> np.ndarray:
    """The LLM's gain with the first record of a reranker that was trained on nothing from the
    user's first evaluated query on.
    """
    eval_groups = [case.group for case in cases]
    first = {
        user: min(group.position for group in eval_groups if group.user == user)
        for user in {group.user for group in eval_groups}
    }
    first_gain = np.full(len(cases), np.nan)
    for part in folds(sorted(first), args.folds, args.seed):
        train = [group for group in train_groups if group.user not in part]
        early = [
            group
            for group in train_groups
            if group.user in part and group.position < first[group.user]
        ]
        scorer, tables = fitted(
            bundle, train, [early, [group for group in eval_groups if group.user in part]]
        )
        heads = fit_heads(scorer, tables[0], part) if len(tables[0]) else {}
        picks = (
            scorer.core(tables[1].groups, heads_for(tables[1], heads))
            .masked_fill(~tables[1].groups.mask, -torch.inf)
            .argmax(-1)
        )
        places = [index for index, group in enumerate(eval_groups) if group.user in part]
        for index, pick in zip(places, picks.tolist(), strict=True):
            first_gain[index] = eval_groups[index].gains[pick]
    return first_gain


@torch.no_grad()
def fitted(
    bundle: Bundle, train: Sequence[LabelledGroup], others: Sequence[Sequence[LabelledGroup]]
) -> tuple[Scorer, list[TrainingSet]]:
    settings = bundle.settings
    interaction = Tower(bundle.features.encoder.width, settings.width)
    scorer = Scorer(
        interaction,
        make_head("linear", interaction, rank=settings.rank),
        bundle.featurizer.reranker_names,
    )
    rule = settings.label_rule.replace("gold-positive", "above-mean")
    spread = gain_spread(train)
    tables = [
        make_training_set(
            bundle.features, interaction, groups, rule=rule, loss="listwise", spread=spread
        )
        for groups in (train, *others)
        if groups
    ]
    interaction.prepare(tables[0].groups)
    fit_scorer(scorer, tables[0], seed=settings.training_seed)
    empty = tables[0].take([])
    rest = iter(tables[1:])
    return scorer, [next(rest) if groups else empty for groups in others]


def report(
    args: argparse.Namespace, cases: Sequence[Case], gains: dict[str, np.ndarray], n_weak: int
) -> None:
    users = [case.group.user for case in cases]
    rows = {}
    for name, values in gains.items():
        difference = paired(values.tolist(), gains["retriever"].tolist(), users)
        rows[name] = {
            "gain": float(np.mean(values)),
            "over_retriever": difference.difference,
            "low": difference.low,
            "high": difference.high,
        }
    within = [
        np.stack(
            [
                np.array(c.weak_gains) - np.mean(c.weak_gains),
                np.array(c.group.gains) - np.mean(c.group.gains),
            ]
        )
        for c in cases
    ]
    correlation = float(np.corrcoef(np.concatenate(within, axis=1))[0, 1])
    lines = [
        f"{len(cases)} queries of {len(set(users))} training users;"
        f" {n_weak} weakly labelled groups train `history`"
    ]
    for name, row in rows.items():
        interval = f"{row['over_retriever']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        lines.append(
            f"{name:<10} {row['gain']:.3f}   difference from the retriever's order {interval}"
        )
    lines.append(f"correlation of weak labels and LLM labels within a query: {correlation:.2f}")
    finish(args, {"rows": rows, "queries": len(cases), "correlation": correlation}, lines, [])


if __name__ == "__main__":
    main()
