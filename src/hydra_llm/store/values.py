"""The values that the store takes and returns, beside records."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hydra_llm.types import Record


@dataclass(frozen=True, slots=True)
class UserState:
    """What a server reads before it uses a user from its cache."""

    version: int | None  # another one after every change of records or heads; None: unknown user
    bundle: str | None  # folder of the bundle that all servers use; None: none was set


@dataclass(frozen=True, slots=True)
class Watched:
    """What servers of a store watch."""

    bundle: str | None  # folder of the bundle that all servers use; None: none was set
    removal: str | None  # another text after each deletion


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


Purpose = Literal["answer", "write", "read", "delete"]
PURPOSES: tuple[Purpose, ...] = ("answer", "write", "read", "delete")
"""What a key may be for: answers of the LLM, records and feedback, reading and deleting what is
kept of users.
"""


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
    purposes: tuple[str, ...] = PURPOSES


@dataclass(frozen=True, slots=True)
class Accessed:
    """An entry of the audit log."""

    id: str
    created: float
    key: str  # the public id of an API key; `cli`: a command; empty: no key was needed
    purpose: str  # read or delete
    action: str  # as "export"; no content
    person: str  # a keyed hash of the user's name; empty: of all users


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


NANO = 1_000_000_000
"""Cost is counted in whole 1e-9 of money, so that sums are exact and equal in every database."""


@dataclass(frozen=True, slots=True)
class Spend:
    """Calls of LLMs, their tokens and what they cost."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated_tokens: int = 0  # of these: what the LLM did not tell, by rule of thumb
    unpriced_tokens: int = 0  # of these: of models whose price is not known; not in `cost`
    cost: int = 0  # in 1e-9 of money

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def money(self) -> float | None:
        """The cost; None where no token has a price."""
        return None if 0 < self.tokens <= self.unpriced_tokens else self.cost / NANO

    def __add__(self, other: "Spend") -> "Spend":
        return Spend(
            self.calls + other.calls,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.estimated_tokens + other.estimated_tokens,
            self.unpriced_tokens + other.unpriced_tokens,
            self.cost + other.cost,
        )


@dataclass(frozen=True, slots=True, order=True)
class Spender:
    """On what a sum was spent."""

    day: str  # ISO, of UTC
    key: str = ""  # the public id of an API key; '' for none
    user: str = ""  # '' for nobody
    model: str = ""
    kind: str = "request"  # request: the caller's own; samples; job; learn; other
    user_key: int | None = None  # of the user's row at that time; None: there was none


@dataclass(frozen=True, slots=True)
class SpendGroup:
    """A sum of what was spent."""

    by: Mapping[str, str]  # such as {"day": "2026-11-30", "model": "gpt-4o"}
    spend: Spend


@dataclass(frozen=True, slots=True, order=True)
class Total:
    """What a limit is compared with."""

    kind: str  # key or user
    name: str
    period: str  # 2026-11-30, 2026-11, or m and the minutes since 1970


@dataclass(frozen=True, slots=True)
class Limited:
    """A key or user with a limit of its own."""

    kind: str  # key or user
    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Session:
    """Somebody who is signed in at the dashboard."""

    id: str  # the hash of what the browser holds
    key: str | None  # the key's public id; None: it is not in the store
    proof: str  # of what else must not change meanwhile
    expires: float


@dataclass(frozen=True, slots=True)
class Happened:
    """How often something happened in some hours."""

    hour: int  # the beginning of the first, in seconds since 1970
    kind: str
    name: str
    count: int
