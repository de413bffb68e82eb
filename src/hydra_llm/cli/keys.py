"""`hydra-llm keys`: the gateway's API keys."""

from typing import Annotated, Any

import typer
from typer import Argument, Option

from hydra_llm.cli import console
from hydra_llm.cli.options import DEFAULT_STORE, AsJson, StoreURL, open_store
from hydra_llm.errors import SettingsError
from hydra_llm.store.values import Key

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command("create")
def create(
    user: Annotated[list[str] | None, Option(help="Id of the key's user; repeatable.")] = None,
    admin: Annotated[bool, Option("--admin", help="The key may act for all users.")] = False,
    label: Annotated[str, Option(help="A description.")] = "",
    store: StoreURL = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Create a key and print it; it cannot be shown again."""
    from hydra_llm.gateway.auth import make_key

    if bool(user) == admin:
        raise SettingsError("name the users (--user U) or give --admin")
    with open_store(store) as found:
        key, secret = make_key(found, label=label, admin=admin, users=user or ())
    console.emit({**_row(key), "key": secret} if as_json else secret, as_json)


@app.command("list")
def list_(store: StoreURL = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """List the keys; secrets are not stored."""
    with open_store(store) as found:
        console.emit([_row(key) for key in found.keys()], as_json)  # noqa: SIM118


@app.command("revoke")
def revoke(
    id: Annotated[str, Argument(help="The key's id, as shown by `keys list`.")],
    store: StoreURL = DEFAULT_STORE,
) -> None:
    """Revoke a key; the next request with it is refused."""
    with open_store(store) as found:
        if not found.revoke_key(id):
            raise SettingsError(f"no key '{id}': see `hydra-llm keys list`")
    console.say(f"key {id} is revoked")


def _row(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "users": "all" if key.admin else ", ".join(key.users),
        "label": key.label,
        "created": int(key.created),
        "revoked": key.revoked is not None,
    }
