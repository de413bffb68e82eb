"""The membership test of a bundle's shared base (`hydra-llm audit`).

The bundle's training users are parted by lot again and again; a base is learned from each part as
the bundle's was, at the strengths that it reports, and `membership.py` has what an attacker makes
of it. The fits are convex and labelled groups are made once, so a base takes about a second. An LLM
is not asked: its labels come from the cache or the recording that learning used.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydra_llm.bundle import Bundle
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import BudgetExceeded, DataError, SettingsError
from hydra_llm.llm.base import ChatLLM
from hydra_llm.llm.concurrency import StageProgress, run_sync
from hydra_llm.llm.none import NONE
from hydra_llm.llm.registry import open_llm
from hydra_llm.model.scorer import Scorer
from hydra_llm.training import dp
from hydra_llm.training.calibration import group_losses
from hydra_llm.training.convex import fit_base, fit_heads, heads_for, shared_precision
from hydra_llm.training.dataset import LabelledGroup, TrainingSet
from hydra_llm.training.encode import encode_histories
from hydra_llm.training.labelling import asked_about
from hydra_llm.training.learned import Learned
from hydra_llm.training.membership import Attack, Floats, attacks, draw_members
from hydra_llm.training.prior import Ridges, learn_basis
from hydra_llm.training.train_scorer import (
    LabelledData,
    blank_scorer,
    rank_of_prior,
    silent,
    training_set,
)
from hydra_llm.training.work import Work

STAGE = "learn bases"
LEAST_USERS, LEAST_BASES = 20, 8  # with fewer, halves say little


@dataclass(frozen=True)
class Audit:
    """What a membership test found."""

    scorer: str
    users: int
    """Audited users."""
    training_users: int
    bases: int
    attacks: dict[str, Attack] = field(repr=False)
    """By attacker, see `membership`."""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "attacks": {k: own.to_json() for k, own in self.attacks.items()}}


def audit(
    bundle: Bundle,
    data: DataSet,
    llm: ChatLLM | str = NONE,
    *,
    scorer: str = "adapter",
    users: int = 50,
    bases: int = 64,
    seed: int = 0,
    progress: StageProgress = silent,
) -> Audit:
    """The membership test of what users share in one scorer of a bundle, which was learned from
    `data`; `bases` is a multiple of 4.

    Raises SettingsError: the bundle has no such scorer, or one that no convex fit learns.
    DataError: the data are other than those, or too few users have labelled records.
    """
    started = perf_counter()
    _check(bundle, data, scorer, bases)
    labelled, groups = _labelled(bundle, data, llm, scorer, progress)
    own = _by_user(groups)
    names, missing = list(own), len(bundle.trained_on) - len(own)
    if len(names) < LEAST_USERS:
        count = f"{len(names)} of {len(bundle.trained_on)} training users have labelled records"
        fix = "" if own else ": give the --llm that labelled them, its answers are in the cache"
        raise DataError(f"{count}, an audit needs {LEAST_USERS}{fix}")
    asked = np.random.default_rng(seed).permutation(len(names))[:users]
    members = draw_members(len(names), bases, seed)
    told = [group for place in asked for group in own[names[place]]]
    rows = list[Floats]()
    for done, inside in enumerate(members):
        progress(STAGE, done, bases)
        some = [own[name] for name, is_in in zip(names, inside, strict=True) if is_in]
        base = learned_base(bundle, labelled, list(chain.from_iterable(some)))
        rows.append(statistics(base, training_set(bundle, labelled.rule, base, told)))
    progress(STAGE, bases, bases)
    order = np.argsort([names[place] for place in asked])  # as a training set has the users
    found = attacks(np.stack(rows), members[:, asked[order]], seed)
    notes = (f"{missing} training users have no labelled record and were left out",) * bool(missing)
    return Audit(scorer, len(asked), len(names), bases, found, notes, perf_counter() - started)


def _by_user(groups: Sequence[LabelledGroup]) -> dict[str, list[LabelledGroup]]:
    own: dict[str, list[LabelledGroup]] = {}
    for group in groups:
        own.setdefault(group.user, []).append(group)
    return own


def _check(bundle: Bundle, data: DataSet, scorer: str, bases: int) -> None:
    bundle.check_task(data.task)
    if scorer not in bundle.scorers:
        known = ", ".join(bundle.scorers) or "no scorer"
        raise SettingsError(f"the bundle has no {scorer} to audit: it has {known}")
    if bundle.settings.tune_encoder or not bundle.scorers[scorer].head.convex:
        what = "tune_encoder" if bundle.settings.tune_encoder else f"head={bundle.settings.head}"
        why = "an audit learns the base again from frozen features, by convex fits"
        raise SettingsError(f"{what} cannot be audited: {why}")
    if bases % 4 or bases < LEAST_BASES:
        raise SettingsError(f"{bases} bases: take a multiple of 4 from {LEAST_BASES}")
    for user in bundle.trained_on:
        known_user = user in data.splits
        if not known_user or list(data.answered(user)) != list(bundle.records.get(user, ())):
            what = "has other records" if known_user else "is not in it"
            fault = f"the bundle was learned from other data: its training user '{user}' {what}"
            raise DataError(f"{fault}; give the set that `learn` read")


def _labelled(
    bundle: Bundle, data: DataSet, llm: ChatLLM | str, scorer: str, progress: StageProgress
) -> tuple[LabelledData, list[LabelledGroup]]:
    """What the scorer was learned from: the groups that base and heads are fitted on."""
    settings = bundle.settings.model_copy(update={"max_calls": 0})
    model = open_llm(llm, settings) if isinstance(llm, str) else llm
    users = bundle.trained_on
    learned = Learned(replace(bundle, llm=dict(model.identity)), users)
    asked = asked_about(data, settings, users[: settings.labelled_users])
    work = Work(learned, model, progress, asked=asked)
    every = [record for user in users for record in bundle.records[user]]
    encode_histories(bundle, every, progress, ranks=bundle.reranker is not None)
    if bundle.word_model is not None:
        work.fit_words(None)
    try:
        labelled = run_sync(lambda: work.labelled_data(scorer, bundle))
    except BudgetExceeded as error:
        fix = "give the --llm and the cache or recording that `learn` used"
        raise DataError(f"an audit asks no LLM, and an answer is not kept: {fix}") from error
    if labelled is None:
        return LabelledData(scorer, lambda _: [], (), ""), []
    groups = [own for own in labelled.groups(learned.bundle.featurizer) if len(set(own.gains)) > 1]
    weak = [group for group in groups if not group.voted]
    return labelled, weak or groups  # voted ones only calibrate, where there are others


def learned_base(bundle: Bundle, labelled: LabelledData, groups: Sequence[LabelledGroup]) -> Scorer:
    """A base of these groups, at the strengths that the bundle chose."""
    if bundle.settings.dp_epsilon is not None:
        return private_base(bundle, labelled, groups)
    report = bundle.report[labelled.name]
    scorer = blank_scorer(bundle, labelled, groups)
    data = training_set(bundle, labelled.rule, scorer, groups)
    scorer.interaction.prepare(data.groups)
    fit_base(scorer, data, report["ridge"], report["evidence_ridge"])
    if steps := report.get("prior_steps"):
        shared = shared_precision(scorer.interaction, report["ridge"])
        ridges = Ridges(shared, report["evidence_ridge"], report["prior_ridge"])
        rank = rank_of_prior(bundle, by_label=labelled.by_label)
        for _ in learn_basis(scorer, data, ridges, rank=rank, steps=steps):
            pass
    scorer.prior_precision = torch.tensor(report["precision"])
    return scorer


def private_base(bundle: Bundle, labelled: LabelledData, groups: Sequence[LabelledGroup]) -> Scorer:
    """The same with differential privacy, with new noise of the bundle's deviation."""
    scorer = dp.private_scorer(bundle, labelled.side_names)
    data = training_set(bundle, labelled.rule, scorer, groups)
    budget = dp.budget_of(bundle)
    dp.learn_privately(scorer, data, len(data.names()), budget, dp.secret_normals)
    return scorer


@torch.no_grad()
def statistics(scorer: Scorer, data: TrainingSet) -> Floats:
    """[U, 2] of each user, by name: the mean loss by the shared head, and what the base says of
    the user's own way to differ: the mean loss by a head that is fitted to the same groups.
    """
    heads = fit_heads(scorer, data, data.names())
    scores = scorer.core(data.groups), scorer.core(data.groups, heads_for(data, heads))
    return np.stack([by_user(data, group_losses(scorer, data, own)) for own in scores], 1)


def by_user(data: TrainingSet, values: Tensor) -> Floats:
    """[U] each user's mean of values [G]."""
    return np.array([float(values[own].double().mean()) for own in data.index.values()])
