"""`hydra-llm serve`: the gateway."""

import contextlib
import ipaddress
import math
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from hydra_llm.cli import console
from hydra_llm.cli.options import (
    DEFAULT_STORE,
    LLM,
    GivenSettings,
    StoreURL,
    open_store,
    with_option_sets,
)

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

    from hydra_llm.gateway.settings import ServeSettings
    from hydra_llm.store.store import Store

KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep a connection: the server must not close one while a request arrives."""


@with_option_sets
def serve(
    llm: LLM,
    options: GivenSettings,
    bundle: Annotated[
        Path | None, Option(help="A learned bundle; without it, retrieval only.")
    ] = None,
    store: StoreURL = DEFAULT_STORE,
    host: Annotated[
        str, Option(help="Address to listen on; beyond loopback a key must exist.")
    ] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8000,
) -> None:
    """Serve an OpenAI-compatible endpoint with personalized answers. `--set` takes the gateway's
    settings.
    """
    import uvicorn

    from hydra_llm.config import load_settings
    from hydra_llm.gateway.app import make_app
    from hydra_llm.gateway.embedded import open_upstream
    from hydra_llm.gateway.settings import load_serve_settings
    from hydra_llm.llm.registry import bare_llm

    settings = load_serve_settings(options.config, **dict(options.pairs()))
    here = load_settings(file=options.config)
    listening = bound(host, port)  # before anything is loaded: the port may be taken
    inside = is_loopback(host)
    with open_store(store, settings.store_timeout) as found:
        _check_keys(found, host, inside)
        _check_bundle(found, bundle)
        model = bare_llm(llm, here)
        app = make_app(
            found,
            open_upstream(llm, model, timeout=settings.upstream_timeout),
            settings,
            bundle=str(bundle) if bundle else None,
            llm=model,
            here=here,
            on_loopback=inside,
        )
        name = f"[{host}]" if ":" in host else host
        console.say(f"serving on http://{name}:{listening.getsockname()[1]}/v1")
        # uvicorn raises the signal again after the requests in flight have ended.
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(_server_config(app, settings)).run([listening])
        console.say("stopped; requests in flight have ended")


def _check_keys(store: "Store", host: str, inside: bool) -> None:
    """Without a key only this machine is served.

    Raises:
        SettingsError: another address without a key.
    """
    from hydra_llm.errors import SettingsError

    if store.has_keys():
        return
    if not inside:
        raise SettingsError(
            f"--host {host}: anyone could connect without a key: run `hydra-llm keys create"
            " --admin` first"
        )
    console.say(
        "no key exists: any key is accepted, from this machine only; create one by `hydra-llm keys"
        " create --admin`"
    )


def _check_bundle(store: "Store", bundle: Path | None) -> None:
    """Say if the store names another bundle, which is then used."""
    from hydra_llm.gateway.deployment import folder_of

    chosen = store.bundle()
    if bundle and chosen and Path(folder_of(chosen)).resolve() != bundle.resolve():
        console.say(
            f"--bundle {bundle} is ignored: `hydra-llm bundles use` set {folder_of(chosen)} for"
            " this store"
        )


def _server_config(app: "ASGIApp", settings: "ServeSettings") -> "uvicorn.Config":
    import uvicorn

    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        # uvicorn takes whole seconds
        timeout_graceful_shutdown=None if settings.drain is None else math.ceil(settings.drain),
    )


def bound(host: str, port: int) -> socket.socket:
    """A listening socket: clients that connect before the server is up wait for it.

    Raises:
        SettingsError: the address is not available.
    """
    from hydra_llm.errors import SettingsError

    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # asyncio sets TCP_NODELAY only if the protocol is named.
        found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as asyncio does
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(2048)
    except OSError as error:
        raise SettingsError(
            f"--host {host} --port {port}: {error.strerror or error}: choose another,"
            " --port 0 picks a free one"
        ) from None
    return found


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
