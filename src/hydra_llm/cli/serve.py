"""`hydra-llm serve`, `keys` and `bundles`: the gateway and who may use it."""

import contextlib
import ipaddress
import math
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hydra_llm.cli import console
from hydra_llm.cli.options import LLM, AsJson, Config, Set, given
from hydra_llm.cli.store import opened

if TYPE_CHECKING:
    from hydra_llm.store.values import Key

STORE = "sqlite:///hydra-llm.db"
URL = Annotated[
    str, typer.Option("--store", help="sqlite:///FILE, or postgresql+psycopg://USER@HOST/DATABASE.")
]

keys_app = typer.Typer(add_completion=False, no_args_is_help=True)
bundles_app = typer.Typer(add_completion=False, no_args_is_help=True)


def serve(
    llm: LLM,
    bundle: Annotated[
        Path | None, typer.Option(help="A learned bundle; without it records alone personalize.")
    ] = None,
    store: URL = STORE,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback only once there is a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    config: Config = None,
    set_: Set = None,
) -> None:
    """Serve an OpenAI-compatible endpoint whose answers are each user's own. `--set` takes the
    gateway's settings.
    """
    import uvicorn

    from hydra_llm.config import load_settings
    from hydra_llm.errors import SettingsError
    from hydra_llm.gateway.app import make_app
    from hydra_llm.gateway.deployment import folder_of
    from hydra_llm.gateway.settings import load_serve_settings
    from hydra_llm.gateway.upstream import open_upstream
    from hydra_llm.llm.registry import bare_llm

    settings, here = load_serve_settings(config, **given(set_)), load_settings(file=config)
    listening = bound(host, port)  # first: a port that is taken is told before anything is loaded
    inside = is_loopback(host)
    with opened(store, settings.store_timeout) as found:
        if not found.has_keys():
            if not inside:
                raise SettingsError(
                    f"--host {host}: others could come in without a key: run `hydra-llm keys create"
                    " --admin` first"
                )
            console.say(
                "no key was made yet: any key is taken, from this machine alone; `hydra-llm keys"
                " create --admin` changes that"
            )
        if (
            bundle
            and (chosen := found.bundle())
            and Path(folder_of(chosen)).resolve() != bundle.resolve()
        ):
            console.say(
                f"--bundle {bundle} is not used: `hydra-llm bundles use` gave this store"
                f" {folder_of(chosen)}"
            )
        model = bare_llm(llm, here)
        upstream = open_upstream(llm, model, timeout=settings.upstream_timeout)
        app = make_app(
            found,
            upstream,
            settings,
            bundle=str(bundle) if bundle else None,
            llm=model,
            here=here,
            on_loopback=inside,
        )
        server = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            # longer than clients keep a connection: who closes first must not be the server, amid a
            # request
            timeout_keep_alive=75,
            timeout_graceful_shutdown=(
                None if settings.drain is None else math.ceil(settings.drain)
            ),  # it takes whole seconds
        )
        console.say(
            "serving on"
            f" http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/v1"
        )
        with contextlib.suppress(
            KeyboardInterrupt
        ):  # uvicorn has let the requests in flight end, and raises the signal again
            uvicorn.Server(server).run([listening])
        console.say("stopped; requests in flight have ended")


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens at an address: whoever connects before the server is up waits for it.

    Raises:
        SettingsError: the address cannot be had.
    """
    from hydra_llm.errors import SettingsError

    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Named as TCP, which asyncio looks at before it sends small pieces at once (TCP_NODELAY).
        found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as asyncio has it
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(2048)
    except OSError as error:
        raise SettingsError(
            f"--host {host} --port {port}: {error.strerror or error}: take another, --port 0 takes"
            " a free one"
        ) from None
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@keys_app.command("create")
def create_key(
    user: Annotated[
        list[str] | None, typer.Option(help="A user for whom the key may speak; may be repeated.")
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="The key speaks for all users.")] = False,
    label: Annotated[str, typer.Option(help="What it is for.")] = "",
    store: URL = STORE,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it: it is shown this once."""
    from hydra_llm.errors import SettingsError
    from hydra_llm.gateway.auth import make_key

    if bool(user) == admin:
        raise SettingsError("name the users (--user U) or give --admin")
    with opened(store) as found:
        key, secret = make_key(found, label=label, admin=admin, users=user or ())
    console.emit({**_row(key), "key": secret} if as_json else secret, as_json)


@keys_app.command("list")
def list_keys(store: URL = STORE, as_json: AsJson = False) -> None:
    """List the keys, without their secrets, which nobody has."""
    with opened(store) as found:
        console.emit([_row(key) for key in found.keys()], as_json)  # noqa: SIM118


@keys_app.command("revoke")
def revoke_key(
    id: Annotated[str, typer.Argument(help="The key's id, as `keys list` shows it.")],
    store: URL = STORE,
) -> None:
    """Make a key useless from the next request on."""
    from hydra_llm.errors import SettingsError

    with opened(store) as found:
        if not found.revoke_key(id):
            raise SettingsError(f"no key '{id}': see `hydra-llm keys list`")
    console.say(f"key {id} is revoked")


@bundles_app.command("use")
def use_bundle(
    bundle: Annotated[Path, typer.Argument(help="Folder of a learned bundle.")], store: URL = STORE
) -> None:
    """Have all servers of a store answer with this bundle; requests in flight end with the one that
    they began with.
    """
    from hydra_llm.gateway.deployment import named
    from hydra_llm.model.persistence import read_bundle

    weights = read_bundle(bundle).config["files"]["weights.safetensors"]["sha256"]
    with opened(store) as found:
        found.set_bundle(named(bundle.resolve(), weights))
    console.say(
        f"servers of this store take {bundle} within a second or two; users' heads are fitted by"
        " POST /v1/users/ID/fit"
    )


@bundles_app.command("show")
def show_bundle(store: URL = STORE, as_json: AsJson = False) -> None:
    """Which bundle servers of a store were told to use."""
    with opened(store) as found:
        console.emit({"bundle": found.bundle()}, as_json)


def _row(key: "Key") -> dict[str, Any]:
    users = "all" if key.admin else ", ".join(key.users)
    return {
        "id": key.id,
        "users": users,
        "label": key.label,
        "created": int(key.created),
        "revoked": key.revoked is not None,
    }
