"""The prior of users' heads, learned from the training users by expectation-maximisation.

    δ_u = Sᵀ a_u + ε_u,   a_u ~ N(0, I),   ε_u ~ N(0, I/λ)        S [K, V]

One step, with θ₀, S and the weights w of side features as they are:
    E   each user's posterior of a_u: the mode m_u, and by Laplace's method its covariance C_u
    M   θ₀, S and w minimise the expected loss of the users' groups: the loss at m_u, plus
        ½ tr(W S C_u Sᵀ) with W the Hessian by the scores, plus ridges on θ₀, w and S
The ridge on S shrinks what the data do not support towards no difference between users. Between the
two the coordinates are changed so that the users' a have mean 0 and covariance I (parameter
expansion: Liu, Rubin and Wu 1998), which takes few steps instead of many. With known texts
(`LabelBilinear`) this is a matrix factorization with side information; λ is chosen afterwards
(training/convex.py). The result does not depend on the order of the users.

Letters: U users, N groups of all users, T distinct texts, L labels, J columns of their coding, K
rank, V length of θ₀, E side features. Knows no texts and no LLM.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hydra_llm.model.heads.linear import LinearHead
from hydra_llm.model.heads.lowrank import LowRankHead
from hydra_llm.model.interactions import LabelBilinear
from hydra_llm.model.newton import Problem, newton_cg
from hydra_llm.model.scorer import Scorer
from hydra_llm.training.dataset import TrainingSet, chunks_of_users

START = 0.3  # standard deviation of the scores that a direction of the first S gives
START_USERS = 2000  # whose gradients give the directions
CONSTANT, KNOWN = 0.1, 0.3  # ridges on S of the constant and of known texts, of those of directions
NUMBERS = 50_000_000  # N · J · K at most: bounds memory
NEWTON_STEPS, PRODUCTS = 1, 15  # of an M step, which need not be exact: the next one goes on


Posteriors = tuple[Tensor, Tensor]  # the users' modes [U, K] and covariances [U, K, K]


@dataclass(frozen=True)
class Ridges:
    """What is penalised how much in an M step."""

    shared: Tensor  # [V] of θ₀
    side: float  # of the weights of side features
    basis: float  # of S in the principal directions


class State(NamedTuple):
    """What a fit of base and prior has set in a scorer."""

    shared: Tensor
    bias: Tensor
    side: tuple[Tensor, Tensor, Tensor]  # weights, means and deviations
    basis: Tensor | None

    @classmethod
    def of(cls, scorer: Scorer) -> "State":
        head = scorer.head
        assert isinstance(head, LinearHead | LowRankHead)
        side = (scorer.side_weight.detach().clone(), scorer.side_mean, scorer.side_scale)
        shared, bias = head.shared.detach().clone(), head.shared_bias.detach().clone()
        return cls(shared, bias, side, head.basis)

    def restore(self, scorer: Scorer) -> None:
        """Set them again."""
        scorer.head.set_shared(self.shared, self.bias)
        weights, scorer.side_mean, scorer.side_scale = self.side
        scorer.side_weight.data.copy_(weights)
        assert isinstance(scorer.head, LinearHead | LowRankHead)
        scorer.head.set_basis(self.basis)


def learn_basis(
    scorer: Scorer, data: TrainingSet, ridges: Ridges, *, rank: int, steps: int
) -> Iterator[Tensor]:
    """Steps of EM from a fitted base; each sets the scorer's shared head, side weights and basis,
    and gives S. Nothing where the users are too few to differ.
    """
    records = _Records.of(scorer, data)
    rank = min(rank, len(data.names()) // 2, NUMBERS // max(1, len(data) * records.columns))
    if rank < 1:
        return
    head = scorer.head
    assert isinstance(head, LinearHead | LowRankHead)
    shared, weights = head.shared.detach()[None], scorer.side_weight.detach().clone()
    table = torch.cat([shared, records.first_basis(shared, weights, rank)])  # [K + 1, V]
    on_basis = _basis_precision(records.interaction, ridges.basis).repeat(rank)
    ridge = torch.cat([ridges.shared, on_basis, torch.full_like(weights, ridges.side)])
    for step in range(steps):
        modes, covariance = records.expected(table, weights)
        if step:
            table, modes, covariance = _standardised(table, modes, covariance)
        posteriors = modes, covariance
        table, weights = _maximised(records, table, weights, posteriors, ridge)
        head.set_shared(table[0], torch.zeros(()))
        head.set_basis(table[1:].clone())
        scorer.side_weight.data.copy_(weights)
        yield table[1:]


def _basis_precision(interaction: LabelBilinear, ridge: float) -> Tensor:
    """[V] the ridge on each number of a row of S."""
    dense = torch.full((interaction.columns, interaction.rank + 1), ridge)
    dense[:, -1] *= CONSTANT
    known = torch.full((interaction.texts * interaction.columns,), ridge * KNOWN)
    return torch.cat([dense.flatten(), known])


def _standardised(table: Tensor, modes: Tensor, covariance: Tensor) -> tuple[Tensor, ...]:
    """The same scores in coordinates in which the users' a have mean 0 and covariance I."""
    mean = modes.mean(0)
    centred = modes - mean
    spread = centred.T @ centred / len(modes) + covariance.mean(0)
    factor = torch.linalg.cholesky(spread + 1e-6 * torch.eye(len(spread)))
    basis = table[1:]
    table = torch.cat([table[:1] + mean @ basis, factor.T @ basis])
    inverse = torch.linalg.inv(factor)
    return table, centred @ inverse.T, inverse @ covariance @ inverse.T


