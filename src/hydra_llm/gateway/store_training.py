"""Training on the store's users: heads in background jobs, a bundle for `hydra-llm learn`."""

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import DataError, HydraError
from hydra_llm.gateway.auth import pseudonym
from hydra_llm.gateway.deployment import ANY_TASK, Deployment
from hydra_llm.gateway.drift import CHANGED, first_after_change, mark_of
from hydra_llm.gateway.feedback import FITTED, heads_after, with_choices
from hydra_llm.gateway.spend import Bill, Ledger, PaidLLM
from hydra_llm.gateway.telemetry import log
from hydra_llm.gateway.user_cache import texts_of, to_stored
from hydra_llm.llm.base import ChatLLM
from hydra_llm.llm.concurrency import StageProgress
from hydra_llm.llm.none import NoLLM
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.head import FEEDBACK_WINDOW, Head
from hydra_llm.store.change import FEEDBACK_ID, NoSuchUser, StaleVersion
from hydra_llm.store.store import Store
from hydra_llm.store.values import Job, StoredFeedback
from hydra_llm.tasks.base import Task
from hydra_llm.types import Record

if TYPE_CHECKING:
    from hydra_llm.bundle import Bundle
    from hydra_llm.training.learned import Learned
    from hydra_llm.training.refit import KeptFit

IDLE_SECONDS = 1.0
TRIES = 5


class Stopped(Exception):
    """The server ends, and the job waits for another; or the job was deleted with its user."""


class Worker:
    """Runs the store's jobs, one after the other; `wake` is set to look for a job now."""

    def __init__(
        self,
        store: Store,
        deployment: Callable[[], Deployment],
        llm: ChatLLM | None,
        ledger: Ledger,
    ):
        self._store, self._deployment, self._llm, self._ledger = store, deployment, llm, ledger
        self.wake, self._ended = threading.Event(), False
        self.thread = threading.Thread(target=self._run, name="jobs", daemon=True)

    def close(self) -> None:
        """End; a running job stops at its next report of progress and waits for another server."""
        self._ended = True
        self.wake.set()
        self.thread.join()

    def _run(self) -> None:
        while not self._ended:
            try:
                job = self._store.claim_job()
            except HydraError as error:
                log.warning("jobs: the store failed: %s", type(error).__name__)
                job = None
            if job is not None:
                self.run(job)
            else:
                self.wake.wait(IDLE_SECONDS)
                self.wake.clear()

    def run(self, job: Job) -> None:
        """Run one job and store how it ended."""
        state, message = "done", ""
        try:
            self._fit(job)
        except Exception as error:
            # Concurrent calls raise in a group; this one makes a single error one too.
            if ExceptionGroup("", [error]).subgroup(Stopped) is not None:
                state = "waiting"  # for the next server
            else:
                log.warning("jobs: a %s failed: %s", job.kind, type(error).__name__)
                known = isinstance(error, HydraError)
                state, message = "failed", str(error) if known else type(error).__name__
        try:
            self._store.update_job(job.id, int(state == "done"), 1, state=state, error=message)
        except HydraError:
            log.warning("jobs: the store failed; the job will be taken up again")

    def _fit(self, job: Job) -> None:
        """Changes nothing of the bundle in use, so that no answer waits, and closes its cache of
        features: nothing of a deleted user stays.
        """
        deployment = self._deployment()
        if deployment.bundle is None:
            raise HydraError("there is no bundle: nothing to fit")
        base = deployment.bundle.features
        for _ in range(TRIES):
            version, plain = self._store.records(job.user)
            records = with_choices(plain, self._store.unlearned_feedback(job.user, or_learned=True))
            readable, ids = deployment.readable(records), {record.id for record in records}
            # Feedback that became a record is learned by the fit; the rest updates the head.
            feedback = self._store.unlearned_feedback(job.user, bundle=deployment.id)
            learned = [item for item in feedback if f"{FEEDBACK_ID}{item.request}" in ids]
            judged = [item for item in feedback if item not in learned]
            first = self._first_after_change(job.user, deployment.id)
            mark = mark_of(first)
            features = FeatureCache(base.encoder, base.path)
            features.keep = False
            with closing(features), suppress(StaleVersion):
                bundle = replace(deployment.bundle, features=features)
                kept = deployment.fits.of(job.user)
                bill = Bill(user=job.user)
                bill.known(version)
                try:
                    learned_now = self._fitted(bundle, job, readable, bill, kept, mark)
                finally:
                    self._ledger.take(bill)
                heads = self._with_feedback(bundle, job.user, learned_now, judged, first)
                with self._store.change(job.user, version=version) as change:
                    change.put_heads(deployment.id, to_stored(heads | mark))
                    deployment.fits.put(learned_now.kept)  # a deletion comes later, as of features
                    if deployment.users.need_features:
                        # encoded already; in the transaction, so that a deletion comes later
                        features.texts(texts_of(readable), keep=True)
                    change.mark_learned([item.request for item in learned])
                return
        raise HydraError("the user changes faster than heads are fitted")

    def _first_after_change(self, user: str, bundle: str) -> StoredFeedback | None:
        which: Any = {"bundle": bundle, "or_learned": True}
        return first_after_change(self._store.unlearned_feedback(user, FEEDBACK_WINDOW, **which))

    def _fitted(
        self,
        bundle: "Bundle",
        job: Job,
        records: Sequence[Record],
        bill: Bill,
        kept: "Mapping[str, KeptFit]",
        mark: Mapping[str, Head],
    ) -> "Learned":
        """The user's heads, fitted on these records; a kept fit goes on. `mark`: of a change."""
        from hydra_llm.training.api import fit

        private = bundle.settings.private
        if self._llm is None and not private:
            raise HydraError("this server has no LLM that could label candidates")
        learned_with = bundle.learned_with or bundle.settings
        own = {"private": private, "mask": bundle.settings.mask}
        settings = learned_with.model_copy(update=own)
        bundle = replace(bundle, settings=settings)
        data = DataSet.from_records(bundle.task, {job.user: "test"}, records, [])

        def progress(stage: str, done: int, total: int) -> None:
            if self._ended or not self._store.update_job(job.id, done, total):
                raise Stopped

        llm = PaidLLM(self._llm, bill, self._ledger) if self._llm and not private else NoLLM()
        changed = {job.user: mark[CHANGED].records} if mark else {}
        whom: Any = {"users": [job.user], "kept": kept, "changed": changed}
        return fit(data, bundle, llm, progress=progress, **whom)

    def _with_feedback(
        self,
        bundle: "Bundle",
        user: str,
        fitted: "Learned",
        judged: Sequence[StoredFeedback],
        first: StoredFeedback | None,
    ) -> dict[str, Head]:
        """The user's heads after the feedback that is in no record."""
        heads, adapter = fitted.bundle.heads_of(user), bundle.adapter
        if judged and adapter is not None and adapter.updates_online:
            heads |= heads_after(bundle, user, heads, judged, first)
        return heads


