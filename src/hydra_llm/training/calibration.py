"""Scores as probabilities: temperature scaling and the weight of the LLM's votes, by held-out
groups of training users.

Letters: G groups, C candidates, X columns of a mix. Knows no texts and no LLM.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hydra_llm.model.newton import Loss, Problem, losses, newton_cg
from hydra_llm.model.scorer import Scorer
from hydra_llm.training.dataset import TrainingSet
from hydra_llm.training.report import FitReport

CALIBRATION_RIDGE = 1.0
CROSS_FIT_FOLDS = 10  # parts of the users; weights for one are fitted on the others
LEAST_SCALE = 0.05


class HeldOut(NamedTuple):
    """Groups that nothing was fitted on, with scores before calibration [G, C]."""

    late: TrainingSet
    shared: Tensor  # by a base that has not seen these users
    own: Tensor  # by heads, of the kind that will serve, fitted on these users' earlier groups


@torch.no_grad()
def evaluate_held_out(scorer: Scorer, held_out: Sequence[HeldOut], report: FitReport) -> None:
    """The report's losses on held-out groups: of equal shares, of the shared and of own heads."""
    report.held_out_groups = sum(int(held.late.informative.sum()) for held in held_out)
    count = max(1, report.held_out_groups)

    def mean_loss(scores: Callable[[HeldOut], Tensor]) -> float:
        return sum(summed_loss(scorer, held.late, scores(held)) for held in held_out) / count

    report.loss_uniform = mean_loss(lambda held: torch.zeros_like(held.own))
    report.loss_shared = mean_loss(lambda held: held.shared)
    report.loss_user = mean_loss(lambda held: held.own)


def summed_loss(scorer: Scorer, data: TrainingSet, scores: Tensor) -> float:
    """The loss of scores [G, C], summed over groups."""
    return float(losses(scores, data.target, data.groups.mask, scorer.loss).sum())


@torch.no_grad()
def evaluate_picks(scorer: Scorer, held_out: Sequence[HeldOut], report: FitReport) -> None:
    """The report's gains on held-out groups: of the first candidates, the scorer's, the best."""
    worth: list[Tensor] = []
    for late, _, own in held_out:
        mask, gains = late.groups.mask, late.gains.masked_fill(~late.groups.mask, -1.0)
        scores = scorer.calibrated(own, late.groups)
        first, pick, best = mask.int().argmax(-1), scores.argmax(-1), gains.argmax(-1)
        worth.append(gains.gather(1, torch.stack([first, pick, best], 1)))
    if worth:
        report.gain_first, report.gain_pick, report.gain_best = torch.cat(worth).mean(0).tolist()


@torch.no_grad()
def calibrate(scorer: Scorer, held_out: Sequence[HeldOut], report: FitReport) -> None:
    """Fit β and the weights of the LLM's columns on held-out scores, regularised towards β = 1 and
    no weight. Votes that raise the loss of users whom their weight was not fitted on get weight 0.
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
    scorer.vote_weight = torch.zeros_like(scorer.vote_weight)
    scorer.vote_weight[mix.columns] = v[1:]
    informative = (mix.target.sum(-1) > 0).sum().clamp_min(1)
    scores = scorer.scale * mix.scores + mix.x[..., 1:] @ v[1:]
    total = losses(scores, mix.target, mix.mask, mix.loss).sum()
    report.loss_calibrated, report.scale = float(total / informative), float(scorer.scale)
    for column, weight in zip(mix.columns, v[1:].tolist(), strict=True):
        report.vote_weight[scorer.side_names[column]] = round(weight, 4)


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
        scores = torch.cat([held.own for held in held_out])
        side = torch.cat([held.late.groups.side_features for held in held_out])
        mask = torch.cat([held.late.groups.mask for held in held_out])
        target = torch.cat([held.late.target for held in held_out])
        columns = [i for i, name in enumerate(scorer.side_names) if name.startswith("llm_")]
        weighed = float(scorer.side_weight[columns].abs().sum()) > 0  # by the base already
        if weighed or not any(bool(held.late.voted.any()) for held in held_out):
            columns = []
        x = torch.cat([scores[..., None], side[..., columns]], -1) * mask[..., None]
        users = [user for held in held_out for user in held.late.users]
        return cls(x, columns, target, mask, scorer.loss, users)

    @property
    def scores(self) -> Tensor:
        return self.x[..., 0]

    def without_votes(self) -> "_Mix":
        return self._replace(x=self.x[..., :1], columns=[])

    def fit(self, where: Tensor | None = None) -> Tensor:
        """The weights [X] that, added to the scores, fit the targets best; drawn towards 0."""
        parts = (self.x, self.target, self.mask)
        x, target, mask = parts if where is None else (part[where] for part in parts)

        def dot(v: Tensor) -> Tensor:
            return torch.einsum("gcx,ux->ugc", x, v)

        def outer(r: Tensor) -> Tensor:
            return torch.einsum("gcx,ugc->ux", x, r)

        offset, size = x[None, ..., 0], x.shape[-1]
        problem = Problem(dot, outer, size, offset, target[None], mask[None], self.loss)
        return newton_cg(problem, CALIBRATION_RIDGE)[0]

    def cross_fitted_loss(self) -> float:
        """Mean loss with weights that were fitted on the other folds of users; NaN for one user."""
        names = list(dict.fromkeys(self.users))
        if len(names) < 2:
            return float("nan")
        fold_of = {name: index % CROSS_FIT_FOLDS for index, name in enumerate(names)}
        fold, total = torch.tensor([fold_of[user] for user in self.users]), 0.0
        for own in (fold == each for each in range(min(CROSS_FIT_FOLDS, len(names)))):
            v = self.fit(~own)
            votes = self.x[own][..., 1:] @ v[1:]
            scores = self.scores[own] * (1 + v[0]).clamp_min(LEAST_SCALE) + votes
            total += float(losses(scores, self.target[own], self.mask[own], self.loss).sum())
        return total / max(1, int((self.target.sum(-1) > 0).sum()))
