"""Scores as probabilities: temperature scaling and the weight of the LLM's votes, by held-out
groups of training users; and what learning reached on these groups.

Letters: G groups, C candidates, X columns of a mix. Knows no texts and no LLM.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hydra_llm.model.newton import Loss, Problem, losses, newton_cg
from hydra_llm.model.scorer import Scorer
from hydra_llm.select import TIE
from hydra_llm.training.dataset import TrainingSet

CALIBRATION_RIDGE = 1.0
CROSS_FIT_FOLDS = 10  # parts of the users; weights for one are fitted on the others
LEAST_SCALE = 0.05
NAN = float("nan")


@dataclass
class FitReport:
    """Figures of one scorer, on later groups of users whom the base has not seen."""

    users: int = 0
    groups: int = 0
    ridge: float = 3.0
    evidence_ridge: float = 1.0
    precision: float = 10.0
    prior: str = ""  # learned or isotropic, where both were tried; a reason in brackets
    prior_ridge: float = NAN  # on the basis of a learned prior
    prior_steps: int = 0  # of its learning; 0: the prior is isotropic
    # relative standard error of Σ = SᵀS, as another sample of users would have given another
    prior_error: float = NAN
    held_out_groups: int = 0
    loss_uniform: float = NAN  # of equal shares: what knowing nothing costs
    loss_shared: float = NAN  # with the shared head alone
    loss_user: float = NAN  # with each user's own head
    loss_user_error: float = NAN  # its standard error over users
    # with β and the votes, on the groups (voted ones, if any) that both were fitted on
    loss_calibrated: float = NAN
    loss_with_votes: float = NAN  # on these, each user's with β and votes fitted on the others
    loss_without_votes: float = NAN  # likewise with β alone: the difference is what votes add
    gain_first: float = NAN  # mean gain of their first candidates: first retrieved, greedy, label
    gain_pick: float = NAN  # of those that the users' own heads score highest
    gain_best: float = NAN  # of the best there are: no scorer can do more
    discount: float | None = None  # by age, of what heads learn from
    discounts: dict[str, float] = field(default_factory=dict)  # loss by each that was tried
    calibration_error: float = NAN  # expected (ECE), of the probability of the calibrated picks
    scale: float = 1.0
    vote_weight: dict[str, float] = field(default_factory=dict)

    def to_json(self, *, convex: bool = True) -> dict[str, Any]:
        """Everything; the strengths only where they were used."""
        unused = set() if convex else {"ridge", "evidence_ridge", "precision"}
        of_prior = {"prior", "prior_ridge", "prior_steps", "prior_error", "calibration_error"}
        unused |= set() if self.prior else of_prior
        unused |= set() if self.discounts or self.discount else {"discount", "discounts"}
        return {name: value for name, value in asdict(self).items() if name not in unused}


class HeldOut(NamedTuple):
    """Groups that nothing was fitted on, with scores before calibration [G, C]."""

    late: TrainingSet
    shared: Tensor  # by a base that has not seen these users
    own: Tensor  # by heads, of the kind that will serve, fitted on these users' earlier groups


@torch.no_grad()
def evaluate_held_out(scorer: Scorer, held_out: Sequence[HeldOut], report: FitReport) -> None:
    """The report's losses on held-out groups: of equal shares, of the shared and of own heads."""
    report.held_out_groups = sum(int(part.late.informative.sum()) for part in held_out)
    count = max(1, report.held_out_groups)

    def mean_loss(scores: Callable[[HeldOut], Tensor]) -> float:
        return sum(summed_loss(scorer, part.late, scores(part)) for part in held_out) / count

    report.loss_uniform = mean_loss(lambda part: torch.zeros_like(part.own))
    report.loss_shared = mean_loss(lambda part: part.shared)
    report.loss_user = mean_loss(lambda part: part.own)


