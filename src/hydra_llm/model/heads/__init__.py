"""One small head per user on top of a shared one: s = g(φ; θ₀ + δᵤ) (DESIGN 4, paper section 3.1).

A bank holds the shared head θ₀ and a row δᵤ per user. Rows are gathered by index, never by one-hot
vectors: scoring costs the same with 10 users and with 1,000,000. Row −1 is "nobody": the shared
head alone, which is what a user without records gets.

Letters: U users in the bank, G groups, C candidates, V length of a linear head, H width of φ, K
rank, N kept rows. Knows no names, no texts, no losses; heads are fitted in `learning/solve.py`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from hydra_llm.errors import SettingsError
from hydra_llm.model.heads.base import Head
from hydra_llm.model.interactions import Interaction, LabelBilinear


class HeadBank(nn.Module):
    """What every kind of head offers. `x` is what the interaction's forward gave for G groups."""

    kind: str

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def numbers_per_user(self) -> int:
        """How many 32-bit numbers one user's δ takes."""
        raise NotImplementedError

    def forward(self, interaction: Interaction, x: Tensor, rows: Tensor) -> Tensor:
        """Scores [G, C] of G groups for the users in `rows` [G] (−1: the shared head)."""
        raise NotImplementedError

    def grow(self, users: int) -> None:
        """Append rows whose δ is 0 until there are `users`."""
        raise NotImplementedError

    def clear(self, row: int) -> None:
        """Set the δ of a row to 0: the user is forgotten."""
        raise NotImplementedError

    def take(self, row: int) -> Tensor:
        """One user's δ as a flat vector, a copy: what is kept of a user elsewhere."""
        raise NotImplementedError

    def put(self, row: int, numbers: Tensor) -> None:
        """Set a row to what `take` gave.

        Raises:
            ValueError: it is of another length than this bank's.
        """
        raise NotImplementedError

    def shared_parameters(self) -> list[nn.Parameter]:
        raise NotImplementedError


def _check_length(numbers: Tensor, wanted: int) -> None:
    if numbers.shape != (wanted,):
        raise ValueError(f"a head of {len(numbers)} numbers, where this bank has {wanted} a user")


def _pick(table: Tensor, rows: Tensor) -> Tensor:
    """Rows of a table; zeros where the row is −1. Reads only what it needs."""
    if not len(table):
        return table.new_zeros(len(rows), *table.shape[1:])
    return table[rows.clamp_min(0)] * (rows >= 0).view(-1, *[1] * (table.dim() - 1))


