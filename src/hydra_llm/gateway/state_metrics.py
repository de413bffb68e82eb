"""Figures that are read when Prometheus asks: of the store (users, jobs, what was spent today by
the keys that spent most), of this build, and of the server's processes, together where there are
several.
"""

import os
import platform
import re
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from hydra_llm import __version__
from hydra_llm.errors import HydraError
from hydra_llm.gateway.drift import drift_of
from hydra_llm.gateway.telemetry import METRICS_FOLDER

if TYPE_CHECKING:
    from hydra_llm.gateway.gateway import Gateway

KEPT_SECONDS = 15.0  # how long what was read of the store counts
MOST_KEYS = 20
STATES = ("waiting", "running", "done", "failed")
LIVE = re.compile(r"gauge_livesum_(\d+)\.db")  # prometheus_client's file of a process
LEAST = ("process_start_time_seconds", "process_max_fds")
"""Figures of which the least of several processes is told; others are added."""


class StateCollector(Collector):
    """Collects the figures; the store's are left out while it fails."""

    def __init__(self, gateway: "Gateway"):
        self._gateway = gateway
        self._kept: list[Metric] = []
        self._until = 0.0

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry would collect to learn the names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All figures."""
        yield self._build()
        yield from _processes()
        if time.monotonic() >= self._until:
            self._until = time.monotonic() + KEPT_SECONDS
            try:
                self._kept = list(self._of_store())
            except HydraError as error:
                self._kept = []
                self._gateway.telemetry.failed("figures", error)
        yield from self._kept

    def _build(self) -> Metric:
        labels = ["version", "python", "bundle"]
        build = GaugeMetricFamily("hydra_build_info", "What runs; always 1", labels=labels)
        bundle = self._gateway.deployment.id[:12] or "none"
        build.add_metric([__version__, platform.python_version(), bundle], 1)
        return build

    def _of_store(self) -> Iterator[Metric]:
        store = self._gateway.store
        users, states = store.user_and_job_counts()
        yield GaugeMetricFamily("hydra_users", "Users of whom something is kept", value=users)
        jobs = GaugeMetricFamily("hydra_jobs", "Jobs, by state", labels=["state"])
        for state in STATES:
            jobs.add_metric([state], states.get(state, 0))
        yield jobs
        yield from self._of_feedback()
        today = datetime.now(UTC).date().isoformat()
        for by, most in (("kind", None), ("key", MOST_KEYS)):
            groups = store.spend(by, since=today, limit=most)
            name, labels = "hydra_today" if by == "kind" else "hydra_key_today", [by]
            about = f"spent today (UTC) by all servers of the store, by {by}"
            tokens = GaugeMetricFamily(f"{name}_tokens", f"Tokens {about}", labels=labels)
            cost = GaugeMetricFamily(f"{name}_cost", f"Money {about}", labels=labels)
            for group in groups:
                tokens.add_metric([group.by[by] or "none"], group.spend.tokens)
                if (money := group.spend.money) is not None:
                    cost.add_metric([group.by[by] or "none"], money)
            yield tokens
            yield cost

    def _of_feedback(self) -> Iterator[Metric]:
        self._gateway.telemetry.activity.keep(self._gateway.store)  # what is only counted yet
        found = drift_of(self._gateway.store, time.time())
        about = (
            "Share of feedback at which the user wanted the answer, of the last 7 and the 28 days"
        )
        share = GaugeMetricFamily("hydra_wanted_ratio", f"{about} before", labels=["days"])
        for own in (found.recent, found.before):
            if own.share is not None:
                share.add_metric([str(own.days)], own.share)
        yield share
        about = "1 where answers are wanted less often than in the 28 days before, else 0"
        yield GaugeMetricFamily("hydra_drift", about, value=int(found.found))


def _processes() -> Iterator[Metric]:
    """prometheus_client's figures of a process, of all workers of this server together."""
    together: dict[str, Metric] = {}
    for pid in _pids():
        collector = ProcessCollector(pid=partial(int, pid), registry=None)
        for metric in collector.collect():
            if metric.name not in together:
                together[metric.name] = metric
                continue
            [kept], [own] = together[metric.name].samples, metric.samples
            both = (kept.value, own.value)
            value = min(both) if own.name in LEAST else sum(both)
            together[metric.name].samples = [kept._replace(value=value)]
    yield from together.values()


def _pids() -> list[int]:
    folder = os.environ.get(METRICS_FOLDER)
    if folder is None:
        return [os.getpid()]
    found = [LIVE.fullmatch(file.name) for file in Path(folder).iterdir()]
    return sorted({int(match[1]) for match in found if match} | {os.getpid()})
