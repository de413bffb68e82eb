"""Users at hand: their records, and their heads in the bundle's scorers, true to the store at every
request.

A request asks the store for one number, the user's version; where it is the one that is at hand,
nothing is read. Other processes' writes are so seen at the next request. The least recently asked
users make room. Knows no HTTP and no LLM.

`load` reads the store, in any thread; what changes heads (`seat`, `drop`) runs in the one thread
that scores (together.py), so that a head never changes under a score, and no score ever waits for
the store.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hydra_llm.bundle import Bundle
from hydra_llm.store.store import Store
from hydra_llm.store.values import StoredHead
from hydra_llm.types import Record, as_one_text

MOST_MISSING = 24
"""Texts that a request may wait for: a few new records, not a whole history."""


@dataclass(frozen=True, slots=True)
class UserSnapshot:
    """One user as of a version."""

    name: str
    version: int
    records: tuple[Record, ...]
    """Oldest first."""
    heads: Mapping[str, StoredHead]
    """By scorer."""


class UserCache:
    """A store's users, those who asked last in memory."""

    def __init__(self, store: Store, bundle: Bundle | None, size: int):
        self._store, self._bundle, self._size = store, bundle, size
        self._at_hand: OrderedDict[str, UserSnapshot] = OrderedDict()
        self._warm: dict[str, int] = {}
        self._scorers = bundle.scorers if bundle is not None else {}

    def at_hand(self, name: str, version: int) -> UserSnapshot | None:
        """The user as of `version`, where that is in memory; no later one either: it may be of a
        user who was deleted since.
        """
        person = self._at_hand.get(name)
        return person if person is not None and person.version == version else None

    def load(self, name: str) -> UserSnapshot | None:
        """The user as the store has it; None for one who is not there."""
        version, records = self._store.records(name)
        if version is None:
            return None
        heads = self._store.heads(name, self._bundle.weights) if self._bundle is not None else {}
        return UserSnapshot(
            name,
            version,
            tuple(records),
            {scorer: head for scorer, head in heads.items() if scorer in self._scorers},
        )

    def seat(self, person: UserSnapshot) -> None:
        """Have this user's heads in the scorers, as of this version."""
        if self.at_hand(person.name, person.version) is None:
            self.drop(person.name)
            for scorer, head in person.heads.items():
                self._scorers[scorer].put_head(person.name, as_numbers(head), head.known)
            self._at_hand[person.name] = person
        self._at_hand.move_to_end(person.name)
        while len(self._at_hand) > self._size:
            self.drop(next(iter(self._at_hand)))

    def drop(self, name: str) -> None:
        """Let go of a user."""
        self._warm.pop(name, None)
        if self._at_hand.pop(name, None) is None:
            return
        for scorer in self._scorers.values():
            if name in scorer.users:
                scorer.forget(name)

    def is_warm(self, person: UserSnapshot, records: Sequence[Record]) -> bool:
        """Whether these records have been encoded, so that scoring need not wait for that."""
        if (
            self._bundle is None
            or self._bundle.settings.features != "tower"
            or self._warm.get(person.name) == person.version
        ):
            return True
        warm = self._bundle.store.missing(texts_of(records)) <= MOST_MISSING
        if warm:
            self._warm[person.name] = person.version
        return warm

    def __len__(self) -> int:
        return len(self._at_hand)


def as_numbers(head: StoredHead) -> torch.Tensor:
    """A kept head as the scorer takes it."""
    return torch.from_numpy(np.frombuffer(head.delta, "<f4").astype(np.float32))


def as_head(numbers: torch.Tensor, known: int) -> StoredHead:
    """The inverse of `as_numbers`."""
    return StoredHead(known, -math.inf, numbers.detach().numpy().astype("<f4").tobytes())


def texts_of(records: Sequence[Record]) -> list[str]:
    """Every text that is kept of records, and of which features may have been."""
    return [
        text
        for record in records
        for text in (record.input, record.output, as_one_text(record.input, record.output))
    ]
