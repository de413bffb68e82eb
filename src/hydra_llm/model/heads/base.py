"""What a kind of head must be able to do.

    score(user, pair) = g(φ; θ₀ + δ)     θ₀: the shared head, δ: the user's numbers (paper, 3.1)

Every head has a Gaussian prior whose mean is the shared head. A new kind is a subclass of
`HeadKind` or `AdditiveHead` and an entry point of the group `hydra_llm.heads`.
Letters: U users, G groups, C candidates, P numbers of a head, V length of θ₀.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from hydra_llm.model.forgetting import weights
from hydra_llm.model.head import Head
from hydra_llm.model.interactions import Interaction
from hydra_llm.model.laplace import LaplacePosterior
from hydra_llm.model.newton import Loss


@dataclass(frozen=True)
class SGDConfig:
    """How a problem that is not convex is trained."""

    epochs: int = 30
    lr: float = 1e-3
    batch: int = 64  # pairs per step, rounded to whole groups
    weight_decay: float = 0.01
    patience: int = 5  # epochs without a lower held-out loss; 0 trains all, as in the paper
    seed: int = 0
    random_start: bool = False  # of `mlp` heads, as in the authors' code; else at the shared head

    def batches(self, sizes: Tensor, order: Tensor) -> Iterable[Tensor]:
        """Groups in order, as many at once as have about `batch` pairs; `sizes` [G] in pairs."""
        start, pairs = 0, 0
        for end, i in enumerate(order.tolist(), 1):
            pairs += int(sizes[i])
            if pairs >= self.batch or end == len(order):
                yield order[start:end]
                start, pairs = end, 0


@dataclass(frozen=True, slots=True)
class HeadProblem:
    """U users' labelled groups, from which their heads are fitted while all else is frozen."""

    users: tuple[str, ...]
    interaction: Interaction
    x: Tensor  # [U, G, ...] features as the interaction gives them, padded
    offset: Tensor  # [U, G, C] what is in the score beside the head
    target: Tensor  # [U, G, C]
    mask: Tensor  # [U, G, C] False for padding
    loss: Loss
    precision: float = 1.0  # of the Gaussian prior around the shared head
    sgd: SGDConfig = SGDConfig()
    start: Tensor | None = None  # [U, P] heads from which a convex fit begins
    discount: float | None = None  # what a record counts less than the one after it
    keep: float = 1.0  # what counts of a fitted head's records in its online update

    def discounted(self, positions: Tensor, changed: int | None = None) -> "HeadProblem":
        """The problem with targets that count less the older they are, where there is a discount,
        and less before a change of taste; arguments as of `forgetting.weights`.
        """
        if self.discount is None and not changed:
            return self
        weight = weights(positions, self.mask.any(-1), self.discount, changed)
        return replace(self, target=self.target * weight[..., None])

    def user(self, u: int) -> "HeadProblem":
        """One user's problem without padded groups, U = 1."""
        own = self.mask[u].any(-1)
        x, offset = self.x[u, own][None], self.offset[u, own][None]
        target, mask = self.target[u, own][None], self.mask[u, own][None]
        users = self.users[u : u + 1]
        return replace(self, users=users, x=x, offset=offset, target=target, mask=mask)


def gather(heads: Sequence[Head | None], size: int) -> Tensor:
    """[G, size] the heads' numbers, zeros for None; ValueError for a head of another size."""
    out = np.zeros((len(heads), size), dtype=np.float32)
    for row, head in enumerate(heads):
        if head is not None:
            if len(head.numbers) != size:
                raise ValueError(f"a head of {len(head.numbers)} numbers, where {size} are needed")
            out[row] = head.numbers
    return torch.from_numpy(out)


