"""Around every request: access, rates, body sizes, errors. Plain ASGI, so that streams stay so."""

import hashlib
import ipaddress
import math
import string
import threading
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from urllib.parse import quote, unquote, urlsplit

from cachetools import LRUCache, TTLCache
from fastapi.exceptions import RequestValidationError
from starlette._utils import get_route_path  # the router's own: keys are checked for what it sees
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hydra_llm.errors import HydraError, StoreError
from hydra_llm.gateway.audit import done, unlogged
from hydra_llm.gateway.auth import UNVERIFIED, WITHOUT_KEYS, Access, Caller, caller_of
from hydra_llm.gateway.batching import Overloaded
from hydra_llm.gateway.gateway import Gateway
from hydra_llm.gateway.messages import error_body
from hydra_llm.gateway.schemas import ApiError, Json
from hydra_llm.gateway.spend import Bill, paying
from hydra_llm.gateway.telemetry import log
from hydra_llm.store.store import Store

START = "http.response.start"
OPEN_PATHS = ("/health/", "/metrics", "/docs", "/openapi.json")  # need no key
UPSTREAM_PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages"),
    *("/v1/models", "/v1/responses"),
)
MCP_PATH = "/mcp"
DASHBOARD = "/ui"  # has sessions in place of keys (ui/session.py)
KNOWN_SECONDS = 300.0  # how long a caller is known while the store is down
TAKEN_SECONDS = 1.0  # how long requests that were taken from the store's bucket may be used
KNOWN_CALLERS, LIMITED_KEYS = 10_000, 100_000  # cache sizes; the oldest go first
ERRORS = (ApiError, HydraError, RequestValidationError, HTTPException)
"""What routes raise on purpose, for `error_response`."""


class ClientGone(Exception):
    """The client has hung up before its answer was there."""


class ConnectionCut(Exception):
    """Makes the server cut the connection: half an answer must not look like a whole one."""


