"""The shared base and the heads on frozen features (paper, 3.1): convex and deterministic.

    base       shared head and weights of side features, by ridge regression
    heads      δ of all users at once under the Gaussian prior (model/heads)
    strengths  ridges and the prior's precision, chosen by the loss on the later groups of users
               whom the base has not seen and whose heads were fitted on their earlier groups
    calibrate  β and the weight of the LLM's votes, on the same held-out scores

`sgd.py` has what is not convex (the shared layer of `tower`, a tuned encoder, `mlp` heads). Nothing
but the scorer that is being learned is changed. Knows no texts and no LLM.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from hydra_llm.model.heads import Head, HeadKind, HeadProblem, SGDConfig
from hydra_llm.model.laplace import LaplacePosterior
from hydra_llm.model.newton import Problem, newton_cg, with_bias
from hydra_llm.model.scorer import Scorer
from hydra_llm.training.calibration import (
    HeldOut,
    calibrate,
    evaluate_held_out,
    evaluate_picks,
    summed_loss,
)
from hydra_llm.training.dataset import Split, TrainingSet, chunks_of_users, folds
from hydra_llm.training.report import FitReport

LARGE_SET = 2000  # groups above which a handful of side weights need no choice of ridge
FOLDS = 3  # parts of the users who take turns as those whom the base has not seen
# up to so many groups there are more folds: a base without a third of them would be far from the
# one that serves
TINY_SET, TINY_FOLDS = 300, 10
FISHER_GROUPS = 2000  # a mean over so many groups is good enough
Heads = dict[str, Head]
SplitUsers = Callable[[TrainingSet], list[Split]]


@dataclass(frozen=True)
class Strengths:
    """The strengths of regularisation that are tried."""

    ridges: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 300.0, 3000.0)
    side_ridges: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
    precisions: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)


class Fold(NamedTuple):
    """Users from whom the base is learned, and the names of others who judge it."""

    train: TrainingSet
    held_out: list[str]


def fit_scorer(
    scorer: Scorer,
    data: TrainingSet,
    *,
    seed: int = 0,
    unseen: Sequence[str] = (),
    strengths: Strengths | None = None,
) -> tuple[FitReport, Heads]:
    """Choose the strengths, fit base and heads of every user, calibrate. `interaction.prepare` must
    have run.

    `unseen` are the users from whom a trained interaction has not learned: only they show what
    helps a new user. Without them the users take turns in folds, which is fair where the
    interaction has seen no labels. Where only some groups are voted, base and heads learn from the
    others, and the voted ones only calibrate.
    """
    plain = data.where_voted(False) if 0 < int(data.voted.sum()) < len(data) else data
    names = plain.names()
    report = FitReport(users=len(names), groups=len(plain))
    splits = _folds(plain, unseen, seed)
    if splits:
        _choose_strengths(scorer, plain, splits, report, strengths or Strengths())
    scorer.prior_precision = torch.tensor(report.precision)
    base = _Base(scorer, plain, report)
    scorer.head.tune((base.problems_of(fold) for fold in splits), len(splits))
    if splits:
        held_out = base.held_out(splits, plain, TrainingSet.prequential_splits)
        evaluate_held_out(scorer, held_out, report)
        held_out = base.held_out(splits, data, TrainingSet.calibration_splits)
        calibrate(scorer, held_out, report)
        evaluate_picks(scorer, held_out, report)
    base.fit(plain)
    heads = fit_heads(scorer, plain, names)
    measure_posterior(scorer, plain, heads)
    return report, heads


def _folds(plain: TrainingSet, unseen: Sequence[str], seed: int) -> list[Fold]:
    names = plain.names()
    count = FOLDS if len(plain) > TINY_SET else TINY_FOLDS
    parts = folds(names, min(count, len(names)), seed) if len(names) > 1 else []
    if unseen:
        parts = [list(unseen)]
    made = (Fold(plain.of(sorted(set(names) - set(part))), part) for part in parts)
    return [fold for fold in made if len(fold.train)]


# ---- the shared base


class _Base(NamedTuple):
    """The base of the chosen strengths, fitted on one set of users after the other."""

    scorer: Scorer
    plain: TrainingSet
    report: FitReport

    def fit(self, train: TrainingSet) -> None:
        """The base of these users, and what a kind of head shares beside it."""
        scorer = self.scorer
        fit_base(scorer, train, self.report.ridge, self.report.evidence_ridge)
        scorer.head.learn_shared(head_problems(scorer, train, train.names()))

    def problems_of(self, fold: Fold) -> Iterator[HeadProblem]:
        """Each held-out user's problem under the base of the others."""
        fit_base(self.scorer, fold.train, self.report.ridge, self.report.evidence_ridge)
        for user in fold.held_out:
            yield from head_problems(self.scorer, self.plain.of([user]), [user])

    def held_out(
        self, folds: Sequence[Fold], data: TrainingSet, split: SplitUsers
    ) -> list[HeldOut]:
        """Each fold's later groups, with heads of the earlier ones."""
        scores, scorer = [], self.scorer
        for fold in folds:
            self.fit(fold.train)
            for early, late in split(data.of(fold.held_out)):
                if len(late):
                    heads = fit_heads(scorer, early, fold.held_out)
                    scores.append(held_out_scores(scorer, late, heads))
        return scores


