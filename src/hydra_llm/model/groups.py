"""Groups of pairs as tensors: what interactions make features of; vectors found among known ones.
Knows no texts.

Letters: G groups, C candidates, D width of the encoder, E side features, T distinct texts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Groups:
    """G groups of up to C candidates, padded. Queries of one text may share a row of `left`."""

    left: Tensor  # [G, D] the queries' vectors; with `text` [T, D], one row for each text
    right: Tensor | None  # [G, C, D] of candidates (tower) or pairs (cross); None: label features
    side_features: Tensor  # [G, C, E] what is known of each pair beside its text
    mask: Tensor  # [G, C] True where there is a candidate
    target: Tensor | None = None  # [G, C] a distribution over the group, or (binary) 0 to 1 each
    text: Tensor | None = None  # [G] each query's row of `left`; None: its own place

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, index: Tensor | slice | list[int]) -> "Groups":
        right = None if self.right is None else self.right[index]
        target = None if self.target is None else self.target[index]
        text = None if self.text is None else self.text[index]
        left = self.left[index] if text is None else self.left
        side, mask = self.side_features[index], self.mask[index]
        return Groups(left, right, side, mask, target, text)

    def of_left(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """[G, ...] a function of vectors [·, D], row by row; once for each text where texts are
        fewer than groups.
        """
        if self.text is None:
            return function(self.left)
        if len(self.left) > len(self.text):
            return function(self.left[self.text])
        return function(self.left)[self.text]

    def distinct(self) -> tuple["Groups", Tensor]:
        """The queries, each text once where texts are shared, and the place [G] of each group's;
        for what only queries count in.
        """
        if self.text is None:
            return self, torch.arange(len(self.mask))
        return Groups(self.left, None, self.side_features[:0], self.mask[:0]), self.text


SAME_VECTOR = 1e-4  # vectors of one text in two batches differ by rounding alone
SAME_ROUNDED = 0.01  # where the encoder computes with bfloat16


def places_among(rows: Tensor, known: Tensor) -> Tensor:
    """[G] the place of each row [G, D] among `known` [T, D], −1 where it is none of them.

    Both are compared along one fixed direction first, so that no [G, T] table is made.
    """
    direction = torch.cos(torch.arange(rows.shape[1], dtype=torch.float64) ** 2)
    keys, order = (known.double() @ direction).sort()
    after = torch.searchsorted(keys, rows.double() @ direction)
    places = torch.full((len(rows),), -1)
    for near in (after - 1, after):
        candidate = order[near.clamp(0, len(known) - 1)]
        same = (rows - known[candidate]).abs().amax(-1) < SAME_VECTOR
        places = torch.where(same, candidate, places)
    return places


def places_near(rows: Tensor, known: Tensor) -> Tensor:
    """`places_among` of vectors in bfloat16, of which rounding moves a component by .003 at most;
    of different texts of the set `opinion` one differs by .024 or more.
    """
    nearest = (rows @ known.T).argmax(-1)
    same = (rows - known[nearest]).abs().amax(-1) < SAME_ROUNDED
    return torch.where(same, nearest, -1)