class AccessMiddleware:
    """Checks keys, rates and sizes of bodies, and turns errors into responses."""

    def __init__(self, app: ASGIApp, *, gateway: Gateway, access: Access):
        self._app, self._gateway, self._telemetry = app, gateway, gateway.telemetry
        self._find = partial(caller_of, gateway.store, access=access)
        self._rates = RateLimiter(gateway.store, gateway.settings.requests_per_minute)
        most = gateway.settings.wrong_keys_per_minute
        self._wrong_keys = WrongKeys(most)
        self._known_callers: TTLCache[bytes, Caller] = TTLCache(KNOWN_CALLERS, KNOWN_SECONDS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, bill = False, Bill()
        paying.set(bill)

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            if not message.get("more_body", False):
                await self._settle(bill)
            await send(message)

        state = scope.setdefault("state", {})
        scope = _as_sent(scope)
        try:
            path = get_route_path(scope)
            if not self._is_open(path):
                await self._authorize(scope)
                bill.key = scope["state"]["caller"].key
            elif path.startswith("/metrics") and await self._is_keyless():  # costs, ids of keys
                check_origin(scope, self._gateway.settings.cors_origins, keyless=True)
            await self._app(scope, self._limited(scope, receive), self._audited(scope, watched))
        except ConnectionCut:
            raise
        except ClientGone:
            return  # nobody reads an answer; the log has status 499
        except Exception as error:
            if not isinstance(error, ApiError | StoreError):  # refused before it came to the app
                self._telemetry.failed("request", error)
            if started:
                raise _cut(error) from None
            with suppress(ClientGone):  # it was told that the log could not be written
                response = await error_response(Request(scope), error)
                await response(scope, receive, self._audited(scope, send))
        finally:
            bill.closed = True
            self._gateway.ledger.take(bill)
            state["route"] = getattr(scope.get("route"), "path", "unknown")

    def _audited(self, scope: Scope, send: Send) -> Send:
        """Nothing goes out of which the audit log could not be written (audit.py)."""
        state, gateway = scope["state"], self._gateway

        async def audited(message: Message) -> None:
            accesses = done(state, message["status"]) if message["type"] == START else ()
            if accesses:
                write = partial(gateway.store.add_accesses, state["caller"].key, accesses)
                try:
                    await gateway.reads.read(write)
                except StoreError as error:
                    refused = await error_response(Request(scope), unlogged(accesses, error))
                    await refused(scope, _nothing, send)
                    raise ClientGone from None
            await send(message)

        return audited

    def _is_open(self, path: str) -> bool:
        """Whether no key is asked for in a header."""
        on = self._gateway.settings.dashboard
        return path.startswith(OPEN_PATHS) or (on and f"{path}/".startswith(f"{DASHBOARD}/"))

    async def _is_keyless(self) -> bool:
        with suppress(ApiError, StoreError):
            return await self._gateway.reads.read(partial(self._find, "")) is WITHOUT_KEYS
        return False

    async def _settle(self, bill: Bill) -> None:
        """Write what a payer with a limit has spent, before the end of the answer is told: the next
        request must find it.
        """
        if bill.limited and bill.spent:
            self._gateway.ledger.take(bill)
            with suppress(StoreError):  # it took too long, and goes on
                await self._gateway.reads.read(self._gateway.ledger.flush)

    async def _authorize(self, scope: Scope) -> None:
        """Find the caller. While the store is down, callers of the last minutes are still known."""
        try:
            unquote(scope["query_string"].decode(), errors="strict")
        except UnicodeDecodeError:
            raise ApiError(400, "the query is not UTF-8", code="invalid_request") from None
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        key = headers.get(b"x-api-key")  # as Anthropic's clients send it
        authorization = headers.get(b"authorization") or (f"Bearer {key}" if key else "")
        digest = hashlib.sha256(authorization.encode()).digest()
        find = partial(self._find, authorization)
        try:
            caller = self._known_callers[digest] = await self._gateway.reads.read(find)
        except StoreError as error:
            known = self._known_callers.get(digest)
            if known is None:
                raise
            self._telemetry.failed("keys", error)
            caller = UNVERIFIED if known is WITHOUT_KEYS else known
            if caller is UNVERIFIED and not get_route_path(scope).startswith(UPSTREAM_PATHS):
                raise StoreError("it is unknown whether a key is needed by now") from None
        except ApiError:
            self._known_callers.pop(digest, None)
            if authorization:  # a right key still passes: its client may share the address
                self._wrong_keys.check(address_of(scope))
            raise
        keyless = caller in (WITHOUT_KEYS, UNVERIFIED)
        if keyless or get_route_path(scope) == MCP_PATH:
            check_origin(scope, self._gateway.settings.cors_origins, keyless)
        await self._check_rate(caller.key)
        scope.setdefault("state", {})["caller"] = caller

    async def _check_rate(self, key: str) -> None:
        if not self._rates.passes(key):
            try:
                await self._gateway.reads.read(partial(self._rates.check, key))
            except StoreError as error:  # without the store nothing is refused
                self._telemetry.failed("rates", error)

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        most, seen = self._gateway.settings.max_body_bytes, 0
        too_large = f"the body has more than {most} bytes"
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > most:
            if not self._is_open(get_route_path(scope)):
                raise ApiError(413, too_large, code="body_too_large")
            seen = most  # the route that reads it says so: a page, if it is one

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise HTTPException(413, too_large)  # FastAPI lets this class through as it is
            return message

        return counted


def _cut(error: Exception) -> ConnectionCut:
    _log_bug(error)
    return ConnectionCut()


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _as_sent(scope: Scope) -> Scope:
    """Paths of users as they were sent: a decoded `%2F` would split an id (user_routes decodes).
    MCP's with a slash at its end, as clients write it, without.
    """
    if get_route_path(scope) == f"{MCP_PATH}/":
        return {**scope, "path": scope["path"].rstrip("/")}
    if get_route_path(scope).startswith("/v1/users/") and (raw := scope.get("raw_path")):
        return {**scope, "path": quote(raw, safe=string.printable)}
    return scope


def check_origin(scope: Scope, origins: Collection[str], keyless: bool) -> None:
    """Without keys only this machine's programs and pages are served: a foreign page reaches the
    server too, under a name of its own (DNS rebinding) or by a request across origins. MCP asks for
    a check of the origin with a key as well. `origins`: who else may call. Else `ApiError` 403.
    """
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    origin = headers.get(b"origin")
    foreign = origin is not None and not {"*", origin} & {*origins} and not is_local(origin)
    if foreign and not keyless:
        fix = "add it to the setting cors_origins"
        raise ApiError(403, f"pages of this origin may not call {MCP_PATH}: {fix}", code="foreign")
    if foreign or (keyless and not is_local(f"http://{headers.get(b'host') or 'localhost'}")):
        fix = "create a key (`hydra-llm keys create --admin`), or name the server localhost"
        raise ApiError(403, f"without keys only this machine is served: {fix}", code="foreign")


class RootPath:
    """Names the prefix of paths that a proxy may have removed: routes match with it and without."""

    def __init__(self, app: ASGIApp, *, path: str):
        self._app, self._path = app, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._path and scope["type"] == "http":
            scope = {**scope, "root_path": self._path}
        await self._app(scope, receive, send)


def is_local(url: str) -> bool:
    """Whether a URL's host is this machine by its name: localhost, or a loopback address."""
    with suppress(ValueError):
        host = (urlsplit(url).hostname or "").rstrip(".")
        if host == "localhost" or host.endswith(".localhost"):
            return True
        return ipaddress.ip_address(host).is_loopback
    return False


def address_of(scope: Scope) -> str:
    """Whose wrong keys are counted together: the client's address, behind a `proxy` the one that it
    tells; of IPv6 the network, of which one client may have all addresses.
    """
    client = scope.get("client")
    try:
        address = ipaddress.ip_address(client[0].partition("%")[0] if client else "")
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.ip_network((address, 64), strict=False))
        address = address.ipv4_mapped
    return str(address)


