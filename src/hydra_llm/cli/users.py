"""`hydra-llm users`: the users of the gateway's database, in words; import, export, deletion."""

import json
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from hydra_llm.cli import console
from hydra_llm.cli.options import DEFAULT_STORE, AsJson, StoreURL, open_store
from hydra_llm.errors import HydraError, UnknownUser

if TYPE_CHECKING:
    from hydra_llm.bundle import Bundle
    from hydra_llm.gateway.user_data import Forget
    from hydra_llm.store.store import Store

app = typer.Typer(add_completion=False, no_args_is_help=True)
User = Annotated[str, Argument(help="The user's id.")]


@app.command(name="list")
def list_(
    store: StoreURL = DEFAULT_STORE,
    limit: Annotated[int, Option(min=1, help="Max number of users.")] = 100,
    after: Annotated[str, Option(help="List the users behind this id.")] = "",
    as_json: AsJson = False,
) -> None:
    """List users with counts of what is kept about them, by id."""
    with open_store(store) as opened:
        users = opened.user_counts(after=after, limit=limit + 1)
        _log(opened, "read", "users")
    rows = [
        {
            "user": user.id,
            "records": user.records,
            "feedback": user.feedback,
            "requests": user.requests,
            "since": console.day(user.created),
        }
        for user in users[:limit]
    ]
    console.emit(rows, as_json)
    if len(users) > limit:
        console.say(f"there are more: --after {users[limit - 1].id}")


