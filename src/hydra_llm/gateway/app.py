"""The gateway as an ASGI application, and what starts and ends with the server."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from anyio.to_thread import run_sync
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from hydra_llm import __version__
from hydra_llm.config import Settings, load_settings
from hydra_llm.errors import HydraError
from hydra_llm.gateway import (
    admin_routes,
    forward,
    health,
    mcp_routes,
    message_routes,
    next_question,
    openai_routes,
    record_routes,
    response_routes,
    spend_routes,
    user_routes,
)
from hydra_llm.gateway.activity import ACTIVITY_DAYS
from hydra_llm.gateway.auth import Access
from hydra_llm.gateway.deployment import folder_of, open_deployment
from hydra_llm.gateway.drift import check_detector
from hydra_llm.gateway.gateway import Gateway
from hydra_llm.gateway.middleware import ERRORS, AccessMiddleware, RootPath, error_response
from hydra_llm.gateway.next_question import read_pool
from hydra_llm.gateway.pictures import open_pictures
from hydra_llm.gateway.request_log import RequestLog
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.spend import FLUSH_SECONDS, Ledger, minute_of
from hydra_llm.gateway.state_metrics import StateCollector
from hydra_llm.gateway.store_training import Worker
from hydra_llm.gateway.telemetry import Telemetry, log
from hydra_llm.gateway.texts import Embedder
from hydra_llm.gateway.tracing import Tracing, open_tracing
from hydra_llm.gateway.upstream import Upstream
from hydra_llm.gateway.user_cache import TimedReads
from hydra_llm.llm.base import ChatLLM
from hydra_llm.llm.prices import load_prices
from hydra_llm.model.feature_cache import erase_features
from hydra_llm.store.removals import Listener
from hydra_llm.store.store import Store

WATCH_SECONDS = 0.5  # so that a deletion reaches every server within a second
PRUNE_SECONDS = 600.0
COUNT_SECONDS = 10.0
DAY = 86400.0

ABOUT_USERS = (record_routes, user_routes, next_question, admin_routes, spend_routes, mcp_routes)
ROUTES = (openai_routes, response_routes, message_routes, *ABOUT_USERS, health, forward)


def make_app(
    store: Store,
    upstream: Upstream,
    settings: ServeSettings | None = None,
    bundle: Path | None = None,
    *,
    llm: ChatLLM | None = None,
    here: Settings | None = None,
    access: Access | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The application. `bundle` is used until the store names one; `llm` labels candidates where a
    fit needs that; `here` has the settings that a bundle does not carry; `access` is by default
    that of a server on loopback, `tracing` that of the settings. Raises `BundleError` if there is
    no such bundle, `StoreError` if the store fails.
    """
    settings = settings or ServeSettings()
    check_detector(wanted=settings.detect_changes)
    active, reads = store.bundle(), TimedReads(settings.store_timeout)
    here, folder = here or load_settings(), folder_of(active) if active else bundle
    deployment = open_deployment(store, reads, folder, settings, here)
    telemetry = Telemetry(tracing or open_tracing(settings.traces))
    ledger = Ledger(store, load_prices(here.prices), telemetry)
    gateway = Gateway(store, reads, upstream, settings, deployment, telemetry, ledger, active)
    gateway.pictures = open_pictures(settings, here.cache, ledger, telemetry)
    telemetry.state.register(StateCollector(gateway))
    about = {"title": "hydra-llm", "version": __version__, "static_url": "/docs/static"}
    app = FastAPIOffline(**about, lifespan=_lifespan, redoc_url=None)  # /docs from here alone
    app.state.bundle = bundle  # until the store names one
    app.state.gateway, app.state.readiness = gateway, health.Readiness(gateway)
    app.state.worker = Worker(store, lambda: gateway.deployment, llm, ledger)
    app.state.embedder = Embedder()
    app.state.question_pool = read_pool(settings.question_pool)
    _add_dashboard(app, gateway, access or Access())
    for module in ROUTES:
        app.include_router(module.router)
    for kind in ERRORS:
        app.add_exception_handler(kind, error_response)
    _add_middleware(app, gateway, access or Access())
    return app


def _add_dashboard(app: FastAPI, gateway: Gateway, access: Access) -> None:
    if gateway.settings.dashboard:
        from hydra_llm.gateway import ui  # what needs no dashboard needs no templates

        ui.add_to(app, gateway.store, access, gateway.settings)


