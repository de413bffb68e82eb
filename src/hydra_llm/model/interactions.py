"""How vectors of texts become the features φ of a pair (DESIGN 4).

Three ways behind one interface. A group is one query with its C candidates (or C retrieved
records).
    tower   [q, r, q·r, |q − r|] through one shared layer; each text is encoded once
    cross   the encoder reads the pair as one text, as in the paper (section 3.2)
    label   for a closed set of labels: one block of weights per label on the query's vector
A head is a vector v of length `size`; `dot` scores with it and `outer` is the transpose of `dot`,
so that a solver needs neither the kind of features nor, for labels, the full φ (which would be
mostly zeros).

Letters: U users, G groups of a user, C candidates, D width of the encoder, H width of φ, V length
of a head's vector. Knows no users' names, no texts and no tasks.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Groups:
    """G groups of up to C candidates, padded."""

    left: Tensor
    """[G, D] the queries' vectors."""
    right: Tensor | None
    """[G, C, D] the candidates' vectors (tower) or the pairs' (cross); None for label features."""
    evidence: Tensor
    """[G, C, E] what is known of each pair beside its text."""
    mask: Tensor
    """[G, C] True where there is a candidate."""
    target: Tensor | None = None
    """[G, C] what each candidate should get; a distribution over the group, or 0 to 1 each for the
    binary loss.
    """

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, index: Tensor | slice | list[int]) -> "Groups":
        right = None if self.right is None else self.right[index]
        target = None if self.target is None else self.target[index]
        return Groups(self.left[index], right, self.evidence[index], self.mask[index], target)

    def with_target(self, target: Tensor) -> "Groups":
        return replace(self, target=target)


class PairInteraction(nn.Module):
    """φ of shape [G, C, H] stands explicitly; `size` is H. Base of tower and cross."""

    kind: str
    size: int

    def forward(self, groups: Groups) -> Tensor:
        """φ: [G, C, H]."""
        raise NotImplementedError

    def prepare(self, groups: Groups) -> None:
        """Set what is not learned by gradient (scales, principal directions) from the training
        groups.
        """

    @staticmethod
    def dot(x: Tensor, v: Tensor) -> Tensor:
        """x [U, G, C, H], v [U, H] → scores [U, G, C]."""
        return torch.einsum("ugch,uh->ugc", x, v)

    @staticmethod
    def outer(x: Tensor, r: Tensor) -> Tensor:
        """x [U, G, C, H], r [U, G, C] → [U, H], the transpose of `dot`."""
        return torch.einsum("ugch,ugc->uh", x, r)

    def config(self) -> dict[str, Any]:
        raise NotImplementedError


class Tower(PairInteraction):
    """[q, r, q·r, |q − r|] through a shared layer with tanh (DESIGN 4: `tower`)."""

    kind = "tower"

    def __init__(self, width: int, size: int):
        super().__init__()
        self.width, self.size = width, size
        self.layer = nn.Linear(4 * width, size)
        self.register_buffer("mean", torch.zeros(4 * width))

    def forward(self, groups: Groups) -> Tensor:
        return torch.tanh(self.layer(self._joined(groups) - self.mean))

    def prepare(self, groups: Groups) -> None:
        """Start the layer at the principal directions of the training pairs, each with standard
        deviation 1/2.
        """
        rows = self._joined(groups)[groups.mask]
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:20_000]]
        self.mean = rows.mean(0)
        centred = rows - self.mean
        values, directions = principal(centred.T @ centred / max(1, len(rows) - 1), self.size)
        with torch.no_grad():
            self.layer.bias.zero_()
            self.layer.weight[: len(values)] = directions / (2 * values[:, None].sqrt())

    @staticmethod
    def _joined(groups: Groups) -> Tensor:
        assert groups.right is not None
        q, r = groups.left[:, None].expand_as(groups.right), groups.right
        return torch.cat([q, r, q * r, (q - r).abs()], -1)

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "width": self.width, "size": self.size}


