"""The kernel head: learn its bandwidth, weight and ridge; remember a user's pairs (DESIGN 4:
`kernel`).

Knows no texts. A pair's residual is its target minus the share that the shared head and the
evidence gave it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hydra_llm.model.heads import KernelBank
from hydra_llm.model.scorer import Scorer
from hydra_llm.training.dataset import Table
from hydra_llm.training.newton import losses

Case = tuple[Table, Tensor, Tensor, Tensor, Tensor, Tensor]
"""A user's groups, their x, shared scores, keys, residuals, and which pair may see which."""
STEPS = 150
MOST_SIMILARITIES = 3_000_000
"""Three numbers need no more data than this; it keeps learning them at seconds where every pair is
a key of its own.
"""


@torch.no_grad()
def residuals(scorer: Scorer, table: Table) -> tuple[Tensor, Tensor, Tensor]:
    """x of the groups, their shared scores [G, C], and what those leave unexplained [G, C]."""
    groups = table.groups
    assert groups.target is not None and isinstance(scorer.bank, KernelBank)
    x = scorer.interaction(groups)
    scores = scorer.bank.shared_scores(scorer.interaction, x) + scorer.side_score(groups)
    if scorer.loss == "binary":
        return x, scores, (groups.target - torch.sigmoid(scores)) * groups.mask
    share = scores.masked_fill(~groups.mask, -1e30).softmax(-1) * groups.target.sum(
        -1, keepdim=True
    )
    return x, scores, (groups.target - share) * groups.mask


def as_memory(
    scorer: Scorer, table: Table, x: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [N, D], residuals [N, R] and the group of each key [N]: one key per query for label
    features, else one per pair.
    """
    place = torch.arange(len(table))
    if scorer.interaction.kind == "label":
        return x, residual, place
    mask = table.groups.mask
    return x[mask], residual[mask][:, None], place[:, None].expand_as(mask)[mask]


@torch.no_grad()
def remember_users(scorer: Scorer, table: Table, names: Sequence[str]) -> None:
    """Put each user's pairs in place of what the bank kept of the user."""
    bank = scorer.bank
    assert isinstance(bank, KernelBank)
    for name in names:
        own = table.of([name])
        bank.clear(scorer.row(name))
        if len(own):
            x, _, residual = residuals(scorer, own)
            keys, values, _ = as_memory(scorer, own, x, residual)
            bank.remember(scorer.row(name), keys.clone(), values.clone())


def learn_kernel(
    scorer: Scorer,
    plain: Table,
    splits: Sequence[tuple[Table, list[str]]],
    base_of: Callable[[Table], None],
) -> None:
    """Fit τ, w and λ so that users whom the base has not seen are predicted best, each group from
    the user's earlier groups only.
    """
    bank = scorer.bank
    assert isinstance(bank, KernelBank)
    cases: list[Case] = []
    for train, part in splits:
        base_of(train)
        cases += _cases(scorer, plain, part, MOST_SIMILARITIES // len(splits))
    if not cases:
        return
    parameters = [bank.log_bandwidth, bank.strength, bank.log_ridge]
    optimiser = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(STEPS):
        optimiser.zero_grad()
        total = torch.stack([_case_loss(scorer, bank, *case) for case in cases]).sum()
        (total + 0.1 * (bank.strength - 1).square()).backward()
        optimiser.step()


def _cases(scorer: Scorer, plain: Table, part: list[str], room: int) -> list[Case]:
    """The users of a part, as many as have `room` similarities together; at least one."""
    cases: list[Case] = []
    for user in part:
        case = _case(scorer, plain.of([user]))
        room -= case[-1].numel()
        if room < 0 and cases:
            break
        cases.append(case)
    return cases


def _case(scorer: Scorer, own: Table) -> Case:
    x, scores, residual = residuals(scorer, own)
    keys, values, place = as_memory(scorer, own, x, residual)
    here = torch.arange(len(own)).repeat_interleave(1 if x.dim() == 2 else x.shape[1])
    return own, x.flatten(0, -2), scores, keys, values, (place[None] < here[:, None]).float()


def _case_loss(
    scorer: Scorer,
    bank: KernelBank,
    own: Table,
    x: Tensor,
    scores: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
) -> Tensor:
    assert own.groups.target is not None
    extra = bank.evidence(x, keys, values, seen).view_as(scores)
    return losses(scores + extra, own.groups.target, own.groups.mask, scorer.loss).sum()
