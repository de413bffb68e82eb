"""The endpoints of administrators: keys, the jobs of all users, and what was answered by hour."""

import time
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from hydra_llm.gateway.activity import ACTIVITY_DAYS, HOUR
from hydra_llm.gateway.auth import WITHOUT_KEYS, make_key, pseudonym
from hydra_llm.gateway.drift import drift_of
from hydra_llm.gateway.gateway import Gateway
from hydra_llm.gateway.schemas import MAX_ID, ApiError, Id, KeyIn, id_fault
from hydra_llm.store.pages import Place
from hydra_llm.store.values import PURPOSES, Job, Key
from hydra_llm.text import text_fault

Limit = Annotated[int, Query(ge=1, le=1000)]
After = Annotated[str, Query(max_length=MAX_ID, description="`next` of the page before.")]
router = APIRouter(prefix="/v1", tags=["administration"])


@router.post("/keys", status_code=201)
def create_key(sent: KeyIn, http: Request) -> dict[str, Any]:
    """Create a key. `key` of the reply is the secret, which is stored nowhere."""
    gateway = gateway_of_admin(http)
    if bool(sent.users) == sent.admin:
        raise ApiError(400, "name the key's users, or make it an administrator's", param="users")
    full = sent.admin and set(PURPOSES) <= {*sent.purposes}
    if http.state.caller is WITHOUT_KEYS and not full:
        fault = "make an administrator's key first, with every purpose"
        message = f"{fault}: with this one alone nobody could make more here"
        raise ApiError(400, message, param="admin")
    if sent.label and (fault := text_fault(sent.label)):
        raise ApiError(400, f"label {fault}", param="label")
    users = list(dict.fromkeys(sent.users))
    about: Any = {"label": sent.label, "admin": sent.admin, "purposes": sent.purposes}
    key, secret = make_key(gateway.store, users=users, **about)
    return {**_key(key), "key": secret}


@router.get("/keys")
def list_keys(
    http: Request, after: After = "", limit: Limit = 100, user: Id | None = None
) -> dict[str, Any]:
    """The keys (of a user), newest first, without their secrets."""
    store = gateway_of_admin(http).store
    page = store.latest_keys(limit + 1, before=_place(after), user=user)
    return _page([_key(key) for key in page], limit)


@router.delete("/keys/{id}")
def revoke_key(id: Id, http: Request) -> dict[str, Any]:
    """Refuse a key from the next request on, and end the sessions that were begun with it."""
    if not gateway_of_admin(http).store.revoke_key(id):
        raise ApiError(404, "no such key", code="key_not_found", param="id")
    return {"id": id, "revoked": True}


@router.get("/jobs")
def list_jobs(http: Request, after: After = "", limit: Limit = 100) -> dict[str, Any]:
    """The jobs of all users, newest first."""
    page = gateway_of_admin(http).store.latest_jobs(limit + 1, before=_place(after))
    return _page([_job(job) for job in page], limit)


@router.get("/audit")
def show_audit(
    http: Request,
    after: After = "",
    limit: Limit = 100,
    user: Id | None = None,
    key: Id | None = None,
) -> dict[str, Any]:
    """Who has read or deleted what is kept (of a user, with a key), newest first, without content.
    `person` is a keyed hash of the user: the same for the same user, also after a deletion.
    """
    gateway = gateway_of_admin(http)
    person = None if user is None else pseudonym(gateway.salt, user)
    which: Any = {"before": _place(after), "key": key, "person": person}
    page = gateway.store.accesses(limit + 1, **which)
    return _page([asdict(own) for own in page], limit)


@router.get("/activity")
def activity(
    http: Request,
    hours: Annotated[int, Query(ge=1, le=24 * ACTIVITY_DAYS)] = 24,
    step: Annotated[int, Query(ge=1, le=24 * ACTIVITY_DAYS, description="Hours of a row.")] = 1,
) -> dict[str, Any]:
    """What all servers of the store have answered, by hour: `answer` by reason, `pick` (`first`:
    the adapter left the first candidate), `upstream` and `own` seconds by upper bound, `feedback`
    (`wanted`: the user wanted the answer that they got). `drift` compares the feedback of the last
    7 days with that of the 28 days before.
    """
    store, now = gateway_of_admin(http).store, time.time()
    since = int(now) // HOUR * HOUR - (hours - 1) * HOUR
    happened = store.activity(since, step * HOUR)
    data = [[own.hour, own.kind, own.name, own.count] for own in happened]
    reply = {"object": "list", "columns": ["hour", "kind", "name", "count"], "data": data}
    return {**reply, "drift": drift_of(store, now).as_json()}


def gateway_of_admin(http: Request) -> Gateway:
    """The gateway, for a caller who may act for all users; else `ApiError` 403."""
    if not http.state.caller.administers:
        message = "only an administrator's key with every purpose may do this"
        raise ApiError(403, message, code="admin_only")
    gateway: Gateway = http.app.state.gateway
    return gateway


def _key(key: Key) -> dict[str, Any]:
    names = ("id", "label", "admin", "users", "purposes", "created", "revoked")
    return {name: getattr(key, name) for name in names}


def _job(job: Job) -> dict[str, Any]:
    names = ("id", "user", "kind", "state", "done", "total", "created", "updated")
    return {name: getattr(job, name) for name in names} | {"error": job.error or None}


def _page(rows: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A page of a list that has been read one row further; `next` begins the page behind it."""
    more, shown = len(rows) > limit, rows[:limit]
    last = f"{shown[-1]['created']!r}_{shown[-1]['id']}" if more else None
    return {"object": "list", "data": shown, "has_more": more, "next": last}


def _place(after: str) -> Place | None:
    if not after:
        return None
    created, _, id = after.partition("_")
    try:
        if not id_fault(id):
            return float(created), id
        raise ValueError
    except ValueError:
        raise ApiError(400, "after: take `next` of the page before", param="after") from None
