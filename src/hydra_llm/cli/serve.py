"""`hydra-llm serve`: the gateway."""

import contextlib
import json
import math
import signal
import socket
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from hydra_llm.cli import console
from hydra_llm.cli import options as opt
from hydra_llm.config import load_settings
from hydra_llm.errors import SettingsError, StoreError
from hydra_llm.extras import installed
from hydra_llm.llm.endpoint import without_userinfo
from hydra_llm.llm.registry import bare_llm

if TYPE_CHECKING:
    from hydra_llm.gateway.gateway import Gateway
    from hydra_llm.store.store import Store

KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep a connection: the server must not close one while a request arrives."""


@opt.with_option_sets
def serve(
    llm: opt.LLM,
    options: opt.GivenSettings,
    bundle: Annotated[Path | None, Option(help="A bundle; default: retrieval only.")] = None,
    store: opt.StoreURL = opt.DEFAULT_STORE,
    host: Annotated[str, Option(help="Address; beyond loopback a key is needed.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8000,
    log: Annotated[str | None, Option(help="Lines on stderr: text, json or off.")] = None,
) -> None:
    """Serve an OpenAI-compatible, personalizing endpoint. `--set` takes the gateway's settings.

    HYDRA_ADMIN_KEY is a key for all users; else `hydra-llm keys create` makes keys.
    """
    import uvicorn

    from hydra_llm.gateway.app import make_app
    from hydra_llm.gateway.auth import Access, admin_key_given
    from hydra_llm.gateway.embedded import open_upstream
    from hydra_llm.gateway.middleware import is_local
    from hydra_llm.gateway.request_log import logging_to_stderr
    from hydra_llm.gateway.settings import load_serve_settings

    flags = dict(options.pairs()) | ({"log": log} if log else {})
    settings = load_serve_settings(options.config, **flags)
    admin_key = admin_key_given()
    here = load_settings(file=options.config)
    listening = bound(host, port)  # before anything is loaded: the port may be taken
    name = f"[{host}]" if ":" in host else host
    local = is_local(f"http://{name}")
    # An endpoint is asked without the SDK; learning alone needs it, whose extra brings it.
    plain = llm.startswith("openai:") and find_spec("openai") is None
    model = None if plain else bare_llm(llm, here)
    upstream = open_upstream(llm, model, timeout=settings.upstream_timeout)
    _check_before_creation(store, bundle)
    with opt.open_store(store, settings.store_timeout, create=True) as opened:
        _check_keys(opened, host, local, admin_key)
        _check_bundle(opened, bundle)
        access = Access(local, admin_key)
        app = make_app(opened, upstream, settings, bundle, llm=model, here=here, access=access)
        config = uvicorn.Config(app, log_config=None, log_level="warning", access_log=False)
        config.timeout_keep_alive = KEEP_ALIVE_SECONDS
        if settings.drain is not None:
            config.timeout_graceful_shutdown = math.ceil(settings.drain)  # whole seconds
        server = uvicorn.Server(config)
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none
        if hangup and signal.getsignal(hangup) is not signal.SIG_IGN:  # which nohup sets
            # The terminal is gone: requests in flight end, as with SIGTERM.
            signal.signal(hangup, lambda *_: server.handle_exit(signal.SIGTERM, None))
        address = f"http://{name}:{listening.getsockname()[1]}/v1"
        _say_what_runs(address, app.state.gateway, opened.name, without_userinfo(llm))
        # uvicorn raises the signal again after the requests in flight have ended.
        with contextlib.suppress(KeyboardInterrupt), logging_to_stderr(settings.log):
            server.run([listening])
        console.say("stopped; requests in flight have ended")


def _say_what_runs(address: str, gateway: "Gateway", store: str, llm: str) -> None:
    """One line at the start."""
    parts = {
        "bundle": gateway.deployment.id[:12] or "none (records alone)",
        "gate": gateway.deployment.gate,
        "store": store,
        "upstream": llm,
        "extras": ", ".join(installed()) or "none",
    }
    if gateway.settings.log == "json":
        moment = datetime.now(UTC).isoformat(timespec="milliseconds")
        console.say(json.dumps({"time": moment, "message": "serving", "address": address, **parts}))
    else:
        told = "; ".join(f"{name} {value}" for name, value in parts.items())
        console.say(f"serving on {address}; {told}")


def _check_keys(store: "Store", host: str, local: bool, admin_key: str) -> None:
    """Without a key only this machine is served; the first start elsewhere makes one."""
    from hydra_llm.gateway.auth import make_key

    if admin_key or store.has_keys():
        return
    create = "`hydra-llm keys create --admin`"
    if local:
        accepted = "any key is accepted, from this machine only"
        console.say(f"no key exists: {accepted}; create one by {create}")
    elif store.created:
        secret = make_key(store, label="made at the first start", admin=True)[1]
        console.say(f"admin key, which is not shown again: {secret}")
    else:
        fix = f"run {create}, or set HYDRA_ADMIN_KEY"
        raise SettingsError(f"--host {host}: anyone could connect without a key: {fix}")


def _check_before_creation(store: str, bundle: Path | None) -> None:
    """No store is made for a bundle that cannot be served; one that is there may name another."""
    if bundle is None:
        return
    from hydra_llm.model.persistence import read_bundle  # needs torch: only with a bundle

    try:
        with opt.open_store(store, create=False):
            pass
    except StoreError:
        read_bundle(bundle)


def _check_bundle(store: "Store", bundle: Path | None) -> None:
    """The store's bundle takes precedence."""
    from hydra_llm.gateway.deployment import folder_of

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
