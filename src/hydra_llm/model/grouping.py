"""From texts to groups of vectors: the one way in which scoring and learning see a case.

Letters: G groups, C candidates, D width of the encoder, E evidence. Knows no users and no tasks.
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
    evidence: Sequence[Sequence[Sequence[float]] | NDArray[np.floating]],
) -> Groups:
    """G queries with their candidates' texts and evidence, padded to the longest group. Each
    distinct text is encoded once.
    """
    width = max((len(texts) for texts in rights), default=0)
    mask = torch.tensor(
        [[c < len(texts) for c in range(width)] for texts in rights], dtype=torch.bool
    ).view(len(rights), width)
    columns = np.shape(evidence[0])[-1] if len(evidence) and len(evidence[0]) else 0
    known = torch.zeros(len(rights), width, columns)
    if len(rights):
        known[mask] = torch.tensor(
            np.concatenate([np.asarray(e, dtype=np.float32) for e in evidence])
        )
    left, right = interaction.encode(store, lefts, rights)
    return Groups(left, None if right is None else _spread(right, mask), known, mask)


def _spread(vectors: np.ndarray, mask: torch.Tensor) -> torch.Tensor:
    """Rows [B, D] into their places [G, C, D]; zeros elsewhere."""
    out = torch.zeros(*mask.shape, vectors.shape[-1])
    out[mask] = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))
    return out
