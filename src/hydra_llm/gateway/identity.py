"""Which user a chat request names, in the headers and fields that the settings list, and the body
with pseudonyms in their place. Knows no keys: whether a caller may name the user is in auth.py.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hydra_llm.gateway.auth import pseudonym
from hydra_llm.gateway.schemas import ApiError, id_fault
from hydra_llm.gateway.settings import ServeSettings

Headers = Sequence[tuple[bytes, bytes]]
CONTAINERS = ("metadata", "litellm_metadata", "extra_body")  # also as the text of a JSON object
DEPTH = 3  # of the objects in them that are searched
_NAMES_USER = re.compile(r"user(?![-_]?agent)|customer|e-?mail|^uid$|^sub$", re.IGNORECASE)
_PLAIN = re.compile(r"[\w.-]{1,80}", re.ASCII)


@dataclass(frozen=True, slots=True)
class NamedUser:
    """The user that a request names."""

    id: str | None
    unread: str = ""
    """If `id` is None: a header or field that seems to name a user and is not read."""


def named_user(headers: Headers, body: Mapping[str, Any], settings: ServeSettings) -> NamedUser:
    """The first of `user_headers`, then of `user_fields`, that is given and not empty. `ApiError`
    400: it is no valid id, a header is not UTF-8, or occurs twice with different values.
    """
    places = [(name, _header(headers, name)) for name in settings.user_headers]
    places += [(path, _at(body, path.split("."))) for path in settings.user_fields]
    for place, id in places:
        if not id:
            continue
        if fault := id_fault(id):
            raise ApiError(400, f"the user's id in '{place}' {fault}", param=place)
        return NamedUser(id)
    return NamedUser(None, _unread(headers, body))


def hide_user(body: Mapping[str, Any], salt: str, fields: Iterable[str]) -> dict[str, Any]:
    """A request's body with pseudonyms where it names the user."""
    hidden: Any = dict(body)
    for path in dict.fromkeys(fields):
        hidden = _changed(hidden, path.split("."), partial(pseudonym, salt))
    return dict(hidden)


def hide_user_in_form(body: bytes, boundary: str, salt: str, fields: Iterable[str]) -> bytes:
    """A body of multipart/form-data with pseudonyms where it names the user."""
    names = {re.sub(r"\.([^.]+)", r"[\1]", path) for path in fields}  # metadata[user_id]
    named = "|".join(re.escape(name) for name in names)
    head = rf'\r\ncontent-disposition:[^\r\n]*; *name="?(?:{named})"? *\r\n(?:[^\r\n]+\r\n)*\r\n'
    field = f"(?is)({head})(.*?)(?=\r\n--{re.escape(boundary)})".encode()

    def hidden(match: re.Match[bytes]) -> bytes:
        return match[1] + pseudonym(salt, match[2].decode("utf-8", "replace")).encode()

    return re.sub(field, hidden, body)


def _header(headers: Headers, name: str) -> str:
    values = {value for key, value in headers if key.lower() == name.encode()}
    if len(values) > 1:
        raise ApiError(400, f"the header '{name}' names different users: send one", param=name)
    try:
        return values.pop().decode() if values else ""
    except UnicodeDecodeError:
        fix = "send UTF-8, or name the user in the body"
        raise ApiError(400, f"the header '{name}' is not UTF-8: {fix}", param=name) from None


def _at(value: Any, keys: Sequence[str]) -> str:
    """The id at a path of a body, or ''."""
    for key in keys:
        value = (_object(value) or {}).get(key)
    return str(value) if _is_id(value) else ""


def _changed(value: Any, keys: Sequence[str], change: Callable[[str], str]) -> Any:
    """The value with another id at a path, if there is one; JSON texts stay JSON texts."""
    if not keys:
        return change(str(value)) if _is_id(value) and value != "" else value
    inner = _object(value)
    if inner is None or keys[0] not in inner:
        return value
    new = {**inner, keys[0]: _changed(inner[keys[0]], keys[1:], change)}
    return json.dumps(new) if isinstance(value, str) and new != inner else new


def _is_id(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _object(value: Any) -> Mapping[str, Any] | None:
    """A JSON object, or the text of one."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, Mapping) else None


def _fields(place: str, inner: Mapping[str, Any], depth: int) -> Iterator[tuple[str, Any]]:
    for key, value in inner.items():
        yield f"{place}.{key}", value
        if depth > 1 and (below := _object(value)):
            yield from _fields(f"{place}.{key}", below, depth - 1)


def _unread(headers: Headers, body: Mapping[str, Any]) -> str:
    """The first header or field whose name says that it names a user."""
    named = [(key.decode("latin-1").lower(), value) for key, value in headers]
    named += list(body.items())
    for container in CONTAINERS:
        inner = _object(body.get(container) or {})
        if inner is None:
            return container
        named += _fields(container, inner, DEPTH)
    for place, value in named:
        if value and _NAMES_USER.search(place.rpartition(".")[2]):
            return place if _PLAIN.fullmatch(place) else place.partition(".")[0]
    return ""
