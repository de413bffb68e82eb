"""Which question tells most about a user: a bandit over the uncertainty of the user's head.

    worth(q) = tr[ (I + W_q Σ_q)⁻¹ W_q Φ_q S H S Φ_qᵀ ]    H = Σ_t Φ_tᵀ W_t Φ_t,  Σ_q = Φ_q S Φ_qᵀ

S is the covariance of the head's coordinates by the prior and the questions that the user has
answered, W = diag(p) − ppᵀ at the present scores (Laplace), t the questions of the pool: twice by
how much an answer to q lowers the expected log-loss over the pool, to second order (V-optimal
design; Cohn, Ghahramani and Jordan 1996).
Letters: N questions, C candidates, K coordinates of a head.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hydra_llm.model.head import Head
from hydra_llm.model.heads.additive import AdditiveHead
from hydra_llm.model.interactions import Groups
from hydra_llm.model.scorer import Scorer


def can_ask(scorer: Scorer | None) -> bool:
    """Whether the scorer knows how uncertain its heads are, for groups of known candidates."""
    return (
        scorer is not None
        and isinstance(scorer.head, AdditiveHead)
        and scorer.interaction.by_label
        and scorer.loss == "listwise"
    )


@torch.inference_mode()
def in_turn(
    scorer: Scorer, pool: Groups, answered: Groups | None = None, head: Head | None = None
) -> Iterator[tuple[int, float]]:
    """The places in the pool of the questions to ask, the one that tells most first, each with its
    worth as if those before it were answered. `answered`: what the user has answered.
    """
    phi, share = _design(scorer, pool, head)
    inverse = torch.eye(phi.shape[-1])  # of S, in coordinates in which the prior's is I
    if answered is not None and len(answered):
        inverse = inverse + _information(*_design(scorer, answered, head))
    of_pool, left = _information(phi, share), torch.ones(len(phi), dtype=torch.bool)
    middle = torch.diag_embed(share) - share[:, :, None] * share[:, None]  # W
    for _ in range(len(phi)):
        spread = torch.cholesky_solve(phi.flatten(0, 1).T, torch.linalg.cholesky(inverse))
        spread = spread.T.view_as(phi)  # Φ S
        own = middle @ spread @ phi.transpose(1, 2)  # W Σ
        lowered = middle @ (spread @ of_pool) @ spread.transpose(1, 2)
        worth = torch.linalg.solve(torch.eye(own.shape[-1]) + own, lowered)
        worth = worth.diagonal(dim1=1, dim2=2).sum(-1).masked_fill(~left, -torch.inf)
        place = int(worth.argmax())
        yield place, float(worth[place])
        left[place] = False
        inverse = inverse + _information(phi[[place]], share[[place]])


def _design(scorer: Scorer, groups: Groups, head: Head | None) -> tuple[Tensor, Tensor]:
    """Features of the coordinates in units of the prior's deviation [N, C, K]; shares [N, C]."""
    kind, x = scorer.head, scorer.interaction(groups)
    assert isinstance(kind, AdditiveHead)
    count = groups.mask.shape[1]
    _, outer = kind.design(scorer.interaction, x.repeat_interleave(count, 0)[:, None])
    rows = outer(torch.eye(count).repeat(len(x), 1)[:, None]).view(len(x), count, -1)
    prior = torch.as_tensor(kind.precisions(float(scorer.prior_precision)))
    return rows * prior.rsqrt(), scorer.core(groups, [head] * len(groups)).softmax(-1)


def _information(phi: Tensor, share: Tensor) -> Tensor:
    """[K, K] the sum of Φᵀ W Φ."""
    mean = torch.einsum("nc,nck->nk", share, phi)
    return torch.einsum("nc,nck,ncl->kl", share, phi, phi) - mean.T @ mean
