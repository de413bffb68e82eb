"""A bundle from the gateway's store. It has no records and no heads: those stay in the store."""

import json
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import DataError
from hydra_llm.gateway.auth import pseudonym
from hydra_llm.gateway.deployment import ANY_TASK
from hydra_llm.gateway.user_cache import to_stored
from hydra_llm.llm.base import ChatLLM
from hydra_llm.llm.concurrency import StageProgress
from hydra_llm.store.change import NoSuchUser, StaleVersion
from hydra_llm.store.store import Store
from hydra_llm.tasks.base import Task
from hydra_llm.training.api import Learned, learn
from hydra_llm.training.train_scorer import silent
from hydra_llm.types import Record


def learn_from_store(
    url: str,
    llm: ChatLLM,
    settings: Settings,
    out: Path,
    *,
    task: Path | None = None,
    progress: StageProgress = silent,
) -> Learned:
    """Learn from the store's users: the shared weights go to `out`, the heads into the store.

    Raises:
        DataError: no user has records, or the task's file is broken.
        StoreError: the store fails.
    """
    if task is None:  # of a conversation's answer every line counts
        kind, settings = ANY_TASK, settings.model_copy(update={"parsing": "strict"})
    else:
        kind = _task(task)
    with closing(Store(url)) as store:
        versions, data = _dataset(store, kind)
        # Features of what the LLM made of users' records could not be deleted later.
        with TemporaryDirectory() as folder:
            passing = settings.model_copy(update={"cache": Path(folder)})
            learned = learn(data, llm, passing, progress=progress)
        bundle = learned.bundle
        bundle.without_people(partial(pseudonym, store.salt())).save(out)
        weights = type(bundle).load(out).weights
        for user in learned.users:
            heads = {name: to_stored(head) for name, head in bundle.heads_of(user).items()}
            try:
                with suppress(NoSuchUser), store.change(user, version=versions[user]) as change:
                    change.put_heads(weights, heads)
            except StaleVersion:  # more has come since: a fit will see it
                learned.notes.append(
                    "a user has changed while the bundle was learned: fit that user's heads"
                )
    return learned


def _task(file: Path) -> Task:
    try:
        return Task.from_json(json.loads(file.read_text(encoding="utf-8")), str(file))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read as JSON ({error})", file=file) from None


def _dataset(store: Store, task: Task) -> tuple[dict[str, int], DataSet]:
    """The users' versions, and their records that the task can read as training data."""
    versions, records = dict[str, int](), list[Record]()
    for user in store.users():
        version, stored = store.records(user)
        readable = [record for record in stored if task.is_answer(record.output)]
        if version is not None and readable:
            versions[user] = version
            records += readable
    if not versions:
        raise DataError("the store has no user with records that this task can read")
    return versions, DataSet.from_records(task, dict.fromkeys(versions, "train"), records, [])