@app.command()
def show(
    user: User,
    store: StoreURL = DEFAULT_STORE,
    bundle: Annotated[Path | None, Option(help="Default: that of `bundles use`.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a user in words: counts, typical answers, what was learned, the records most used."""
    from hydra_llm.gateway.profile import describe, in_words, leanings

    with open_store(store) as opened:
        kept, loaded = _exported(opened, user, "profile"), _bundle(opened, bundle)
        if kept["heads"] and not (bundle or opened.bundle()):
            console.say("what was learned is not shown: give --bundle, the bundle of the server")
        records = opened.records(user)[1]
    learned = leanings(kept, records, loaded) if loaded else {}
    profile = describe(kept, records, learned, loaded.task if loaded else None)
    console.emit(profile if as_json else "\n".join(in_words(profile)), as_json)


@app.command(name="import")
def import_(
    data: Annotated[Path, Argument(help="A data set: native folder, or LaMP's files.")],
    store: StoreURL = DEFAULT_STORE,
    replace: Annotated[
        bool, Option("--replace", help="Delete these users' records that are not in the set.")
    ] = False,
    answered: Annotated[
        bool, Option("--answered", help="Also the queries and their answers, as records.")
    ] = False,
    bundle: Annotated[Path | None, Option(help="Also these users' heads in this bundle.")] = None,
    as_json: AsJson = False,
) -> None:
    """Import the histories of a data set's users; the same set again changes nothing."""
    from hydra_llm.datasets.native import load
    from hydra_llm.gateway.user_data import import_users

    with open_store(store) as opened, console.progress(quiet=as_json) as report:
        loaded, forget = load(data), _forget(opened)
        learned = bundle and _bundle(opened, bundle)
        if learned:
            learned.check_task(loaded.task)
        histories = loaded.answered if answered else loaded.history
        records = {user: histories(user) for user in loaded.users()}
        for user in records if replace else ():
            _log(opened, "delete", "import", user)
        counts = import_users(opened, records, replace=replace, report=report, forget=forget)
        if learned:
            counts |= _import_heads(opened, learned, bundle, records)
        opened.erase()
    console.emit(counts, as_json)


def _import_heads(
    store: "Store", bundle: "Bundle", folder: Path | None, users: Iterable[str]
) -> dict[str, int]:
    from hydra_llm.gateway.deployment import folder_of, named
    from hydra_llm.gateway.store_training import import_heads

    counts = import_heads(store, bundle, users)
    if not any(counts.values()):
        console.say(f"{folder} has heads of none of these users: `hydra-llm fit` makes them")
    if left := counts["heads_left_out"]:
        why = "they have learned from records that this store lacks, has changed or switched off"
        console.say(f"users whose heads were left out: {left}; {why}")
    active, this = store.bundle(), named(Path(), bundle.weights).partition(":")[0]
    if active and active.partition(":")[0] != this:
        other = f"servers of this store use another bundle, {folder_of(active)}"
        console.say(f"{other}: these heads count after `hydra-llm bundles use {folder}`")
    return counts


@app.command()
def export(user: User, store: StoreURL = DEFAULT_STORE) -> None:
    """Print all that is kept about a user as JSON, heads included."""
    from hydra_llm.gateway.user_data import as_json

    with open_store(store) as opened:
        kept = as_json(_exported(opened, user, "export"))
    console.emit(json.loads(kept), as_json=True)


@app.command()
def delete(
    user: User,
    store: StoreURL = DEFAULT_STORE,
    bundle: Annotated[
        Path | None, Option(help="Delete from this bundle, not from a store.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Delete all that is kept about a user, at once and for good; keys of this user only, too."""
    if bundle is not None:
        _delete_from_bundle(bundle, user, as_json)
        return
    from hydra_llm.gateway.user_data import delete_user

    with open_store(store) as opened:
        counts, _ = delete_user(opened, user, _forget(opened))
        if counts is not None:
            _log(opened, "delete", "user", user)
        emptied = counts is None or opened.erase(at_once=math.inf)
    if counts is None:
        raise _unknown(user)
    console.emit({"deleted": counts} if as_json else counts, as_json)
    if not emptied:
        console.say("SQLite's log is in use: what was deleted is in it until its reader ends")


def _delete_from_bundle(folder: Path, user: str, as_json: bool) -> None:
    """Features first: if they cannot be deleted, the user is still there to be deleted again."""
    from hydra_llm.bundle import delete_from
    from hydra_llm.config import load_settings
    from hydra_llm.gateway.user_cache import texts_of
    from hydra_llm.model.feature_cache import forget_features
    from hydra_llm.model.persistence import read_bundle

    texts = texts_of(read_bundle(folder).records.get(user, ()))
    features = forget_features(load_settings().cache / "features.sqlite", texts)
    if (counts := delete_from(folder, user)) is None:
        raise UnknownUser(f"no user '{user}' in the bundle {folder}")
    counts["features"] = features
    console.emit({"deleted": counts} if as_json else counts, as_json)


def _exported(store: "Store", user: str, action: str) -> dict[str, Any]:
    kept = store.export_user(user)
    if kept is None:
        raise _unknown(user)
    _log(store, "read", action, user)
    return kept


def _log(store: "Store", purpose: str, action: str, user: str = "") -> None:
    """An entry of the audit log; without a user, of all."""
    from hydra_llm.gateway.auth import pseudonym

    store.add_accesses("cli", [(purpose, action, user and pseudonym(store.salt(), user))])


def _unknown(user: str) -> UnknownUser:
    return UnknownUser(f"no user '{user}' in this store: see `hydra-llm users list`")


def _forget(store: "Store") -> "Forget":
    """Deletes features from the file that servers of this machine share by default."""
    from hydra_llm.config import load_settings
    from hydra_llm.gateway.picture_cache import forget_too
    from hydra_llm.gateway.user_data import forget_unused
    from hydra_llm.model.feature_cache import forget_features

    cache = load_settings().cache
    forget = partial(forget_features, cache / "features.sqlite")
    return partial(forget_unused, store, forget_too(cache, forget))


def _bundle(store: "Store", folder: Path | None) -> "Bundle | None":
    """The bundle of a folder, or that servers use; None, with a message, if the latter is gone."""
    active = store.bundle()
    if folder is None and active is None:
        return None
    try:
        from hydra_llm.bundle import Bundle  # without the extra `learn` it cannot be read
        from hydra_llm.gateway.deployment import folder_of

        bundle = Bundle.load(folder or folder_of(active or ""))
    except HydraError as error:
        if folder is not None:
            raise
        console.say(f"what was learned is not shown: {error}")
        return None
    bundle.features.keep = False  # features on disk are those that servers write
    return bundle
