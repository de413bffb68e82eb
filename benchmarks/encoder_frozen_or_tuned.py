"""Whether to fine-tune the encoder or keep it frozen, per minute of training.

    python benchmarks/encoder_frozen_or_tuned.py [--data FOLDER] [--users 12] [--new 16] [--groups
    8] [--epochs 1 2] [--seed 0] [--json]

Variants of adapter training on the same labelled groups, each as in `hydra_llm.learn`:
    label     label-bilinear features on the frozen encoder's query vector (tasks with labels)
    tower     frozen encoder, each text once; the shared layer has principal directions, no SGD
    trained   as tower, with the shared layer trained jointly with base and heads
    cross     frozen encoder, each pair as one text
    tuned     as cross, with the encoder fine-tuned jointly (learning rate 5e-5), per --epochs
Evaluated on new users' later groups, with heads fitted on their earlier ones: cross-entropy per
group with the shared head and with users' heads. "In folds" is the shared head's cross-validation
loss on training users that were held out from base, layer and encoder; if it is far below the loss
on new users, the hyperparameters are overfitted. Minutes include encoding. A user's records are the
queries, all labels the candidates; no LLM is called. Without `--side-features` only the encoder is
measured. There is no limit: the result is the reason for a default.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import finish, options
from simulated_users import CLASSIFY, learn_scorer, open_data, simulate_users, simulated_data

from hydra_llm.config import Settings, load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.model.encoder import open_encoder
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.heads import Head
from hydra_llm.model.newton import losses
from hydra_llm.model.scorer import Scorer
from hydra_llm.side_features import Featurizer, fit_stats
from hydra_llm.training.convex import fit_heads, heads_for
from hydra_llm.training.dataset import LabelledGroup, TrainingSet, make_training_set
from hydra_llm.training.labelling import weak_adapter_groups

RULE = "exact"
TUNED_LR = 5e-5


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument(
        "--data", type=Path, help="folder of a data set with labels; default: simulated users"
    )
    parser.add_argument("--users", type=int, default=12, help="training users")
    parser.add_argument("--new", type=int, default=16, help="new users")
    parser.add_argument(
        "--groups", type=int, default=8, help="latest records of each user used as queries"
    )
    parser.add_argument(
        "--epochs", type=int, nargs="+", default=[1, 2], help="of fine-tuning the encoder"
    )
    parser.add_argument(
        "--side-features", action="store_true", help="use side features of the history too"
    )
    args = parser.parse_args()
    data = (
        open_data(args.data)
        if args.data
        else simulated_data(
            CLASSIFY,
            simulate_users(args.users + args.new, args.seed),
            args.groups,
            args.seed,
            args.new,
        )
    )
    if not data.task.labels:
        raise SystemExit(
            f"task '{data.task.name}' has no labels: take news_category or movie_rating"
        )
    train_groups, new_groups, names = labelled_groups(data, args)
    rows = [
        measure(variant, settings, data, train_groups, new_groups, names)
        for variant, settings in variants(args).items()
    ]
    args.data = str(args.data) if args.data else None
    groups = {
        "training": len(train_groups),
        "new users": len(new_groups),
        "pairs of one": len(train_groups[0].rights),
    }
    finish(args, {"groups": groups, "rows": rows}, report_lines(rows, groups), [])


def variants(args: argparse.Namespace) -> dict[str, Settings]:
    base = {"seed": args.seed}
    tuned = {
        f"tuned, {n} epochs": load_settings(
            **base, features="cross", tune_encoder=True, lr=TUNED_LR, epochs=n
        )
        for n in args.epochs
    }
    frozen = {
        "label": load_settings(**base),
        "tower": load_settings(**base),
        "trained": load_settings(**base, epochs=30),
        "cross": load_settings(**base, features="cross"),
    }
    return frozen | tuned


def labelled_groups(
    data: DataSet, args: argparse.Namespace
) -> tuple[list[LabelledGroup], list[LabelledGroup], tuple[str, ...]]:
    """Groups of training users and of new users, and the names of the side features."""
    store = FeatureCache(open_encoder("minilm"))
    users = {
        split: data.users(split)[:count]
        for split, count in (("train", args.users), ("test", args.new))
    }
    histories = {user: data.answered(user) for names in users.values() for user in names}
    featurizer = Featurizer(
        data.task, store, fit_stats(data.task, store, [histories[user] for user in users["train"]])
    )
    train_groups, new_groups = (
        [
            group
            for user in names
            for group in weak_adapter_groups(featurizer, histories[user])[-args.groups :]
        ]
        for names in users.values()
    )
    if args.side_features:
        return train_groups, new_groups, featurizer.adapter_names
    train_groups, new_groups = (
        [without_side_features(group) for group in groups] for groups in (train_groups, new_groups)
    )
    return train_groups, new_groups, ("none",)


def without_side_features(group: LabelledGroup) -> LabelledGroup:
    return replace(group, side_features=np.zeros((len(group.rights), 1)))


def measure(
    variant: str,
    settings: Settings,
    data: DataSet,
    train_groups: Sequence[LabelledGroup],
    new_groups: Sequence[LabelledGroup],
    names: Sequence[str],
) -> dict[str, Any]:
    store = FeatureCache(open_encoder("minilm"))
    start = time.perf_counter()
    scorer, learned = learn_scorer(
        store,
        settings,
        data.task,
        "adapter",
        train_groups,
        names,
        RULE,
        by_label=variant == "label",
    )
    minutes = (time.perf_counter() - start) / 60
    early, late = make_training_set(
        store, scorer.interaction, new_groups, rule=RULE, loss=scorer.loss
    ).split_late()
    shared, uniform = (
        mean_loss(scorer, late, {}),
        float(late.groups.mask.sum(-1).float().log().mean()),
    )
    heads = fit_heads(scorer, early, early.names())
    own, accuracy = mean_loss(scorer, late, heads), accuracy_of(scorer, late, heads)
    return {
        "variant": variant,
        "minutes": minutes,
        "loss_uniform": uniform,
        "loss_shared": shared,
        "loss_shared_in_folds": learned["loss_shared"],
        "loss_user": own,
        "accuracy_user": accuracy,
        "gained_nats_per_minute": (uniform - own) / minutes,
        "held_out_groups": len(late),
    }


def mean_loss(scorer: Scorer, late: TrainingSet, heads: dict[str, Head]) -> float:
    assert late.groups.target is not None
    scores = scorer.score(late.groups, heads_for(late, heads)).masked_fill(~late.groups.mask, -1e30)
    return float(losses(scores, late.groups.target, late.groups.mask, scorer.loss).mean())


def accuracy_of(scorer: Scorer, late: TrainingSet, heads: dict[str, Head]) -> float:
    assert late.groups.target is not None
    pick = scorer.score(late.groups, heads_for(late, heads)).argmax(-1)
    return float((late.groups.target[torch.arange(len(late)), pick] > 0).float().mean())


def report_lines(rows: Sequence[dict[str, Any]], groups: dict[str, int]) -> list[str]:
    header = (
        f"{'variant':<18} {'minutes':>8} {'in folds':>9} {'loss shared':>12} {'loss user':>9}"
        f" {'accuracy':>9} {'nats gained / minute':>21}"
    )
    n_groups, uniform = rows[0]["held_out_groups"], rows[0]["loss_uniform"]
    summary = (
        f"{groups['training']} training groups of {groups['pairs of one']} pairs;"
        f" {n_groups} held-out groups, uniform {uniform:.3f}"
    )
    return [summary, header, *(report_line(row) for row in rows)]


def report_line(row: dict[str, Any]) -> str:
    columns = (
        f"{row['loss_shared_in_folds']:9.3f} {row['loss_shared']:12.3f} {row['loss_user']:9.3f}"
        f" {row['accuracy_user']:9.2f}"
    )
    gained = f"{row['gained_nats_per_minute']:21.2f}"
    return f"{row['variant']:<18} {row['minutes']:8.2f} {columns} {gained}"


if __name__ == "__main__":
    main()
