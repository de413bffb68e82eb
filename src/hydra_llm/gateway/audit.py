"""What a request may do with what is kept of users, and its entries in the audit log: who has read
or deleted what, without content. The middleware writes them before the reply goes out.
"""

from fastapi import Request

from hydra_llm.gateway.auth import pseudonym
from hydra_llm.gateway.gateway import Gateway

AUDITED = ("read", "delete")  # purposes


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
