"""The gateway as an ASGI application: who is let in, which errors go out, what starts and ends with
the server.
"""

import asyncio
import hashlib
import math
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import anyio
from cachetools import LRUCache, TTLCache
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from hydra_llm import __version__
from hydra_llm.config import Settings, load_settings
from hydra_llm.errors import HydraError, StoreError
from hydra_llm.gateway import openai_routes, user_routes
from hydra_llm.gateway.auth import ANYBODY, NOBODY, Caller, caller_of
from hydra_llm.gateway.batching import Overloaded
from hydra_llm.gateway.deployment import folder_of, open_deployment
from hydra_llm.gateway.gateway import Gateway
from hydra_llm.gateway.jobs import Worker
from hydra_llm.gateway.schemas import ApiError, Json
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.telemetry import Telemetry, log
from hydra_llm.gateway.timed_reads import TimedReads
from hydra_llm.gateway.upstream import Upstream, UpstreamError
from hydra_llm.llm.base import ChatLLM
from hydra_llm.store.store import Store

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN = ("/health/", "/metrics", "/docs", "/openapi.json")
"""Paths that need no key: they tell nothing about anybody."""
OF_UPSTREAM = ("/v1/chat/completions", "/v1/models")
WATCH_SECONDS = 1.0
REMEMBERED_SECONDS = 300.0
"""How long a caller is known while the store is down."""
KNOWN_CALLERS, PACED_KEYS = 10_000, 100_000
"""How many callers are known, and how many keys have a rate; the oldest go first."""
PRUNE_SECONDS = 600.0
DAY = 86400.0


def make_app(
    store: Store,
    upstream: Upstream,
    settings: ServeSettings | None = None,
    *,
    bundle: str | None = None,
    llm: ChatLLM | None = None,
    here: Settings | None = None,
    on_loopback: bool = True,
) -> FastAPI:
    """The application. `bundle` is used until the store says otherwise; `llm` labels candidates
    where a fit needs that; `here` tells what a bundle does not carry, by default as environment
    and file do.

    Raises:
        BundleError: there is no such bundle.
        StoreError: the store fails.
    """
    settings, observer = settings or ServeSettings(), Telemetry()
    wanted, reads = store.bundle(), TimedReads(settings.store_timeout)
    serving = open_deployment(
        store, reads, folder_of(wanted) if wanted else bundle, settings, here or load_settings()
    )
    gateway = Gateway(store, reads, upstream, settings, serving, observer)
    gateway.active_bundle = wanted
    worker = Worker(store, lambda: gateway.deployment, llm)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        tasks = [asyncio.create_task(_watch(gateway)), asyncio.create_task(_prune(gateway))]
        yield
        for task in tasks:
            task.cancel()
        await anyio.to_thread.run_sync(worker.close)
        await anyio.to_thread.run_sync(gateway.deployment.close)
        await upstream.aclose()

    # Its /docs loads nothing from elsewhere.
    app = FastAPIOffline(
        title="hydra-llm",
        version=__version__,
        lifespan=lifespan,
        redoc_url=None,
        static_url="/docs/static",
    )
    app.state.gateway, app.state.worker = gateway, worker
    app.include_router(openai_routes.router)
    app.include_router(user_routes.router)
    _add_health(app, store, reads, observer)
    _add_errors(app)
    app.add_middleware(
        Door,
        store=store,
        reads=reads,
        settings=settings,
        observer=observer,
        on_loopback=on_loopback,
    )
    return app


# ---- the door


class Cut(Exception):
    """Has the server cut the connection: half an answer must not look like a whole one. What it
    logs of this quotes nobody.
    """