class Cross(PairInteraction):
    """The pair's own vector from the encoder, scaled to unit variance over the training pairs
    (DESIGN 4: `cross`).
    """

    kind = "cross"

    def __init__(self, width: int):
        super().__init__()
        self.width = self.size = width
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, groups: Groups) -> Tensor:
        assert groups.right is not None
        return (groups.right - self.mean) * self.scale

    def prepare(self, groups: Groups) -> None:
        assert groups.right is not None
        rows = groups.right[groups.mask]
        self.mean = rows.mean(0)
        self.scale = 0.5 / (rows - self.mean).std().clamp_min(1e-6)

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "width": self.width}


class LabelBilinear(nn.Module):
    """One block of weights per label on the query's vector: φ(q, a) = e_a ⊗ [P(q − μ), 1] (DESIGN
    5, closed label sets).

    P keeps the `rank` principal directions of the training queries: a head has `labels`·(rank + 1)
    numbers.
    """

    kind = "label"
    project: Tensor

    def __init__(self, width: int, labels: int, rank: int):
        super().__init__()
        self.width, self.labels, self.rank = width, labels, min(rank, width)
        self.size = labels * (self.rank + 1)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("project", torch.zeros(self.rank, width))

    def forward(self, groups: Groups) -> Tensor:
        """z = [P(q − μ), 1]: [G, rank + 1], the part of φ that is not zero."""
        z = (groups.left - self.mean) @ self.project.T
        return torch.cat([z, torch.ones_like(z[:, :1])], -1)

    def prepare(self, groups: Groups) -> None:
        centred = groups.left - groups.left.mean(0)
        self.mean = groups.left.mean(0)
        _, directions = principal(centred.T @ centred, self.rank)
        # A unit vector of MiniLM has components of about 1/sqrt(D): times sqrt(D)/5, one direction
        # moves a score as much as the constant
        self.project = torch.zeros_like(self.project)
        self.project[: len(directions)] = directions * (self.width**0.5 / 5)

    def dot(self, x: Tensor, v: Tensor) -> Tensor:
        """x [U, G, rank + 1], v [U, V] → scores [U, G, labels]."""
        return torch.einsum("ugd,uld->ugl", x, v.view(len(v), self.labels, self.rank + 1))

    def outer(self, x: Tensor, r: Tensor) -> Tensor:
        """x [U, G, rank + 1], r [U, G, labels] → [U, V], the transpose of `dot`."""
        return torch.einsum("ugd,ugl->uld", x, r).flatten(1)

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, "width": self.width, "labels": self.labels, "rank": self.rank}


Interaction = Tower | Cross | LabelBilinear


def principal(covariance: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues [K] of a covariance [D, D] and their directions [K, D], K ≤ most;
    none along which nothing varies.

    A direction's sign is arbitrary and differs between processors: the component that is farthest
    from 0 is positive here, so that training that starts at random is the same on all of them.
    """
    values, vectors = torch.linalg.eigh(covariance)
    count = min(most, int((values > 1e-6 * values[-1].clamp_min(1e-12)).sum()))
    values, directions = values.flip(0)[:count], vectors.T.flip(0)[:count]
    return values, directions * directions.gather(
        1, directions.abs().argmax(1, keepdim=True)
    ).sign()


def make_interaction(config: dict[str, Any]) -> Interaction:
    """The inverse of `config()`: an empty interaction of the same shape."""
    kinds: dict[str, type[Tower | Cross | LabelBilinear]] = {
        "tower": Tower,
        "cross": Cross,
        "label": LabelBilinear,
    }
    return kinds[config["kind"]](**{key: value for key, value in config.items() if key != "kind"})


__all__ = [
    "Cross",
    "Groups",
    "Interaction",
    "LabelBilinear",
    "PairInteraction",
    "Tower",
    "make_interaction",
]
