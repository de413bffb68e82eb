"""Many users' heads in one array, as a bundle's weights hold them."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from hydra_llm.model.heads.base import Head


class HeadMatrix(Mapping[str, Head]):
    """User → head, views of one flat array; `ends` [U] says where each user's numbers end."""

    def __init__(
        self, users: Iterable[str], numbers: np.ndarray, ends: np.ndarray, meta: ArrayLike
    ):
        self._rows = {user: row for row, user in enumerate(users)}
        self._numbers, self._ends = numbers, ends
        self._meta = np.array(meta, dtype=np.float64).reshape(-1, 2)  # records and until
        numbers.flags.writeable = False

    @classmethod
    def of(cls, heads: Mapping[str, Head]) -> "HeadMatrix":
        """A copy of these heads in one array."""
        values = list(heads.values())
        empty = np.zeros(0, dtype=np.float32)
        numbers = np.concatenate([empty, *(head.numbers for head in values)])
        ends = np.cumsum([len(head.numbers) for head in values], dtype=np.int64)
        return cls(heads, numbers, ends, [(head.records, head.until) for head in values])

    def __getitem__(self, user: str) -> Head:
        row = self._rows[user]
        start = int(self._ends[row - 1]) if row else 0
        records, until = self._meta[row]
        return Head(self._numbers[start : int(self._ends[row])], int(records), float(until))

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    # ---- on disk: plain values and tensors

    def config(self) -> dict[str, Any]:
        """Users in the order of their rows, with what their heads were learned from."""
        known, untils = self._meta[:, 0].astype(int).tolist(), self._meta[:, 1].tolist()
        untils = [None if math.isinf(until) else until for until in untils]
        return {"users": list(self._rows), "known": known, "until": untils}

    def tensors(self) -> dict[str, Tensor]:
        """All numbers in a row, and where each user's end."""
        numbers = torch.from_numpy(self._numbers.copy())
        return {"heads.numbers": numbers, "heads.ends": torch.from_numpy(self._ends)}

    @classmethod
    def restore(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "HeadMatrix":
        """The inverse of `config` and `tensors`; KeyError or ValueError if they do not fit."""
        users, ends = config["users"], tensors["heads.ends"].numpy()
        numbers = tensors["heads.numbers"].numpy()
        untils = [-math.inf if until is None else until for until in config["until"]]
        meta = list(zip(config["known"], untils, strict=True))
        if len(users) != len(ends) or (len(ends) and int(ends[-1]) != len(numbers)):
            raise ValueError(f"{len(users)} users, {len(ends)} heads of {len(numbers)} numbers")
        return cls(users, numbers, ends, meta)
