"""One scorer learns from its labelled groups: features, targets, training of what is not convex,
then the heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.llm.concurrency import StageProgress
from hydra_llm.model.heads import MLPBank, make_bank
from hydra_llm.model.interactions import Cross, Interaction, LabelBilinear, Tower
from hydra_llm.model.scorer import Scorer
from hydra_llm.side_features import fit_stats
from hydra_llm.training.convex import fit_all, fit_heads
from hydra_llm.training.dataset import Table, gain_spread, in_table_order, make_table
from hydra_llm.training.sgd import (
    Plan,
    TextSource,
    fit_mlp,
    fit_unseen,
    held_out_users,
    train_joint,
)
from hydra_llm.types import LabelledGroup


def silent(stage: str, done: int, total: int) -> None:
    """No progress."""


@dataclass(frozen=True)
class Lesson:
    """What a scorer is to learn from."""

    name: str
    """reranker or adapter."""
    groups: Callable[[], list[LabelledGroup]]
    """Makes the labelled groups, with evidence from the encoder as it is now."""
    evidence: Sequence[str]
    """Names of the evidence's columns."""
    rule: str
    """How gains become targets, see `table.targets`."""
    by_label: bool = False
    """Label features, in place of features of pairs."""


def learn_scorer(
    bundle: Bundle,
    lesson: Lesson,
    *,
    tune: bool = False,
    out: Path | str | None = None,
    progress: StageProgress = silent,
) -> Scorer:
    """Build the features, train what is not convex (with `tune`, the bundle's encoder too), fit
    what is.
    """
    settings, name = bundle.settings, lesson.name
    torch.manual_seed(settings.training_seed)
    interaction = _make_combiner(bundle, lesson.by_label)
    scorer = Scorer(
        interaction,
        make_bank(settings.head, interaction, rank=settings.rank),
        lesson.evidence,
        loss=settings.loss,
    )
    groups = lesson.groups()
    scorer.gain_spread = torch.tensor(gain_spread(groups))
    progress(f"fit {name}", 0, 1)
    table = _table(bundle, scorer, groups, lesson.rule)
    interaction.prepare(table.groups)
    report: dict[str, Any] = {
        "groups": len(table),
        "features": interaction.kind,
        "head": scorer.bank.kind,
    }
    plan = _plan(settings)
    trains = plan.epochs > 0 and (
        tune or isinstance(scorer.bank, MLPBank) or isinstance(interaction, Tower)
    )
    if trains:
        source = TextSource(bundle.store.encoder, in_table_order(groups)) if tune else None
        losses = _train(scorer, table, plan, source, name, out, progress)
        report |= {"epochs": len(losses), "training_loss": losses[-1] if losses else None}
        if tune:  # features and evidence of the encoder as it is now
            _survey(bundle)
            table = _table(bundle, scorer, lesson.groups(), lesson.rule)
    if isinstance(scorer.bank, MLPBank):
        report |= fit_unseen(scorer, table, plan, random_start=settings.prior == "random").to_json(
            convex=False
        )
    else:
        report |= fit_all(
            scorer,
            table,
            seed=settings.training_seed,
            unseen=held_out_users(table, plan) if trains else (),
        ).to_json()
    bundle.report[name] = report
    progress(f"fit {name}", 1, 1)
    return scorer.eval()


def _survey(bundle: Bundle) -> None:
    """The population's figures, by the encoder as it is now."""
    histories = [bundle.records[user] for user in bundle.trained_on]
    bundle.population = bundle.featurizer.stats = fit_stats(bundle.task, bundle.store, histories)


def _train(
    scorer: Scorer,
    table: Table,
    plan: Plan,
    source: TextSource | None,
    name: str,
    out: Path | str | None,
    progress: StageProgress,
) -> list[float]:
    """Joint training with a checkpoint beside the bundle that is to come."""
    checkpoint = None if out is None else Path(f"{out}.{name}.checkpoint")

    def done(epoch: int, total: int, loss: float) -> None:
        progress(f"train {name}", epoch, total)

    losses = train_joint(scorer, table, plan, source=source, checkpoint=checkpoint, done=done)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return losses


def _make_combiner(bundle: Bundle, by_label: bool) -> Interaction:
    settings, width = bundle.settings, bundle.store.encoder.width
    if settings.features == "cross":
        return Cross(width)
    if by_label:
        return LabelBilinear(width, len(bundle.task.labels), settings.label_rank)
    return Tower(width, settings.width)


def _plan(settings: Settings) -> Plan:
    usual = 30 if settings.head == "mlp" else 0
    epochs = (
        settings.epochs if settings.epochs is not None else 2 if settings.tune_encoder else usual
    )
    patience = (
        0 if settings.prior == "random" else 5
    )  # as published, all training users are trained on, for all epochs
    return Plan(
        epochs, settings.lr, settings.batch, settings.weight_decay, patience, settings.training_seed
    )


def fit_groups(
    bundle: Bundle, name: str, scorer: Scorer, groups: Sequence[LabelledGroup], users: Sequence[str]
) -> None:
    """Fit the heads of enrolled users on their groups; nothing shared changes."""
    table = _table(bundle, scorer, groups, target_rule(bundle, name))
    if isinstance(scorer.bank, MLPBank):
        fit_mlp(
            scorer,
            table,
            users,
            _plan(bundle.settings),
            random_start=bundle.settings.prior == "random",
        )
    else:
        fit_heads(scorer, table, users)


def target_rule(bundle: Bundle, name: str) -> str:
    """How gains become targets: labels are right or wrong; a gold answer among the candidates is
    above the mean anyway.
    """
    of_kind = bundle.task.strategy.target_rule if name == "adapter" else ""
    return of_kind or bundle.settings.label_rule.replace("gold-positive", "above-mean")


def _table(bundle: Bundle, scorer: Scorer, groups: Sequence[LabelledGroup], rule: str) -> Table:
    return make_table(
        bundle.store,
        scorer.interaction,
        groups,
        rule=rule,
        loss=scorer.loss,
        spread=float(scorer.gain_spread),
    )