class Door:
    """Lets in whoever may come in, counts, and keeps bodies within their size. ASGI itself, so that
    streams stay streams.
    """

    def __init__(
        self,
        app: Any,
        *,
        store: Store,
        reads: TimedReads,
        settings: ServeSettings,
        observer: Telemetry,
        on_loopback: bool,
    ):
        self._app, self._store, self._reads, self._settings = app, store, reads, settings
        self._observer, self._on_loopback = observer, on_loopback
        self._pace = Pace(settings.requests_per_minute)
        self._known_callers: TTLCache[bytes, Caller] = TTLCache(KNOWN_CALLERS, REMEMBERED_SECONDS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started = 500, False

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
            await send(message)

        scope = _undecoded(scope)
        self._observer.in_flight.inc()
        try:
            try:
                if not scope["path"].startswith(OPEN):
                    await self._let_in(scope)
                receive = self._limited(scope, receive)
            except (ApiError, StoreError) as error:
                await _error_response(error)(scope, receive, counted)
                return
            try:
                await self._app(scope, receive, counted)
            except Exception as error:
                self._observer.failed("request", error)
                if started:
                    _tell_bug(error)
                    raise Cut from None
                await _error_response(error)(scope, receive, counted)
        finally:
            self._observer.in_flight.dec()
            self._observer.request(getattr(scope.get("route"), "path", "unknown"), status)

    async def _let_in(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        caller = await self._caller(headers.get(b"authorization", b"").decode("latin-1"))
        if caller is NOBODY and not scope["path"].startswith(OF_UPSTREAM):
            raise StoreError("nobody can tell whether a key is needed by now")
        self._pace.check(caller.key)
        scope.setdefault("state", {})["caller"] = caller

    async def _caller(self, authorization: str) -> Caller:
        """Who it is. While the store is down, whoever was let in within the last minutes is let in
        again: no answer is lost for that.
        """
        digest = hashlib.sha256(authorization.encode()).digest()
        try:
            caller = await self._reads.read(
                partial(caller_of, self._store, authorization, on_loopback=self._on_loopback)
            )
        except StoreError as error:
            known = self._known_callers.get(digest)
            if known is None:
                raise
            self._observer.failed("keys", error)
            return NOBODY if known is ANYBODY else known
        except ApiError:
            self._known_callers.pop(digest, None)
            raise
        self._known_callers[digest] = caller
        return caller

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        most, seen = self._settings.max_body_bytes, 0
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > most:
            raise _too_large(most)

        async def counted() -> MutableMapping[str, Any]:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise HTTPException(
                    413, f"the body has more than {most} bytes"
                )  # FastAPI lets this class through as it is
            return message

        return counted


def _undecoded(scope: Scope) -> Scope:
    """With the path of a user as it was sent: a decoded `%2F` would end an id in its midst
    (users_api.py decodes).
    """
    raw = scope.get("raw_path")
    if not raw or not scope["path"].startswith("/v1/users/"):
        return scope
    return {**scope, "path": raw.decode("latin-1")}


class Pace:
    """How many requests a minute each key may make: a bucket that fills steadily."""

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = time.monotonic):
        self._per_minute, self._clock = per_minute, clock
        self._left: LRUCache[str, tuple[float, float]] = LRUCache(PACED_KEYS)

    def check(self, key: str) -> None:
        """Count a request.

        Raises:
            ApiError: 429, too many.
        """
        if self._per_minute is None:
            return
        now = self._clock()
        left, since = self._left.get(key, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - since) * self._per_minute / 60)
        self._left[key] = (left - 1 if left >= 1 else left, now)
        if left < 1:
            wait = {"retry-after": str(math.ceil((1 - left) * 60 / self._per_minute))}
            raise ApiError(
                429,
                f"more than {self._per_minute} requests a minute",
                code="rate_limit_exceeded",
                headers=wait,
            )


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body has more than {most} bytes", code="body_too_large")


# ---- errors, in OpenAI's shape


def _add_errors(app: FastAPI) -> None:
    async def told(_: Request, error: Exception) -> Response:
        return _error_response(error)

    for kind in (ApiError, UpstreamError, HydraError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, told)


def _error_response(error: Exception) -> Json:
    if isinstance(error, ApiError):
        return Json(error.body(), error.status, headers=error.headers)
    if isinstance(error, UpstreamError):
        return Json(error.body, error.status, headers=error.headers)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        made = ApiError(
            400, f"{place or 'body'}: {first['msg']}", param=place or None, code="invalid_request"
        )
    elif isinstance(error, HTTPException):
        made = ApiError(error.status_code, str(error.detail))
    elif isinstance(error, Overloaded):
        made = ApiError(
            503, "more waits here than this machine can do: try again", code="overloaded"
        )
    elif isinstance(error, StoreError):
        log.error("the store failed: %s", type(error).__name__)
        made = ApiError(
            503,
            "the store does not answer: nothing was changed, try again",
            code="store_unavailable",
        )
    else:
        _tell_bug(error)
        made = ApiError(500, "something went wrong here", code="internal_error")
    return Json(made.body(), made.status)


def _tell_bug(error: Exception) -> None:
    """Where it is, without its message, which may quote somebody."""
    log.error(
        "a bug: %s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__))
    )


# ---- health


def _add_health(app: FastAPI, store: Store, reads: TimedReads, observer: Telemetry) -> None:
    @app.get("/health/liveness", tags=["health"])
    async def liveness() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/health/readiness", tags=["health"])
    async def readiness(response: Response) -> dict[str, str]:
        """The store answers; no LLM is asked."""
        try:
            await reads.read(store.bundle)
        except HydraError:
            response.status_code = 503
            return {"status": "the store does not answer"}
        return {"status": "ok"}

    @app.get("/metrics", tags=["health"], response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(observer.text(), media_type="text/plain; version=0.0.4")


# ---- what goes on beside the requests


async def _watch(gateway: Gateway) -> None:
    """Switch to the bundle that the store names; requests in flight end with the one that they
    began with.
    """
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        try:
            wanted = await gateway.reads.read(gateway.store.bundle)
            if wanted is not None and wanted != gateway.active_bundle:
                opened = partial(
                    open_deployment,
                    gateway.store,
                    gateway.reads,
                    folder_of(wanted),
                    gateway.settings,
                    gateway.deployment.settings,
                )
                new = await anyio.to_thread.run_sync(opened)
                old, gateway.deployment, gateway.active_bundle = gateway.deployment, new, wanted
                log.info("bundle %s is in use", new.id[:12])
                asyncio.get_running_loop().call_later(
                    gateway.settings.deadline + gateway.settings.upstream_timeout,
                    threading.Thread(target=old.close).start,
                )
        except Exception as error:  # tried again: its files may still be under way
            gateway.telemetry.failed("bundle", error)


async def _prune(gateway: Gateway) -> None:
    """Forget answered requests that nobody may comment on any more."""
    while True:
        with suppress(HydraError):
            before = time.time() - gateway.settings.retention_days * DAY
            await anyio.to_thread.run_sync(partial(gateway.store.delete_requests, before))
            await anyio.to_thread.run_sync(partial(gateway.store.delete_jobs, before))
            await anyio.to_thread.run_sync(gateway.store.truncate_log)
        await asyncio.sleep(PRUNE_SECONDS)
