"""Who is signed in. The browser holds a random id with a signature, never a key; the store has the
id's hash, the key's public id and when the session ends. Whether the key is still valid is asked of
the store for every page. Knows no page.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import Request, Response

from hydra_llm.gateway.auth import ADMIN, WITHOUT_KEYS, Access, Caller, caller_of, caller_with
from hydra_llm.gateway.middleware import DASHBOARD, RateLimiter, WrongKeys, address_of, check_origin
from hydra_llm.gateway.schemas import ApiError
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.store.store import Store
from hydra_llm.store.values import Session

NO_KEYS = "no keys"
"""Proof of a session that was begun while no key was needed."""
HOUR = 3600
Kind = Literal["session", "form"]
"""What an id is for: a session, or the form of who has none. A link from another site brings no
cookie along: the form's must not take the place of the session's.
"""


class SignedOut(Exception):
    """There is no session, or not any more."""


class Sessions:
    """The sessions of a store's dashboard; any server of the store knows those of the others."""

    def __init__(self, store: Store, access: Access, settings: ServeSettings):
        self._store, self._access = store, access
        self.seconds = settings.session_hours * HOUR
        self._secret = _mac(store.salt(), "dashboard")  # the salt itself is for pseudonyms
        self._rates = RateLimiter(store, settings.requests_per_minute)
        self._wrong_keys = WrongKeys(settings.wrong_keys_per_minute)

    # ---- what the browser holds

    def id_of(self, http: Request, kind: Kind = "session") -> str | None:
        """The id that the browser holds, if this store has signed it for that."""
        id, _, signature = http.cookies.get(cookie_name(http, kind), "").partition(".")
        return id if id and _same(signature, self._mac(kind, id)) else None

    def put(self, http: Request, response: Response, id: str, kind: Kind = "session") -> None:
        """Give the browser an id."""
        value, seconds = f"{id}.{self._mac(kind, id)}", int(self.seconds)
        response.set_cookie(cookie_name(http, kind), value, max_age=seconds, **_options(http))

    def remove(self, http: Request, response: Response, kind: Kind = "session") -> None:
        """Take an id from the browser."""
        response.delete_cookie(cookie_name(http, kind), **_options(http))

    def form_token(self, id: str) -> str:
        """What the forms hold that were made for this browser: other pages cannot know it."""
        return self._mac("token", id)

    def check_form(self, id: str, form: Mapping[str, str]) -> None:
        """Raise `ApiError` 403 unless a form was made for this browser."""
        if not _same(form.get("token", ""), self.form_token(id)):
            message = "this form was not made for you, or is too old: go back and try again"
            raise ApiError(403, message, code="form")

    # ---- sessions

    def needs_key(self) -> bool:
        """Whether nobody may sign in without a key."""
        return self._access.needs_key(self._store)

    def begin(self, http: Request, key: str) -> str:
        """Sign in; returns the id, which is always a new one. `ApiError` 401 for a wrong key, 429
        for any after too many from one address.
        """
        address = address_of(http.scope)
        self._wrong_keys.check(address, count=False)
        try:
            caller = caller_of(self._store, f"Bearer {key}", self._access)
        except ApiError:
            if key:
                self._wrong_keys.check(address)
            raise
        if caller is WITHOUT_KEYS:
            check_origin(http.scope, (), True)
        stored = None if caller in (ADMIN, WITHOUT_KEYS) else caller.key
        proof = {ADMIN: self._mac("admin", self._access.admin_key), WITHOUT_KEYS: NO_KEYS}
        id = secrets.token_urlsafe(32)
        ends = time.time() + self.seconds
        self._store.add_session(Session(_hash(id), stored, proof.get(caller, ""), ends))
        return id

    def caller(self, http: Request, id: str) -> Caller:
        """Whose session it is. `SignedOut`: there is none, it has expired, or its key is not valid
        any more. `ApiError` 429: too many requests.
        """
        session = self._store.session(_hash(id))
        caller = self._caller(http, session) if session else None
        if caller is None:
            raise SignedOut
        self._rates.check(caller.key)
        return caller

    def _caller(self, http: Request, session: Session) -> Caller | None:
        access = self._access
        if session.key is not None:
            key = self._store.key(session.key)
            return caller_with(key) if key and key.revoked is None else None
        if session.proof == NO_KEYS:
            if access.needs_key(self._store):
                return None
            check_origin(http.scope, (), True)
            return WITHOUT_KEYS
        same = _same(session.proof, self._mac("admin", access.admin_key))
        return ADMIN if access.admin_key and same else None

    def end(self, id: str) -> None:
        self._store.end_session(_hash(id))

    def _mac(self, what: str, text: str) -> str:
        return _mac(self._secret, f"{what} {text}")


def cookie_name(http: Request, kind: Kind = "session") -> str:
    """Under TLS a name that no other host and no page without TLS can set."""
    name = "hydra" if kind == "session" else f"hydra-{kind}"
    return f"__Host-{name}" if http.url.scheme == "https" else name


def _options(http: Request) -> Any:
    secure = http.url.scheme == "https"
    path = "/" if secure else f"{http.scope.get('root_path', '')}{DASHBOARD}"
    return {"path": path, "secure": secure, "httponly": True, "samesite": "strict"}


def _hash(id: str) -> str:
    return hashlib.sha256(id.encode()).hexdigest()


def _mac(secret: str, text: str) -> str:
    encoded = text.encode("utf-8", "surrogatepass")
    return hmac.new(secret.encode(), encoded, hashlib.sha256).hexdigest()


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode("utf-8", "surrogatepass"), other.encode())
