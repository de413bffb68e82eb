"""From texts to groups of vectors, and from these to the features φ of a pair.

    tower   bi-encoder: [q, r, q·r, |q − r|] through one shared layer; each text is encoded once
    cross   cross-encoder: the encoder reads the pair as one text, as in the paper (section 3.2)
    label   label-bilinear, for a closed set of labels: one block of weights per label (or per
            column of a coding of the labels) on the query's vector
A head is a vector v of length `size`; `dot` scores with it and `outer` is the transpose of `dot`,
so that a solver needs neither the kind of features nor, for labels, the full φ (mostly zeros).

Letters: U users, G groups of a user, C candidates (or records), D width of the encoder, E side
features, H width of φ, V length of a head's vector, K rank, N kept pairs, L labels, J columns of
their coding, T texts that recur. Knows no tasks.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.groups import Groups as Groups
from hydra_llm.model.groups import places_among, places_near
from hydra_llm.model.laplace import mean_fisher

Texts = Sequence[str]
Encoded = tuple[Tensor, np.ndarray | None]


class Interaction(nn.Module):
    """Features of G groups as `x`; the base class has explicit ones, φ [G, C, H]."""

    kind: ClassVar[str]
    shape: ClassVar[tuple[str, ...]]  # names of what `__init__` takes
    reads_pairs: ClassVar[bool] = False  # the encoder reads query and candidate as one text
    by_label: ClassVar[bool] = False  # the candidates are always the task's labels, in their order
    trainable: ClassVar[bool] = False  # it has weights that can be trained by gradient
    size: int  # V
    rounded = False  # whether vectors are, or were when it was learned, of bfloat16

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
        """How many numbers one group takes while x is made."""
        return self.size * groups.mask.shape[1]

    def dot(self, x: Tensor, v: Tensor) -> Tensor:
        """x [U, G, C, H], v [U, H] → scores [U, G, C]."""
        return torch.einsum("ugch,uh->ugc", x, v)

    def outer(self, x: Tensor, r: Tensor) -> Tensor:
        """x [U, G, C, H], r [U, G, C] → [U, H], the transpose of `dot`."""
        return torch.einsum("ugch,ugc->uh", x, r)

    @property
    def own_size(self) -> int:
        """How many numbers of one user `own_dot` takes: V, or fewer."""
        return self.size

    def own_dot(self, x: Tensor, v: Tensor) -> Tensor:
        """As `dot`, of what one user's own records can tell: v [U, own_size]."""
        return self.dot(x, v)

    def own_outer(self, x: Tensor, r: Tensor) -> Tensor:
        """The transpose of `own_dot`."""
        return self.outer(x, r)

    def explicit(self, x: Tensor) -> Tensor | None:
        """φ [G, C, V]; None where it would be mostly zeros."""
        return x

    def on_basis(self, x: Tensor, basis: Tensor) -> Tensor:
        """φ on a basis [K, V]: [G, C, K]."""
        return x @ basis.T

    def fisher(self, x: Tensor, share: Tensor, binary: bool) -> tuple[Tensor, Tensor]:
        """The two factors of the mean Fisher information of a head's `own_size` numbers; `share`
        as in `mean_fisher`.
        """
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

    def numbers(self, groups: Groups) -> int:
        return (4 * self.width + self.size) * groups.mask.shape[1]

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
    """Blocks of weights on the query's vector: φ(q, a) = C_a ⊗ [P(q − μ), 1, e_q].

    P keeps the `rank` principal directions of the training queries. C [L, J] codes the labels; with
    `codes` = 0 it is the identity, one block per label. e_q has a 1 at the place of q among the
    texts that many users have answered, `known`, and is 0 elsewhere; their effects are numbers that
    only all users together can tell. A head's vector holds J · (rank + 1) numbers, then T · J. One
    user's own numbers are those of the first `own_rank` directions and of the constant.
    """

    kind = "label"
    shape = ("width", "labels", "rank", "codes", "texts", "own_rank")
    by_label = True
    project: Tensor
    coding: Tensor | None
    known: Tensor | None

    def __init__(
        self, width: int, labels: int, rank: int, codes: int = 0, texts: int = 0, own_rank: int = 0
    ):
        super().__init__()
        self.width, self.labels, self.rank = width, labels, min(rank, width)
        self.codes, self.texts = codes, texts
        self.own_rank = min(own_rank or self.rank, self.rank)
        self.columns = codes or labels  # J
        self.dense = self.columns * (self.rank + 1)
        self.size = self.dense + texts * self.columns
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("project", torch.zeros(self.rank, width))
        self.register_buffer("coding", torch.zeros(labels, codes) if codes else None)
        self.register_buffer("known", torch.zeros(texts, width) if texts else None)

    @property
    def own_size(self) -> int:
        return self.columns * (self.own_rank + 1)

    def forward(self, groups: Groups) -> Tensor:
        """z = [P(q − μ), 1], the part of φ that is not zero, and with known texts the place of q
        among them, −1 for others: [G, rank + 1 (+ 1)].
        """
        return groups.of_left(self._projected)

    def _projected(self, left: Tensor) -> Tensor:
        return self.at_places(left, None if self.known is None else self.places_of(left))

    def places_of(self, left: Tensor) -> Tensor:
        """[G] the places of vectors [G, D] among the known texts, −1 for others."""
        assert self.known is not None
        return (places_near if self.rounded else places_among)(left, self.known)

    def at_places(self, left: Tensor, places: Tensor | None) -> Tensor:
        """As `forward`, of vectors [G, D] whose places [G] among the known texts are given."""
        z = (left - self.mean) @ self.project.T
        parts = [z, torch.ones_like(z[:, :1])]
        if places is not None:
            parts.append(places[:, None].to(z.dtype))
        return torch.cat(parts, -1)

    def encode(self, store: FeatureCache, lefts: Texts, rights: Sequence[Texts]) -> Encoded:
        return torch.from_numpy(store.texts(list(lefts))), None

    def prepare(self, groups: Groups) -> None:
        left, times = groups.left, torch.ones(len(groups.left), 1)  # how often each text is asked
        if groups.text is not None:
            times = torch.bincount(groups.text, minlength=len(left))[:, None].to(left.dtype)
        self.mean = (left * times).sum(0) / times.sum()
        centred = (left - self.mean) * times.sqrt()
        _, directions = principal(centred.T @ centred, self.rank)
        # A component of a unit vector is about 1/sqrt(D): times sqrt(D)/5, one direction moves a
        # score as much as the constant.
        directions = directions * (self.width**0.5 / 5)
        self.project = torch.zeros_like(self.project)
        if self.own_rank < self.rank:  # the first ones stand last, beside the constant
            self.project[self.rank - len(directions) :] = directions.flip(0)
        else:
            self.project[: len(directions)] = directions

    def numbers(self, groups: Groups) -> int:
        return groups.left.shape[1] + self.rank + groups.mask.shape[1]

    def dot(self, x: Tensor, v: Tensor) -> Tensor:
        """x [U, G, ...], v [U, V] → scores [U, G, L]."""
        scores = self._dense_dot(x[..., : self.rank + 1], v[:, : self.dense])
        if self.texts:
            effects = v[:, self.dense :].view(len(v), self.texts, self.columns)
            place, known = self._places(x)
            scores = scores + effects.gather(1, place.expand(*scores.shape)) * known
        return self._by_label(scores)

    def outer(self, x: Tensor, r: Tensor) -> Tensor:
        """x [U, G, ...], r [U, G, L] → [U, V], the transpose of `dot`."""
        r = self._by_code(r)
        dense = torch.einsum("ugd,ugj->ujd", x[..., : self.rank + 1], r).flatten(1)
        if not self.texts:
            return dense
        place, known = self._places(x)
        effects = r.new_zeros(len(r), self.texts, self.columns)
        effects.scatter_add_(1, place.expand(*r.shape), r * known)
        return torch.cat([dense, effects.flatten(1)], 1)

    def own_dot(self, x: Tensor, v: Tensor) -> Tensor:
        return self._by_label(self._dense_dot(self._own(x), v))

    def own_outer(self, x: Tensor, r: Tensor) -> Tensor:
        return torch.einsum("ugd,ugj->ujd", self._own(x), self._by_code(r)).flatten(1)

    def explicit(self, x: Tensor) -> Tensor | None:
        return None

    def on_basis(self, x: Tensor, basis: Tensor) -> Tensor:
        rows = self.code_rows(x, basis)
        return rows if self.coding is None else torch.einsum("gjk,lj->glk", rows, self.coding)

    def code_rows(self, x: Tensor, basis: Tensor) -> Tensor:
        """φ on a basis [K, V] before the coding of labels: [G, J, K]."""
        dense = basis[:, : self.dense].view(-1, self.columns, self.rank + 1)
        rows = torch.einsum("gd,kjd->gjk", x[:, : self.rank + 1], dense)
        if self.texts:
            effects = basis[:, self.dense :].view(-1, self.texts, self.columns)
            place, known = self._places(x)
            rows = rows + effects.permute(1, 2, 0)[place[:, 0]] * known[..., None]
        return rows

    def code_back(self, x: Tensor, r: Tensor) -> Tensor:
        """The transpose of `code_rows`: r [G, J, K] → [K, V]."""
        dense = torch.einsum("gd,gjk->kjd", x[:, : self.rank + 1], r).flatten(1)
        if not self.texts:
            return dense
        place, known = self._places(x)
        effects = r.new_zeros(self.texts, *r.shape[1:])
        effects.index_add_(0, place[:, 0], r * known[..., None])
        return torch.cat([dense, effects.permute(2, 0, 1).flatten(1)], 1)

    def fisher(self, x: Tensor, share: Tensor, binary: bool) -> tuple[Tensor, Tensor]:
        between = 0 if binary else share.T @ share / len(share)
        left, z = share.mean(0).diag() - between, self._own(x)
        if self.coding is not None:
            left = self.coding.T @ left @ self.coding
        return left, z.T @ z / len(x)

    def keys(self, x: Tensor, residual: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, residual, torch.arange(len(x))

    def _own(self, x: Tensor) -> Tensor:
        return x[..., self.rank - self.own_rank : self.rank + 1]

    def _dense_dot(self, z: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("ugd,ujd->ugj", z, v.view(len(v), self.columns, z.shape[-1]))

    def _places(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., 1] each text's place among the known ones, and 1 or 0 where it has none."""
        place = x[..., -1:]
        return place.clamp_min(0).long(), (place >= 0).to(x.dtype)

    def _by_label(self, scores: Tensor) -> Tensor:
        return scores if self.coding is None else scores @ self.coding.T

    def _by_code(self, r: Tensor) -> Tensor:
        return r if self.coding is None else r @ self.coding


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
    if not interaction.by_label:
        left, right = interaction.encode(store, lefts, rights)
        return Groups(left, None if right is None else _padded(right, mask), side, mask)
    place = {text: at for at, text in enumerate(dict.fromkeys(lefts))}
    text = torch.tensor([place[own] for own in lefts], dtype=torch.long)
    left, _ = interaction.encode(store, list(place), rights)
    return Groups(left, None, side, mask, text=text)


def _padded(rows: np.ndarray, mask: Tensor) -> Tensor:
    """Rows [B, D] in their places [G, C, D]; zeros elsewhere."""
    out = torch.zeros(*mask.shape, rows.shape[-1])
    out[mask] = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))
    return out