@torch.no_grad()
def held_out_scores(scorer: Scorer, late: TrainingSet, heads: Mapping[str, Head]) -> HeldOut:
    """Later groups with the scores of the shared head and of these."""
    own = scorer.core(late.groups, heads_for(late, heads))
    return HeldOut(late, scorer.core(late.groups), own)


def heads_for(data: TrainingSet, heads: Mapping[str, Head]) -> list[Head | None]:
    """[G] the head of each group's user."""
    return [heads.get(user) for user in data.users]


@torch.no_grad()
def fit_base(scorer: Scorer, data: TrainingSet, ridge: float, side_ridge: float = 1.0) -> None:
    """Set the shared head and the side weights to the minimiser of the ridge-penalised loss."""
    interaction, size = scorer.interaction, scorer.interaction.size
    standardise(scorer, data)
    side, x = scorer.standardised(data.groups)[None], interaction(data.groups)[None]
    target, mask = data.target[None], data.groups.mask[None]
    head = with_bias(
        Problem(
            lambda v: interaction.dot(x, v),
            lambda r: interaction.outer(x, r),
            size,
            torch.zeros_like(target),
            target,
            mask,
            scorer.loss,
        )
    )

    def dot(v: Tensor) -> Tensor:
        own, weights = v[:, : head.size], v[:, head.size :]
        return head.dot(own) + torch.einsum("ugce,ue->ugc", side, weights)

    def outer(r: Tensor) -> Tensor:
        return torch.cat([head.outer(r), torch.einsum("ugce,ugc->ue", side, r)], 1)

    problem = replace(head, dot=dot, outer=outer, size=head.size + side.shape[-1])
    precision = torch.full((problem.size,), ridge)
    precision[size : head.size], precision[head.size :] = 1e-3, side_ridge
    v = newton_cg(problem, precision)[0]
    scorer.head.set_shared(v[:size], v[size] if head.size > size else torch.zeros(()))
    scorer.side_weight.copy_(v[head.size :])


def standardise(scorer: Scorer, data: TrainingSet) -> None:
    """From here on side features count in deviations from their mean in this training set."""
    rows = data.groups.side_features[data.groups.mask]
    scorer.side_mean = rows.mean(0)
    spread = (rows - scorer.side_mean).square().mean(0).sqrt()
    scorer.side_scale = torch.where(spread > 1e-6, spread, torch.ones_like(spread))


