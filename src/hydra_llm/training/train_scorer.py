"""One scorer from its labelled data: features, joint training of what is not convex, then the base
and the users' heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.llm.concurrency import StageProgress
from hydra_llm.model.heads import Head, SGDConfig, latest_time, make_head
from hydra_llm.model.interactions import Interaction, interaction_for
from hydra_llm.model.scorer import Scorer
from hydra_llm.plugins import HEADS
from hydra_llm.side_features import Featurizer, fit_stats
from hydra_llm.training.convex import Heads, fit_heads, fit_scorer
from hydra_llm.training.dataset import TrainingSet, gain_spread, in_set_order, make_training_set
from hydra_llm.training.sgd import TextSource, fit_unseen, held_out_users, seeded, train_jointly
from hydra_llm.types import LabelledGroup


def silent(stage: str, done: int, total: int) -> None:
    """No progress."""


@dataclass(frozen=True)
class LabelledData:
    """What a scorer is learned from."""

    name: str  # reranker or adapter
    groups: Callable[[Featurizer], list[LabelledGroup]]
    """Makes the labelled groups with side features of the encoder as it is now."""
    side_names: Sequence[str]  # names of the side features' columns
    rule: str  # how gains become targets, see `dataset.targets`
    by_label: bool = False  # label features, in place of features of pairs


@dataclass(frozen=True)
class TrainingFiles:
    """Where training tells how far it is."""

    out: Path | str | None = None
    """The bundle's folder; checkpoints lie beside it. None keeps none."""
    progress: StageProgress = silent

    def checkpoint(self, name: str) -> Path | None:
        return None if self.out is None else Path(f"{self.out}.{name}.checkpoint")


def train_scorer(
    bundle: Bundle, data: LabelledData, *, tune: bool = False, files: TrainingFiles | None = None
) -> Bundle:
    """The bundle with one scorer more: train what is not convex (with `tune`, the bundle's own
    encoder too), fit what is.
    """
    config, name, files = sgd_config(bundle.settings), data.name, files or TrainingFiles()
    groups = data.groups(bundle.featurizer)
    scorer = _untrained(bundle, data)
    scorer.gain_spread = torch.tensor(gain_spread(groups))
    files.progress(f"fit {name}", 0, 1)
    training_set = _training_set(bundle, data.rule, scorer, groups)
    scorer.interaction.prepare(training_set.groups)
    report: dict[str, Any] = {
        "groups": len(training_set),
        "features": scorer.interaction.kind,
        "head": scorer.head.name,
    }
    trainable = tune or not scorer.head.convex or scorer.interaction.trainable
    joint: Heads = {}
    if trains := config.epochs > 0 and trainable:
        source = TextSource(bundle.store.encoder, in_set_order(groups)) if tune else None
        losses, joint = _train_jointly(scorer, training_set, config, source, name, files)
        report |= {"epochs": len(losses), "training_loss": losses[-1] if losses else None}
        if tune:  # features and side features of the encoder as it is now
            bundle = _with_present_stats(bundle)
            groups = data.groups(bundle.featurizer)
            training_set = _training_set(bundle, data.rule, scorer, groups)
    fitted, heads = _fit(scorer, training_set, config, trained=trains)
    files.progress(f"fit {name}", 1, 1)
    return replace(
        bundle,
        scorers={**bundle.scorers, name: scorer.eval()},
        heads={**bundle.heads, name: with_times({**joint, **heads}, bundle.records)},
        report={**bundle.report, name: report | fitted},
    )


def _fit(
    scorer: Scorer, data: TrainingSet, config: SGDConfig, *, trained: bool
) -> tuple[dict[str, Any], Heads]:
    if not scorer.head.convex:
        report, heads = fit_unseen(scorer, data, config)
    else:
        unseen = held_out_users(data, config) if trained else ()
        report, heads = fit_scorer(scorer, data, seed=config.seed, unseen=unseen)
    return report.to_json(convex=scorer.head.convex), heads


def _train_jointly(
    scorer: Scorer,
    data: TrainingSet,
    config: SGDConfig,
    source: TextSource | None,
    name: str,
    files: TrainingFiles,
) -> tuple[list[float], Heads]:
    """Joint training with a checkpoint beside the bundle that is to come."""
    checkpoint = files.checkpoint(name)

    def done(epoch: int, total: int, loss: float) -> None:
        files.progress(f"train {name}", epoch, total)

    out = train_jointly(scorer, data, config, source=source, checkpoint=checkpoint, done=done)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return out


def _untrained(bundle: Bundle, data: LabelledData) -> Scorer:
    settings = bundle.settings
    with seeded(settings.training_seed):
        interaction = make_features(bundle, by_label=data.by_label)
        head = make_head(settings.head, interaction, rank=settings.rank)
        return Scorer(interaction, head, data.side_names, loss=settings.loss)


def make_features(bundle: Bundle, *, by_label: bool) -> Interaction:
    """The untrained interaction of a bundle's scorer."""
    settings, labels = bundle.settings, len(bundle.task.labels) if by_label else 0
    return interaction_for(
        settings.features,
        bundle.store.encoder.width,
        size=settings.width,
        labels=labels,
        label_rank=settings.label_rank,
    )


def _with_present_stats(bundle: Bundle) -> Bundle:
    """The cohort's statistics by the encoder as it is now."""
    histories = [bundle.records[user] for user in bundle.trained_on]
    return replace(bundle, population=fit_stats(bundle.task, bundle.store, histories))


def sgd_config(settings: Settings) -> SGDConfig:
    """How what is not convex is trained by these settings."""
    default = 2 if settings.tune_encoder else 0 if HEADS.load(settings.head).convex else 30
    random_start = settings.prior == "random"
    return SGDConfig(
        default if settings.epochs is None else settings.epochs,
        settings.lr,
        settings.batch,
        settings.weight_decay,
        # as published, all training users are trained on, for all epochs
        0 if random_start else 5,
        settings.training_seed,
        random_start,
    )


def fit_new_heads(
    bundle: Bundle, name: str, groups: Sequence[LabelledGroup], users: Sequence[str]
) -> Heads:
    """The heads of these users on their groups, for one scorer of the bundle."""
    scorer = bundle.scorers[name]
    data = _training_set(bundle, target_rule(bundle, name), scorer, groups)
    heads = fit_heads(scorer, data, users, sgd=sgd_config(bundle.settings))
    return with_times(heads, bundle.records)


def empty_heads(bundle: Bundle, name: str, users: Sequence[str]) -> Heads:
    """Heads that are the shared one, for users without groups."""
    return dict.fromkeys(users, Head.of(bundle.scorers[name].head.empty()))


def with_times(heads: Heads, records: Mapping[str, Sequence[Any]]) -> Heads:
    """The heads with the time of the latest record that each has learned from."""
    return {
        user: Head(head.numbers, head.records, latest_time(records.get(user, ())[: head.records]))
        for user, head in heads.items()
    }


def target_rule(bundle: Bundle, name: str) -> str:
    """How gains become targets: labels are right or wrong; a gold answer among the candidates is
    above the mean anyway.
    """
    of_kind = bundle.task.strategy.target_rule if name == "adapter" else ""
    return of_kind or bundle.settings.label_rule.replace("gold-positive", "above-mean")


def _training_set(
    bundle: Bundle, rule: str, scorer: Scorer, groups: Sequence[LabelledGroup]
) -> TrainingSet:
    return make_training_set(
        bundle.store,
        scorer.interaction,
        groups,
        rule=rule,
        loss=scorer.loss,
        spread=float(scorer.gain_spread),
    )
