"""What load balancers and orchestrators ask: alive, ready, figures. Needs no key."""

import asyncio
import time

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response

from hydra_llm.errors import HydraError
from hydra_llm.gateway.gateway import Gateway
from hydra_llm.gateway.upstream import UpstreamError

CHECK_SECONDS = 10.0  # how long a check of a write and of the upstream counts
PROBE_SECONDS = 5.0  # how long each of the two may take
UNREACHABLE = (502, 503, 504)  # any other answer, such as 404 for the list of models, is one
router = APIRouter(tags=["health"])


class Readiness:
    """Whether the store takes writes and the upstream answers; beside the requests' own path."""

    def __init__(self, gateway: Gateway):
        self._gateway, self._lock = gateway, asyncio.Lock()
        self._fault, self._until = "", 0.0

    async def fault(self) -> str:
        """Why this server is not ready, or ''."""
        store = self._gateway.store
        try:
            await self._gateway.reads.read(store.bundle)
        except HydraError:
            return "the store does not answer"
        async with self._lock:  # one check for all who ask
            if time.monotonic() >= self._until:
                self._fault = await self._check()
                self._until = time.monotonic() + CHECK_SECONDS
            return self._fault

    async def _check(self) -> str:
        try:
            with anyio.fail_after(PROBE_SECONDS):
                await run_sync(self._gateway.store.check_write, abandon_on_cancel=True)
        except (HydraError, TimeoutError):
            return "the store takes no writes"
        try:
            with anyio.fail_after(PROBE_SECONDS):
                await self._gateway.upstream.models()
        except TimeoutError:
            return "the upstream does not answer"
        except UpstreamError as error:
            return "the upstream does not answer" if error.status in UNREACHABLE else ""
        return ""


@router.get("/health/liveness")
async def liveness() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/health/readiness")
async def readiness(http: Request, response: Response) -> dict[str, str]:
    """The store answers and takes writes, and the upstream answers; no LLM is asked."""
    fault = await http.app.state.readiness.fault()
    if fault:
        response.status_code = 503
    return {"status": fault or "ok"}


@router.get("/metrics", response_class=Response)
async def metrics(http: Request) -> Response:
    """Figures for Prometheus."""
    figures = await run_sync(http.app.state.gateway.telemetry.figures)
    return Response(figures, media_type="text/plain; version=0.0.4")
