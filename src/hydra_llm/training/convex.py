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
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from hydra_llm.llm.concurrency import Progress
from hydra_llm.model.heads import Head, HeadKind, HeadProblem, SGDConfig
from hydra_llm.model.laplace import LaplacePosterior
from hydra_llm.model.newton import Problem, newton_cg, with_bias
from hydra_llm.model.scorer import Scorer
from hydra_llm.training.calibration import (
    FitReport,
    HeldOut,
    calibrate,
    evaluate_held_out,
    summed_loss,
)
from hydra_llm.training.dataset import Split, TrainingSet, chunks_of_users, folds

LARGE_SET = 2000  # groups above which a handful of side weights need no choice of ridge
FOLDS = 3  # parts of the users who take turns as those whom the base has not seen
# up to so many groups there are more folds: a base without a third of them would be far from the
# one that is deployed
TINY_SET, TINY_FOLDS = 300, 10
FISHER_GROUPS = 2000  # a mean over so many groups is good enough
UserHeads = dict[str, Head]


@dataclass(frozen=True)
class Strengths:
    """The strengths of regularisation that are tried."""

    ridges: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 300.0, 3000.0)
    side_ridges: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
    precisions: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)


def fit_scorer(
    scorer: Scorer,
    data: TrainingSet,
    *,
    seed: int = 0,
    unseen: Sequence[str] = (),
    strengths: Strengths = Strengths(),
    done: Progress | None = None,
) -> tuple[FitReport, UserHeads]:
    """Choose the strengths, fit base and heads of every user, calibrate, on a prepared interaction.

    `unseen` are the users from whom a trained interaction has not learned: only they show what
    helps a new user. Without them the users take turns in folds, which is fair where the
    interaction has seen no labels. Where only some groups are voted, base and heads learn from the
    others, and the voted ones only calibrate.
    """
    partly = 0 < int(data.voted.sum()) < len(data)
    plain = data.take((~data.voted).nonzero()[:, 0]) if partly else data
    names = plain.names()
    report = FitReport(users=len(names), groups=len(plain))
    parts = [list(unseen)] if unseen else []
    if not unseen and len(names) > 1:
        parts = folds(names, FOLDS if len(plain) > TINY_SET else TINY_FOLDS, seed)
    parted = [_Fold(plain.of(sorted(set(names) - set(part))), part) for part in parts]
    used = [fold for fold in parted if len(fold.train)]
    pairs = len(strengths.ridges) * len(_side_ridges(plain, strengths))
    base = _Base(scorer, plain, used, report, _Steps((pairs + 4) * len(used) + 1, done))
    if base.folds:
        base.choose_strengths(strengths)
    scorer.prior_precision = torch.tensor(report.precision)
    scorer.head.tune(map(base.problems_of, base.folds), len(base.folds))
    if base.folds:
        evaluate_held_out(scorer, base.held_out(plain, TrainingSet.prequential_splits), report)
        calibrate(scorer, base.held_out(data, TrainingSet.calibration_splits), report)
    base.fit(plain)
    heads = fit_heads(scorer, plain, names)
    base.steps.finish()
    measure_posterior(scorer, plain, heads)
    return report, heads


class _Fold(NamedTuple):
    train: TrainingSet  # of the users from whom the base is learned
    held_out: list[str]  # the names of others, who evaluate it


def _side_ridges(data: TrainingSet, tried: Strengths) -> tuple[float, ...]:
    return tried.side_ridges if len(data) <= LARGE_SET else tried.side_ridges[:1]


class _Steps:
    """Reports how many bases were fitted: for each fold, one for each pair of ridges, then four (to
    choose the precision, to tune and to calibrate twice); the last one at the end.
    """

    def __init__(self, count: int, done: Progress | None):
        self.steps, self.total, self.done = 0, count, done

    def step(self) -> None:
        self.steps = min(self.steps + 1, self.total - 1)  # not every head is tuned
        if self.done is not None:
            self.done(self.steps, self.total)

    def finish(self) -> None:
        if self.done is not None:
            self.done(self.total, self.total)