class _Records(NamedTuple):
    """All users' groups, each distinct text once."""

    interaction: LabelBilinear
    x: Tensor  # [T, ...] features of the distinct texts
    text: Tensor  # [N] the text of each group
    side: Tensor  # [N, L, E]
    target: Tensor  # [N, L]
    user: Tensor  # [N] whose group
    chunks: list[Tensor]  # [U, G] places of users' groups, −1 is padding
    owners: list[Tensor]  # [U] the number of each of a chunk's users
    number: int  # U

    @classmethod
    def of(cls, scorer: Scorer, data: TrainingSet) -> "_Records":
        interaction = scorer.interaction
        assert isinstance(interaction, LabelBilinear)
        distinct, text = data.groups.distinct()
        x = interaction(distinct)
        names = {name: number for number, name in enumerate(data.names())}
        user = torch.tensor([names[name] for name in data.users])
        per_group = max(data.target.shape[1] * 32, x.shape[1])
        parts = list(chunks_of_users(data, list(names), per_group=per_group))
        chunks = [index for _, index in parts]
        owners = [torch.tensor([names[name] for name in own]) for own, _ in parts]
        side = scorer.standardised(data.groups)
        return cls(interaction, x, text, side, data.target, user, chunks, owners, len(names))

    @property
    def columns(self) -> int:
        return self.interaction.columns

    @property
    def coding(self) -> Tensor:
        """C [L, J]."""
        coding = self.interaction.coding
        return torch.eye(self.columns) if coding is None else coding

    def rows(self, table: Tensor) -> Tensor:
        """[N, J, K] the groups' features on the rows of a table [K, V]."""
        return self.interaction.code_rows(self.x, table)[self.text]

    def back(self, r: Tensor, *, squared: bool = False) -> Tensor:
        """The transpose of `rows`: [N, J, K] → [K, V]; or that of features squared."""
        by_text = r.new_zeros(len(self.x), *r.shape[1:]).index_add_(0, self.text, r)
        x = self.x
        if squared:  # but not the text's place
            width = self.interaction.rank + 1
            x = torch.cat([x[:, :width].square(), x[:, width:]], 1)
        return self.interaction.code_back(x, by_text)

    def by_user(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """[N, J, K] the groups' rows [N, J, K] times their user's matrix, of [U, K, K]."""
        out = torch.empty_like(rows)
        for places, owners in zip(self.chunks, self.owners, strict=True):
            own = rows[places.clamp_min(0)]  # [U, G, J, K]
            own = (own.flatten(1, 2) @ matrices[owners]).view_as(own)
            out[places[places >= 0]] = own[places >= 0]
        return out

    def shares(self, scores: Tensor) -> Tensor:
        """[N, L] the softmax, 0 for groups without a target."""
        return scores.softmax(-1) * self.target.sum(-1, keepdim=True)

    def first_basis(self, shared: Tensor, weights: Tensor, rank: int) -> Tensor:
        """[K, V] the directions in which the users' gradients at θ₀ [1, V] differ most."""
        scores = self.rows(shared)[..., 0] @ self.coding.T + self.side @ weights
        residual = self.target - self.shares(scores)
        gradients, number = [], 0
        asked = torch.linspace(0, self.number - 1, min(self.number, START_USERS)).long()
        for places in self.chunks:
            some = asked[(asked >= number) & (asked < number + len(places))] - number
            number, places = number + len(places), places[some]
            index = places.clamp_min(0)
            own = residual[index] * (places >= 0)[..., None]
            gradients.append(self.interaction.outer(self.x[self.text[index]], own))
        some = torch.cat(gradients)
        _, _, directions = torch.linalg.svd(some - some.mean(0), full_matrices=False)
        spread = self.rows(directions[:rank]).square().mean((0, 1)).sqrt().clamp_min(1e-6)
        out: Tensor = START / spread[:, None] * directions[:rank]
        return out

    def expected(self, table: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """E step: the users' modes [U, K] and covariances [U, K, K]."""
        rank = len(table) - 1
        rows = self.rows(table)
        base = rows[..., 0] @ self.coding.T + self.side @ weights
        modes = torch.zeros(self.number, rank)
        covariance = torch.zeros(self.number, rank, rank)
        for places, owners in zip(self.chunks, self.owners, strict=True):
            index = places.clamp_min(0)
            own = torch.einsum("ugjk,lj->uglk", rows[index][..., 1:], self.coding)
            target = self.target[index] * (places >= 0)[..., None]
            mask = (places >= 0)[..., None].expand_as(target)
            modes[owners], covariance[owners] = posterior(own, base[index], target, mask)
        return modes, covariance


class _MStep(NamedTuple):
    """The M step's problem in v: a table [K + 1, V] of θ₀ and S, then the weights [E]."""

    records: _Records
    shape: torch.Size  # of the table
    factor: Tensor  # [N, 1, K + 1] 1 and the mode of the group's user
    spread: Tensor  # [U, K, K] the covariance of each user
    hessian: Tensor  # [N, J, J] of the losses by the codes' scores
    ridge: Tensor  # [·] on each number of v

    def dot(self, v: Tensor) -> Tensor:
        records, size = self.records, self.shape.numel()
        codes = (records.rows(v[0, :size].view(self.shape)) * self.factor).sum(-1)
        return (codes @ records.coding.T + records.side @ v[0, size:])[None]

    def outer(self, r: Tensor) -> Tensor:
        records = self.records
        by_table = records.back((r[0] @ records.coding)[..., None] * self.factor)
        by_side = torch.einsum("nle,nl->e", records.side, r[0])
        return torch.cat([by_table.flatten(), by_side])[None]

    def prior(self, v: Tensor) -> Tensor:
        """The ridges, and what the users' covariances add, as a product with v."""
        records, size = self.records, self.shape.numel()
        rows = records.rows(v[0, :size].view(self.shape)[1:])
        out = self.ridge * v
        spread = records.by_user(self.hessian @ rows, self.spread)
        out[0, self.shape[1] : size] += records.back(spread).flatten()
        return out

    def diagonal(self, shares: Tensor) -> Tensor:
        """The diagonal of the Hessian."""
        records, second = self.records, self.factor[:, 0].square()
        second[:, 1:] += self.spread.diagonal(dim1=1, dim2=2)[records.user]
        of_codes = self.hessian.diagonal(dim1=1, dim2=2)[..., None] * second[:, None]
        side = records.side
        centred = side - (shares[..., None] * side).sum(1, keepdim=True)
        of_side = (shares[..., None] * centred.square()).sum((0, 1))
        of_table = records.back(of_codes, squared=True).flatten()
        return torch.cat([of_table, of_side]) + self.ridge


def _maximised(
    records: _Records, table: Tensor, weights: Tensor, posteriors: Posteriors, ridge: Tensor
) -> tuple[Tensor, Tensor]:
    """The table and the weights after an M step, in coordinates in which the Hessian's diagonal is
    about 1.
    """
    (modes, covariance), user, coding = posteriors, records.user, records.coding
    factor = torch.cat([torch.ones(len(modes), 1), modes], 1)[user][:, None]
    none = torch.zeros(len(user), records.columns, records.columns)
    step = _MStep(records, table.shape, factor, covariance, none, ridge)
    start = torch.cat([table.flatten(), weights])[None]
    shares = records.shares(step.dot(start)[0])
    middle = shares @ coding
    second = torch.einsum("nl,lj,li->nji", shares, coding, coding)
    step = step._replace(hessian=second - middle[:, :, None] * middle[:, None])
    scale = step.diagonal(shares).rsqrt()
    target = records.target[None]
    problem = Problem(
        dot=lambda v: step.dot(v * scale),
        outer=lambda r: step.outer(r) * scale,
        size=start.shape[1],
        offset=torch.zeros_like(target),
        target=target,
        mask=torch.ones_like(target, dtype=torch.bool),
        loss="listwise",
    )
    solve = partial(newton_cg, start=start / scale, steps=NEWTON_STEPS, products=PRODUCTS)
    v = solve(problem, lambda v: step.prior(v * scale) * scale)[0] * scale
    return v[: table.numel()].view_as(table), v[table.numel() :]


def posterior(rows: Tensor, offset: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Modes [U, K] and Laplace covariances [U, K, K] of coordinates a ~ N(0, I) with features
    `rows` [U, G, L, K] in a listwise loss; offset, target and mask [U, G, L].
    """

    def dot(a: Tensor) -> Tensor:
        return torch.einsum("uglk,uk->ugl", rows, a)

    def outer(r: Tensor) -> Tensor:
        return torch.einsum("uglk,ugl->uk", rows, r)

    problem = Problem(dot, outer, rows.shape[-1], offset, target, mask, "listwise")
    modes = newton_cg(problem, 1.0, steps=10, tolerance=1e-3)
    mass = target.sum(-1, keepdim=True)
    share = (offset + dot(modes)).masked_fill(~mask, -1e30).softmax(-1) * mask
    weighted = (share * mass)[..., None] * rows
    middle = torch.einsum("ugl,uglk->ugk", share, rows)
    hessian = torch.einsum("uglk,uglm->ukm", weighted, rows)
    hessian = hessian - torch.einsum("ugk,ugm->ukm", middle * mass, middle)
    return modes, torch.linalg.inv(hessian + torch.eye(rows.shape[-1]))
