"""From texts to groups of vectors, and from these to the features φ of a pair.

    tower   bi-encoder: [q, r, q·r, |q − r|] through one shared layer; each text is encoded once
    cross   cross-encoder: the encoder reads the pair as one text, as in the paper (section 3.2)
    label   label-bilinear, for a closed set of labels: one block of weights per label on the
            query's vector
A head is a vector v of length `size`; `dot` scores with it and `outer` is the transpose of `dot`,
so that a solver needs neither the kind of features nor, for labels, the full φ (mostly zeros).

Letters: U users, G groups of a user, C candidates (or records), D width of the encoder, E side
features, H width of φ, V length of a head's vector, K rank, N kept pairs. Knows no tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.laplace import mean_fisher

Texts = Sequence[str]
Encoded = tuple[Tensor, np.ndarray | None]


@dataclass(frozen=True, slots=True)
class Groups:
    """G groups of up to C candidates, padded."""

    left: Tensor  # [G, D] the queries' vectors
    right: Tensor | None  # [G, C, D] of candidates (tower) or pairs (cross); None: label features
    side_features: Tensor  # [G, C, E] what is known of each pair beside its text
    mask: Tensor  # [G, C] True where there is a candidate
    target: Tensor | None = None  # [G, C] a distribution over the group, or (binary) 0 to 1 each

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, index: Tensor | slice | list[int]) -> "Groups":
        right = None if self.right is None else self.right[index]
        target = None if self.target is None else self.target[index]
        return Groups(self.left[index], right, self.side_features[index], self.mask[index], target)


class Interaction(nn.Module):
    """Features of G groups as `x`; the base class has explicit ones, φ [G, C, H]."""

    kind: ClassVar[str]
    shape: ClassVar[tuple[str, ...]]  # names of what `__init__` takes
    reads_pairs: ClassVar[bool] = False  # the encoder reads query and candidate as one text
    by_label: ClassVar[bool] = False  # the candidates are always the task's labels, in their order
    trainable: ClassVar[bool] = False  # it has weights that can be trained by gradient
    size: int  # V

    def forward(self, groups: Groups) -> Tensor:
        """x [G, C, H]."""
        raise NotImplementedError

    def encode(self, store: FeatureCache, lefts: Texts, rights: Sequence[Texts]) -> Encoded:
        """Vectors of the queries [G, D] and, in a row, of all candidates or pairs [B, D]."""
        raise NotImplementedError

    def prepare(self, groups: Groups) -> None:
        """Set what is not learned by gradient (scales, principal directions)."""

    def config(self) -> dict[str, Any]:
        """What `make_interaction` needs."""
        return {"kind": self.kind, **{name: getattr(self, name) for name in self.shape}}

    def numbers(self, groups: Groups) -> int:
        """How many numbers x takes for one group."""
        return self.size * groups.mask.shape[1]

    def dot(self, x: Tensor, v: Tensor) -> Tensor:
        """x [U, G, C, H], v [U, H] → scores [U, G, C]."""
        return torch.einsum("ugch,uh->ugc", x, v)

    def outer(self, x: Tensor, r: Tensor) -> Tensor:
        """x [U, G, C, H], r [U, G, C] → [U, H], the transpose of `dot`."""
        return torch.einsum("ugch,ugc->uh", x, r)

    def explicit(self, x: Tensor) -> Tensor | None:
        """φ [G, C, V]; None where it would be mostly zeros."""
        return x

    def on_basis(self, x: Tensor, basis: Tensor) -> Tensor:
        """φ on a basis [K, V]: [G, C, K]."""
        return x @ basis.T

    def fisher(self, x: Tensor, share: Tensor, binary: bool) -> tuple[Tensor, Tensor]:
        """The two factors of heads' mean Fisher information; `share` as in `mean_fisher`."""
        return torch.ones(1, 1), mean_fisher(x, share, binary)

    def keys(self, x: Tensor, residual: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a kernel compares: keys [N, D] with their residuals [N, R] and groups [N]."""
        group = torch.arange(len(x))[:, None].expand_as(mask)
        return x[mask], residual[mask][:, None], group[mask]


class Tower(Interaction):
    """Bi-encoder: [q, r, q·r, |q − r|] through a shared layer with tanh."""

    kind, shape = "tower", ("width", "size")
    trainable = True

    def __init__(self, width: int, size: int):
        super().__init__()
        self.width, self.size = width, size
        self.layer = nn.Linear(4 * width, size)
        self.register_buffer("mean", torch.zeros(4 * width))

    def forward(self, groups: Groups) -> Tensor:
        return torch.tanh(self.layer(self._joined(groups) - self.mean))

    def encode(self, store: FeatureCache, lefts: Texts, rights: Sequence[Texts]) -> Encoded:
        left = torch.from_numpy(store.texts(list(lefts)))
        return left, store.texts([text for texts in rights for text in texts])

    def prepare(self, groups: Groups) -> None:
        """Start the layer at the pairs' principal directions, each with standard deviation 1/2."""
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


class Cross(Interaction):
    """Cross-encoder: the pair's own vector, scaled to unit variance over the training pairs."""

    kind, shape = "cross", ("width",)
    reads_pairs = True

    def __init__(self, width: int):
        super().__init__()
        self.width = self.size = width
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, groups: Groups) -> Tensor:
        assert groups.right is not None
        return (groups.right - self.mean) * self.scale

    def encode(self, store: FeatureCache, lefts: Texts, rights: Sequence[Texts]) -> Encoded:
        left = [query for query, texts in zip(lefts, rights, strict=True) for _ in texts]
        right = [text for texts in rights for text in texts]
        return torch.zeros(len(lefts), 0), store.pairs(left, right)

    def prepare(self, groups: Groups) -> None:
        assert groups.right is not None
        rows = groups.right[groups.mask]
        self.mean = rows.mean(0)
        self.scale = 0.5 / (rows - self.mean).std().clamp_min(1e-6)


