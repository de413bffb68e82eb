"""Adapter training on few labelled queries of a text task: the constants for small training sets
against the general ones.

    python benchmarks/few_groups.py DATA --llm SPEC [--users 20] [--new 17] [--splits 24] [--set
    NAME=VALUE] [--json]

The reason for two constants of training: more folds, and evaluation on all groups, if there are
few. Uses training users and new users' histories, never new users' queries. All users have groups
of candidates, as in learning and fitting (`--llm replay:FILE` makes no calls). Each random split
trains a base on as many users as there are training users and evaluates on the others: all their
groups with the shared head, and each group with a head fitted on the user's groups before it.
Prints mean cross-entropy and mean gain of the picks. `before` is the same with three folds of users
and evaluation on the last third of each user's groups. Uniform shares and the first candidates are
baselines.
"""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from measure import finish, options
from torch import Tensor

from hydra_llm.bundle import Bundle
from hydra_llm.cli.options import GivenSettings
from hydra_llm.config import load_settings
from hydra_llm.datasets.native import load
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.llm.registry import open_llm
from hydra_llm.model.heads import Head, make_head
from hydra_llm.model.interactions import Tower
from hydra_llm.model.newton import losses
from hydra_llm.model.scorer import Scorer
from hydra_llm.select import select
from hydra_llm.training.api import fit, learn
from hydra_llm.training.convex import fit_heads, heads_for
from hydra_llm.training.dataset import (
    LabelledGroup,
    TrainingSet,
    gain_spread,
    in_set_order,
    make_training_set,
)
from hydra_llm.training.labelling import adapter_groups, training_queries
from hydra_llm.training.strengths import fit_scorer
from hydra_llm.types import Candidate

Row = tuple[float, float]
"""Cross-entropy and gain of the pick, for one group."""
HEADS = ("shared head", "own head")
BEFORE: dict[str, Any] = {
    "hydra_llm.training.strengths.TINY_SET": 0,
    "hydra_llm.training.dataset.TrainingSet.block_splits": TrainingSet.prequential_splits,
    "hydra_llm.training.dataset.FEW_GROUPS": 0,
}


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument("data", type=Path)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--users", type=int, default=20, help="training users")
    parser.add_argument(
        "--new", type=int, default=17, help="new users; only their histories are used"
    )
    parser.add_argument("--splits", type=int, default=24)
    parser.add_argument(
        "--set", action="append", metavar="NAME=VALUE", help="any setting, as for the commands"
    )
    args = parser.parse_args()
    bundle, groups = labelled_groups(args)
    names = list(dict.fromkeys(group.user for group in groups))
    results: dict[str, list[np.ndarray]] = {}
    for split in range(args.splits):
        order = np.random.default_rng(args.seed + split).permutation(len(names))
        train_users, eval_users = (
            {names[i] for i in part} for part in (order[: args.users], order[args.users :])
        )
        train, evaluated = (
            [group for group in groups if group.user in part] for part in (train_users, eval_users)
        )
        for kind, constants in (("before", BEFORE), ("now", {})):
            for variant, rows in evaluate(
                bundle, train, evaluated, constants, args.seed + split
            ).items():
                if variant in HEADS or kind == "now":
                    results.setdefault(
                        f"{variant}, {kind}" if variant in HEADS else variant, []
                    ).append(np.mean(rows, axis=0))
    report(args, results, len(names), len(groups))


def labelled_groups(args: argparse.Namespace) -> tuple[Bundle, list[LabelledGroup]]:
    """A trained bundle with the new users' reranker heads, and all users' groups of candidates in
    the order of a training set.
    """
    flags = {"users": args.users, "seed": args.seed}
    settings = load_settings(**GivenSettings(set_=args.set).given(**flags))
    data = load(args.data)
    llm, new = open_llm(args.llm, settings), data.users("test")[: args.new]
    bundle = fit(data, learn(data, llm, settings).bundle, llm, users=new).bundle
    users = [*bundle.trained_on, *new]
    queries = [
        q
        for user in users
        for q in training_queries(bundle.task, bundle.records[user], settings.queries_per_user)
    ]
    pipeline = bundle.personalizer(llm, adapt=False)
    return bundle, in_set_order(
        run_sync(lambda: adapter_groups(pipeline, queries)).groups(bundle.featurizer)
    )


