"""What a key or a user may spend: money or tokens, per minute, day or month (UTC). All servers of a
store share the sums. Requests in flight can exceed a limit: what they cost is known at their end.

A limit is a text, `5/day, 100/month, 20000 tokens/minute`; `none` is no limit. Without the store
nothing is refused.
"""

import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Literal

from fastapi import Request

from hydra_llm.errors import HydraError
from hydra_llm.gateway.schemas import ApiError
from hydra_llm.gateway.spend import Bill, minute_of, paying
from hydra_llm.store.store import Store
from hydra_llm.store.values import NANO, Spend, Total

if TYPE_CHECKING:
    from hydra_llm.gateway.gateway import Gateway

Owner = tuple[str, str]  # key or user, and its name
FORM = (
    "write 5/day, 100/month for money, 20000 tokens/minute for tokens, separated by commas, or none"
)
PART = re.compile(r"(\d+(?:\.\d+)?)\s*(tokens)?\s*/\s*(minute|day|month)")
OWN_SECONDS = 2.0  # how soon other servers see a limit that is set
MOMENT = 0.001  # seconds
KNOWN_TEXTS = 10_000


@dataclass(frozen=True, slots=True)
class Limit:
    """How much may be spent in a time."""

    most: float  # tokens, or money
    unit: Literal["tokens", "money"]
    per: Literal["minute", "day", "month"]

    def spent(self, spend: Spend) -> float:
        return spend.tokens if self.unit == "tokens" else spend.cost / NANO


@dataclass(frozen=True, slots=True)
class LimitState:
    """A limit, and how much of it is spent."""

    of: str  # key or user
    limit: Limit
    spent: float
    seconds: float  # until something is free again; 0 where it is


@lru_cache(KNOWN_TEXTS)
def parse_limits(text: str) -> tuple[Limit, ...]:
    """The limits in a text; ValueError says how to write them."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if parts in ([], ["none"]):
        return ()
    limits = []
    for part in parts:
        found = PART.fullmatch(part)
        if found is None or (not found[2] and found[3] == "minute"):
            raise ValueError(f"{FORM}: '{part}'")
        unit: Literal["tokens", "money"] = "tokens" if found[2] else "money"
        limits.append(Limit(float(found[1]), unit, found[3]))  # type: ignore[arg-type]
    return tuple(limits)


class Limits:
    """The limits of all keys and users, and what is spent of them. Blocks: used in threads."""

    def __init__(self, store: Store, of_keys: str, of_users: str):
        self._store, self._default = store, {"key": of_keys, "user": of_users}
        self._own: Mapping[Owner, str] = {}
        self._until = 0.0

    def of(self, owner: Owner) -> tuple[Limit, ...]:
        """The limits of a key or user; of nobody none."""
        kind, name = owner
        return parse_limits(self._own.get(owner, self._default[kind])) if name else ()

    def are_none(self, *owners: Owner) -> bool:
        """Whether none of these has a limit, as far as was read a moment ago; False: read them."""
        return time.monotonic() < self._until and not any(map(self.of, owners))

    def read(self) -> None:
        """Read the limits of single keys and users, unless that was done just now."""
        if time.monotonic() >= self._until:
            self._own = {(own.kind, own.name): own.value for own in self._store.limits()}
            self._until = time.monotonic() + OWN_SECONDS

    def set(self, owner: Owner, text: str | None) -> None:
        """Set the limit of a single key or user; None: as the settings say."""
        self._store.set_limit(*owner, text)
        self._until = 0.0

    def states(self, *owners: Owner) -> list[LimitState]:
        """What is spent of the limits of each."""
        self.read()
        now = datetime.now(UTC)
        limits = [(owner, limit) for owner in owners for limit in self.of(owner)]
        wanted = {total for owner, limit in limits for total in _totals(owner, limit, now)}
        spent = self._store.spent(wanted)
        return [_state(owner, limit, spent, now) for owner, limit in limits]


def _totals(owner: Owner, limit: Limit, now: datetime) -> Iterator[Total]:
    """The totals that a limit is compared with."""
    if limit.per == "minute":
        yield Total(*owner, minute_of(now))
        yield Total(*owner, minute_of(now, 1))
    else:
        yield Total(*owner, f"{now:%Y-%m-%d}" if limit.per == "day" else f"{now:%Y-%m}")


def _state(owner: Owner, limit: Limit, spent: Mapping[Total, Spend], now: datetime) -> LimitState:
    latest, *before = (limit.spent(spent.get(t, Spend())) for t in _totals(owner, limit, now))
    if limit.per == "minute":
        # The last 60 seconds, as if the minute before had been spent evenly.
        second = now.timestamp() % 60
        rest = before[0] * (1 - second / 60)
        # A limit that is just reached has room a moment later; 0 would mean that it has room now.
        wait = max(_wait(limit.most, latest, before[0], second), MOMENT)
        return LimitState(
            owner[0], limit, latest + rest, wait if latest + rest >= limit.most else 0
        )
    return LimitState(
        owner[0], limit, latest, _until_next(limit.per, now) if latest >= limit.most else 0
    )


def _wait(most: float, latest: float, before: float, second: float) -> float:
    """Seconds until the spending of the last 60 seconds is below `most`."""
    if latest < most and before > 0:
        return max(0.0, 60 * (1 - (most - latest) / before) - second)
    return 60 - second + (60 * (1 - most / latest) if latest > 0 else 0)


def _until_next(per: str, now: datetime) -> float:
    day = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if per == "day":
        return (day + timedelta(days=1) - now).total_seconds()
    return ((day.replace(day=1) + timedelta(days=32)).replace(day=1) - now).total_seconds()


def reached(states: Iterable[LimitState]) -> LimitState | None:
    """The limit without room that lasts longest; None where all have room."""
    full = [state for state in states if state.spent >= state.limit.most]
    return max(full, key=lambda state: state.seconds, default=None)


def refusal(state: LimitState) -> ApiError:
    """What a caller is told of a limit without room."""
    limit, seconds = state.limit, max(1, math.ceil(state.seconds))
    unit = " tokens" if limit.unit == "tokens" else ""
    owner = {"key": "this API key", "user": "this user"}[state.of]
    spent = f"{limit.most:g}{unit} per {limit.per} and has spent {state.spent:.10g}{unit}"
    headers = {"retry-after": str(seconds)}
    if limit.per != "minute":  # a client that tries again at once would ask in vain
        headers["x-should-retry"] = "false"
    code = "rate_limit_exceeded" if limit.per == "minute" else "insufficient_quota"
    message = f"{owner} may spend {spent}; try again in {seconds} s"
    return ApiError(429, message, code=code, headers=headers)


async def admit(http: Request, user: str | None) -> None:
    """Before a request asks an LLM: its bill gets the user, and `ApiError` 429 where the key or the
    user has spent what it may.
    """
    bill = paying.get() or Bill()
    bill.user = user or ""
    await check(http.app.state.gateway, bill)


async def check(gateway: "Gateway", bill: Bill) -> None:
    """Raise `ApiError` 429 where the payers of a bill have spent what they may."""
    owners, limits = (("key", bill.key), ("user", bill.user)), gateway.limits
    if limits.are_none(*owners):
        return
    try:
        states = await gateway.reads.read(partial(limits.states, *owners))
    except HydraError as error:
        gateway.telemetry.failed("limits", error)
        return
    bill.limited = bool(states)
    bill.minutes = frozenset(state.of for state in states if state.limit.per == "minute")
    if full := reached(states):
        gateway.telemetry.limited.labels(full.of, full.limit.unit, full.limit.per).inc()
        raise refusal(full)
