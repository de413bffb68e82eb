"""The shared base and the heads, at strengths of regularisation that held-out users choose.

    base       shared head and weights of side features (convex.py)
    heads      δ of all users at once under the Gaussian prior (convex.py)
    prior      learned from the users' records (prior.py), or isotropic
    strengths  ridges, the kind of prior and its precision, chosen by the loss on later groups of
               users whom the base has not seen and whose heads were fitted on their earlier ones
    calibrate  β and the weight of the LLM's votes, on the same held-out scores

Nothing but the scorer that is being learned is changed. Knows no texts and no LLM.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hydra_llm.llm.concurrency import Progress
from hydra_llm.model.heads import HeadKind, HeadProblem
from hydra_llm.model.heads.linear import LinearHead
from hydra_llm.model.heads.lowrank import LowRankHead
from hydra_llm.model.scorer import Scorer
from hydra_llm.training.calibration import (
    FitReport,
    HeldOut,
    calibrate,
    error_by_users,
    evaluate_held_out,
    group_losses,
)
from hydra_llm.training.convex import (
    UserHeads,
    fit_base,
    fit_heads,
    head_problems,
    heads_for,
    held_out_scores,
    measure_posterior,
    shared_precision,
)
from hydra_llm.training.dataset import Split, TrainingSet, folds
from hydra_llm.training.discounts import Rate, choose_discount, set_discount
from hydra_llm.training.prior import Ridges, State, learn_basis
from hydra_llm.training.steps import Steps

# groups above which a handful of side weights need no choice of ridge, and each user's last groups
# are enough to calibrate by; in a smaller set of labels every group counts, in blocks
LARGE_SET = 2000
FOLDS = 3  # parts of the users who take turns as those whom the base has not seen
# up to so many groups there are more folds: a base without a third of them would be far from the
# one that is deployed
TINY_SET, TINY_FOLDS = 300, 10
SHARED_ONLY = 1e6  # a precision at which a user's numbers stay 0


@dataclass(frozen=True)
class Strengths:
    """The strengths of regularisation that are tried."""

    ridges: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 300.0, 3000.0)
    side_ridges: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
    precisions: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)
    bases: tuple[float, ...] = (10.0, 30.0, 100.0)  # ridges on the basis of a learned prior
    steps: int = 4  # of its learning, at most
    margin: float = 1.0  # standard errors by which own heads must beat the shared one
    discounts: tuple[Rate, ...] = (None,)  # by age, of what heads learn from

    def chosen(self, report: Mapping[str, Any]) -> "Strengths":
        """Those that a scorer's report has, for another fit to the same groups."""
        basis = report.get("prior_ridge", math.nan)
        return replace(
            self,
            ridges=(report["ridge"],),
            side_ridges=(report["evidence_ridge"],),
            precisions=(report["precision"],),
            bases=self.bases if math.isnan(basis) else (basis,),
        )


Keep = Callable[[Sequence[HeldOut]], object]


def unkept(held_out: Sequence[HeldOut]) -> None:
    """Keep nothing."""


def fit_scorer(
    scorer: Scorer,
    data: TrainingSet,
    *,
    seed: int = 0,
    unseen: Sequence[str] = (),
    strengths: Strengths = Strengths(),
    rank: int = 0,
    done: Progress | None = None,
    keep: Keep = unkept,
) -> tuple[FitReport, UserHeads]:
    """Choose the strengths, fit base and heads of every user, calibrate, on a prepared interaction.

    `unseen` are the users from whom a trained interaction has not learned: only they show what
    helps a new user. Without them users take turns in folds, fair where it has seen no labels.
    Where only some groups are voted, base and heads learn from the others, and the voted ones only
    calibrate (`keep` gets these held-out groups). With a `rank` the prior of heads is learned,
    unless an isotropic one is better for held-out users.
    """
    plain = data.take((~data.voted).nonzero()[:, 0]) if data.partly_voted else data
    report = FitReport(len(names := plain.names()), len(plain), discount=scorer.rate)
    used = _folds_of(plain, [list(unseen)] if unseen else _parts(plain, seed))
    rank = rank if scorer.head.learns_prior and scorer.loss == "listwise" else 0
    fits = len(strengths.ridges) * len(_side_ridges(plain, strengths)) + 4
    fits += len(strengths.bases) if rank else 0
    base = _Base(scorer, plain, used, report, Steps(fits * len(used) + 1, done), rank, {})
    if base.folds:
        base.choose_strengths(strengths)
    if rank:
        report.prior = "learned" if report.prior_steps else _why_isotropic(report)
    scorer.prior_precision = torch.tensor(report.precision)
    scorer.head.tune(map(base.problems_of, base.folds), len(base.folds))
    if base.folds:
        base.evaluate()
        calibrate(scorer, held_out := base.held_out(data, base.calibration_splits), report)
        keep(held_out)
    base.fit(plain)
    base.steps.finish()
    measure_posterior(scorer, plain, heads := fit_heads(scorer, plain, names))
    return report, heads


