"""H×H, tanh, H→2 per user, as the paper has it: 592,130 numbers at H = 768. For fidelity.

The score is logit₁ − logit₀. Each head is fitted by a gradient descent of its own: none depends on
other users.
"""

import zlib
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from hydra_llm.errors import SettingsError
from hydra_llm.model.heads.base import HeadKind, HeadProblem
from hydra_llm.model.interactions import Interaction
from hydra_llm.model.newton import losses


class MLPHead(HeadKind):
    """Two layers per user on pair features."""

    name = "mlp"
    convex = False
    on_labels = False

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.shared = nn.Parameter(self._random())

    @classmethod
    def create(cls, interaction: Interaction, rank: int) -> Self:
        if interaction.by_label:
            fix = "take linear, lowrank or kernel, or label_features=false"
            raise SettingsError(f"head 'mlp' does not go with {interaction.kind} features: {fix}")
        return cls(interaction.size)

    def _random(self, seed: int | None = None) -> Tensor:
        """[P] a freshly initialised head, as torch initialises a linear layer."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        draw = torch.rand(1, self.numbers_per_user, generator=generator)[0]
        head: Tensor = (draw * 2 - 1) / float(self.size) ** 0.5
        return head

    @property
    def numbers_per_user(self) -> int:
        return self.size * self.size + 3 * self.size + 2

    joint_numbers = numbers_per_user

    def joint_parameters(self) -> list[nn.Parameter]:
        return [self.shared]

    def shared_score(self, interaction: Interaction, x: Tensor) -> Tensor:
        return self._network(x, self.shared.expand(len(x), -1))

    def score_numbers(self, interaction: Interaction, x: Tensor, numbers: Tensor) -> Tensor:
        return self._network(x, self.shared + numbers)

    def _network(self, x: Tensor, heads: Tensor) -> Tensor:
        """x [G, C, H] and one flat network per group [G, P] → scores [G, C]."""
        H, G = self.size, len(heads)
        w1, b1, w2, b2 = heads.split([H * H, H, 2 * H, 2], 1)
        hidden = torch.tanh(x @ w1.view(G, H, H).transpose(1, 2) + b1[:, None])
        logits: Tensor = hidden @ w2.view(G, 2, H).transpose(1, 2) + b2[:, None]
        return logits[..., 1] - logits[..., 0]

    def fit(self, problem: HeadProblem) -> list[np.ndarray]:
        """With the shared head as prior, as strong as the weight decay; or from a random start and
        decayed to 0, as in the authors' code.
        """
        return [self._fit_one(problem.user(u)) for u in range(len(problem.users))]

    @torch.enable_grad()
    def _fit_one(self, problem: HeadProblem) -> np.ndarray:
        shared, sgd = self.shared.detach(), problem.sgd
        delta = torch.zeros_like(shared)
        if sgd.random_start:
            seed = zlib.crc32(problem.users[0].encode("utf-8", "surrogatepass")) ^ sgd.seed
            delta = self._random(seed) - shared
        delta.requires_grad_(True)
        optimizer = torch.optim.AdamW([delta], lr=sgd.lr, weight_decay=0.0)
        x, offset = problem.x[0], problem.offset[0]
        target, mask = problem.target[0], problem.mask[0]
        for epoch in range(sgd.epochs):
            draw = torch.Generator().manual_seed(sgd.seed + epoch)
            for index in sgd.batches(mask.sum(-1), torch.randperm(len(x), generator=draw)):
                scores = self._network(x[index], (shared + delta).expand(len(index), -1))
                own = losses(scores + offset[index], target[index], mask[index], problem.loss)
                decayed = shared + delta if sgd.random_start else delta
                penalty = 0.5 * sgd.weight_decay * decayed.square().sum()
                optimizer.zero_grad()
                (own.sum() / len(index) + penalty).backward()
                optimizer.step()
        return delta.detach().numpy()