def _choose_strengths(
    scorer: Scorer, plain: TrainingSet, splits: Sequence[Fold], report: FitReport, tried: Strengths
) -> None:
    """First the ridges, by the loss of users whom the base has not seen; then the prior's
    precision, by their later groups' loss with heads of the earlier ones.
    """
    side_ridges = tried.side_ridges if len(plain) <= LARGE_SET else tried.side_ridges[:1]
    by_ridges = {
        ridges: sum(_unseen_loss(scorer, plain, fold, *ridges) for fold in splits)
        for ridges in product(tried.ridges, side_ridges)
    }
    report.ridge, report.evidence_ridge = min(by_ridges, key=lambda key: by_ridges[key])
    if not scorer.head.has_precision:
        return
    totals, probe = dict.fromkeys(tried.precisions, 0.0), scorer.head.precision_probe()
    for train, part in splits:
        fit_base(scorer, train, report.ridge, report.evidence_ridge)
        for early, late in plain.of(part).prequential_splits():
            for precision in tried.precisions:
                heads = fit_heads(scorer, early, part, kind=probe, precision=precision)
                totals[precision] += _loss(scorer, late, probe, heads)
    report.precision = min(totals, key=lambda key: totals[key])


def _unseen_loss(
    scorer: Scorer, plain: TrainingSet, fold: Fold, ridge: float, side_ridge: float
) -> float:
    fit_base(scorer, fold.train, ridge, side_ridge)
    unseen = plain.of(fold.held_out)
    with torch.no_grad():
        return summed_loss(scorer, unseen, scorer.core(unseen.groups))


@torch.no_grad()
def _loss(scorer: Scorer, late: TrainingSet, kind: HeadKind, heads: Mapping[str, Head]) -> float:
    x = scorer.interaction(late.groups)
    own = kind.score(scorer.interaction, x, heads_for(late, heads))
    return summed_loss(scorer, late, own + scorer.side_score(late.groups))


# ---- the users' heads


def head_problems(scorer: Scorer, data: TrainingSet, names: Sequence[str]) -> Iterator[HeadProblem]:
    """What fitting these users' heads needs, as many of them at once as memory allows."""
    per_group = scorer.interaction.numbers(data.groups)
    for users, index in chunks_of_users(data, names, per_group=per_group):
        yield scorer.head_problem(data.groups, users, index)


def fit_heads(
    scorer: Scorer,
    data: TrainingSet,
    names: Sequence[str],
    *,
    kind: HeadKind | None = None,
    precision: float | None = None,
    sgd: SGDConfig | None = None,
) -> Heads:
    """These users' heads on all their groups, all else frozen; without groups the shared head."""
    kind, seen = kind or scorer.head, data.records_seen()
    heads = dict.fromkeys(names, Head.of(kind.empty()))
    for problem in head_problems(scorer, data, names):
        problem = replace(problem, precision=precision or problem.precision, sgd=sgd or problem.sgd)
        for user, numbers in zip(problem.users, kind.fit(problem), strict=True):
            heads[user] = Head.of(numbers, seen[user])
    return heads


@torch.no_grad()
def measure_posterior(scorer: Scorer, data: TrainingSet, heads: Mapping[str, Head]) -> None:
    """The mean Fisher information of a group, where the users' own heads stand."""
    informative = data.take(data.informative.nonzero()[:, 0])
    if not len(informative):
        return
    draw = torch.Generator().manual_seed(0)
    sample = informative.take(torch.randperm(len(informative), generator=draw)[:FISHER_GROUPS])
    groups, binary = sample.groups, scorer.loss == "binary"
    scores = scorer.core(groups, heads_for(sample, heads)).masked_fill(~groups.mask, -1e30)
    share: Tensor = scores.sigmoid() * (1 - scores.sigmoid()) if binary else scores.softmax(-1)
    factors = scorer.head.fisher(scorer.interaction, scorer.interaction(groups), share, binary)
    if factors is not None:
        scorer.posterior = LaplacePosterior.of(*factors)
