"""The values that the store takes and returns, beside records."""

from dataclasses import dataclass
from typing import Any

from hydra_llm.types import Record


@dataclass(frozen=True, slots=True)
class UserState:
    """What a server reads before it uses a user from its cache."""

    version: int | None  # another one after every change of records or heads; None: unknown user
    bundle: str | None  # folder of the bundle that all servers use; None: none was set


@dataclass(frozen=True, slots=True)
class UserCounts:
    """How much is kept about a user."""

    id: str
    created: float  # seconds since 1970
    records: int
    feedback: int
    requests: int
    latest: float | None  # when the latest personal answer was given that is kept


@dataclass(frozen=True, slots=True)
class Added:
    """What became of records that were sent."""

    added: int = 0
    changed: int = 0  # known id, other content: replaced, at the same place in the user's order
    unchanged: int = 0
    replaced: tuple[Record, ...] = ()  # the changed ones, with the texts that they had before


@dataclass(frozen=True, slots=True)
class StoredHead:
    """One user's head of one scorer of one bundle."""

    known: int  # how many of the user's records it has learned from
    until: float  # time of the latest of these, in seconds since 1970; -inf if they have none
    delta: bytes  # little-endian float32 numbers, in the order of the head's parameters


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
class StoredResponse:
    """A response of the Responses API, with what was asked."""

    id: str
    user: str
    created: float
    previous: str | None  # the id of the response before it in the conversation
    content: Any


@dataclass(frozen=True, slots=True)
class StoredFeedback:
    """Feedback on one answered request."""

    request: str
    created: float  # when the request was answered: the order of feedback, whenever it arrived
    content: Any


@dataclass(frozen=True, slots=True)
class Key:
    """An API key. Its secret is kept nowhere, its hash in the store only."""

    id: str
    hash: str
    label: str
    admin: bool
    users: tuple[str, ...]  # whom it may name (an admin's key: all)
    created: float
    revoked: float | None
    bound: bool = False  # made for one user, whom a request need not name


@dataclass(frozen=True, slots=True)
class Job:
    """Work that outlasts its request."""

    id: str
    user: str
    kind: str
    state: str  # waiting, running, done or failed
    done: int
    total: int
    error: str
    created: float
    updated: float


@dataclass(frozen=True, slots=True)
class Session:
    """Somebody who is signed in at the dashboard."""

    id: str  # the hash of what the browser holds
    key: str | None  # the key's public id; None: it is not in the store
    proof: str  # of what else must not change meanwhile
    expires: float


@dataclass(frozen=True, slots=True)
class Happened:
    """How often something happened in an hour."""

    hour: int  # its beginning, in seconds since 1970
    kind: str
    name: str
    count: int