@torch.no_grad()
def cross_fitted_losses(
    scorer: Scorer, known: TrainingSet, used: Tensor, *, seed: int = 0, tried: Strengths
) -> Tensor:
    """[G] the loss of each group of `known` by a base that is fitted, at ridges of its own choice,
    to those `used` [G] of other users; NaN without any.
    """
    train, out = known.take(used.nonzero()[:, 0]), torch.full((len(known),), math.nan)
    base = _Base(
        scorer, train, _folds_of(train, _parts(train, seed)), FitReport(), Steps(1, None), 0, {}
    )
    base.choose_ridges(tried)
    for part in folds(known.names(), TINY_FOLDS, seed):
        others = train.of(sorted(set(train.names()) - set(part)))
        if not len(others):
            continue
        fit_base(scorer, others, base.report.ridge, base.report.evidence_ridge)
        places = [place for user in part for place in known.index[user]]
        unseen = known.take(places)
        out[places] = group_losses(scorer, unseen, scorer.core(unseen.groups))
    return out


def _why_isotropic(report: FitReport) -> str:
    if math.isnan(report.prior_ridge):
        return f"isotropic ({report.users} users are too few to learn how users differ)"
    if report.precision == SHARED_ONLY:
        return "none (held-out users' own heads were no better than the shared one)"
    return "isotropic (a learned one was no better for held-out users)"


class _Fold(NamedTuple):
    train: TrainingSet  # of the users from whom the base is learned
    held_out: list[str]  # the names of others, who evaluate it


def _side_ridges(data: TrainingSet, tried: Strengths) -> tuple[float, ...]:
    return tried.side_ridges if len(data) <= LARGE_SET else tried.side_ridges[:1]


def _parts(data: TrainingSet, seed: int) -> list[list[str]]:
    names, count = data.names(), FOLDS if len(data) > TINY_SET else TINY_FOLDS
    return folds(names, count, seed) if len(names) > 1 else []


def _folds_of(data: TrainingSet, parts: Sequence[list[str]]) -> list[_Fold]:
    names = set(data.names())
    parted = [_Fold(data.of(sorted(names - set(part))), part) for part in parts]
    return [fold for fold in parted if len(fold.train)]


def _alike(losses: Tensor, least: Tensor) -> bool:
    """Whether the mean of a group's losses [G] is within a standard error of the least one's."""
    more = losses - least
    return bool(more.mean() <= more.std(correction=0) / len(more) ** 0.5)


