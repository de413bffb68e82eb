"""Background jobs: fitting a user's heads, in one thread a server. Another server continues the
jobs of one that died.

A fit changes nothing of the bundle in use, so that no answer waits for it, and its cache of
features ends with it: nothing of a deleted user stays. Knows no HTTP.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from hydra_llm.bundle import Bundle
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import HydraError
from hydra_llm.gateway.deployment import Deployment
from hydra_llm.gateway.feedback import heads_after
from hydra_llm.gateway.user_cache import texts_of, to_stored
from hydra_llm.llm.base import ChatLLM
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.heads import Head
from hydra_llm.store.change import FEEDBACK_ID
from hydra_llm.store.store import Store
from hydra_llm.store.values import Job, StaleVersion, StoredFeedback
from hydra_llm.training.api import fit
from hydra_llm.types import Record

log = logging.getLogger("hydra_llm.gateway")
IDLE_SECONDS = 1.0
TRIES = 5


class Stopped(Exception):
    """The server ends, and the job waits for another; or the job was deleted with its user."""


class Worker:
    """Runs the store's jobs, one after the other."""

    def __init__(self, store: Store, deployment: Callable[[], Deployment], llm: ChatLLM | None):
        self._store, self._deployment, self._llm = store, deployment, llm
        self._wake, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Look for a new job now."""
        self._wake.set()

    def close(self) -> None:
        """End; a running job stops at its next report of progress and waits for another server."""
        self._ended = True
        self._wake.set()
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
                self._wake.wait(IDLE_SECONDS)
                self._wake.clear()

    def run(self, job: Job) -> None:
        """Run one job and store how it ended."""
        state, error = self._outcome(job)
        try:
            self._store.update_job(job.id, int(state == "done"), 1, state=state, error=error)
        except HydraError:
            log.warning("jobs: the store failed; the job will be taken up again")

    def _outcome(self, job: Job) -> tuple[str, str]:
        """The state in which a job ends, and its error."""
        try:
            self._fit(job)
        except Exception as error:
            if _is_stop(error):
                return "waiting", ""  # for the next server
            log.warning("jobs: a %s failed: %s", job.kind, type(error).__name__)
            return "failed", str(error) if isinstance(error, HydraError) else type(error).__name__
        return "done", ""

    def _fit(self, job: Job) -> None:
        deployment = self._deployment()
        if deployment.bundle is None:
            raise HydraError("there is no bundle: nothing to fit")
        for _ in range(TRIES):
            version, records = self._store.records(job.user)
            readable = deployment.readable(tuple(records))
            feedback = self._store.unlearned_feedback(job.user, bundle=deployment.id)
            known, judged = _split_feedback(feedback, records)
            with features_of(deployment.bundle) as features:
                bundle = replace(deployment.bundle, store=features)
                heads = self._fitted(bundle, job, readable, judged)
                stored = {name: to_stored(head) for name, head in heads.items()}
                try:
                    with self._store.change(job.user, version=version) as change:
                        change.put_heads(deployment.id, stored)
                        if deployment.prefetcher is not None:
                            # encoded already; in the transaction, so that a deletion comes later
                            features.texts(texts_of(readable), keep=True)
                        change.mark_learned([each.request for each in known])
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


@contextmanager
def features_of(bundle: Bundle) -> Iterator[FeatureCache]:
    """The bundle's features, cached apart; the file is written only where a call says so."""
    features = FeatureCache(bundle.store.encoder, bundle.store.path)
    features.keep = False
    try:
        yield features
    finally:
        features.close()


def _is_stop(error: Exception) -> bool:
    """Whether a job was stopped; concurrent calls raise it in a group."""
    group = isinstance(error, ExceptionGroup) and error.subgroup(Stopped) is not None
    return group or isinstance(error, Stopped)


def _split_feedback(
    judged: Sequence[StoredFeedback], records: Sequence[Record]
) -> tuple[list[StoredFeedback], list[StoredFeedback]]:
    """Feedback that became a record, which a fit knows; and the rest, which it does not."""
    ids = {record.id for record in records}
    known = [each for each in judged if f"{FEEDBACK_ID}{each.request}" in ids]
    return known, [each for each in judged if each not in known]