def evaluate(
    bundle: Bundle,
    train_groups: Sequence[LabelledGroup],
    eval_groups: Sequence[LabelledGroup],
    constants: dict[str, Any],
    seed: int,
) -> dict[str, list[Row]]:
    """The evaluation groups by a base fitted on the training groups: with the shared head, with
    users' heads, and without a scorer.
    """
    interaction = Tower(bundle.features.encoder.width, bundle.settings.width)
    scorer = Scorer(interaction, make_head("linear", interaction), bundle.featurizer.adapter_names)
    train, late = (
        to_training_set(bundle, scorer, groups, gain_spread(train_groups))
        for groups in (train_groups, eval_groups)
    )
    interaction.prepare(train.groups)
    with ExitStack() as stack:
        for name, value in constants.items():
            stack.enter_context(patch(name, value))
        fit_scorer(scorer, train, seed=seed)
    rows = {"equal shares": loss_and_gain(bundle, late, torch.zeros_like(late.gains), eval_groups)}
    rows["first candidate"] = [
        (0.0, group.gains[0]) for group in eval_groups if len(set(group.gains)) > 1
    ]
    rows["shared head"] = loss_and_gain(bundle, late, calibrated(scorer, late, {}), eval_groups)
    rows["own head"] = []
    for before, after in late.prequential_splits():
        heads = fit_heads(scorer, before, late.names())
        places = {
            (user, int(position))
            for user, position in zip(after.users, after.positions, strict=True)
        }
        head_groups = [group for group in eval_groups if (group.user, group.position) in places]
        rows["own head"] += loss_and_gain(
            bundle, after, calibrated(scorer, after, heads), head_groups
        )
    return rows


def to_training_set(
    bundle: Bundle, scorer: Scorer, groups: Sequence[LabelledGroup], spread: float
) -> TrainingSet:
    return make_training_set(
        bundle.features,
        scorer.interaction,
        groups,
        rule=bundle.settings.label_rule,
        loss=scorer.loss,
        spread=spread,
    )


@torch.no_grad()
def calibrated(scorer: Scorer, data: TrainingSet, heads: dict[str, Head]) -> Tensor:
    return scorer.scale * scorer.core(data.groups, heads_for(data, heads))


def loss_and_gain(
    bundle: Bundle, data: TrainingSet, scores: Tensor, groups: Sequence[LabelledGroup]
) -> list[Row]:
    """One row per group whose candidates differ in gain."""
    assert data.groups.target is not None
    group_losses = losses(scores, data.groups.target, data.groups.mask, "listwise").tolist()
    rows = []
    for loss, score, group in zip(group_losses, scores, groups, strict=True):
        if len(set(group.gains)) > 1:
            own = score[: len(group.rights)]
            candidates = [Candidate(text, text) for text in group.rights]
            pick = select(
                bundle.task,
                candidates,
                own.numpy(),
                own.softmax(-1).numpy(),
                bundle.settings.select,
            )
            rows.append((loss, group.gains[pick]))
    return rows


def report(
    args: argparse.Namespace, results: dict[str, list[np.ndarray]], users: int, groups: int
) -> None:
    """Means over splits; for now minus before also the standard deviation over splits. Splits share
    users, so there is no interval.
    """
    rows = {
        name: dict(zip(("loss", "gain"), np.mean(values, axis=0).tolist(), strict=True))
        for name, values in results.items()
    }
    rows["first candidate"].pop("loss")  # a pick without probabilities
    for variant in HEADS:
        difference = np.subtract(results[f"{variant}, now"], results[f"{variant}, before"])
        names = ("loss", "gain", "loss_deviation", "gain_deviation")
        rows[f"{variant}, now less before"] = dict(
            zip(names, [*difference.mean(0).tolist(), *difference.std(0).tolist()], strict=True)
        )
    lines = [
        f"{groups} groups of {users} users, {args.splits} splits: {args.users} for training,"
        f" {users - args.users} for evaluation"
    ]
    lines += [
        f"{name:<28} " + "   ".join(f"{key} {value:+.4f}" for key, value in row.items())
        for name, row in rows.items()
    ]
    finish(args, {"rows": rows, "users": users, "groups": groups}, lines, [])


if __name__ == "__main__":
    main()