def _add_middleware(app: FastAPI, gateway: Gateway, access: Access) -> None:
    """From the innermost to the outermost."""
    settings = gateway.settings
    app.add_middleware(AccessMiddleware, gateway=gateway, access=access)
    if settings.cors_origins:  # outside of it: a preflight has no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-hydra-personalized", "x-hydra-request-id", "retry-after"],
        )
    app.add_middleware(RequestLog, telemetry=gateway.telemetry)
    app.add_middleware(RootPath, path=settings.root_path)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    gateway, worker = app.state.gateway, app.state.worker
    upstream = gateway.upstream
    worker.thread.start()
    work = (_watch, _prune, _flush, _count)
    tasks = [asyncio.create_task(do(gateway)) for do in work]
    loop = asyncio.get_running_loop()
    listener = Listener(gateway.store, partial(loop.call_soon_threadsafe, gateway.told.set))
    yield
    await run_sync(listener.close)
    for task in tasks:
        task.cancel()
    await run_sync(worker.close)
    await run_sync(gateway.deployment.batcher.close)
    await run_sync(gateway.telemetry.activity.keep, gateway.store)
    await run_sync(gateway.ledger.flush)
    await run_sync(gateway.telemetry.tracing.close)
    if gateway.pictures is not None:
        await gateway.pictures.aclose()
    await upstream.aclose()


async def _watch(gateway: Gateway) -> None:
    """Look at what the store tells all servers, every `WATCH_SECONDS` and when it says so: forget
    what others have deleted, and switch to the bundle that it names.
    """
    seen = None
    while True:
        with suppress(TimeoutError):
            await asyncio.wait_for(gateway.told.wait(), WATCH_SECONDS)
        gateway.told.clear()
        part = "bundle"
        try:
            watched = await gateway.reads.read(gateway.store.watched)
            if watched.removal != seen:
                part = "removal"
                await gateway.deployment.forget_removed()
                seen, part = watched.removal, "bundle"
            if watched.bundle not in (None, gateway.active_bundle):
                await _switch(gateway, str(watched.bundle))
        except Exception as error:  # tried again: a bundle's files may still be under way
            gateway.telemetry.failed(part, error)


async def _switch(gateway: Gateway, active: str) -> None:
    """Answer with another bundle; requests in flight end with their own."""
    store, settings, old = gateway.store, gateway.settings, gateway.deployment
    folder, here = folder_of(active), old.pipeline.settings
    new = await run_sync(open_deployment, store, gateway.reads, folder, settings, here)
    gateway.deployment, gateway.active_bundle = new, active
    log.info("bundle %s is in use", new.id[:12])
    wait = settings.deadline + settings.upstream_timeout
    close = threading.Thread(target=old.batcher.close)
    asyncio.get_running_loop().call_later(wait, close.start)


async def _count(gateway: Gateway) -> None:
    """Add what happened here to the figures of all servers."""
    while True:
        await asyncio.sleep(COUNT_SECONDS)
        await run_sync(gateway.telemetry.activity.keep, gateway.store)


async def _prune(gateway: Gateway) -> None:
    """Delete answered requests and ended jobs that are older than the retention."""
    while True:
        with suppress(HydraError):
            before = time.time() - gateway.settings.retention_days * DAY
            await run_sync(gateway.store.prune, before)
            await run_sync(gateway.store.prune_activity, time.time() - ACTIVITY_DAYS * DAY)
            await run_sync(_prune_spend, gateway)
            audited = time.time() - gateway.settings.audit_days * DAY
            await run_sync(gateway.store.prune_accesses, audited)
            await run_sync(partial(gateway.store.erase, at_once=0))
            cache = gateway.deployment.pipeline.settings.cache
            await run_sync(partial(erase_features, cache / "features.sqlite", at_once=0))
        await asyncio.sleep(PRUNE_SECONDS)


def _prune_spend(gateway: Gateway) -> None:
    now = datetime.now(UTC)
    last = now - timedelta(days=1)  # a server whose clock is behind adds to it yet
    gateway.store.prune_totals(f"{last:%Y-%m-%d}", f"{last:%Y-%m}", minute_of(now, 5))
    oldest = now - timedelta(days=gateway.settings.spend_days)
    gateway.store.forget_spenders(f"{oldest:%Y-%m-%d}")


async def _flush(gateway: Gateway) -> None:
    """Write what was spent by those who have no limit."""
    while True:
        await asyncio.sleep(FLUSH_SECONDS)
        try:
            await run_sync(gateway.ledger.flush)
        except Exception as error:  # the next sums must be written all the same
            gateway.telemetry.failed("spend", error)
