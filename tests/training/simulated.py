"""Users whose tastes are known, because they are made up: each candidate's chance is the softmax of
φ·(w₀ + δᵤ).
"""

import torch
from torch import Tensor

from hydra_llm.model.heads import make_head
from hydra_llm.model.interactions import Cross, Groups
from hydra_llm.model.scorer import Loss, Scorer
from hydra_llm.training.dataset import TrainingSet

WIDTH = 5


def simulate(
    users: int = 12,
    groups: int = 14,
    *,
    differ: float = 2.0,
    shared: float = 1.0,
    candidates: int = 4,
    loss: Loss = "listwise",
    seed: int = 0,
) -> tuple[TrainingSet, dict[str, Tensor]]:
    """A table and each user's true weights [WIDTH]; δᵤ has the deviation `differ` in each
    direction, w₀ `shared`.
    """
    draw = torch.Generator().manual_seed(0)
    base = shared * torch.randn(WIDTH, generator=draw)
    truth = {f"u{i:03}": base + differ * torch.randn(WIDTH, generator=draw) for i in range(users)}
    count = users * groups
    x = torch.randn(count, candidates, WIDTH, generator=draw)
    mask = torch.rand(count, candidates, generator=draw) < 0.8
    mask[:, :2] = True
    names = tuple(name for name in truth for _ in range(groups))
    scores = torch.einsum(
        "gch,gh->gc", x, torch.stack([truth[name] for name in names])
    ).masked_fill(~mask, -torch.inf)
    if loss == "listwise":
        target = torch.nn.functional.one_hot(
            torch.multinomial(scores.softmax(-1), 1, generator=draw)[:, 0], candidates
        ).float()
    else:
        target = (torch.rand(scores.shape, generator=draw) < scores.sigmoid()).float()
    places = torch.arange(groups).repeat(users)
    cases = Groups(
        torch.zeros(count, 0), x * mask[..., None], torch.zeros(count, candidates, 0), mask, target
    )
    return TrainingSet(
        cases, names, places, torch.zeros(count, dtype=torch.bool), cases.target
    ), truth


def cross_scorer(
    head: str,
    table: TrainingSet,
    *,
    loss: Loss = "listwise",
    rank: int = 3,
    evidence: tuple[str, ...] = (),
) -> Scorer:
    torch.manual_seed(0)
    interaction = Cross(WIDTH)
    interaction.prepare(table.groups)
    return Scorer(interaction, make_head(head, interaction, rank=rank), evidence, loss=loss)
