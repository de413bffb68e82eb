"""Learning the adapter from a few labelled queries of a text task: constants for few groups against
the general ones.

    python benchmarks/small_lessons.py DATA --llm SPEC [--users 20] [--new 17] [--splits 24] [--set
    NAME=VALUE] [--json]

The measurement behind two constants of training (more folds, and validation on all groups, if there
are few), on training users and on new users' histories alone, never on their queries. All users
have groups of candidates, as learning and fitting make them (`--llm replay:FILE` makes no calls).
In each random split as many users as there are training users teach a base, and the others
validate: all their groups under the shared head, and each group under a head of the groups before
it. Printed are the mean cross-entropy and the gain of the picks; `before` is the same with folds of
a third of the users and the last third of each user's groups. Equal shares and the first candidates
are beside them.
"""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
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
from hydra_llm.training.convex import fit_heads, fit_scorer, heads_for
from hydra_llm.training.dataset import TrainingSet, gain_spread, in_set_order, make_training_set
from hydra_llm.training.labelling import adapter_groups, training_queries
from hydra_llm.types import Candidate, LabelledGroup

Row = tuple[float, float]
"""Cross-entropy and gain of the pick of one group."""
HEADS = ("shared head", "own head")
BEFORE = {"hydra_llm.training.convex.TINY_SET": 0, "hydra_llm.training.dataset.FEW_GROUPS": 0}


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument("data", type=Path)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--users", type=int, default=20, help="training users")
    parser.add_argument(
        "--new",
        type=int,
        default=17,
        help="new users, whose histories are used and whose queries are not",
    )
    parser.add_argument("--splits", type=int, default=24)
    parser.add_argument(
        "--set", action="append", metavar="NAME=VALUE", help="any setting, as the commands take it"
    )
    given = parser.parse_args()
    bundle, groups = lessons(given)
    names = list(dict.fromkeys(group.user for group in groups))
    found: dict[str, list[np.ndarray]] = {}
    for split in range(given.splits):
        order = np.random.default_rng(given.seed + split).permutation(len(names))
        teachers, judges = (
            {names[i] for i in part} for part in (order[: given.users], order[given.users :])
        )
        parts = [[group for group in groups if group.user in part] for part in (teachers, judges)]
        for kind, constants in (("before", BEFORE), ("now", {})):
            for way, rows in judged(bundle, *parts, constants, given.seed + split).items():
                if way in HEADS or kind == "now":
                    found.setdefault(f"{way}, {kind}" if way in HEADS else way, []).append(
                        np.mean(rows, axis=0)
                    )
    report(given, found, len(names), len(groups))


def lessons(given: argparse.Namespace) -> tuple[Bundle, list[LabelledGroup]]:
    """A learned bundle with the new users' reranker heads, and everybody's groups of candidates, in
    a table's order.
    """
    flags = {"users": given.users, "seed": given.seed}
    settings = load_settings(**GivenSettings(set_=given.set).given(**flags))
    data = load(given.data)
    llm, new = open_llm(given.llm, settings), data.users("test")[: given.new]
    bundle = fit(data, learn(data, llm, settings).bundle, llm, users=new).bundle
    people = [*bundle.trained_on, *new]
    queries = [
        q
        for user in people
        for q in training_queries(bundle.task, bundle.records[user], settings.queries_per_user)
    ]
    door = bundle.personalizer(llm, adapt=False)
    return bundle, in_set_order(
        run_sync(lambda: adapter_groups(door, queries)).groups(bundle.featurizer)
    )


def judged(
    bundle: Bundle,
    teaching: Sequence[LabelledGroup],
    judging: Sequence[LabelledGroup],
    constants: dict[str, int],
    seed: int,
) -> dict[str, list[Row]]:
    """The judges' groups by a base that the teachers taught: under the shared head, by own heads,
    and without any scorer.
    """
    interaction = Tower(bundle.store.encoder.width, bundle.settings.width)
    scorer = Scorer(interaction, make_head("linear", interaction), bundle.featurizer.adapter_names)
    train, late = (
        table_of(bundle, scorer, groups, gain_spread(teaching)) for groups in (teaching, judging)
    )
    interaction.prepare(train.groups)
    with ExitStack() as stack:
        for name, value in constants.items():
            stack.enter_context(patch(name, value))
        fit_scorer(scorer, train, seed=seed)
    told = {"equal shares": rows_of(bundle, late, torch.zeros_like(late.gains), judging)}
    told["first candidate"] = [
        (0.0, group.gains[0]) for group in judging if len(set(group.gains)) > 1
    ]
    told["shared head"] = rows_of(bundle, late, calibrated(scorer, late, {}), judging)
    told["own head"] = []
    for before, after in late.prequential_splits():
        heads = fit_heads(scorer, before, late.names())
        places = {
            (user, int(place)) for user, place in zip(after.users, after.positions, strict=True)
        }
        own = [group for group in judging if (group.user, group.position) in places]
        told["own head"] += rows_of(bundle, after, calibrated(scorer, after, heads), own)
    return told


def table_of(
    bundle: Bundle, scorer: Scorer, groups: Sequence[LabelledGroup], spread: float
) -> TrainingSet:
    return make_training_set(
        bundle.store,
        scorer.interaction,
        groups,
        rule=bundle.settings.label_rule,
        loss=scorer.loss,
        spread=spread,
    )


@torch.no_grad()
def calibrated(scorer: Scorer, table: TrainingSet, heads: dict[str, Head]) -> Tensor:
    return scorer.scale * scorer.core(table.groups, heads_for(table, heads))


def rows_of(
    bundle: Bundle, table: TrainingSet, scores: Tensor, groups: Sequence[LabelledGroup]
) -> list[Row]:
    """Of each group in which candidates differ in worth."""
    assert table.groups.target is not None
    found = losses(scores, table.groups.target, table.groups.mask, "listwise").tolist()
    rows = []
    for loss, score, group in zip(found, scores, groups, strict=True):
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
    given: argparse.Namespace, found: dict[str, list[np.ndarray]], users: int, groups: int
) -> None:
    """Means over the splits; of now less before also the deviation over splits, which share users:
    no interval.
    """
    rows = {
        name: dict(zip(("loss", "gain"), np.mean(each, axis=0).tolist(), strict=True))
        for name, each in found.items()
    }
    rows["first candidate"].pop("loss")  # a choice, no chances
    for way in HEADS:
        apart = np.subtract(found[f"{way}, now"], found[f"{way}, before"])
        names = ("loss", "gain", "loss_deviation", "gain_deviation")
        rows[f"{way}, now less before"] = dict(
            zip(names, [*apart.mean(0).tolist(), *apart.std(0).tolist()], strict=True)
        )
    lines = [
        f"{groups} groups of {users} users, {given.splits} splits: {given.users} teach,"
        f" {users - given.users} judge"
    ]
    lines += [
        f"{name:<28} " + "   ".join(f"{key} {value:+.4f}" for key, value in row.items())
        for name, row in rows.items()
    ]
    finish(given, {"rows": rows, "users": users, "groups": groups}, lines, [])


if __name__ == "__main__":
    main()
