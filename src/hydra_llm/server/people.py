"""Users at hand: their records, and their heads in the bundle's scorers, true to the store at every request.

A request asks the store for one number, the user's version; where it is the one that is at hand, nothing is read. Other processes'
writes are so seen at the next request. The least recently asked users make room. Knows no HTTP and no LLM.

Everything here runs in the one thread that scores (together.py): a head never changes under a score.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hydra_llm.bundle import Bundle
from hydra_llm.store.store import Store
from hydra_llm.store.values import Head
from hydra_llm.types import Record

MOST_MISSING = 24
"""Texts that a request may wait for: a few new records, not a whole history."""


@dataclass(frozen=True, slots=True)
class Person:
    """One user as of a version."""

    name: str
    version: int
    records: tuple[Record, ...]
    """Oldest first."""
    heads: frozenset[str] = frozenset()
    """The scorers in which this user has a head."""


class People:
    """A store's users, those who asked last in memory."""

    def __init__(self, store: Store, bundle: Bundle | None, size: int):
        self._store, self._bundle, self._size = store, bundle, size
        self._at_hand: OrderedDict[str, Person] = OrderedDict()
        self._warm: dict[str, int] = {}
        self._scorers = bundle.scorers if bundle is not None else {}

    def get(self, name: str, version: int | None) -> Person | None:
        """The user as of at least `version`; None for one who is not there."""
        if version is None:
            self.drop(name)
            return None
        person = self._at_hand.get(name)
        if person is None or person.version < version:
            person = self._read(name)
        if person is not None:
            self._at_hand.move_to_end(name)
        return person

    def drop(self, name: str) -> None:
        """Let go of a user."""
        self._warm.pop(name, None)
        if self._at_hand.pop(name, None) is None:
            return
        for scorer in self._scorers.values():
            if name in scorer.users:
                scorer.forget(name)

    def is_warm(self, person: Person, records: Sequence[Record]) -> bool:
        """Whether these records have been encoded, so that scoring need not wait for that."""
        if self._bundle is None or self._bundle.settings.features != "tower" or self._warm.get(person.name) == person.version:
            return True
        warm = self._bundle.store.missing(texts_of(records)) <= MOST_MISSING
        if warm:
            self._warm[person.name] = person.version
        return warm

    def __len__(self) -> int:
        return len(self._at_hand)

    def _read(self, name: str) -> Person | None:
        self.drop(name)
        version, records = self._store.records(name)
        if version is None:
            return None
        heads = self._put_heads(name) if self._bundle else frozenset()
        person = Person(name, version, tuple(records), heads)
        self._at_hand[name] = person
        while len(self._at_hand) > self._size:
            self.drop(next(iter(self._at_hand)))
        return person

    def _put_heads(self, name: str) -> frozenset[str]:
        assert self._bundle is not None
        found = self._store.heads(name, self._bundle.weights)
        for scorer_name, head in found.items():
            if scorer_name in self._scorers:
                self._scorers[scorer_name].put_head(name, as_numbers(head), head.known)
        return frozenset(found) & frozenset(self._scorers)


def as_numbers(head: Head) -> torch.Tensor:
    """A kept head as the scorer takes it."""
    return torch.from_numpy(np.frombuffer(head.delta, "<f4").astype(np.float32))


def as_head(numbers: torch.Tensor, known: int) -> Head:
    """The inverse of `as_numbers`."""
    return Head(known, numbers.detach().numpy().astype("<f4").tobytes())


def texts_of(records: Sequence[Record]) -> list[str]:
    """Every text that is kept of records, and of which features may have been."""
    return [text for record in records for text in (record.input, record.output, f"{record.input} → {record.output}")]
