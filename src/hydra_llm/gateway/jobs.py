"""Background jobs: fitting a user's heads, in one thread a server. Another server continues the
jobs of one that died.

A fit changes nothing of the bundle in use, so that no answer waits for it, and its cache of
features is closed with it: nothing of a deleted user stays. Knows no HTTP.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

from hydra_llm.bundle import Bundle
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import HydraError
from hydra_llm.gateway.deployment import Deployment
from hydra_llm.gateway.feedback import heads_after
from hydra_llm.gateway.telemetry import log
from hydra_llm.gateway.user_cache import texts_of, to_stored
from hydra_llm.llm.base import ChatLLM
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.heads import Head
from hydra_llm.store.change import FEEDBACK_ID, StaleVersion
from hydra_llm.store.store import Store
from hydra_llm.store.values import Job, StoredFeedback
from hydra_llm.training.api import fit
from hydra_llm.types import Record

IDLE_SECONDS = 1.0
TRIES = 5


class Stopped(Exception):
    """The server ends, and the job waits for another; or the job was deleted with its user."""


class Worker:
    """Runs the store's jobs, one after the other; `wake` is set to look for a job now."""

    def __init__(self, store: Store, deployment: Callable[[], Deployment], llm: ChatLLM | None):
        self._store, self._deployment, self._llm = store, deployment, llm
        self.wake, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End; a running job stops at its next report of progress and waits for another server."""
        self._ended = True
        self.wake.set()
        self._thread.join()

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
        deployment = self._deployment()
        if deployment.bundle is None:
            raise HydraError("there is no bundle: nothing to fit")
        base = deployment.bundle.store
        for _ in range(TRIES):
            version, records = self._store.records(job.user)
            readable, ids = deployment.readable(records), {record.id for record in records}
            # Feedback that became a record is learned by the fit; the rest updates the head.
            feedback = self._store.unlearned_feedback(job.user, bundle=deployment.id)
            learned = [item for item in feedback if f"{FEEDBACK_ID}{item.request}" in ids]
            judged = [item for item in feedback if item not in learned]
            with closing(FeatureCache(base.encoder, base.path)) as features:
                features.keep = False
                bundle = replace(deployment.bundle, store=features)
                heads = self._fitted(bundle, job, readable, judged)
                stored = {name: to_stored(head) for name, head in heads.items()}
                try:
                    with self._store.change(job.user, version=version) as change:
                        change.put_heads(deployment.id, stored)
                        if deployment.prefetcher is not None:
                            # encoded already; in the transaction, so that a deletion comes later
                            features.texts(texts_of(readable), keep=True)
                        change.mark_learned([item.request for item in learned])
                    return
                except StaleVersion:
                    continue
        raise HydraError("the user changes faster than heads are fitted")

    def _fitted(
        self, bundle: Bundle, job: Job, records: Sequence[Record], judged: Sequence[StoredFeedback]
    ) -> dict[str, Head]:
        """The user's heads, fitted on these records and updated by the feedback that is in none."""
        if self._llm is None:
            raise HydraError("this server has no LLM that could label candidates")
        bundle = replace(bundle, settings=bundle.learned_with or bundle.settings)
        data = DataSet.from_records(bundle.task, {job.user: "test"}, records, [])

        def progress(stage: str, done: int, total: int) -> None:
            if self._ended or not self._store.update_job(job.id, done, total):
                raise Stopped

        learned = fit(data, bundle, self._llm, users=[job.user], progress=progress)
        heads, adapter = learned.bundle.heads_of(job.user), bundle.adapter
        if judged and adapter is not None and adapter.updates_online:
            heads |= heads_after(bundle, job.user, heads, judged)
        return heads
