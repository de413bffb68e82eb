"""Whether to tune the encoder or to leave it frozen, per minute of learning.

    python benchmarks/encoder_frozen_or_tuned.py [--data FOLDER] [--users 12] [--new 16] [--groups
    8] [--epochs 1 2] [--seed 0] [--json]

Ways to learn the adapter from the same labelled groups, each as `hydra_llm.learn` does it:
    label     one block of weights per label on the frozen encoder's vector of the query (tasks with
              labels)
    tower     frozen encoder, each text once, a shared layer of principal directions: nothing is
              trained by gradient
    trained   as tower, the shared layer trained together with base and heads
    cross     frozen encoder, each pair as one text
    tuned     as cross, the encoder fine-tuned with base and heads (learning rate 5e-5), for each
              number of epochs
Validated on new users' later groups, with heads fitted on their earlier ones: cross-entropy per
group, with the shared head and with the user's own. "In folds" is the shared head's loss by which
learning chose its strengths, on training users that neither that head nor a trained layer or
encoder had seen: if it is far below the other, the choice was overfitted. Minutes are those of
learning, encoding included. A user's records are the queries, all labels the candidates; no LLM is
called. Without `--evidence` no side features are used, so that only the encoder is measured. There
is no limit: this is the measurement behind a default.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from hydra_llm.training.dataset import TrainingSet, make_training_set
from hydra_llm.training.labelling import weak_adapter_groups
from hydra_llm.types import LabelledGroup

RULE = "exact"
TUNED_LR = 5e-5


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument(
        "--data",
        type=Path,
        help="a data set's folder (a task with labels); without it, users are made up",
    )
    parser.add_argument("--users", type=int, default=12, help="training users")
    parser.add_argument("--new", type=int, default=16, help="new users")
    parser.add_argument(
        "--groups", type=int, default=8, help="latest records of each user that serve as groups"
    )
    parser.add_argument(
        "--epochs", type=int, nargs="+", default=[1, 2], help="of the tuned encoder"
    )
    parser.add_argument(
        "--evidence", action="store_true", help="figures of the history stand beside the texts"
    )
    given = parser.parse_args()
    data = (
        open_data(given.data)
        if given.data
        else simulated_data(
            CLASSIFY,
            simulate_users(given.users + given.new, given.seed),
            given.groups,
            given.seed,
            given.new,
        )
    )
    if not data.task.labels:
        raise SystemExit(
            f"task '{data.task.name}' has no labels: take news_category or movie_rating"
        )
    old, new, names = rows_of(data, given)
    rows = [measure(way, settings, data, old, new, names) for way, settings in ways(given).items()]
    given.data = str(given.data) if given.data else None
    groups = {"training": len(old), "new users": len(new), "pairs of one": len(old[0].rights)}
    finish(given, {"groups": groups, "rows": rows}, table_of(rows, groups), [])


def ways(given: argparse.Namespace) -> dict[str, Settings]:
    base = {"seed": given.seed}
    tuned = {
        f"tuned, {n} epochs": load_settings(
            **base, features="cross", tune_encoder=True, lr=TUNED_LR, epochs=n
        )
        for n in given.epochs
    }
    frozen = {
        "label": load_settings(**base),
        "tower": load_settings(**base),
        "trained": load_settings(**base, epochs=30),
        "cross": load_settings(**base, features="cross"),
    }
    return frozen | tuned


def rows_of(
    data: DataSet, given: argparse.Namespace
) -> tuple[list[LabelledGroup], list[LabelledGroup], tuple[str, ...]]:
    """Groups of training and of new users, and the names of the evidence."""
    store = FeatureCache(open_encoder("minilm"))
    users = {
        split: data.users(split)[:many]
        for split, many in (("train", given.users), ("test", given.new))
    }
    histories = {user: data.answered(user) for names in users.values() for user in names}
    maker = Featurizer(
        data.task, store, fit_stats(data.task, store, [histories[user] for user in users["train"]])
    )
    old, new = (
        [
            group
            for user in names
            for group in weak_adapter_groups(maker, histories[user])[-given.groups :]
        ]
        for names in users.values()
    )
    if given.evidence:
        return old, new, maker.adapter_names
    return [bare(group) for group in old], [bare(group) for group in new], ("none",)


def bare(group: LabelledGroup) -> LabelledGroup:
    nothing = ((0.0,),) * len(group.rights)
    return LabelledGroup(
        group.user,
        group.query,
        group.left,
        group.rights,
        group.gains,
        nothing,
        group.position,
        group.voted,
    )


def measure(
    way: str,
    settings: Settings,
    data: DataSet,
    old: Sequence[LabelledGroup],
    new: Sequence[LabelledGroup],
    names: Sequence[str],
) -> dict[str, Any]:
    store = FeatureCache(open_encoder("minilm"))
    began = time.perf_counter()
    scorer, learned = learn_scorer(
        store, settings, data.task, "adapter", old, names, RULE, by_label=way == "label"
    )
    minutes = (time.perf_counter() - began) / 60
    early, late = make_training_set(
        store, scorer.interaction, new, rule=RULE, loss=scorer.loss
    ).split_late()
    shared, uniform = (
        loss_of(scorer, late, {}),
        float(late.groups.mask.sum(-1).float().log().mean()),
    )
    heads = fit_heads(scorer, early, early.names())
    own, right = loss_of(scorer, late, heads), hits(scorer, late, heads)
    return {
        "way": way,
        "minutes": minutes,
        "loss_uniform": uniform,
        "loss_shared": shared,
        "loss_shared_in_folds": learned["loss_shared"],
        "loss_user": own,
        "accuracy_user": right,
        "gained_nats_per_minute": (uniform - own) / minutes,
        "held_out_groups": len(late),
    }


def loss_of(scorer: Scorer, late: TrainingSet, heads: dict[str, Head]) -> float:
    assert late.groups.target is not None
    scores = scorer.score(late.groups, heads_for(late, heads)).masked_fill(~late.groups.mask, -1e30)
    return float(losses(scores, late.groups.target, late.groups.mask, scorer.loss).mean())


def hits(scorer: Scorer, late: TrainingSet, heads: dict[str, Head]) -> float:
    assert late.groups.target is not None
    pick = scorer.score(late.groups, heads_for(late, heads)).argmax(-1)
    return float((late.groups.target[torch.arange(len(late)), pick] > 0).float().mean())


def table_of(rows: Sequence[dict[str, Any]], groups: dict[str, int]) -> list[str]:
    head = (
        f"{'way':<18} {'minutes':>8} {'in folds':>9} {'loss shared':>12} {'loss own':>9}"
        f" {'accuracy':>9} {'nats gained a minute':>21}"
    )
    held, uniform = rows[0]["held_out_groups"], rows[0]["loss_uniform"]
    about = (
        f"{groups['training']} training groups of {groups['pairs of one']}; {held} held-out groups,"
        f" equal shares {uniform:.3f}"
    )
    return [about, head, *(line_of(row) for row in rows)]


def line_of(row: dict[str, Any]) -> str:
    found = (
        f"{row['loss_shared_in_folds']:9.3f} {row['loss_shared']:12.3f} {row['loss_user']:9.3f}"
        f" {row['accuracy_user']:9.2f}"
    )
    return f"{row['way']:<18} {row['minutes']:8.2f} {found} {row['gained_nats_per_minute']:21.2f}"


if __name__ == "__main__":
    main()