class _Base(NamedTuple):
    """The base of the strengths in the report, fitted on one set of users after the other."""

    scorer: Scorer
    plain: TrainingSet
    folds: list[_Fold]
    report: FitReport
    steps: Steps
    rank: int  # of the learned prior; 0 if none is tried
    known: dict[tuple[int, float, int], State]  # by training set, ridge and step of the prior

    def fit(self, train: TrainingSet) -> None:
        """The base of these users, and what a kind of head shares beside it."""
        self.fit_shared(train)
        if self.report.prior_steps:
            for _ in self.bases(train, self.report.prior_ridge, self.report.prior_steps):
                pass
        else:
            self.scorer.head.learn_shared(head_problems(self.scorer, train, train.names()))

    def fit_shared(self, train: TrainingSet) -> None:
        """The base alone, by the strengths in the report."""
        place = (id(train), 0.0, 0)
        if place in self.known:
            self.known[place].restore(self.scorer)
        else:
            if isinstance(self.scorer.head, LinearHead | LowRankHead):
                self.scorer.head.set_basis(None)
            fit_base(self.scorer, train, self.report.ridge, self.report.evidence_ridge)
            if self.rank:
                self.known[place] = State.of(self.scorer)
        self.steps.step()

    def bases(self, train: TrainingSet, ridge: float, steps: int) -> Iterator[Tensor]:
        """The basis after each step of learning the prior, from the fitted base; where the last one
        is known, that alone.
        """
        if (last := self.known.get((id(train), ridge, steps))) is not None:
            last.restore(self.scorer)
            assert last.basis is not None
            yield last.basis
            return
        shared = shared_precision(self.scorer.interaction, self.report.ridge)
        ridges = Ridges(shared, self.report.evidence_ridge, ridge)
        learning = learn_basis(self.scorer, train, ridges, rank=self.rank, steps=steps)
        for step, basis in enumerate(learning, 1):
            self.known[id(train), ridge, step] = State.of(self.scorer)
            yield basis

    def error_of_prior(self) -> float:
        """The relative standard error of Σ = SᵀS (Frobenius norm) by the delete-a-group jackknife
        (Kott 2001): each fold's was learned without its part of the users. NaN: none is learned.
        """
        ridge, steps = self.report.prior_ridge, self.report.prior_steps
        states = [self.known.get((id(fold.train), ridge, steps)) for fold in self.folds]
        bases = [state.basis for state in states if state is not None and state.basis is not None]
        if not steps or len(bases) < 2:
            return math.nan
        inner = torch.tensor([[(a @ b.T).square().sum() for b in bases] for a in bases])  # of Σs
        count, mean = len(bases), inner.mean()  # the squared norm of the mean of the Σs
        variance = (count - 1) / count * (inner.trace() - count * mean)
        return float((variance / mean).clamp_min(0).sqrt())

    def problems_of(self, fold: _Fold) -> Iterator[HeadProblem]:
        """Each held-out user's problem under the base of the others."""
        self.fit_shared(fold.train)
        for user in fold.held_out:
            yield from head_problems(self.scorer, self.plain.of([user]), [user])

    def calibration_splits(self, data: TrainingSet) -> list[Split]:
        """What held-out users' groups calibrate by; see `LARGE_SET`."""
        every = self.rank > 0 and len(self.plain) <= LARGE_SET and not data.partly_voted
        return data.block_splits() if every else data.calibration_splits()

    def held_out(
        self, data: TrainingSet, split: Callable[[TrainingSet], list[Split]]
    ) -> list[HeldOut]:
        """Each fold's later groups, with heads of the earlier ones."""
        parts = []
        for fold in self.folds:
            self.fit(fold.train)
            parts += held_out_scores(self.scorer, split(data.of(fold.held_out)), fold.held_out)
        return parts

    def evaluate(self) -> None:
        """The losses of held-out users and their error, and that of the learned prior."""
        held_out = self.held_out(self.plain, TrainingSet.prequential_splits)
        evaluate_held_out(self.scorer, held_out, self.report)
        if any(len(part.late) for part in held_out):
            self.report.loss_user_error = float(error_by_users(*self.losses_by_user(held_out)))
        self.report.prior_error = self.error_of_prior()

    def later_losses(self) -> tuple[Tensor, list[str]]:
        """As `losses_by_user`, of held-out users' later groups."""
        return self.losses_by_user(self.held_out(self.plain, TrainingSet.prequential_splits))

    def losses_by_user(self, held_out: Sequence[HeldOut]) -> tuple[Tensor, list[str]]:
        """[G] the losses with own heads, and whose group each is."""
        losses = [group_losses(self.scorer, part.late, part.own) for part in held_out]
        return torch.cat(losses), [user for part in held_out for user in part.late.users]

    def choose_strengths(self, tried: Strengths) -> None:
        """The ridges, then the learned prior, then the precision, then the discount by age."""
        set_discount(self.scorer, tried.discounts[0])
        self.choose_ridges(tried)
        if self.rank:
            self.choose_basis(tried)
        if self.scorer.head.has_precision:
            self.choose_precision(tried)
        self.scorer.prior_precision = torch.tensor(self.report.precision)
        choose_discount(self.scorer, tried.discounts, self.report, self.later_losses)

    def choose_ridges(self, tried: Strengths) -> None:
        """The ridges of the base, by the loss of users whom it has not seen. Where side weights
        have a prior, features of pairs must speak clearly for themselves: the strongest ridge of
        which the mean loss is within a standard error of the least (Breiman et al. 1984, 3.4.3).
        """
        scorer, plain, report = self.scorer, self.plain, self.report
        by_ridges: dict[tuple[float, float], list[Tensor]] = {}  # the groups' losses, by fold
        for ridges in product(tried.ridges, _side_ridges(plain, tried)):
            rows = []
            for train, part in self.folds:
                fit_base(scorer, train, *ridges)
                self.steps.step()
                unseen = plain.of(part)
                with torch.no_grad():
                    scores = scorer.core(unseen.groups)
                rows.append(group_losses(scorer, unseen, scores))
            by_ridges[ridges] = rows

        def total(pair: tuple[float, float]) -> float:
            return sum(float(losses.sum()) for losses in by_ridges[pair])

        chosen = min(by_ridges, key=total)
        if scorer.side_prior.any():
            pairs = sorted(by_ridges, key=total, reverse=True)
            best = {pair[0]: pair for pair in pairs}.values()  # of each ridge on pairs
            least = torch.cat(by_ridges[chosen])
            chosen = max(pair for pair in best if _alike(torch.cat(by_ridges[pair]), least))
        report.ridge, report.evidence_ridge = chosen

    def choose_basis(self, tried: Strengths) -> None:
        """The ridge and the number of steps of the learned prior, by held-out users' later groups
        with heads on the basis of their earlier ones.
        """
        totals: dict[tuple[float, int], float] = defaultdict(float)
        for train, part in self.folds:
            splits = self.plain.of(part).prequential_splits()
            for ridge in tried.bases:
                self.fit_shared(train)
                for step, basis in enumerate(self.bases(train, ridge, tried.steps), 1):
                    head = self.scorer.head
                    assert isinstance(head, LinearHead | LowRankHead)
                    probe = LowRankHead.on(head, basis)
                    for early, late in splits:
                        losses = self.losses_of(probe, 1.0, early, late, part)
                        totals[ridge, step] += float(losses.sum())
        if totals:
            best = min(totals, key=lambda pair: totals[pair])
            self.report.prior_ridge, self.report.prior_steps = best

    def choose_precision(self, tried: Strengths) -> None:
        """The precision of the numbers that have no learned prior, and whether there is one. Beside
        a learned prior the shared head stands: it answers for all unless users' own heads are
        better by more than a standard error over held-out users.
        """
        learned = self.report.prior_steps
        tried_ones: dict[tuple[int, float], list[Tensor]] = defaultdict(list)  # groups' losses
        owners: dict[int, list[str]] = defaultdict(list)
        for (train, part), steps in product(self.folds, sorted({0, learned})):
            self.report.prior_steps = steps
            self.fit(train) if steps else self.fit_shared(train)
            probe, precisions = self.scorer.head.precision_probe(), tried.precisions
            if self.rank:
                precisions = tuple(dict.fromkeys((*precisions, SHARED_ONLY)))
            if steps and isinstance(self.scorer.head, LowRankHead):
                probe, precisions = self.scorer.head, (1.0,)  # the basis has the scale
            for early, late in self.plain.of(part).prequential_splits():
                owners[steps] += late.users
                for precision in precisions:
                    losses = self.losses_of(probe, precision, early, late, part)
                    tried_ones[steps, precision].append(losses)
        rows = {pair: torch.cat(losses) for pair, losses in tried_ones.items()}
        best = min(rows, key=lambda pair: float(rows[pair].sum()))
        shared = rows.get((0, SHARED_ONLY))
        more = None if shared is None else shared - rows[best]
        if more is not None and more.mean() <= tried.margin * error_by_users(more, owners[0]):
            best = 0, SHARED_ONLY
        self.report.prior_steps, self.report.precision = best

    def losses_of(
        self,
        kind: HeadKind,
        precision: float,
        early: TrainingSet,
        late: TrainingSet,
        part: list[str],
    ) -> Tensor:
        """[G] the losses of later groups with heads of this kind of the earlier ones."""
        scorer = self.scorer
        heads = fit_heads(scorer, early, part, kind=kind, precision=precision)
        with torch.no_grad():
            x, side = scorer.interaction(late.groups), scorer.side_score(late.groups)
            own = kind.score(scorer.interaction, x, heads_for(late, heads))
            return group_losses(scorer, late, own + side)