class _Base(NamedTuple):
    """The base of the strengths in the report, fitted on one set of users after the other."""

    scorer: Scorer
    plain: TrainingSet
    folds: list[_Fold]
    report: FitReport
    steps: _Steps

    def fit(self, train: TrainingSet) -> None:
        """The base of these users, and what a kind of head shares beside it."""
        self.fit_shared(train)
        self.scorer.head.learn_shared(head_problems(self.scorer, train, train.names()))

    def fit_shared(self, train: TrainingSet) -> None:
        """The base alone, by the strengths in the report."""
        fit_base(self.scorer, train, self.report.ridge, self.report.evidence_ridge)
        self.steps.step()

    def problems_of(self, fold: _Fold) -> Iterator[HeadProblem]:
        """Each held-out user's problem under the base of the others."""
        self.fit_shared(fold.train)
        for user in fold.held_out:
            yield from head_problems(self.scorer, self.plain.of([user]), [user])

    def held_out(
        self, data: TrainingSet, split: Callable[[TrainingSet], list[Split]]
    ) -> list[HeldOut]:
        """Each fold's later groups, with heads of the earlier ones."""
        parts = []
        for fold in self.folds:
            self.fit(fold.train)
            parts += held_out_scores(self.scorer, split(data.of(fold.held_out)), fold.held_out)
        return parts

    def choose_strengths(self, tried: Strengths) -> None:
        """First the ridges, by the loss of users whom the base has not seen; then the prior's
        precision, by their later groups' loss with heads of the earlier ones.
        """
        scorer, plain, report = self.scorer, self.plain, self.report
        by_ridges = dict.fromkeys(product(tried.ridges, _side_ridges(plain, tried)), 0.0)
        for ridges, (train, part) in product(by_ridges, self.folds):
            fit_base(scorer, train, *ridges)
            self.steps.step()
            unseen = plain.of(part)
            with torch.no_grad():
                by_ridges[ridges] += summed_loss(scorer, unseen, scorer.core(unseen.groups))
        report.ridge, report.evidence_ridge = min(by_ridges, key=lambda pair: by_ridges[pair])
        if not scorer.head.has_precision:
            return
        totals = dict.fromkeys(tried.precisions, 0.0)
        probe = scorer.head.precision_probe()
        for train, part in self.folds:
            self.fit_shared(train)
            for early, late in plain.of(part).prequential_splits():
                for precision in tried.precisions:
                    heads = fit_heads(scorer, early, part, kind=probe, precision=precision)
                    with torch.no_grad():
                        x, side = scorer.interaction(late.groups), scorer.side_score(late.groups)
                        own = probe.score(scorer.interaction, x, heads_for(late, heads))
                        totals[precision] += summed_loss(scorer, late, own + side)
        report.precision = min(totals, key=lambda precision: totals[precision])


def held_out_scores(
    scorer: Scorer, splits: Sequence[Split], names: Sequence[str], sgd: SGDConfig | None = None
) -> list[HeldOut]:
    """Later groups with the scores of the shared head and of heads of the earlier groups."""
    parts = []
    for early, late in splits:
        if len(late):
            heads = heads_for(late, fit_heads(scorer, early, names, sgd=sgd))
            with torch.no_grad():
                own, shared = scorer.core(late.groups, heads), scorer.core(late.groups)
            parts.append(HeldOut(late, shared, own))
    return parts


def heads_for(data: TrainingSet, heads: Mapping[str, Head]) -> list[Head | None]:
    """[G] the head of each group's user."""
    return [heads.get(user) for user in data.users]


@torch.no_grad()
def fit_base(scorer: Scorer, data: TrainingSet, ridge: float, side_ridge: float = 1.0) -> None:
    """Set the shared head and the side weights to the minimiser of the ridge-penalised loss; the
    side weights are drawn towards `side_prior`.
    """
    interaction, size = scorer.interaction, scorer.interaction.size
    standardise(scorer, data)
    side, x = scorer.standardised(data.groups)[None], interaction(data.groups)[None]
    target, mask = data.target[None], data.groups.mask[None]
    of_pairs, of_scores = partial(interaction.dot, x), partial(interaction.outer, x)
    believed = scorer.side_prior * scorer.side_scale
    offset = side @ believed
    head = with_bias(Problem(of_pairs, of_scores, size, offset, target, mask, scorer.loss))

    def dot(v: Tensor) -> Tensor:
        own, weights = v[:, : head.size], v[:, head.size :]
        return head.dot(own) + torch.einsum("ugce,ue->ugc", side, weights)

    def outer(r: Tensor) -> Tensor:
        return torch.cat([head.outer(r), torch.einsum("ugce,ugc->ue", side, r)], 1)

    problem = replace(head, dot=dot, outer=outer, size=head.size + side.shape[-1])
    precision = torch.full((problem.size,), ridge)
    precision[size : head.size] = 1e-3  # the bias, if there is one
    precision[head.size :] = side_ridge
    v = newton_cg(problem, precision)[0]
    scorer.head.set_shared(v[:size], v[size] if head.size > size else torch.zeros(()))
    scorer.side_weight.copy_(believed + v[head.size :])


def standardise(scorer: Scorer, data: TrainingSet) -> None:
    """From here on side features count in deviations from their mean in this training set."""
    rows = data.groups.side_features[data.groups.mask]
    scorer.side_mean = rows.mean(0)
    spread = (rows - scorer.side_mean).square().mean(0).sqrt()
    scorer.side_scale = torch.where(spread > 1e-6, spread, torch.ones_like(spread))


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
) -> UserHeads:
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
