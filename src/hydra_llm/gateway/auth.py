"""Who may speak for whom, and what the upstream sees in place of a user's id."""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra_llm.environment import variables
from hydra_llm.errors import SettingsError
from hydra_llm.gateway.schemas import ApiError
from hydra_llm.store.store import Store
from hydra_llm.store.values import PURPOSES, Key

PREFIX = "hk"
LEAST_KEY, SAFE_KEY = 16, 32  # characters of HYDRA_ADMIN_KEY
NO_HASH = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request."""

    key: str  # the key's public id; empty where no key is needed yet
    admin: bool
    users: tuple[str, ...]  # for whom this caller may speak, unless admin
    bound: str | None = None  # the one user for whom the key was made; no other need be named
    purposes: tuple[str, ...] = PURPOSES

    @property
    def administers(self) -> bool:
        """Whether this caller may make keys: one with fewer purposes could make itself more."""
        return self.admin and set(PURPOSES) <= {*self.purposes}

    def need(self, purpose: str) -> None:
        """Was the key made for this purpose? Else `ApiError` 403."""
        if purpose not in self.purposes:
            own = ", ".join(self.purposes)
            message = f"this key was not made to {purpose}, but for: {own}"
            raise ApiError(403, message, code="purpose_not_allowed")

    def check(self, user: str) -> None:
        """May this caller speak for the user? Else `ApiError` 403, whether or not there is one."""
        if not self.admin and user not in self.users:
            raise ApiError(403, "this key may not speak for that user", code="user_not_allowed")


@dataclass(frozen=True, slots=True)
class Access:
    """Who is let in beside the store's keys."""

    on_loopback: bool = True
    """Only this machine can connect: until there is a key, none is needed."""
    admin_key: str = field(default="", repr=False)
    """A key for all users that is not in the store; empty: there is none."""

    def is_admin(self, authorization: str) -> bool:
        """Whether an Authorization header holds the admin key."""
        scheme, _, token = authorization.partition(" ")
        same = hmac.compare_digest(_hash(token.strip()), _hash(self.admin_key))
        return bool(self.admin_key) and scheme.lower() == "bearer" and same

    def needs_key(self, store: Store) -> bool:
        """Whether nobody is served without a key."""
        return bool(self.admin_key) or not self.on_loopback or store.has_keys()


ADMIN = Caller("admin", True, ())  # the caller with HYDRA_ADMIN_KEY
WITHOUT_KEYS = Caller("", True, ())  # the caller of a server that has no keys yet
UNVERIFIED = Caller("", False, ())
"""The same while the store is down: there may be keys by now, so requests only pass through."""


def admin_key_given() -> str:
    """HYDRA_ADMIN_KEY, or ''. Raises SettingsError: it is short, or no header can carry it."""
    key = variables().get("HYDRA_ADMIN_KEY", "").strip()
    if key and (len(key) < LEAST_KEY or not re.fullmatch(r"[!-~]+", key)):
        form = f"at least {LEAST_KEY} characters, printable ASCII without blanks"
        raise SettingsError(f"HYDRA_ADMIN_KEY is no key: {form}")
    return key


def make_key(
    store: Store,
    *,
    label: str = "",
    admin: bool = False,
    users: Sequence[str] = (),
    purposes: Sequence[str] = PURPOSES,
) -> tuple[Key, str]:
    """Make a key; its secret is in the second value and nowhere else: the store has its hash."""
    id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    bound = len(set(users)) == 1 and not admin
    chosen = tuple(own for own in PURPOSES if own in purposes)
    about: Any = {"bound": bound, "purposes": chosen}
    key = Key(id, _hash(secret), label, admin, tuple(users), time.time(), None, **about)
    store.add_key(key)
    return key, f"{PREFIX}-{id}-{secret}"


def caller_of(store: Store, authorization: str | None, access: Access) -> Caller:
    """The caller by the Authorization header; until there is a key, anyone who reaches a loopback
    address. `ApiError` 401 is the same for a wrong key, a revoked one and none.
    """
    if access.is_admin(authorization or ""):
        return ADMIN
    scheme, _, token = (authorization or "").partition(" ")
    prefix, _, rest = token.strip().partition("-")
    id, _, secret = rest.partition("-")
    key = store.key(id) if scheme.lower() == "bearer" and prefix == PREFIX and id else None
    # The same work for an unknown key: the time that it takes tells nothing.
    matches = hmac.compare_digest(_hash(secret), key.hash if key else NO_HASH)
    if key and matches and key.revoked is None:
        return caller_with(key)
    if access.needs_key(store):
        message = "this key is not valid: pass `Authorization: Bearer hk-...`"
        raise ApiError(401, message, code="invalid_api_key")
    return WITHOUT_KEYS


def caller_with(key: Key) -> Caller:
    """The caller who has shown a key that is not revoked."""
    bound = key.users[0] if key.bound and key.users else None
    return Caller(key.id, key.admin, key.users, bound, key.purposes)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def pseudonym(salt: str, user: str) -> str:
    """32 hexadecimal digits in place of a user's id, the same for the same user of a store. Without
    the store's salt guesses of ids cannot be checked.
    """
    encoded = user.encode("utf-8", "surrogatepass")
    return hmac.new(salt.encode(), encoded, hashlib.sha256).hexdigest()[:32]