def group_losses(scorer: Scorer, data: TrainingSet, scores: Tensor) -> Tensor:
    """[G] the loss of scores [G, C]."""
    return losses(scores, data.target, data.groups.mask, scorer.loss)


def summed_loss(scorer: Scorer, data: TrainingSet, scores: Tensor) -> float:
    """The loss of scores [G, C], summed over groups."""
    return float(group_losses(scorer, data, scores).sum())


@torch.no_grad()
def calibrate(scorer: Scorer, held_out: Sequence[HeldOut], report: FitReport) -> None:
    """Fit β and the weights of the LLM's columns on held-out scores, regularised towards β = 1 and
    no weight; and the β of groups that the LLM was not asked about. Votes that raise the loss of
    users whom their weight was not fitted on get weight 0. The report's gains are those of the
    calibrated scores.
    """
    if not held_out:
        return
    mix = _Mix.of(scorer, held_out)
    report.loss_with_votes = mix.cross_fitted_loss()
    report.loss_without_votes = mix.without_votes().cross_fitted_loss()
    if report.loss_with_votes > report.loss_without_votes:
        mix = mix.without_votes()
    v = mix.fit()
    scorer.scale = (1 + v[0]).clamp_min(LEAST_SCALE)
    scorer.scale_alone = (1 + mix.without_votes().fit()[0]).clamp_min(LEAST_SCALE)
    scorer.vote_weight = torch.zeros_like(scorer.vote_weight)
    scorer.vote_weight[mix.columns] = v[1:]
    informative = (mix.target.sum(-1) > 0).sum().clamp_min(1)
    scores = scorer.scale * mix.scores + mix.x[..., 1:] @ v[1:]
    total = losses(scores, mix.target, mix.mask, mix.loss).sum()
    report.calibration_error = expected_calibration_error(
        scores.masked_fill(~mix.mask, -1e30).softmax(-1), mix.target
    )
    report.loss_calibrated, report.scale = float(total / informative), float(scorer.scale)
    for column, weight in zip(mix.columns, v[1:].tolist(), strict=True):
        report.vote_weight[scorer.side_names[column]] = round(weight, 4)
    worth = []  # [G, 3] gains of the first candidates, of the highest scores and of the best
    for late, _, own in held_out:
        mask = late.groups.mask
        gains = late.gains.masked_fill(~mask, -1.0)
        scores = scorer.calibrated(own, late.groups)
        # As answers are picked: of equal scores the first one, on every processor.
        tops = scores >= scores.max(-1, keepdim=True).values - TIE
        places = [mask.int().argmax(-1), tops.int().argmax(-1), gains.argmax(-1)]
        worth.append(gains.gather(1, torch.stack(places, 1)))
    report.gain_first, report.gain_pick, report.gain_best = torch.cat(worth).mean(0).tolist()


class VoteTable:
    """Held-out groups of which the LLM labels some: what its votes are worth to the calibration."""

    @torch.no_grad()
    def __init__(self, scorer: Scorer, held_out: Sequence[HeldOut]):
        self.mix = _Mix.of(scorer, held_out)
        self.columns, self.users = self.mix.columns, self.mix.users

    @torch.no_grad()
    def losses(self, votes: Mapping[int, Tensor], used: Set[int]) -> Tensor:
        """[G] losses of the groups in these places, whose votes are [C, X], calibrated on those
        `used` of other users, with votes or without as `calibrate` decides.
        """
        places, mix = torch.tensor(list(votes)), self.mix
        x = mix.x[places]
        x[..., 1:] = torch.stack(list(votes.values())) * mix.mask[places][..., None]
        part = mix._replace(
            x=x,
            target=mix.target[places],
            mask=mix.mask[places],
            users=[self.users[place] for place in votes],
        )
        known = torch.tensor([place in used for place in votes])
        heard, alone = part.cross_fitted(known), part.without_votes().cross_fitted(known)
        return alone if heard[known].sum() > alone[known].sum() else heard


