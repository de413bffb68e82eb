"""`hydra-llm serve`: the gateway."""

import contextlib
import ipaddress
import math
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from hydra_llm.cli import console
from hydra_llm.cli import options as opt
from hydra_llm.config import load_settings
from hydra_llm.errors import SettingsError
from hydra_llm.llm.registry import bare_llm

if TYPE_CHECKING:
    from hydra_llm.store.store import Store

KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep a connection: the server must not close one while a request arrives."""


@opt.with_option_sets
def serve(
    llm: opt.LLM,
    options: opt.GivenSettings,
    bundle: Annotated[Path | None, Option(help="A bundle; default: retrieval only.")] = None,
    store: opt.StoreURL = opt.DEFAULT_STORE,
    host: Annotated[str, Option(help="Address; beyond loopback a key must exist.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8000,
) -> None:
    """Serve an OpenAI-compatible, personalizing endpoint. `--set` takes the gateway's settings."""
    import uvicorn

    from hydra_llm.gateway.app import make_app
    from hydra_llm.gateway.embedded import open_upstream
    from hydra_llm.gateway.settings import load_serve_settings

    settings = load_serve_settings(options.config, **dict(options.pairs()))
    here = load_settings(file=options.config)
    listening = bound(host, port)  # before anything is loaded: the port may be taken
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    with opt.open_store(store, settings.store_timeout, create=True) as opened:
        _check_store(opened, host, local, bundle)
        # An endpoint is asked without the SDK; learning alone needs it, whose extra brings it.
        plain = llm.startswith("openai:") and find_spec("openai") is None
        model = None if plain else bare_llm(llm, here)
        upstream = open_upstream(llm, model, timeout=settings.upstream_timeout)
        app = make_app(
            opened, upstream, settings, bundle=bundle, llm=model, here=here, on_loopback=local
        )
        name = f"[{host}]" if ":" in host else host
        config = uvicorn.Config(app, log_level="warning", access_log=False)
        config.timeout_keep_alive = KEEP_ALIVE_SECONDS
        if settings.drain is not None:
            config.timeout_graceful_shutdown = math.ceil(settings.drain)  # whole seconds
        console.say(f"serving on http://{name}:{listening.getsockname()[1]}/v1")
        # uvicorn raises the signal again after the requests in flight have ended.
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run([listening])
        console.say("stopped; requests in flight have ended")


def _check_store(store: "Store", host: str, local: bool, bundle: Path | None) -> None:
    """Without a key only this machine is served. The store's bundle takes precedence."""
    from hydra_llm.gateway.deployment import folder_of

    if not store.has_keys():
        create = "`hydra-llm keys create --admin`"
        if not local:
            problem = "anyone could connect without a key"
            raise SettingsError(f"--host {host}: {problem}: run {create} first")
        accepted = "any key is accepted, from this machine only"
        console.say(f"no key exists: {accepted}; create one by {create}")
    chosen = store.bundle()
    if bundle and chosen and folder_of(chosen).resolve() != bundle.resolve():
        reason = f"`hydra-llm bundles use` set {folder_of(chosen)} for this store"
        console.say(f"--bundle {bundle} is ignored: {reason}")


def bound(host: str, port: int) -> socket.socket:
    """A listening socket: clients that connect before the server is up wait for it."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # asyncio sets TCP_NODELAY only if the protocol is named.
        server = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as asyncio does
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
        server.listen(2048)
    except OSError as error:
        taken = f"--host {host} --port {port}: {error.strerror or error}"
        raise SettingsError(f"{taken}: choose another, --port 0 picks a free one") from None
    return server
