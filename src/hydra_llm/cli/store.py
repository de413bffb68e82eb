"""`hydra-llm keys`, `bundles` and `store`: what is kept in the gateway's database."""

import math
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from hydra_llm.cli import console
from hydra_llm.cli.options import DEFAULT_STORE, AsJson, StoreURL, open_store
from hydra_llm.errors import SettingsError
from hydra_llm.extras import require

if TYPE_CHECKING:
    from hydra_llm.store.values import Key

PURPOSE_HELP = "answer, write, read or delete; repeatable; default: all."
keys = typer.Typer(add_completion=False, no_args_is_help=True)
bundles = typer.Typer(add_completion=False, no_args_is_help=True)
maintenance = typer.Typer(add_completion=False, no_args_is_help=True)


@keys.command("create")
def create(
    user: Annotated[list[str] | None, Option(help="Id of the key's user; repeatable.")] = None,
    admin: Annotated[bool, Option("--admin", help="The key may act for all users.")] = False,
    label: Annotated[str, Option(help="A description.")] = "",
    purpose: Annotated[list[str] | None, Option(help=PURPOSE_HELP)] = None,
    store: StoreURL = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Create a key and print it; it cannot be shown again."""
    from hydra_llm.gateway.auth import make_key
    from hydra_llm.gateway.schemas import id_fault
    from hydra_llm.store.values import PURPOSES

    if bool(user) == admin:
        raise SettingsError("name the users (--user U) or give --admin")
    if unknown := [own for own in purpose or () if own not in PURPOSES]:
        raise SettingsError(f"--purpose {unknown[0]}: take some of {', '.join(PURPOSES)}")
    users = list(dict.fromkeys(user or ()))
    for id in users:
        if fault := id_fault(id):
            raise SettingsError(f"--user {id!r} {fault}: no request could name that user")
    with open_store(store, create=True) as opened:
        about: dict[str, Any] = {"label": label, "admin": admin, "purposes": purpose or PURPOSES}
        key, secret = make_key(opened, users=users, **about)
    console.emit({**_row(key), "key": secret} if as_json else secret, as_json)


@keys.command("list")
def list_(store: StoreURL = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """List the keys; secrets are not stored."""
    with open_store(store) as opened:
        rows = [_row(key) for key in opened.keys()]  # noqa: SIM118
    if not as_json:
        rows = [row | {"created": console.day(row["created"])} for row in rows]
    console.emit(rows, as_json)


@keys.command("revoke")
def revoke(
    id: Annotated[str, Argument(help="The key's id, as shown by `keys list`.")],
    store: StoreURL = DEFAULT_STORE,
) -> None:
    """Revoke a key; the next request with it is refused."""
    with open_store(store) as opened:
        if not opened.revoke_key(id):
            raise SettingsError(f"no key '{id}': see `hydra-llm keys list`")
    console.say(f"key {id} is revoked")


def _row(key: "Key") -> dict[str, Any]:
    return {
        "id": key.id,
        "users": "all" if key.admin else ", ".join(key.users),
        "purposes": ", ".join(key.purposes),
        "label": key.label,
        "created": int(key.created),
        "revoked": key.revoked is not None,
    }


@bundles.command()
def use(
    bundle: Annotated[Path, Argument(help="Folder of a learned bundle.")],
    store: StoreURL = DEFAULT_STORE,
) -> None:
    """Switch all servers of a store to this bundle; requests in flight keep the one before."""
    from hydra_llm.gateway.deployment import named
    from hydra_llm.model.persistence import read_bundle

    weights = read_bundle(bundle).config["files"]["weights.safetensors"]["sha256"]
    with open_store(store) as opened:
        opened.set_bundle(named(bundle.resolve(), weights))
    loading = f"servers of this store load {bundle} within two seconds"
    heads = "users' heads come by `users import DATA --bundle` or POST /v1/users/ID/fit"
    console.say(f"{loading}; {heads}")


@bundles.command()
def show(
    folder: Annotated[Path | None, Argument(help="A bundle, to show what it is.")] = None,
    store: StoreURL = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Show the bundle that was set for the servers of a store; or what one is, with the ε and δ of
    its differential privacy.
    """
    if folder is not None:
        console.emit(_described(folder), as_json)
        return
    with open_store(store) as opened:
        bundle = opened.bundle()
    if bundle is None and not as_json:
        console.say("none: each server uses the one of its --bundle")
    else:
        console.emit({"bundle": bundle}, as_json)


@bundles.command()
def export(
    bundle: Annotated[Path, Argument(help="Folder of a learned bundle.")],
    out: Annotated[Path, Option(help="Folder to write; only USER's file if it is there.")],
    onnx: Annotated[bool, Option("--onnx", help="As graphs in int8, for a device.")] = False,
    user: Annotated[str | None, Option(help="Whose head and records to write too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Export the adapter for a device: encoder, scorer and one user's head, without torch."""
    require("onnx", "an export to ONNX")  # before a bundle asks for `learn`
    from hydra_llm.bundle import Bundle
    from hydra_llm.export import export_onnx

    if not onnx:
        raise SettingsError("name the format of the export: --onnx")
    written = export_onnx(Bundle.load(bundle), out, user)
    if user is not None:
        console.say(f"{out / 'user.json'} holds records of '{user}'")
    console.emit(written if as_json else written["files"], as_json)


def _described(folder: Path) -> dict[str, Any]:
    from hydra_llm.model.persistence import read_config

    config = read_config(folder)
    scorers = {name: own["head"] for name, own in config["scorers"].items()}
    return {
        "bundle": str(folder),
        "task": config["task"]["name"],
        "training_users": len(config["trained_on"]),
        **{f"{name}_head": head for name, head in scorers.items()},
        "privacy": config["report"].get("privacy", "none"),
    }


@maintenance.command()
def migrate(store: StoreURL = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """Migrate the tables to this version, or create them. Back up first; servers may run."""
    from hydra_llm.store.database import Database, one_line_errors
    from hydra_llm.store.migrate import LATEST, upgrade, version_of

    database = Database(store, timeout=3600.0)  # an index of many rows takes long
    database.check_file(create=True)
    with one_line_errors(database.url):
        before = version_of(database.engine)
        upgrade(database.engine)
    if before is None:
        console.say(f"store {database.name}: created")
    console.emit({"from": before, "to": LATEST}, as_json)


@maintenance.command()
def backup(
    file: Annotated[Path, Argument(help="A new SQLite file.")],
    store: StoreURL = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Write a consistent copy to a file, itself a store (`sqlite:///FILE`), while servers run."""
    from hydra_llm.store.backup import backup

    with open_store(store) as opened:
        counts = backup(opened, file)
    console.say(f"wrote {file}: it holds users' texts")
    console.emit(counts, as_json)


@maintenance.command()
def restore(
    file: Annotated[Path, Argument(help="A backup.")],
    store: StoreURL = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Fill an empty or a new store, of either database, from a backup."""
    from hydra_llm.store.backup import open_backup, restore

    # The backup first: a new store is made only for one that can be read.
    with closing(open_backup(file)) as saved, open_store(store, create=True) as opened:
        counts = restore(opened, saved)
    console.emit(counts, as_json)


@maintenance.command()
def check(store: StoreURL = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """Count rows and check for damage; the exit code is 1 if there is any."""
    with open_store(store) as opened:
        faults, counts = opened.check(), opened.counts()
    console.emit({"faults": faults, "rows": counts} if as_json else counts, as_json)
    for line in faults:
        console.say(line)
    if faults:
        raise typer.Exit(1)


@maintenance.command()
def audit(
    user: Annotated[str | None, Option(help="Of this user alone.")] = None,
    key: Annotated[str | None, Option(help="With the key of this id alone.")] = None,
    limit: Annotated[int, Option(min=1, help="Max number, the latest.")] = 100,
    store: StoreURL = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Show who has read or deleted what, newest first; users are keyed hashes."""
    from hydra_llm.gateway.auth import pseudonym

    with open_store(store) as opened:
        person = None if user is None else pseudonym(opened.salt(), user)
        rows = [asdict(own) for own in opened.accesses(limit, key=key, person=person)]
    if not as_json:
        rows = [{**row, "created": console.moment(row["created"])} for row in rows]
        rows = [{name: row[name] for name in row if name != "id"} for row in rows]
    console.emit(rows, as_json)


@maintenance.command()
def scrub(store: StoreURL = DEFAULT_STORE) -> None:
    """Rewrite the files of database and cached features without deleted bytes; locks tables."""
    from hydra_llm.config import load_settings
    from hydra_llm.model.feature_cache import erase_features

    with open_store(store) as opened:
        opened.scrub()
    erase_features(load_settings().cache / "features.sqlite", at_once=math.inf)
    console.say("the files of the database and of cached features hold no deleted data")