class LabelBilinear(Interaction):
    """One block of weights per label on the query's vector: φ(q, a) = e_a ⊗ [P(q − μ), 1].

    P keeps the `rank` principal directions of the training queries: V = labels · (rank + 1).
    """

    kind, shape = "label", ("width", "labels", "rank")
    by_label = True
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

    def encode(self, store: FeatureCache, lefts: Texts, rights: Sequence[Texts]) -> Encoded:
        return torch.from_numpy(store.texts(list(lefts))), None

    def prepare(self, groups: Groups) -> None:
        self.mean = groups.left.mean(0)
        centred = groups.left - self.mean
        _, directions = principal(centred.T @ centred, self.rank)
        # A component of a unit vector is about 1/sqrt(D): times sqrt(D)/5, one direction moves a
        # score as much as the constant.
        self.project = torch.zeros_like(self.project)
        self.project[: len(directions)] = directions * (self.width**0.5 / 5)

    def numbers(self, groups: Groups) -> int:
        return groups.left.shape[1] * groups.mask.shape[1]

    def dot(self, x: Tensor, v: Tensor) -> Tensor:
        """x [U, G, rank + 1], v [U, V] → scores [U, G, labels]."""
        return torch.einsum("ugd,uld->ugl", x, v.view(len(v), self.labels, self.rank + 1))

    def outer(self, x: Tensor, r: Tensor) -> Tensor:
        """x [U, G, rank + 1], r [U, G, labels] → [U, V], the transpose of `dot`."""
        return torch.einsum("ugd,ugl->uld", x, r).flatten(1)

    def explicit(self, x: Tensor) -> Tensor | None:
        return None

    def on_basis(self, x: Tensor, basis: Tensor) -> Tensor:
        return torch.einsum("gd,kld->glk", x, basis.view(-1, self.labels, self.rank + 1))

    def fisher(self, x: Tensor, share: Tensor, binary: bool) -> tuple[Tensor, Tensor]:
        between = 0 if binary else share.T @ share / len(share)
        return share.mean(0).diag() - between, x.T @ x / len(x)

    def keys(self, x: Tensor, residual: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, residual, torch.arange(len(x))


def principal(covariance: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues [K] of a covariance [D, D] and their directions [K, D], K ≤ most,
    without those along which nothing varies.

    A direction's sign differs between processors: here the component farthest from 0 is positive,
    so that training that starts at random is the same on all of them.
    """
    values, vectors = torch.linalg.eigh(covariance)
    count = min(most, int((values > 1e-6 * values[-1].clamp_min(1e-12)).sum()))
    values, directions = values.flip(0)[:count], vectors.T.flip(0)[:count]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return values, directions * largest.sign()


KINDS: dict[str, type[Interaction]] = {kind.kind: kind for kind in (Tower, Cross, LabelBilinear)}


def make_interaction(config: dict[str, Any]) -> Interaction:
    """The inverse of `config()`: an empty interaction of the same shape."""
    return KINDS[config["kind"]](**{key: config[key] for key in config if key != "kind"})


def make_groups(
    store: FeatureCache,
    interaction: Interaction,
    lefts: Texts,
    rights: Sequence[Texts],
    side_features: Sequence[Sequence[Sequence[float]] | NDArray[np.floating]],
) -> Groups:
    """G queries with padded candidates and side features; each distinct text is encoded once."""
    counts = torch.tensor([len(texts) for texts in rights], dtype=torch.long)
    mask = torch.arange(max(counts.tolist(), default=0)) < counts[:, None]
    rows = [np.asarray(columns, dtype=np.float32) for columns in side_features]
    side = _padded(np.concatenate(rows) if rows else np.zeros((0, 0)), mask)
    left, right = interaction.encode(store, lefts, rights)
    return Groups(left, None if right is None else _padded(right, mask), side, mask)


def _padded(rows: np.ndarray, mask: Tensor) -> Tensor:
    """Rows [B, D] in their places [G, C, D]; zeros elsewhere."""
    out = torch.zeros(*mask.shape, rows.shape[-1])
    out[mask] = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))
    return out
