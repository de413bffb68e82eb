"""What scores are worth as probabilities, by held-out groups of training users (DESIGN 5): β, and
the weight of the LLM's votes.

Letters: G groups, C candidates, X columns of a mix. Knows no texts and no LLM.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hydra_llm.model.scorer import Loss, Scorer
from hydra_llm.training.dataset import Table
from hydra_llm.training.newton import Problem, losses, solve

if TYPE_CHECKING:
    from hydra_llm.training.convex import FitReport

CALIBRATION_RIDGE = 1.0
MIX_FOLDS = 10
"""Parts of the users whose votes are judged by weights that the others taught."""


class HeldOut(NamedTuple):
    """Groups that nothing was fitted on, with scores before calibration [G, C]."""

    late: Table
    shared: Tensor
    """By a base that has not seen these users."""
    own: Tensor
    """By heads, of the kind that will serve, fitted on these users' earlier groups."""


@torch.no_grad()
def weigh_picks(scorer: Scorer, held_out: Sequence[HeldOut], report: "FitReport") -> None:
    """What the calibrated scorer's first choices are worth on held-out groups, beside the first
    candidates and the best.
    """
    worth: list[Tensor] = []
    for late, _, own in held_out:
        mask, gains = late.groups.mask, late.gains.masked_fill(~late.groups.mask, -1.0)
        scores = (scorer.scale * own + late.groups.evidence @ scorer.vote_weight).masked_fill(
            ~mask, -torch.inf
        )
        first, pick, best = mask.int().argmax(-1), scores.argmax(-1), gains.argmax(-1)
        worth.append(gains.gather(1, torch.stack([first, pick, best], 1)))
    if worth:
        report.gain_first, report.gain_pick, report.gain_best = torch.cat(worth).mean(0).tolist()


@torch.no_grad()
def calibrate(scorer: Scorer, held_out: Sequence[HeldOut], report: "FitReport") -> None:
    """Fit β and the weights of the LLM's columns on held-out scores, drawn towards β = 1 and no
    weight.

    Votes that make the scorer worse for users whose votes it has not seen get no weight: the LLM is
    then asked in vain, and not heard.
    """
    if not held_out:
        return
    scores = torch.cat([held.own for held in held_out])
    evidence, mask, target = (
        torch.cat([getattr(held.late.groups, name) for held in held_out])
        for name in ("evidence", "mask", "target")
    )
    columns = _llm_columns(scorer)
    if float(scorer.side_weight[columns].abs().sum()) > 0 or not any(
        bool(held.late.voted.any()) for held in held_out
    ):
        columns = []  # the base has weighed them already, or nobody was asked
    known = torch.cat([scores[..., None], evidence[..., columns]], -1) * mask[..., None]
    users = [user for held in held_out for user in held.late.users]
    report.loss_with_votes, report.loss_without_votes = (
        _loss_by_others(mixed, scores, target, mask, scorer.loss, users)
        for mixed in (known, known[..., :1])
    )
    if report.loss_with_votes > report.loss_without_votes:
        known, columns = known[..., :1], []
    v = _mix(known, scores, target, mask, scorer.loss)
    scorer.scale = (1 + v[0]).clamp_min(0.05)
    scorer.vote_weight = torch.zeros_like(scorer.vote_weight)
    scorer.vote_weight[columns] = v[1:]
    votes = known[..., 1:] @ v[1:]
    told = (target.sum(-1) > 0).sum().clamp_min(1)
    report.loss_calibrated = float(
        losses(scorer.scale * scores + votes, target, mask, scorer.loss).sum() / told
    )
    report.scale = float(scorer.scale)
    report.vote_weight = {
        scorer.side_names[c]: round(float(w), 4) for c, w in zip(columns, v[1:], strict=True)
    }


def _mix(x: Tensor, offset: Tensor, target: Tensor, mask: Tensor, loss: Loss) -> Tensor:
    """The weights [X] of the columns of x [G, C, X] that, added to the offset, fit the targets
    best; drawn towards 0.
    """
    problem = Problem(
        lambda v: torch.einsum("gcx,ux->ugc", x, v),
        lambda r: torch.einsum("gcx,ugc->ux", x, r),
        x.shape[-1],
        offset[None],
        target[None],
        mask[None],
        loss,
    )
    return solve(problem, CALIBRATION_RIDGE)[0]


def _loss_by_others(
    known: Tensor, scores: Tensor, target: Tensor, mask: Tensor, loss: Loss, users: Sequence[str]
) -> float:
    """Mean loss of the mix, each fold of users [G] with weights that the others taught; NaN where
    there is one user alone.
    """
    names = list(dict.fromkeys(users))
    if len(names) < 2:
        return float("nan")
    place = {name: index % MIX_FOLDS for index, name in enumerate(names)}
    fold, total = torch.tensor([place[user] for user in users]), 0.0
    for own in (fold == each for each in range(min(MIX_FOLDS, len(names)))):
        v = _mix(known[~own], scores[~own], target[~own], mask[~own], loss)
        mixed = scores[own] * (1 + v[0]).clamp_min(0.05) + known[own][..., 1:] @ v[1:]
        total += float(losses(mixed, target[own], mask[own], loss).sum())
    return total / max(1, int((target.sum(-1) > 0).sum()))


def _llm_columns(scorer: Scorer) -> list[int]:
    """The evidence that only LLM samples can give: names that begin with `llm_`."""
    return [i for i, name in enumerate(scorer.side_names) if name.startswith("llm_")]
