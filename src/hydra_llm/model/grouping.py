"""From texts to groups of vectors: the one way in which scoring and learning see a case.

Letters: G groups, C candidates, D width of the encoder, E side features. Knows no users and no
tasks.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.interactions import Groups, Interaction


def make_groups(
    store: FeatureCache,
    interaction: Interaction,
    lefts: Sequence[str],
    rights: Sequence[Sequence[str]],
    side_features: Sequence[Sequence[Sequence[float]] | NDArray[np.floating]],
) -> Groups:
    """G queries with padded candidates and side features; each distinct text is encoded once."""
    counts = torch.tensor([len(texts) for texts in rights], dtype=torch.long)
    mask = torch.arange(max(counts.tolist(), default=0)) < counts[:, None]
    rows = [np.asarray(each, dtype=np.float32) for each in side_features]
    side = _padded(np.concatenate(rows) if rows else np.zeros((0, 0)), mask)
    left, right = interaction.encode(store, lefts, rights)
    return Groups(left, None if right is None else _padded(right, mask), side, mask)


def _padded(rows: np.ndarray, mask: torch.Tensor) -> torch.Tensor:
    """Rows [B, D] in their places [G, C, D]; zeros elsewhere."""
    out = torch.zeros(*mask.shape, rows.shape[-1])
    out[mask] = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))
    return out
