"""What the store gives and takes, beside records. Knows no database."""

from dataclasses import dataclass
from typing import Any

from hydra_llm.errors import StoreError
from hydra_llm.types import Record


class Stale(StoreError):
    """Somebody else has changed the user since the version that the caller read: read again."""


class Unknown(StoreError):
    """No such user, or not any more."""


class Contradiction(StoreError):
    """Something else was said of this request before."""


@dataclass(frozen=True, slots=True)
class StoredFeedback:
    """Feedback on one answered request."""

    request: str
    created: float
    """When the request was answered: the order of feedback, whenever it came."""
    content: Any


@dataclass(frozen=True, slots=True)
class UserState:
    """What a server asks before it trusts its memory."""

    version: int | None
    """Another one after every change of the user's records or heads, and after a deletion; None for
    an unknown user.
    """
    bundle: str | None
    """Folder of the bundle that all servers of this store answer with; None where none was chosen.
    """


@dataclass(frozen=True, slots=True)
class Added:
    """What became of records that were sent."""

    added: int = 0
    changed: int = 0
    """Known id, other content: replaced, at the same place in the user's order."""
    unchanged: int = 0
    replaced: tuple[Record, ...] = ()
    """Those that changed, with the texts that they had."""


@dataclass(frozen=True, slots=True)
class StoredHead:
    """One user's head of one scorer of one bundle."""

    known: int
    """How many of the user's records it has learned from."""
    until: float
    """Time of the latest of these records, in seconds since 1970; -inf if they have none."""
    delta: bytes
    """Little-endian float32 numbers, in the order that the head bank gives them."""


@dataclass(frozen=True, slots=True)
class Request:
    """An answered request, kept so that feedback can refer to it."""

    id: str
    user: str
    created: float
    bundle: str
    question: str
    content: Any


@dataclass(frozen=True, slots=True)
class Key:
    """An API key; its secret is nowhere, its hash in the store alone."""

    id: str
    hash: str
    label: str
    admin: bool
    users: tuple[str, ...]
    """For whom it may speak; an admin's key speaks for all."""
    created: float
    revoked: float | None
    bound: bool = False
    """Whether it was made for one user, who need not be named."""


@dataclass(frozen=True, slots=True)
class Job:
    """Work that goes on after the request that asked for it."""

    id: str
    user: str
    kind: str
    state: str
    """waiting, running, done or failed."""
    done: int
    total: int
    error: str
    created: float
    updated: float
