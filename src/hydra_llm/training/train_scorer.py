"""One scorer from its labelled data: features, joint training of what is not convex, heads."""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.llm.concurrency import Progress, StageProgress
from hydra_llm.model.heads import Head, SGDConfig, latest_time, make_head
from hydra_llm.model.interactions import Cross, Interaction, LabelBilinear, Tower
from hydra_llm.model.scorer import Scorer
from hydra_llm.model.word_model import WordModel
from hydra_llm.plugins import HEADS
from hydra_llm.side_features import Featurizer, fit_stats
from hydra_llm.tasks.base import Task
from hydra_llm.tasks.classification import LabelKind
from hydra_llm.training import dp
from hydra_llm.training.convex import UserHeads, fit_heads
from hydra_llm.training.dataset import (
    LabelledGroup,
    TrainingSet,
    gain_spread,
    in_set_order,
    make_training_set,
)
from hydra_llm.training.discounts import rates_of, set_discount
from hydra_llm.training.sgd import TextSource, fit_unseen, held_out_users, seeded, train_jointly
from hydra_llm.training.strengths import Keep, Strengths, cross_fitted_losses, fit_scorer, unkept

OWN_RANK = 64  # principal directions of which a user has numbers of their own
GROUPS_OF_FULL_WIDTH = 1000  # for each column of codes, that features have full width
# how far an estimate of the gain is believed before there are labels: its weight, in units of gain,
# by the square root of the word model's skill (chosen on training users of two tasks: docs/lab.md)
BELIEF = 1.5
LEAST_USERS, MOST_TEXTS = 3, 4000  # a text that so many users have answered has its own effect


def silent(stage: str, done: int, total: int) -> None:
    """No progress."""


@dataclass(frozen=True)
class LabelledData:
    """What a scorer is learned from."""

    name: str  # reranker or adapter
    # makes the labelled groups with side features of the encoder as it is now
    groups: Callable[[Featurizer], list[LabelledGroup]]
    side_names: Sequence[str]  # names of the side features' columns
    rule: str  # how gains become targets, see `dataset.targets`
    by_label: bool = False  # label features, in place of features of pairs
    strengths: Strengths | None = None  # where they are known already


def train_scorer(
    bundle: Bundle,
    data: LabelledData,
    tune: bool = False,
    checkpoint: Path | None = None,
    progress: StageProgress = silent,
    strengths: Strengths = Strengths(),
    keep: Keep = unkept,
) -> Bundle:
    """The bundle with one more scorer; `tune` trains its encoder too; `keep` as in `fit_scorer`."""
    if bundle.settings.dp_epsilon is not None:
        return _train_privately(bundle, data)
    name, config, groups = data.name, sgd_config(bundle.settings), data.groups(bundle.featurizer)
    interaction, head = (scorer := blank_scorer(bundle, data, groups)).interaction, scorer.head
    labelled = training_set(bundle, data.rule, scorer, groups)
    interaction.prepare(labelled.groups)
    report = {"groups": len(labelled), "features": interaction.kind, "head": head.name}
    trains = config.epochs > 0 and (tune or not head.convex or interaction.trainable)
    joint_heads: UserHeads = {}
    if trains:
        source = TextSource(bundle.features.encoder, in_set_order(groups)) if tune else None
        done = partial(progress, f"train {name}")
        joint_heads, course = _joint_phase(scorer, labelled, config, source, checkpoint, done)
        report |= course
    if trains and tune:  # features and side features of the encoder as it is now
        histories = [bundle.records[user] for user in bundle.trained_on]
        bundle = replace(bundle, population=fit_stats(bundle.task, bundle.features, histories))
        labelled = training_set(bundle, data.rule, scorer, data.groups(bundle.featurizer))
    if head.convex:
        unseen = held_out_users(labelled, config) if trains else ()
        strengths = replace(strengths, discounts=rates_of(bundle.settings))
        options: dict[str, Any] = {"seed": config.seed, "unseen": unseen, "strengths": strengths}
        options |= {"rank": rank_of_prior(bundle, by_label=data.by_label), "keep": keep}
        options["done"] = partial(progress, f"fit {name}")
        fit_report, own_heads = fit_scorer(scorer, labelled, **options)
    else:
        fit_report, own_heads = fit_unseen(scorer, labelled, config)
    heads = {**bundle.heads, name: with_times(joint_heads | own_heads, bundle.records)}
    own = {**bundle.report, name: report | fit_report.to_json(convex=head.convex)}
    return replace(bundle, scorers={**bundle.scorers, name: scorer.eval()}, heads=heads, report=own)


