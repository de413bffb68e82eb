"""`hydra-llm bundles`: which bundle the servers of a store use."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument

from hydra_llm.cli import console
from hydra_llm.cli.options import DEFAULT_STORE, AsJson, StoreURL, open_store

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def use(
    bundle: Annotated[Path, Argument(help="Folder of a learned bundle.")],
    store: StoreURL = DEFAULT_STORE,
) -> None:
    """Switch all servers of a store to this bundle; requests in flight keep the one before."""
    from hydra_llm.gateway.deployment import named
    from hydra_llm.model.persistence import read_bundle

    weights = read_bundle(bundle).config["files"]["weights.safetensors"]["sha256"]
    with open_store(store) as found:
        found.set_bundle(named(bundle.resolve(), weights))
    loading = f"servers of this store load {bundle} within two seconds"
    console.say(f"{loading}; fit users' heads by POST /v1/users/ID/fit")


@app.command()
def show(store: StoreURL = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """Show the bundle that was set for the servers of a store."""
    with open_store(store) as found:
        console.emit({"bundle": found.bundle()}, as_json)
