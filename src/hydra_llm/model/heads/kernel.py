"""δ(x) from the user's own labelled pairs, each weighted by its similarity to the case at hand.

    δ(x) = η · Σᵢ κᵢ rᵢ / (ρ + Σᵢ κᵢ),   κᵢ = exp((cos(x, xᵢ) − 1) / τ)

rᵢ is what the shared head and the side features left unexplained of pair i (target minus predicted
share). η, ρ and τ are shared and learned from the training users. Nothing is fitted for a user.
Keys are φ of a pair (residual [N, 1]) or, for label features, z of a query (residual [N, L]).
Numbers of a head: D, R, then N rows of a key [D] and its residuals [R]; none without pairs.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hydra_llm.model.head import Head
from hydra_llm.model.heads.base import HeadProblem, VectorShared
from hydra_llm.model.interactions import Interaction
from hydra_llm.model.newton import losses

TUNING_STEPS = 150
MAX_SIMILARITIES = 3_000_000  # bounds the time of tuning: three numbers need no more data


class KernelHead(VectorShared):
    """Kernel regression on the user's own pairs."""

    name = "kernel"
    has_precision = False

    def __init__(self, size: int):
        super().__init__(size)
        self.log_bandwidth = nn.Parameter(torch.tensor(-1.5))  # log τ
        self.strength = nn.Parameter(torch.tensor(1.0))  # η
        self.log_ridge = nn.Parameter(torch.tensor(0.0))  # log ρ
        self.tuning_steps = TUNING_STEPS

    @property
    def numbers_per_user(self) -> None:
        return None

    def score(self, interaction: Interaction, x: Tensor, heads: Sequence[Head | None]) -> Tensor:
        scores = self.shared_score(interaction, x)
        rows: dict[int, list[int]] = {}
        for row, head in enumerate(heads):
            rows.setdefault(id(head), []).append(row)
        for own in rows.values():
            head = heads[own[0]]
            if head is not None and len(head.numbers):
                index = torch.tensor(own)
                extra = self.smooth(x[index].flatten(0, -2), *unpack(head.numbers))
                scores = scores.index_add(0, index, extra.view(len(own), -1))
        return scores

    def smooth(
        self, x: Tensor, keys: Tensor, residuals: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """x [B, D], keys [N, D], residuals [N, R] → δ [B, R]; `seen` [B, N] hides pairs from x."""
        cosine = nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(keys, dim=-1).T
        weight = ((cosine - 1) / self.log_bandwidth.exp()).exp()
        if seen is not None:
            weight = weight * seen
        total = self.log_ridge.exp() + weight.sum(-1, keepdim=True)
        out: Tensor = self.strength * (weight @ residuals) / total
        return out

    def fit(self, problem: HeadProblem) -> list[np.ndarray]:
        cases = (self._case(problem.user(u)) for u in range(len(problem.users)))
        return [pack(case.keys, case.residuals) for case in cases]

    def tune(self, rounds: Iterable[Iterable[HeadProblem]], count: int) -> None:
        """Fit η, ρ and τ by predicting each group of an unseen user from the earlier ones."""
        room = MAX_SIMILARITIES // count
        cases = [case for problems in rounds for case in self._bounded(problems, room)]
        if not cases:
            return
        optimiser = torch.optim.Adam([self.log_bandwidth, self.strength, self.log_ridge], lr=0.05)
        for _ in range(self.tuning_steps):
            optimiser.zero_grad()
            parts = []
            for problem, x, scores, keys, residuals, seen in cases:
                own = scores + self.smooth(x, keys, residuals, seen).view_as(scores)
                parts.append(losses(own, problem.target[0], problem.mask[0], problem.loss).sum())
            total = torch.stack(parts).sum()
            (total + 0.1 * (self.strength - 1).square()).backward()
            optimiser.step()

    def _bounded(self, problems: Iterable[HeadProblem], room: int) -> "list[_Case]":
        """As many users as have `room` similarities together; at least one."""
        cases: list[_Case] = []
        for problem in problems:
            case = self._case(problem)
            room -= case.seen.numel()
            if room < 0 and cases:
                break
            cases.append(case)
        return cases

    @torch.no_grad()
    def _case(self, problem: HeadProblem) -> "_Case":
        x, target, mask = problem.x[0], problem.target[0], problem.mask[0]
        scores = self.shared_score(problem.interaction, x) + problem.offset[0]
        if problem.loss == "binary":
            share = torch.sigmoid(scores)
        else:
            share = scores.masked_fill(~mask, -1e30).softmax(-1) * target.sum(-1, keepdim=True)
        keys, residuals, group = problem.interaction.keys(x, (target - share) * mask, mask)
        here = torch.arange(len(x)).repeat_interleave(1 if x.dim() == 2 else x.shape[1])
        seen = (group[None] < here[:, None]).float()
        return _Case(problem, x.flatten(0, -2), scores, keys, residuals, seen)


class _Case(NamedTuple):
    """One user's groups under a base, with the pairs that they become."""

    problem: HeadProblem
    x: Tensor  # [B, D] what is compared with the keys
    scores: Tensor  # [G, C] without the user's head
    keys: Tensor
    residuals: Tensor
    seen: Tensor  # [B, N] 1 where the key's group came before x's


def pack(keys: Tensor, residuals: Tensor) -> np.ndarray:
    """Pairs as the numbers of a head."""
    if not len(keys):
        return np.zeros(0, dtype=np.float32)
    shape = torch.tensor([float(keys.shape[1]), float(residuals.shape[1])])
    return torch.cat([shape, torch.cat([keys, residuals], 1).flatten()]).numpy()


def unpack(numbers: np.ndarray) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`, for a head that has pairs; ValueError if it is of another kind."""
    width, depth = (int(number) for number in numbers[:2])
    if width < 1 or depth < 1 or (len(numbers) - 2) % (width + depth):
        raise ValueError(f"{len(numbers)} numbers are no pairs of {width} and {depth}")
    pairs = torch.tensor(numbers[2:]).view(-1, width + depth)
    return pairs[:, :width], pairs[:, width:]