def _grown(table: Tensor, users: int) -> Tensor:
    """The table with rows of zeros below, until it has `users`. A quarter more is set aside, so
    that enrolling one user after another does not copy everybody's rows each time.
    """
    if users <= len(table):
        return table
    shape = (users, *table.shape[1:])
    if table.untyped_storage().nbytes() >= table.element_size() * math.prod(shape):
        return torch.as_strided(table, shape, table.stride())  # what was set aside is still zero
    roomy = table.new_zeros(users + len(table) // 4, *table.shape[1:])
    roomy[: len(table)] = table
    return roomy[:users]


class _LinearShared(HeadBank):
    """Banks whose shared head is a vector θ₀ [V] and a bias."""

    def __init__(self, size: int):
        super().__init__()
        self.shared = nn.Parameter(torch.zeros(size))
        self.shared_bias = nn.Parameter(torch.zeros(()))

    def shared_parameters(self) -> list[nn.Parameter]:
        return [self.shared, self.shared_bias]


class LinearBank(_LinearShared):
    """δᵤ = (wᵤ, bᵤ): V + 1 numbers a user."""

    kind = "linear"
    weight: Tensor
    bias: Tensor

    def __init__(self, size: int, users: int = 0):
        super().__init__(size)
        self.register_buffer("weight", torch.zeros(users, size))
        self.register_buffer("bias", torch.zeros(users))

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def numbers_per_user(self) -> int:
        return self.weight.shape[1] + 1

    def forward(self, interaction: Interaction, x: Tensor, rows: Tensor) -> Tensor:
        v = self.shared + _pick(self.weight, rows)
        b = self.shared_bias + _pick(self.bias, rows)
        return interaction.dot(x[:, None], v)[:, 0] + b[:, None]

    def grow(self, users: int) -> None:
        self.weight, self.bias = _grown(self.weight, users), _grown(self.bias, users)

    def clear(self, row: int) -> None:
        self.weight[row], self.bias[row] = 0.0, 0.0

    def take(self, row: int) -> Tensor:
        return torch.cat([self.weight[row], self.bias[row : row + 1]])

    def put(self, row: int, numbers: Tensor) -> None:
        _check_length(numbers, self.numbers_per_user)
        self.weight[row], self.bias[row] = numbers[:-1], numbers[-1]


class LowRankBank(_LinearShared):
    """δᵤ = cᵤ·B with a basis B [K, V] that all users share: K numbers a user."""

    kind = "lowrank"
    basis: Tensor
    weight: Tensor

    def __init__(self, size: int, rank: int, users: int = 0):
        super().__init__(size)
        self.register_buffer("basis", torch.zeros(rank, size))
        self.register_buffer("weight", torch.zeros(users, rank))

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def numbers_per_user(self) -> int:
        return self.weight.shape[1]

    def forward(self, interaction: Interaction, x: Tensor, rows: Tensor) -> Tensor:
        v = self.shared + _pick(self.weight, rows) @ self.basis
        return interaction.dot(x[:, None], v)[:, 0] + self.shared_bias

    def grow(self, users: int) -> None:
        self.weight = _grown(self.weight, users)

    def clear(self, row: int) -> None:
        self.weight[row] = 0.0

    def take(self, row: int) -> Tensor:
        return self.weight[row].clone()

    def put(self, row: int, numbers: Tensor) -> None:
        _check_length(numbers, self.numbers_per_user)
        self.weight[row] = numbers


class MLPBank(HeadBank):
    """H×H, tanh, H→2 per user, as the paper has it: 592,130 numbers at H = 768. The score is logit₁
    − logit₀.
    """

    kind = "mlp"
    weight: Tensor

    def __init__(self, size: int, users: int = 0):
        super().__init__()
        self.size = size
        self.shared = nn.Parameter(self.random(1)[0])
        self.register_buffer("weight", torch.zeros(users, self.shared.numel()))

    def random(self, users: int, seed: int | None = None) -> Tensor:
        """[users, P] freshly initialised heads, as torch initialises a linear layer."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        count = self.size * self.size + 3 * self.size + 2
        heads: Tensor = (torch.rand(users, count, generator=generator) * 2 - 1) / float(
            self.size
        ) ** 0.5
        return heads

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def numbers_per_user(self) -> int:
        return self.weight.shape[1]

    def forward(self, interaction: Interaction, x: Tensor, rows: Tensor) -> Tensor:
        return self.apply_heads(x, self.shared + _pick(self.weight, rows))

    def apply_heads(self, x: Tensor, heads: Tensor) -> Tensor:
        """x [G, C, H] and one flat head per group [G, P] → scores [G, C]."""
        H, G = self.size, len(heads)
        w1, b1, w2, b2 = heads.split([H * H, H, 2 * H, 2], 1)
        hidden = torch.tanh(x @ w1.view(G, H, H).transpose(1, 2) + b1[:, None])
        logits: Tensor = hidden @ w2.view(G, 2, H).transpose(1, 2) + b2[:, None]
        return logits[..., 1] - logits[..., 0]

    def grow(self, users: int) -> None:
        self.weight = _grown(self.weight, users)

    def clear(self, row: int) -> None:
        self.weight[row] = 0.0

    def take(self, row: int) -> Tensor:
        return self.weight[row].clone()

    def put(self, row: int, numbers: Tensor) -> None:
        _check_length(numbers, self.numbers_per_user)
        self.weight[row] = numbers

    def shared_parameters(self) -> list[nn.Parameter]:
        return [self.shared]


class KernelBank(_LinearShared):
    """The user's own labelled pairs, each counting by its similarity to the case at hand (DESIGN 4:
    `kernel`).

    δᵤ(x) = w · Σᵢ kᵢ rᵢ / (λ + Σᵢ kᵢ) with kᵢ = exp((cos(x, xᵢ) − 1) / τ) and rᵢ what the shared
    head left unexplained of pair i. τ, w and λ are learned from the training users. Nothing is
    fitted: an update appends, a deletion removes. Keys are φ of a pair (residual [N, 1]) or, for
    label features, z of a query (residual [N, L]).
    """

    kind = "kernel"

    def __init__(self, size: int, users: int = 0):
        super().__init__(size)
        self.log_bandwidth = nn.Parameter(torch.tensor(-1.5))
        self.strength = nn.Parameter(torch.tensor(1.0))
        self.log_ridge = nn.Parameter(torch.tensor(0.0))
        self.keys: list[Tensor] = [torch.zeros(0) for _ in range(users)]
        self.residuals: list[Tensor] = [torch.zeros(0) for _ in range(users)]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def numbers_per_user(self) -> int:
        """The mean over users: this head grows with the history it stands on."""
        return sum(
            k.numel() + r.numel() for k, r in zip(self.keys, self.residuals, strict=True)
        ) // max(1, len(self))

    def forward(self, interaction: Interaction, x: Tensor, rows: Tensor) -> Tensor:
        scores = self.shared_scores(interaction, x)
        for row in rows.unique().tolist():
            if row >= 0 and len(self.keys[row]):
                own = rows == row
                extra = self.evidence(x[own].flatten(0, -2), self.keys[row], self.residuals[row])
                scores = scores.index_add(0, own.nonzero()[:, 0], extra.view(int(own.sum()), -1))
        return scores

    def shared_scores(self, interaction: Interaction, x: Tensor) -> Tensor:
        return interaction.dot(x[None], self.shared[None])[0] + self.shared_bias

    def evidence(
        self, x: Tensor, keys: Tensor, residuals: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """x [B, D], keys [N, D], residuals [N, R] → [B, R]; `seen` [B, N] hides pairs that x must
        not know.
        """
        cosine = nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(keys, dim=-1).T
        weight = ((cosine - 1) / self.log_bandwidth.exp()).exp()
        if seen is not None:
            weight = weight * seen
        out: Tensor = (
            self.strength
            * (weight @ residuals)
            / (self.log_ridge.exp() + weight.sum(-1, keepdim=True))
        )
        return out

    def grow(self, users: int) -> None:
        more = users - len(self)
        self.keys += [torch.zeros(0) for _ in range(more)]
        self.residuals += [torch.zeros(0) for _ in range(more)]

    def remember(self, row: int, keys: Tensor, residuals: Tensor) -> None:
        """Append pairs [N, D] with residuals [N, R] to a user's own."""
        empty = not len(self.keys[row])
        self.keys[row] = keys if empty else torch.cat([self.keys[row], keys])
        self.residuals[row] = residuals if empty else torch.cat([self.residuals[row], residuals])

    def clear(self, row: int) -> None:
        self.keys[row], self.residuals[row] = torch.zeros(0), torch.zeros(0)

    def take(self, row: int) -> Tensor:
        keys, residuals = self.keys[row], self.residuals[row]
        if not len(keys):
            return torch.zeros(0)
        shape = torch.tensor([float(keys.shape[1]), float(residuals.shape[1])])
        return torch.cat([shape, torch.cat([keys, residuals], 1).flatten()])

    def put(self, row: int, numbers: Tensor) -> None:
        self.clear(row)
        if len(numbers) < 2:
            return
        width, depth = (int(number) for number in numbers[:2])
        if width < 1 or depth < 1 or (len(numbers) - 2) % (width + depth):
            raise ValueError(f"{len(numbers)} numbers are no pairs of {width} and {depth}")
        pairs = numbers[2:].view(-1, width + depth)
        self.keys[row], self.residuals[row] = pairs[:, :width].clone(), pairs[:, width:].clone()

    def get_extra_state(self) -> dict[str, Any]:
        return {"keys": self.keys, "residuals": self.residuals}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.keys, self.residuals = state["keys"], state["residuals"]


def make_bank(kind: str, interaction: Interaction, *, rank: int = 16, users: int = 0) -> HeadBank:
    """An empty bank of a kind for a interaction's features.

    Raises:
        SettingsError: an unknown kind, or a kind that needs explicit pair features.
    """
    if kind == "linear":
        return LinearBank(interaction.size, users)
    if kind == "lowrank":
        return LowRankBank(interaction.size, min(rank, interaction.size), users)
    if kind == "kernel":
        return KernelBank(interaction.size, users)
    if kind == "mlp" and not isinstance(interaction, LabelBilinear):
        return MLPBank(interaction.size, users)
    raise SettingsError(
        f"head '{kind}' does not go with {interaction.kind} features: take linear, lowrank or"
        " kernel, or label_features=false"
    )


__all__ = ["Head", "HeadBank", "KernelBank", "LinearBank", "LowRankBank", "MLPBank", "make_bank"]
