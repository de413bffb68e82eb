"""Work that goes on after its request: fitting a user's heads. One thread a server; a job of a
server that died is taken up by another.

A fit changes nothing of the bundle in use, so that no answer waits for it, and has a memory of
features that ends with it: whatever becomes of its user, nothing of it stays. Knows no HTTP.
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
    """The server ends, and the job waits for another; or the job is gone, with its user."""


class Worker:
    """Does the store's jobs, one after the other."""

    def __init__(self, store: Store, serving: Callable[[], Deployment], llm: ChatLLM | None):
        self._store, self._serving, self._llm = store, serving, llm
        self._wake, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """There is a new job."""
        self._wake.set()

    def close(self) -> None:
        """End; a job that is under way stops where it next tells how far it is, and waits for
        another server.
        """
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
                self._do(job)
            else:
                self._wake.wait(IDLE_SECONDS)
                self._wake.clear()

    def _do(self, job: Job) -> None:
        state, said = self._outcome(job)
        try:
            self._store.update_job(job.id, int(state == "done"), 1, state=state, error=said)
        except HydraError:
            log.warning("jobs: the store failed; the job will be taken up again")

    def _outcome(self, job: Job) -> tuple[str, str]:
        """The state in which a job ends, and what is said of it."""
        try:
            self._fit(job)
        except Exception as error:
            if _is_stop(error):
                return "waiting", ""  # for the next server
            log.warning("jobs: a %s failed: %s", job.kind, type(error).__name__)
            return "failed", str(error) if isinstance(error, HydraError) else type(error).__name__
        return "done", ""

    def _fit(self, job: Job) -> None:
        serving = self._serving()
        if serving.bundle is None:
            raise HydraError("there is no bundle: nothing to fit")
        for _ in range(TRIES):
            version, records = self._store.records(job.user)
            known, judged = _told_apart(
                self._store.unlearned_feedback(job.user, bundle=serving.id), records
            )
            with features_of(serving.bundle) as features:
                heads = self.heads(serving, job, records, judged, features)
                stored = {name: to_stored(head) for name, head in heads.items()}
                try:
                    with self._store.change(job.user, version=version) as change:
                        change.put_heads(serving.id, stored)
                        if (
                            serving.prefetcher is not None
                        ):  # encoded already; amid the transaction, so that a deletion comes later
                            features.texts(texts_of(serving.readable(tuple(records))), keep=True)
                        change.mark_learned([each.request for each in known])
                    return
                except StaleVersion:
                    continue
        raise HydraError("the user changes faster than heads are fitted")

    def heads(
        self,
        serving: Deployment,
        job: Job,
        records: Sequence[Record],
        judged: Sequence[StoredFeedback],
        features: FeatureCache,
    ) -> dict[str, Head]:
        """The user's heads, fitted on all records that the bundle can read, and updated by the
        feedback that became no record.
        """
        if self._llm is None:
            raise HydraError("this server has no LLM that could label candidates")
        assert serving.bundle is not None
        learned_with = serving.bundle.learned_with or serving.bundle.settings
        bundle = replace(serving.bundle, store=features, settings=learned_with)
        readable = serving.readable(tuple(records))
        data = DataSet.from_records(bundle.task, {job.user: "test"}, readable, [])

        def tell(stage: str, done: int, total: int) -> None:
            if self._ended or not self._store.update_job(job.id, done, total):
                raise Stopped

        heads = fit(data, bundle, self._llm, users=[job.user], progress=tell).bundle.heads_of(
            job.user
        )
        adapter = bundle.adapter
        if judged and adapter is not None and adapter.updates_online:
            heads |= heads_after(bundle, job.user, heads, judged)
        return heads


@contextmanager
def features_of(bundle: Bundle) -> Iterator[FeatureCache]:
    """What a bundle's encoder has kept, and a memory of one's own; in the file nothing is written
    unless a call says so.
    """
    features = FeatureCache(bundle.store.encoder, bundle.store.path)
    features.keep = False
    try:
        yield features
    finally:
        features.close()


def _is_stop(error: Exception) -> bool:
    """Whether a job was stopped: labelling has several calls under way, and raises what ends them
    as a group.
    """
    return isinstance(error, Stopped) or (
        isinstance(error, ExceptionGroup) and error.subgroup(Stopped) is not None
    )


def _told_apart(
    judged: Sequence[StoredFeedback], records: Sequence[Record]
) -> tuple[list[StoredFeedback], list[StoredFeedback]]:
    """Feedback that became a record, which a fit knows; and rejections and the like, which only the
    moved head does.
    """
    ids = {record.id for record in records}
    known = [each for each in judged if f"{FEEDBACK_ID}{each.request}" in ids]
    return known, [each for each in judged if f"{FEEDBACK_ID}{each.request}" not in ids]
