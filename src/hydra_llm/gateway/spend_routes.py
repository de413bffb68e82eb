"""What was spent, and what may be: for administrators of all, for others of their own users."""

from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from hydra_llm.gateway.audit import allow
from hydra_llm.gateway.auth import Caller
from hydra_llm.gateway.gateway import Gateway
from hydra_llm.gateway.schemas import ApiError, Id, id_fault
from hydra_llm.gateway.spend_limits import LimitState, parse_limits
from hydra_llm.store.spend import COLUMNS
from hydra_llm.store.values import Spend

DAYS = 30  # that are shown by default
MOST_GROUPS = 10_000
MONEY = "USD"  # of the prices that are shipped
ISO = r"^\d{4}-\d{2}-\d{2}$"
router = APIRouter(prefix="/v1", tags=["spend"])

Day = Annotated[str | None, Query(pattern=ISO, description="A day (UTC), as 2026-11-30.")]


@router.get("/spend")
def show_spend(
    http: Request,
    by: Annotated[
        str, Query(description="day, user, key, model, kind; several with commas.")
    ] = "day",
    since: Day = None,
    until: Day = None,
    user: str | None = None,
    key: str | None = None,
    limit: Annotated[int, Query(ge=1, le=MOST_GROUPS)] = 1000,
) -> dict[str, Any]:
    """What was spent, of the last 30 days by default: calls, tokens, `estimated_tokens` that the
    upstream did not tell, `unpriced_tokens` of models without a price, and `cost`, which is null
    where nothing has one. A key for some users sees theirs; of one `user`, also what is left of the
    limits.
    """
    gateway = allow(http, None, "read")
    caller: Caller = http.state.caller
    names = _columns(by)
    chosen = _own(caller, user)
    if key and (fault := id_fault(key)):
        raise ApiError(400, f"key: {fault}", param="key")
    if not caller.admin and (key not in (None, caller.key) or "key" in names):
        raise ApiError(403, "keys are shown to administrators", code="not_allowed", param="key")
    first = since or (datetime.now(UTC).date() - timedelta(days=DAYS - 1)).isoformat()
    last = until or "9999-12-31"
    _check_days(first, last)
    gateway.ledger.flush()  # what this server has not written yet
    where: dict[str, Any] = {"since": first, "until": last, "users": chosen, "key": key}
    groups = gateway.store.spend(*names, **where, limit=limit)
    reply: dict[str, Any] = {"object": "list", "currency": MONEY, "since": first, "until": until}
    reply["data"] = [{**group.by, **spend_json(group.spend)} for group in groups]
    reply["total"] = spend_json(gateway.store.spend(**where)[0].spend)
    if chosen is not None and len(chosen) == 1:
        owners = (("user", chosen[0]), ("key", "" if caller.admin else caller.key))
        reply["limits"] = list(map(_state_json, gateway.limits.states(*owners)))
    return reply


class LimitIn(BaseModel):
    """The limit of a single key or user."""

    model_config = ConfigDict(extra="forbid")
    key: Id | None = None
    user: Id | None = None
    limits: Annotated[str, Field(max_length=200)] | None = None  # None: as the settings say


@router.get("/limits")
def show_limits(http: Request) -> dict[str, Any]:
    """What keys and users may spend: by the settings, and those with limits of their own."""
    gateway = _for_admin(http)
    settings = gateway.settings
    default = {"key": settings.key_limits or "none", "user": settings.user_limits or "none"}
    own = [{own.kind: own.name, "limits": own.value} for own in gateway.store.limits()]
    return {"object": "list", "default": default, "data": own}


@router.put("/limits")
def set_limits(sent: LimitIn, http: Request) -> dict[str, Any]:
    """Set what a key or user may spend, as `5/day, 20000 tokens/minute` or `none`; null removes the
    limit, so that the settings' applies.
    """
    gateway = _for_admin(http)
    named = [(kind, name) for kind, name in (("key", sent.key), ("user", sent.user)) if name]
    if len(named) != 1:
        raise ApiError(400, "name a key or a user", param="key")
    try:
        parse_limits(sent.limits or "")
    except ValueError as error:
        raise ApiError(400, f"limits: {error}", param="limits") from None
    ((kind, name),) = named
    if kind == "key" and gateway.store.key(name) is None:
        raise ApiError(404, "no such key", code="key_not_found", param="key")
    gateway.limits.set((kind, name), sent.limits)
    return {kind: name, "limits": sent.limits}


def spend_json(spend: Spend) -> dict[str, Any]:
    """A sum as replies and commands show it."""
    cost = spend.money
    return {**asdict(spend), "cost": None if cost is None else round(cost, 9)}


def _state_json(state: LimitState) -> dict[str, Any]:
    limit = state.limit
    about = {"of": state.of, "unit": limit.unit, "per": limit.per, "limit": limit.most}
    return {**about, "spent": state.spent, "seconds": round(state.seconds)}


def _columns(by: str) -> list[str]:
    names = [name.strip() for name in by.split(",") if name.strip()]
    if not names or len(set(names)) < len(names) or not set(names) <= COLUMNS.keys():
        known = ", ".join(COLUMNS)
        raise ApiError(400, f"by: take some of {known}, each once", param="by")
    return names


def _own(caller: Caller, user: str | None) -> list[str] | None:
    """The users whose spending is shown; None is all. `ApiError` 403 for others' users."""
    if user is None:
        return None if caller.admin else list(caller.users)
    if user and (fault := id_fault(user)):
        raise ApiError(400, f"user: {fault}", param="user")
    caller.check(user)
    return [user]


def _check_days(first: str, last: str) -> None:
    for name, day in (("since", first), ("until", last)):
        try:
            date.fromisoformat(day)
        except ValueError:
            raise ApiError(400, f"{name}: there is no such day", param=name) from None


def _for_admin(http: Request) -> Gateway:
    if not http.state.caller.administers:
        raise ApiError(403, "limits are for administrators", code="not_allowed")
    gateway: Gateway = http.app.state.gateway
    return gateway
