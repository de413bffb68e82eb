"""`hydra-llm serve`: the gateway."""

import json
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from hydra_llm.cli import console
from hydra_llm.cli import options as opt
from hydra_llm.config import load_settings
from hydra_llm.errors import SettingsError, StoreError
from hydra_llm.extras import installed, require
from hydra_llm.llm.endpoint import without_userinfo
from hydra_llm.llm.prices import load_prices

if TYPE_CHECKING:
    from hydra_llm.store.store import Store


@opt.with_option_sets
def serve(
    llm: opt.LLM,
    options: opt.GivenSettings,
    bundle: Annotated[Path | None, Option(help="A bundle; default: retrieval only.")] = None,
    store: opt.StoreURL = opt.DEFAULT_STORE,
    host: Annotated[str, Option(help="Address; beyond loopback a key is needed.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8000,
    private: opt.Private = False,
    workers: Annotated[int | None, Option(help="Worker processes on the one port.")] = None,
    tls_cert: Annotated[Path | None, Option(help="PEM certificate with its chain: HTTPS.")] = None,
    tls_key: Annotated[Path | None, Option(help="PEM key of --tls-cert.")] = None,
    proxy: Annotated[
        str | None, Option(metavar="IP,...", help="Reverse proxies whose X-Forwarded-* count.")
    ] = None,
    root_path: Annotated[
        str | None, Option(help="Prefix of paths behind a proxy, as /llm.")
    ] = None,
    log: Annotated[str | None, Option(help="Lines on stderr: text, json or off.")] = None,
) -> None:
    """Serve an OpenAI-compatible, personalizing endpoint. `--set` takes the gateway's settings.

    HYDRA_ADMIN_KEY is a key for all users; else `hydra-llm keys create` makes keys.
    """
    from hydra_llm.gateway.auth import SAFE_KEY, Access, admin_key_given
    from hydra_llm.gateway.middleware import is_local
    from hydra_llm.gateway.request_log import logging_to_stderr
    from hydra_llm.gateway.server import Service, Workers, check_tls, run_app
    from hydra_llm.gateway.settings import load_serve_settings

    flags = {"workers": workers, "tls_cert": tls_cert, "tls_key": tls_key, "proxy": proxy}
    flags |= {"root_path": root_path, "log": log, "private": private or None}
    given = {name: value for name, value in flags.items() if value is not None}
    settings = load_serve_settings(options.config, **dict(options.pairs()) | given)
    check_tls(settings)
    if settings.traces == "otlp":
        require("otel", "traces=otlp")
    admin_key = admin_key_given()
    if 0 < len(admin_key) < SAFE_KEY:
        fix = "take a random one, as of `openssl rand -hex 32`"
        console.say(f"warning: HYDRA_ADMIN_KEY has fewer than {SAFE_KEY} characters: {fix}")
    listening = bound(host, port)  # before anything is loaded: the port may be taken
    name = f"[{host}]" if ":" in host else host
    # Whoever reaches a proxy reaches the server behind it.
    local = is_local(f"http://{name}") and not settings.proxy
    here = load_settings(file=options.config)
    load_prices(here.prices)
    service = Service(llm, store, settings, bundle, here, Access(local, admin_key))
    upstream, _ = service.open_llm()  # before a store is made: there may be none
    _check_before_creation(store, bundle)
    with opt.open_store(store, settings.store_timeout, create=True) as opened:
        place = f"--proxy {','.join(settings.proxy)}" if settings.proxy else f"--host {host}"
        _check_keys(opened, place, local, admin_key)
        _check_bundle(opened, bundle)
        scheme = "https" if settings.tls_cert else "http"
        address = f"{scheme}://{name}:{listening.getsockname()[1]}{settings.root_path}/v1"

        def started(serves: Mapping[str, str]) -> None:
            model = getattr(upstream, "model", llm)  # of an embedded one, for requests
            spec = without_userinfo(llm) + f" (model {model})" * (model != llm)
            told = {**serves, "store": opened.name, "upstream": spec}
            _say_what_runs(address, told, as_json=settings.log == "json")

        with logging_to_stderr(settings.log):
            if settings.workers == 1:
                run_app(service.app(opened), listening, started)
            else:
                opened.close()  # each worker has connections of its own
                Workers(service, listening).run(started)
        console.say("stopped; requests in flight have ended")


def _say_what_runs(address: str, serves: Mapping[str, str], *, as_json: bool) -> None:
    """One line at the start."""
    parts = {**serves, "extras": ", ".join(installed()) or "none"}
    if as_json:
        moment = datetime.now(UTC).isoformat(timespec="milliseconds")
        console.say(json.dumps({"time": moment, "message": "serving", "address": address, **parts}))
    else:
        told = "; ".join(f"{name} {value}" for name, value in parts.items())
        console.say(f"serving on {address}; {told}")


def _check_keys(store: "Store", place: str, local: bool, admin_key: str) -> None:
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
        raise SettingsError(f"{place}: anyone could connect without a key: {fix}")


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