class RateLimiter:
    """A limit of requests per minute for each key: a token bucket in the store, from which a server
    takes what fills in a second at once. What it does not use in a second is lost.
    """

    def __init__(
        self, store: Store, per_minute: int | None, clock: Callable[[], float] = time.time
    ):
        self._store, self._per_minute, self._clock = store, per_minute, clock
        self._taken: LRUCache[str, tuple[int, float]] = LRUCache(LIMITED_KEYS)  # and until when
        self._lock = threading.Lock()

    def passes(self, key: str) -> bool:
        """Count a request, if that needs no store; else it has to `check`."""
        if self._per_minute is None:
            return True
        with self._lock:
            left, until = self._taken.get(key, (0, 0.0))
            passes = left > 0 and self._clock() < until
            if passes:
                self._taken[key] = left - 1, until
        return passes

    def check(self, key: str) -> None:
        """Count a request; raises `ApiError` 429 where there are too many. Blocks."""
        if self._per_minute is None or self.passes(key):
            return
        now, count = self._clock(), max(1, self._per_minute // 60)
        taken, wait = self._store.take_requests(key, self._per_minute, count, now)
        if not taken:
            headers = {"retry-after": str(math.ceil(wait))}
            message = f"more than {self._per_minute} requests a minute"
            raise ApiError(429, message, code="rate_limit_exceeded", headers=headers)
        with self._lock:
            left, until = self._taken.get(key, (0, 0.0))
            self._taken[key] = (left if now < until else 0) + taken - 1, now + TAKEN_SECONDS


class WrongKeys:
    """A limit per minute of wrong keys for each address, counted by this process alone: a token
    bucket. Any thread may call.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self._per_minute, self._clock = per_minute, clock
        self._left: LRUCache[str, tuple[float, float]] = LRUCache(LIMITED_KEYS)
        self._lock = threading.Lock()

    def check(self, address: str, *, count: bool = True) -> None:
        """Count a wrong key, unless not `count`; `ApiError` 429 where there were too many."""
        if not self._per_minute:  # no limit
            return
        now = self._clock()
        with self._lock:
            left, since = self._left.get(address, (float(self._per_minute), now))
            left = min(float(self._per_minute), left + (now - since) * self._per_minute / 60)
            if count:
                self._left[address] = (left - 1 if left >= 1 else left, now)
        if left < 1:
            wait = {"retry-after": str(math.ceil((1 - left) * 60 / self._per_minute))}
            message = f"more than {self._per_minute} wrong keys a minute"
            raise ApiError(429, message, code="rate_limit_exceeded", headers=wait)


async def error_response(http: Request, error: Exception) -> Json:
    """An error as the caller sees it: in OpenAI's shape, to Anthropic's clients in theirs, to those
    of MCP in that of JSON-RPC.
    """
    answer, path = as_api_error(error), get_route_path(http.scope)
    body = answer.rpc_body if path == MCP_PATH else answer.body
    if path.startswith("/v1/messages"):
        body = error_body(answer.status, answer.body)
    return Json(body, answer.status, headers=answer.headers)


def as_api_error(error: Exception) -> ApiError:
    """Any error as one that the caller is told; a bug is logged."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            place, message = _body_fault(error)
            return ApiError(400, message, param=place or None, code="invalid_request")
        case HTTPException(status_code=400):  # FastAPI could not decode the body
            message = "the body cannot be read: it must be JSON in UTF-8"
            return ApiError(400, message, code="invalid_request")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), headers=error.headers)
        case Overloaded():
            message = "more waits here than this machine can do: try again"
            return ApiError(503, message, code="overloaded")
        case StoreError():
            # A database's own error says why (a full disk), and no value; others may name a user.
            why = error if type(error) is StoreError else type(error).__name__
            log.error("the store failed: %s", why)
            message = "the store does not answer: nothing was changed, try again"
            return ApiError(503, message, code="store_unavailable")
        case _:
            _log_bug(error)
            return ApiError(500, "something went wrong here", code="internal_error")


def _body_fault(error: RequestValidationError) -> tuple[str, str]:
    """The field at fault, '' for the whole body, and what is wrong with it."""
    first = error.errors()[0]
    kind, where = first["type"], [part for part in first["loc"] if part != "body"]
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return "", f"the body is not valid JSON at character {where[0]}: {reason}"
    if first["loc"] == ("body",):
        unread = "the body is not read as JSON: send the header 'content-type: application/json'"
        return "", unread if isinstance(error.body, bytes) else "the body must be a JSON object"
    place = ".".join(map(str, where))
    return place, f"{place}: {first['msg']}"


def _log_bug(error: Exception) -> None:
    """Where it is, without its message, which may quote a user."""
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("a bug: %s\n%s", type(error).__name__, where)
