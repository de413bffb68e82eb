"""What the upstream and the logs see in place of a user's id: a keyed hash, the same for the same
user of this store.
"""

import hashlib
import hmac
from collections.abc import Mapping
from typing import Any

USER_FIELDS = ("user", "safety_identifier")  # of a request, beside `metadata.user_id`


class Pseudonyms:
    """Hashes under this store's salt: without it, guesses of ids cannot be checked."""

    def __init__(self, salt: str):
        self._salt = salt.encode()

    def hashed(self, name: str) -> str:
        """32 hexadecimal digits."""
        encoded = name.encode("utf-8", "surrogatepass")
        return hmac.new(self._salt, encoded, hashlib.sha256).hexdigest()[:32]

    def hidden(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A request's body with hashes where it names the user."""
        named = {name: body[name] for name in USER_FIELDS if isinstance(body.get(name), str)}
        out = {**body, **{name: self.hashed(user) for name, user in named.items()}}
        metadata = body.get("metadata")
        if isinstance(metadata, Mapping) and isinstance(user := metadata.get("user_id"), str):
            out["metadata"] = {**metadata, "user_id": self.hashed(user)}
        return out


def named_user(body: Mapping[str, Any], header: str | None) -> str | None:
    """The user whom a request names: by header, else in `USER_FIELDS` or `metadata.user_id`."""
    metadata = body.get("metadata")
    in_metadata = metadata.get("user_id") if isinstance(metadata, Mapping) else None
    names = (header, *(body.get(name) for name in USER_FIELDS), in_metadata)
    return next((name for name in names if isinstance(name, str) and name), None)