def learn_from_store(
    url: str,
    llm: ChatLLM,
    settings: Settings,
    out: Path,
    task: Path | None,
    progress: StageProgress,
    warn: Callable[[str], None],
) -> "Learned":
    """Learn from the store's users: the shared weights go to `out`, a bundle without records, and
    the heads into the store. `DataError` if no user has records, or the task's file is broken.
    """
    from hydra_llm.training.api import learn

    if task is None:  # of a conversation's answer every line counts
        kind, settings = ANY_TASK, settings.model_copy(update={"parsing": "strict"})
    else:
        try:
            kind = Task.from_json(json.loads(task.read_text(encoding="utf-8")), str(task))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be read as JSON ({error})", file=task) from None
    with closing(Store(url, create=False)) as store:
        versions, data = _dataset(store, kind, every=settings.dp_epsilon is not None)
        # Features of what the LLM made of users' records could not be deleted later.
        with TemporaryDirectory() as folder:
            passing = settings.model_copy(update={"cache": Path(folder)})
            learned = learn(data, llm, passing, progress=progress, warn=warn)
        bundle = learned.bundle
        bundle.without_people(partial(pseudonym, store.salt())).save(out)
        weights = type(bundle).load(out).weights
        for user in learned.users:
            try:
                with suppress(NoSuchUser), store.change(user, version=versions[user]) as change:
                    change.put_heads(weights, to_stored(bundle.heads_of(user)))
            except StaleVersion:  # more has come since: a fit will see it
                learned.notes.append(
                    "a user has changed while the bundle was learned: fit that user's heads"
                )
    return learned


def _dataset(store: Store, task: Task, *, every: bool = False) -> tuple[dict[str, int], DataSet]:
    """The users' versions, and their records that the task can read; `every`: also without any."""
    versions, records = dict[str, int](), list[Record]()
    for user in store.users():
        version, own = store.records(user)
        if not task.labels:
            own = with_choices(own, store.unlearned_feedback(user, or_learned=True))
        readable = [record for record in own if task.is_answer(record.output)]
        if version is not None and (readable or every):
            versions[user] = version
            records += readable
    if not records:
        raise DataError("the store has no user with records that this task can read")
    return versions, DataSet.from_records(task, dict.fromkeys(versions, "train"), records, [])


def import_heads(store: Store, bundle: "Bundle", users: Iterable[str]) -> dict[str, int]:
    """Give users the heads that a bundle has of them; returns counts. `heads_kept`: those of the
    store, which feedback has moved, or which know as many records. `heads_left_out`: have learned
    from a record that the store lacks, has changed or switched off.
    """
    counts = {"heads": 0, "heads_kept": 0, "heads_left_out": 0}
    for user in users:
        if not (heads := bundle.heads_of(user)):
            continue
        version, records = store.records(user)
        texts = {record.id: (record.input, record.output) for record in records}
        learned = {
            record.id: (record.input, record.output) for record in bundle.records.get(user, ())
        }
        own = store.heads(user, bundle.weights)
        known = all(name in own and own[name].known >= heads[name].records for name in heads)
        if FITTED in own or known:
            counts["heads_kept"] += 1
        elif not learned.items() <= texts.items():
            counts["heads_left_out"] += 1
        else:
            with store.change(user, version=version) as change:
                change.put_heads(bundle.weights, to_stored(heads))
            counts["heads"] += 1
    return counts