def expected_calibration_error(shares: Tensor, target: Tensor, bins: int = 10) -> float:
    """The mean distance between the probability of the pick and how often it is right, in bins of
    equal width of the probability (Naeini et al. 2015); shares and target [G, C].
    """
    top, pick = shares.max(-1)
    gap = top - target.gather(1, pick[:, None])[:, 0]
    place = (top * bins).long().clamp_max(bins - 1)
    return float(torch.zeros(bins).index_add_(0, place, gap).abs().sum() / max(1, len(top)))


class _Mix(NamedTuple):
    """Scores and votes as the columns of a regression."""

    x: Tensor  # [G, C, X] the scores, then the columns of votes
    columns: list[int]  # of the side features, which of them
    target: Tensor
    mask: Tensor
    loss: Loss
    users: list[str]  # [G]

    @classmethod
    def of(cls, scorer: Scorer, held_out: Sequence[HeldOut]) -> "_Mix":
        scores = torch.cat([part.own for part in held_out])
        side = torch.cat([part.late.groups.side_features for part in held_out])
        mask = torch.cat([part.late.groups.mask for part in held_out])
        target = torch.cat([part.late.target for part in held_out])
        columns = scorer.llm_columns
        weighed = float(scorer.side_weight[columns].abs().sum()) > 0  # by the base already
        if weighed or not any(bool(part.late.voted.any()) for part in held_out):
            columns = []
        x = torch.cat([scores[..., None], side[..., columns]], -1) * mask[..., None]
        users = [user for part in held_out for user in part.late.users]
        return cls(x, columns, target, mask, scorer.loss, users)

    @property
    def scores(self) -> Tensor:
        return self.x[..., 0]

    def without_votes(self) -> "_Mix":
        return self._replace(x=self.x[..., :1], columns=[])

    def fit(self, where: Tensor | slice = slice(None)) -> Tensor:
        """The weights [X] that, added to the scores, fit the targets best; drawn towards 0."""
        x, target, mask = self.x[where], self.target[where][None], self.mask[where][None]
        dot = partial(torch.einsum, "gcx,ux->ugc", x)
        outer = partial(torch.einsum, "gcx,ugc->ux", x)
        problem = Problem(dot, outer, x.shape[-1], x[None, ..., 0], target, mask, self.loss)
        return newton_cg(problem, CALIBRATION_RIDGE)[0]

    def cross_fitted_loss(self) -> float:
        """The mean of `cross_fitted`."""
        total = float(self.cross_fitted().double().sum())
        return total / max(1, int((self.target.sum(-1) > 0).sum()))

    def cross_fitted(self, used: Tensor | None = None) -> Tensor:
        """[G] losses with weights fitted on the other folds of users, all of their groups or those
        `used` [G]; NaN for one user.
        """
        names = list(dict.fromkeys(self.users))
        out = torch.full((len(self.users),), NAN)
        if len(names) < 2:
            return out
        fold_of = {name: index % CROSS_FIT_FOLDS for index, name in enumerate(names)}
        folds = torch.tensor([fold_of[user] for user in self.users])
        for fold in range(min(CROSS_FIT_FOLDS, len(names))):
            own = folds == fold
            v = self.fit(~own if used is None else ~own & used)
            votes = self.x[own][..., 1:] @ v[1:]
            scores = self.scores[own] * (1 + v[0]).clamp_min(LEAST_SCALE) + votes
            out[own] = losses(scores, self.target[own], self.mask[own], self.loss)
        return out


def error_by_users(values: Tensor, users: Sequence[str]) -> Tensor:
    """The standard error of the mean of groups' values [G], where those of a user are alike."""
    number = {user: place for place, user in enumerate(dict.fromkeys(users))}
    owner = torch.tensor([number[user] for user in users], dtype=torch.long)
    sums = torch.zeros(len(number)).index_add_(0, owner, values - values.mean())
    return sums.square().sum().sqrt() / len(values)
