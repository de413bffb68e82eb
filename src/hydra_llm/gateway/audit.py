"""What a request may do with what is kept of users, and its entries in the audit log: who has read
or deleted what, without content. The middleware writes them before the reply goes out.
"""

from collections.abc import Iterable
from typing import Any

from fastapi import Request

from hydra_llm.gateway.auth import pseudonym
from hydra_llm.gateway.gateway import Gateway
from hydra_llm.gateway.schemas import ApiError

AUDITED = ("read", "delete")  # purposes
Access = tuple[str, str, str]  # purpose, action, keyed hash of the user
UNLOGGED = "it may be deleted, but the audit log could not be written: look, and try again"


def allow(http: Request, user: str | None, purpose: str, action: str = "") -> Gateway:
    """The gateway, for a caller who may do this for the user (None: for all whose names the caller
    may see); else `ApiError` 403. What is read or deleted is noted under the name of the action.
    """
    gateway: Gateway = http.app.state.gateway
    if user is not None:
        http.state.caller.check(user)
    http.state.caller.need(purpose)
    if purpose in AUDITED and action:
        person = "" if user is None else pseudonym(gateway.salt, user)
        noted = http.scope["state"].setdefault("accesses", {})
        noted[purpose, action, person] = None  # each once, in order
    return gateway


def done(state: dict[str, Any], status: int) -> list[Access]:
    """What was noted of a request, once. One that failed has read nothing, but what it was to
    delete may be gone.
    """
    noted: Iterable[Access] = state.pop("accesses", ())
    return [own for own in noted if status < 400 or (status >= 500 and own[0] == "delete")]


def unlogged(accesses: Iterable[Access], error: Exception) -> Exception:
    """What a caller is told where the log could not be written: `error`, unless that is wrong."""
    deleted = any(purpose == "delete" for purpose, *_ in accesses)
    return ApiError(503, UNLOGGED, code="store_unavailable") if deleted else error