def _train_privately(bundle: Bundle, data: LabelledData) -> Bundle:
    """As `train_scorer` with `dp_epsilon`: of the users the report has their number alone."""
    users = len(bundle.trained_on)
    scorer, budget = dp.private_scorer(bundle, data.side_names), dp.budget_of(bundle)
    labelled = training_set(bundle, data.rule, scorer, data.groups(bundle.featurizer))
    fitted = dp.learn_privately(scorer, labelled, users, budget, dp.secret_normals)
    report = {"users": users, "features": scorer.interaction.kind, "head": scorer.head.name}
    return replace(
        bundle,
        scorers={**bundle.scorers, data.name: scorer.eval()},
        heads={**bundle.heads, data.name: with_times(fitted, bundle.records)},
        report={**bundle.report, data.name: report, "privacy": budget.spent()},
    )


def refitted_losses(
    bundle: Bundle,
    data: LabelledData,
    used: Set[tuple[str, str]],
    strengths: Strengths = Strengths(),
) -> torch.Tensor:
    """[G] the loss of each group, in a training set's order, by a shared head that is fitted to
    those `used` (user and query) of other users.
    """
    groups = in_set_order(data.groups(bundle.featurizer))
    scorer = blank_scorer(bundle, data, groups)
    labelled = training_set(bundle, data.rule, scorer, groups)
    scorer.interaction.prepare(labelled.groups)
    some = torch.tensor([(group.user, group.query) in used for group in groups])
    seed = bundle.settings.training_seed
    return cross_fitted_losses(scorer, labelled, some, seed=seed, tried=strengths)


def blank_scorer(bundle: Bundle, data: LabelledData, groups: Sequence[LabelledGroup]) -> Scorer:
    """A scorer that has learned nothing, with the features that these groups ask for."""
    settings = bundle.settings
    with seeded(settings.training_seed):
        interaction = make_features(bundle, groups, by_label=data.by_label)
        head = make_head(settings.head, interaction, rank=settings.rank)
        scorer = Scorer(interaction, head, data.side_names, loss=settings.loss)
    set_discount(scorer, rates_of(settings)[0])
    scorer.gain_spread = torch.tensor(gain_spread(groups))
    if data.rule == "graded" and scorer.loss == "listwise" and bundle.word_model:
        # Targets are gains over their spread: so are scores that estimate them.
        believed = side_prior(bundle.task, bundle.word_model, data.side_names)
        scorer.side_prior = believed / scorer.gain_spread
    return scorer


def side_prior(task: Task, model: WordModel, side_names: Sequence[str]) -> torch.Tensor:
    """[E] the prior means of the weights of side features, in units of gain."""
    estimates = task.strategy.gain_columns
    return belief(model.skill) * torch.tensor([float(name in estimates) for name in side_names])


def belief(skill: float) -> float:
    """The prior mean of the weight of an estimate of the gain, 0 to 1, by the word model's skill.
    Calibrated shares of words would deserve 1 among words by lot; candidates are of an LLM, which
    knows part of what the model knows.
    """
    return min(1.0, BELIEF * math.sqrt(max(0.0, skill)))


def _joint_phase(
    scorer: Scorer,
    labelled: TrainingSet,
    config: SGDConfig,
    source: TextSource | None,
    checkpoint: Path | None,
    done: Progress,
) -> tuple[UserHeads, dict[str, Any]]:
    """The heads of joint training, and its part of the report; the checkpoint is used up."""
    losses, heads = train_jointly(scorer, labelled, config, source, checkpoint, done)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return heads, {"epochs": len(losses), "training_loss": losses[-1] if losses else None}


