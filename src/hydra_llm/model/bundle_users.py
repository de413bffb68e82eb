"""Users of a bundle on disk, changed in place, beside other processes that do the same."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from hydra_llm.model.head import Head
from hydra_llm.model.persistence import (
    USERS,
    USERS_FORMAT,
    changed,
    locked,
    read_config,
    version_of,
    write_config,
)
from hydra_llm.model.users_file import UsersFile
from hydra_llm.types import Record


def write_users(
    folder: Path,
    users: Iterable[str],
    heads: Mapping[str, Mapping[str, Head]],
    records: Mapping[str, Sequence[Record]],
    *,
    version: str,
) -> str | None:
    """Add or replace users of a bundle in place, for whose shared weights they were fitted:
    `version` is what was read, of which only the users may have changed since. Returns the new
    version; None for a bundle of an older format, which is written as a whole.
    """
    with locked(folder):
        config = read_config(folder)
        if config["format"] < USERS_FORMAT:
            return None
        if config["sha256"] != version.partition(":")[0]:
            raise changed(folder)
        with closing(UsersFile(folder / config["content"] / USERS)) as file:
            file.put(users, heads, records)
        return version_of(folder, config)


def delete_user(folder: Path, user: str) -> dict[str, int] | None:
    """Delete a user from a bundle in place, the name among the training users too: how many
    `heads` and `records`; None if there is no such user. What shared weights have learned from
    the user stays. Raises BundleError: another process writes for long; a full disk.
    """
    with locked(folder):
        config = read_config(folder)
        assert config["format"] >= USERS_FORMAT, "its users are in no file of their own"
        with closing(UsersFile(folder / config["content"] / USERS)) as file:
            records = file.records().get(user)
            parts = file.delete(user)
        trained_on = config.get("trained_on", [])
        if user in trained_on:
            config["trained_on"] = [name for name in trained_on if name != user]
            write_config(folder, config)
        elif not parts:
            return None
        return {"heads": parts - (records is not None), "records": len(records or ())}
