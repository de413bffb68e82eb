"""The gateway as an ASGI application, and what starts and ends with the server."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

from anyio.to_thread import run_sync
from fastapi import FastAPI, Response
from fastapi_offline import FastAPIOffline

from hydra_llm import __version__
from hydra_llm.config import Settings, load_settings
from hydra_llm.errors import HydraError
from hydra_llm.gateway import openai_routes, user_routes
from hydra_llm.gateway.deployment import folder_of, open_deployment
from hydra_llm.gateway.gateway import Gateway
from hydra_llm.gateway.jobs import Worker
from hydra_llm.gateway.middleware import AccessMiddleware, add_error_handlers
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.telemetry import Telemetry, log
from hydra_llm.gateway.timed_reads import TimedReads
from hydra_llm.gateway.upstream import Upstream
from hydra_llm.llm.base import ChatLLM
from hydra_llm.store.store import Store

WATCH_SECONDS = 1.0
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
    """The application. `bundle` is used until the store names one; `llm` labels candidates where a
    fit needs that; `here` has the settings that a bundle does not carry. Raises `BundleError` if
    there is no such bundle, `StoreError` if the store fails.
    """
    settings, telemetry = settings or ServeSettings(), Telemetry()
    active, reads = store.bundle(), TimedReads(settings.store_timeout)
    folder, here = folder_of(active) if active else bundle, here or load_settings()
    deployment = open_deployment(store, reads, folder, settings, here)
    gateway = Gateway(store, reads, upstream, settings, deployment, telemetry, active)
    worker = Worker(store, lambda: gateway.deployment, llm)

    about = {"title": "hydra-llm", "version": __version__}
    lifespan = partial(_lifespan, gateway, worker)
    # Its /docs loads nothing from elsewhere.
    app = FastAPIOffline(**about, lifespan=lifespan, redoc_url=None, static_url="/docs/static")
    app.state.gateway, app.state.worker = gateway, worker
    app.include_router(openai_routes.router)
    app.include_router(user_routes.router)
    _add_health(app, gateway)
    add_error_handlers(app)
    app.add_middleware(AccessMiddleware, gateway=gateway, on_loopback=on_loopback)
    return app


@asynccontextmanager
async def _lifespan(gateway: Gateway, worker: Worker, app: FastAPI) -> AsyncIterator[None]:
    worker.start()
    upstream = gateway.upstream
    tasks = [asyncio.create_task(_watch(gateway)), asyncio.create_task(_prune(gateway))]
    yield
    for task in tasks:
        task.cancel()
    await run_sync(worker.close)
    await run_sync(gateway.deployment.close)
    await upstream.aclose()


def _add_health(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health/liveness", tags=["health"])
    async def liveness() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/health/readiness", tags=["health"])
    async def readiness(response: Response) -> dict[str, str]:
        """The store answers; no LLM is asked."""
        try:
            await gateway.reads.read(gateway.store.bundle)
        except HydraError:
            response.status_code = 503
            return {"status": "the store does not answer"}
        return {"status": "ok"}

    @app.get("/metrics", tags=["health"], response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(gateway.telemetry.text(), media_type="text/plain; version=0.0.4")


async def _watch(gateway: Gateway) -> None:
    """Switch to the bundle that the store names; requests in flight end with their own."""
    store, reads, settings = gateway.store, gateway.reads, gateway.settings
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        try:
            active = await reads.read(store.bundle)
            if active is not None and active != gateway.active_bundle:
                old, parts = gateway.deployment, (folder_of(active), settings)
                new = await run_sync(open_deployment, store, reads, *parts, old.settings)
                gateway.deployment, gateway.active_bundle = new, active
                log.info("bundle %s is in use", new.id[:12])
                wait = settings.deadline + settings.upstream_timeout
                close = threading.Thread(target=old.close)
                asyncio.get_running_loop().call_later(wait, close.start)
        except Exception as error:  # tried again: its files may still be under way
            gateway.telemetry.failed("bundle", error)


async def _prune(gateway: Gateway) -> None:
    """Delete answered requests and ended jobs that are older than the retention."""
    while True:
        with suppress(HydraError):
            before = time.time() - gateway.settings.retention_days * DAY
            await run_sync(gateway.store.prune, before)
            await run_sync(gateway.store.truncate_log)
        await asyncio.sleep(PRUNE_SECONDS)
