"""Users as a whole: import from a data set, export, and deletion with all that was derived from
their texts. For the endpoints and the commands.
"""

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from hydra_llm.errors import DataError
from hydra_llm.gateway.schemas import id_fault
from hydra_llm.gateway.user_cache import texts_of
from hydra_llm.llm.concurrency import StageProgress
from hydra_llm.store.change import FEEDBACK_ID, StaleVersion
from hydra_llm.store.store import Store
from hydra_llm.text import json_text
from hydra_llm.types import Record

MAX_TRIES = 8
Forget = Callable[[list[str], str | None], int]
"""`forget(texts, but)`: delete the features of texts that only the user `but`, if anyone, has."""


def as_json(kept: Any) -> str:
    """An export as JSON; heads' numbers are base64 of little-endian float32."""
    return json_text(kept, default=lambda raw: b64encode(raw).decode())


def forget_unused(
    store: Store, forget: Callable[[list[str]], int], texts: Sequence[str], but: str | None
) -> int:
    """Call `forget` with those of the texts that no user has, or only `but`."""
    in_use = store.texts_in_use(texts, except_user=but)
    return forget([text for text in texts if text not in in_use])


def import_users(
    store: Store,
    histories: Mapping[str, Sequence[Record]],
    *,
    replace: bool,
    report: StageProgress,
    forget: Forget,
) -> dict[str, int]:
    """Add users' records; the same again change nothing. `replace`: a user's records that are not
    among them are deleted. Returns counts. Raises DataError for ids that the gateway refuses,
    before anything is written.
    """
    for user, records in histories.items():
        if fault := id_fault(user):
            raise DataError(f"the user's id {user!r} {fault}")
        for record in records:
            reserved = f"begins with '{FEEDBACK_ID}', as records made of feedback do"
            if fault := reserved if record.id.startswith(FEEDBACK_ID) else id_fault(record.id):
                raise DataError(f"the id {record.id!r} of a record of {user!r} {fault}")
    counts = dict.fromkeys(("users", "added", "changed", "unchanged", "deleted"), 0)
    for done, (user, records) in enumerate(histories.items()):
        report("import", done, len(histories))
        ids = {record.id for record in records}
        present = store.records(user, off_too=True)[1] if replace else []
        gone = [record for record in present if record.id not in ids]
        with store.change(user, create=True) as change:
            for record in gone:
                change.remove(record.id)
            added = change.add(records)
        if old := [*gone, *added.replaced]:
            forget(texts_of(old), None)
        counts["users"] += 1
        counts["deleted"] += len(gone)
        for name in ("added", "changed", "unchanged"):
            counts[name] += getattr(added, name)
    report("import", len(histories), len(histories))
    return counts


def delete_user(store: Store, user: str, forget: Forget) -> tuple[dict[str, int] | None, list[str]]:
    """Delete everything about a user: rows per table and the number of `features` (None: there is
    no such user), and the user's texts. Raises StaleVersion if the user changes all the time.
    """
    features = 0
    for _ in range(MAX_TRIES):
        version, texts = _texts(store, user)
        # First what cannot be undone halfway: if features cannot be deleted, the user is still
        # there to be deleted again.
        features += forget(texts, user)
        with suppress(StaleVersion):  # more has come: of that too no features may stay
            counts = store.delete_user(user, version=version)
            return counts and {**counts, "features": features}, texts
    raise StaleVersion("the user changes faster than it can be deleted: try again")


def _texts(store: Store, user: str) -> tuple[int | None, list[str]]:
    """Every text of which there may be features, as of a version of the user."""
    version, records = store.records(user, off_too=True)
    texts = texts_of(records)
    kept = store.export_user(user) or {"requests": [], "feedback": []}
    for row in kept["requests"]:
        candidates = [*row["content"]["candidates"], *row["content"].get("repeats", ())]
        texts.append(row["question"])
        texts += [item[name] for item in candidates for name in ("text", "said") if name in item]
    for row in kept["feedback"]:
        if group := row["content"].get("group"):
            texts += [group["left"], *group["rights"]]
    return version, texts
