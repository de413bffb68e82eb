"""A head moves with feedback: the latest groups that were judged, exactly, and all that came before
as a Gaussian (DESIGN 2: online).

    minimise over δ   Σ over ≤ WINDOW judged groups of loss(δ)  +  ½ (δ − δ_fit)ᵀ (λ + N·F) (δ −
    δ_fit)

δ_fit is the head as it was fitted on N records, λ the prior's precision, F the mean curvature of a
group (model/curvature.py). The head is a function of the fitted head and of a set of judged groups:
whoever adds the same ones in another order, or one of them twice, gets the same head, and memory
and time are bounded. What leaves the window is not lost: accepted answers are records, which the
next fit sees.
`kernel` and `mlp` heads wait for that fit, and so does the bias of a binary loss: no choice depends
on it.

Letters: G groups, C candidates, V length of a head (low rank: K coefficients). Knows no texts and
no files.
"""

from dataclasses import replace

import torch
from torch import Tensor

from hydra_llm.model.heads import LinearBank, LowRankBank
from hydra_llm.model.scorer import Scorer
from hydra_llm.training.dataset import Table
from hydra_llm.training.newton import Apply, Problem, descend, in_basis, slope, solve

WINDOW = 64
"""StoredFeedback groups that count, the latest."""


def supports_online_update(scorer: Scorer) -> bool:
    """Whether this scorer's heads can move with feedback: linear and low-rank heads of a bundle
    whose curvature was measured.
    """
    return isinstance(scorer.bank, LinearBank | LowRankBank) and scorer.curvature.known


@torch.no_grad()
def moved(scorer: Scorer, row: int, known: int, judged: Table) -> Tensor:
    """The head [V] that serves, where the bank's `row` holds the head as it was fitted on `known`
    records.

    `judged` holds one user's groups with targets, oldest first; of more than `WINDOW` the latest
    count.
    """
    bank, interaction, curvature = scorer.bank, scorer.interaction, scorer.curvature
    assert isinstance(bank, LinearBank | LowRankBank)
    groups = judged.groups[-WINDOW:]
    fitted = bank.weight[row].clone() if row >= 0 else torch.zeros(bank.weight.shape[1])
    if not len(groups):
        return fitted
    assert groups.target is not None
    x = interaction(groups)  # computed once: as `scorer.core` does
    offset = bank(interaction, x, torch.full((len(groups),), row)) + scorer.side_score(groups)
    problem = Problem(
        lambda v: interaction.dot(x[None], v),
        lambda r: interaction.outer(x[None], r),
        interaction.size,
        offset[None],
        groups.target[None],
        groups.mask[None],
        scorer.loss,
    )
    if isinstance(bank, LowRankBank):
        problem = in_basis(problem, bank.basis)
    turned = replace(
        problem,
        dot=lambda v: problem.dot(curvature.turn(v)),
        outer=lambda r: curvature.back(problem.outer(r)),
    )
    precision = float(scorer.prior_precision) + known * curvature.values
    if interaction.kind == "label":
        return fitted + curvature.turn(solve(turned, precision))[0]
    rows = (x @ bank.basis.T if isinstance(bank, LowRankBank) else x) @ curvature.right_vectors
    flat = rows.flatten(0, 1)
    explicit = replace(
        turned,
        dot=lambda v: (flat @ v[0]).view(problem.offset.shape),
        outer=lambda r: (r.flatten() @ flat)[None],
    )
    return (
        fitted
        + curvature.turn(descend(explicit, precision, _inverse(explicit, rows, precision)))[0]
    )


def _inverse(problem: Problem, rows: Tensor, precision: Tensor) -> Apply:
    """The inverse of the objective's second derivative at the fitted head, for pairs with features
    `rows` [G, C, V]: it hardly changes on the way, so that a few gradients are enough where a
    pair's features are as wide as the encoder (cross).
    """
    _, second = slope(problem.offset, problem)
    bent = second(rows.permute(2, 0, 1)).flatten(1) @ rows.flatten(0, 1)
    jitter = 1e-6 * bent.diagonal().mean()
    factor = torch.linalg.cholesky(bent + torch.diag(precision + jitter))
    return lambda r: torch.cholesky_solve(r.T, factor).T