def make_features(
    bundle: Bundle, groups: Sequence[LabelledGroup] = (), *, by_label: bool
) -> Interaction:
    """The untrained interaction of a bundle's scorer; for a learned prior it depends on groups."""
    settings, width = bundle.settings, bundle.features.encoder.width
    if settings.features == Cross.kind:
        return Cross(width)
    if not by_label:
        return Tower(width, settings.width)
    labels = len(bundle.task.labels)
    if not groups or not rank_of_prior(bundle, by_label=by_label):
        return LabelBilinear(width, labels, settings.label_rank or OWN_RANK)
    strategy = bundle.task.strategy
    assert isinstance(strategy, LabelKind)
    codes = torch.from_numpy(strategy.label_codes()).float()
    enough = len(groups) >= GROUPS_OF_FULL_WIDTH * codes.shape[1]
    rank = settings.label_rank or (width if enough else OWN_RANK)
    known = recurring_texts(groups)
    interaction = LabelBilinear(width, labels, rank, codes.shape[1], len(known), OWN_RANK)
    interaction.coding = codes
    if known:
        interaction.known = torch.from_numpy(bundle.features.texts(known))
    return interaction


def rank_of_prior(bundle: Bundle, *, by_label: bool) -> int:
    """Of the prior of this scorer's heads, where it may be learned from the users; else 0."""
    settings = bundle.settings
    learns = bool(HEADS.load(settings.head).learns_prior) and settings.loss == "listwise"
    return settings.rank if by_label and learns and settings.head_prior == "learned" else 0


def recurring_texts(groups: Sequence[LabelledGroup]) -> list[str]:
    """The queries' texts that several users have answered, the most frequent first."""
    users: dict[str, set[str]] = {}
    for group in groups:
        users.setdefault(group.left, set()).add(group.user)
    counts = {text: len(own) for text, own in users.items() if len(own) >= LEAST_USERS}
    return sorted(counts, key=lambda text: (-counts[text], text))[:MOST_TEXTS]


def sgd_config(settings: Settings) -> SGDConfig:
    """How what is not convex is trained by these settings."""
    of_head = 0 if HEADS.load(settings.head).convex else 30
    default = 2 if settings.tune_encoder else of_head
    random_start = settings.prior == "random"
    return SGDConfig(
        epochs=default if settings.epochs is None else settings.epochs,
        lr=settings.lr,
        batch=settings.batch,
        weight_decay=settings.weight_decay,
        patience=0 if random_start else 5,  # as published, all users are trained on, for all epochs
        seed=settings.training_seed,
        random_start=random_start,
    )


def fit_new_heads(
    bundle: Bundle, name: str, groups: Sequence[LabelledGroup], users: Sequence[str]
) -> UserHeads:
    """The heads of these users for one scorer of the bundle; the shared one without groups."""
    return solve_heads(bundle, name, head_data(bundle, name, groups), users)


def head_data(bundle: Bundle, name: str, groups: Sequence[LabelledGroup]) -> TrainingSet:
    """What heads of new users are fitted on: the groups, encoded."""
    return training_set(bundle, target_rule(bundle, name), bundle.scorers[name], groups)


def solve_heads(
    bundle: Bundle, name: str, labelled: TrainingSet, users: Sequence[str]
) -> UserHeads:
    """The heads of these users on what `head_data` made."""
    scorer, sgd = bundle.scorers[name], sgd_config(bundle.settings)
    return with_times(fit_heads(scorer, labelled, users, sgd=sgd), bundle.records)


def with_times(heads: UserHeads, records: Mapping[str, Sequence[Any]]) -> UserHeads:
    """The heads with the time of the latest record that each has learned from."""
    return {
        user: Head(head.numbers, head.records, latest_time(records.get(user, ())[: head.records]))
        for user, head in heads.items()
    }


def target_rule(bundle: Bundle, name: str) -> str:
    """How gains become targets; a gold answer among the candidates is above the mean anyway."""
    of_kind = bundle.task.strategy.target_rule if name == "adapter" else ""
    return of_kind or bundle.settings.label_rule.replace("gold-positive", "above-mean")


def training_set(
    bundle: Bundle, rule: str, scorer: Scorer, groups: Sequence[LabelledGroup]
) -> TrainingSet:
    """The groups as tensors for a scorer of the bundle."""
    spread = float(scorer.gain_spread)
    return make_training_set(
        bundle.features, scorer.interaction, groups, rule=rule, loss=scorer.loss, spread=spread
    )