class HeadKind(nn.Module):
    """One kind of head: its parameters are θ₀ and whatever else all users share."""

    name: ClassVar[str]
    convex: ClassVar[bool] = True  # the shared head is fitted by ridge regression, not by gradient
    has_precision: ClassVar[bool] = True  # its prior's strength is chosen on held-out users
    on_labels: ClassVar[bool] = True  # whether it goes with features of labels (`label_features`)
    updates_online: ClassVar[bool] = False  # feedback changes a head without a new fit
    learns_prior: ClassVar[bool] = False  # it has `set_basis`: a prior learned from users' records
    rank: int = 0  # what `create` needs to make it again

    @classmethod
    def create(cls, interaction: Interaction, rank: int) -> Self:
        """An unfitted head; SettingsError for other features. `rank` is for kinds that have one."""
        raise NotImplementedError

    @property
    def numbers_per_user(self) -> int | None:
        """P; None where it grows with the history."""
        raise NotImplementedError

    # ---- scoring

    def shared_score(self, interaction: Interaction, x: Tensor) -> Tensor:
        """[G, C] by the shared head alone."""
        raise NotImplementedError

    def score(self, interaction: Interaction, x: Tensor, heads: Sequence[Head | None]) -> Tensor:
        """[G, C] of G groups, one head each; None is the shared head."""
        return self.score_numbers(interaction, x, gather(heads, self.numbers_per_user or 0))

    # ---- learning

    def set_shared(self, weight: Tensor, bias: Tensor) -> None:
        """Set the shared head of a convex kind to a vector [V] and a bias."""
        raise NotImplementedError

    def precision_probe(self) -> "HeadKind":
        """The kind by whose heads the precision of the prior is chosen."""
        return self

    def tune(self, rounds: Iterable[Iterable[HeadProblem]], count: int) -> None:
        """Learn what else all users share by predicting users whom the base has not seen, in
        `count` rounds with another base each.
        """

    def learn_shared(self, problems: Iterable[HeadProblem]) -> None:
        """Learn what else all users share from the training users under the present base."""

    def fit(self, problem: HeadProblem) -> list[np.ndarray]:
        """U users' numbers [P] on their groups; who has none gets `empty()`."""
        raise NotImplementedError

    def empty(self) -> np.ndarray:
        """The numbers that make a head the shared one."""
        return np.zeros(self.numbers_per_user or 0, dtype=np.float32)

    def precisions(self, precision: float) -> "float | Tensor":
        """The prior's precision of each coordinate, given that of the numbers without a basis."""
        return precision

    # ---- joint training by gradient

    @property
    def joint_numbers(self) -> int:
        """How many of a user's first numbers are trained together with the base."""
        return 0

    def joint_parameters(self) -> list[nn.Parameter]:
        """The shared parameters that are trained together with them."""
        raise NotImplementedError

    def score_numbers(self, interaction: Interaction, x: Tensor, numbers: Tensor) -> Tensor:
        """[G, C] with plain numbers [G, joint_numbers or P], differentiable."""
        return self.shared_score(interaction, x)

    # ---- uncertainty and feedback

    def fisher(
        self, interaction: Interaction, x: Tensor, share: Tensor, binary: bool
    ) -> tuple[Tensor, ...] | None:
        """Factors of the mean Fisher information of a head, as `LaplacePosterior.of` takes them;
        None where heads have no posterior.
        """
        return None

    def covariance(
        self, interaction: Interaction, x: Tensor, posterior: LaplacePosterior, precision: Tensor
    ) -> Tensor | None:
        """[C, C] of one group's scores (G = 1) under a head of this precision; None if unknown."""
        return None

    def online_update(
        self, problem: HeadProblem, posterior: LaplacePosterior, head: Head | None
    ) -> Head:
        """The head after feedback (U = 1): judged groups exactly, the others by the posterior."""
        raise NotImplementedError


class VectorShared(HeadKind):
    """Kinds whose shared head is a vector θ₀ [V] and a bias b₀."""

    def __init__(self, size: int):
        super().__init__()
        self.shared = nn.Parameter(torch.zeros(size))
        self.shared_bias = nn.Parameter(torch.zeros(()))

    @classmethod
    def create(cls, interaction: Interaction, rank: int) -> Self:
        return cls(interaction.size)

    @torch.no_grad()
    def set_shared(self, weight: Tensor, bias: Tensor) -> None:
        self.shared.copy_(weight)
        self.shared_bias.copy_(bias)

    def joint_parameters(self) -> list[nn.Parameter]:
        return [self.shared, self.shared_bias]

    def shared_score(self, interaction: Interaction, x: Tensor) -> Tensor:
        v = self.shared.expand(len(x), -1)
        return interaction.dot(x[:, None], v)[:, 0] + self.shared_bias
