"""Prometheus figures, and one log line for a failure. Never a user's id, never a text; labels have
few values: what a caller may make up, as a model's name, is counted as `other` beyond a number.
"""

import logging
import os
from collections.abc import Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from hydra_llm.gateway.activity import Activity
from hydra_llm.gateway.tracing import Tracing
from hydra_llm.llm.wire import tokens_of
from hydra_llm.store.values import Spend

log = logging.getLogger("hydra_llm.gateway")
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Variable of prometheus_client: the folder in which the processes of one server count."""
MOST_MODELS = 100  # labels of models; further ones are OTHER
OTHER = "other"
LONGEST_NAME = 100  # characters of a model's name
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

noting: ContextVar[dict[str, Any] | None] = ContextVar("noting", default=None)
"""What is known of the request that is being answered, for its line in the log."""


def note(**facts: Any) -> None:
    """Add to the line of the request that is being answered, if there is one; None adds nothing."""
    if (noted := noting.get()) is not None:
        noted.update({name: fact for name, fact in facts.items() if fact is not None})


TOLD = "usage"
"""Among what is known of a request: what the upstream told last of its tokens."""


def note_usage(usage: object) -> tuple[int, ...]:
    """The tokens of prompt and answer that an upstream tells; empty if it does not."""
    if tokens := tokens_of(usage):
        note(prompt_tokens=tokens[0], completion_tokens=tokens[1])
        note(**{TOLD: usage})
    return tokens or ()


class ModelNames:
    """Names of models as labels: those that have answered, up to a number."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def label(self, model: object, *, answered: bool) -> str:
        """The name, or OTHER."""
        name = str(model)[:LONGEST_NAME] if isinstance(model, str) else OTHER
        if answered and len(self._known) < MOST_MODELS:
            self._known.add(name)
        return name if name in self._known else OTHER


class Telemetry:
    """Counts in a registry of its own, so that a process may hold two servers."""

    def __init__(self, tracing: Tracing | None = None) -> None:
        self.registry, self.tracing = CollectorRegistry(), tracing or Tracing()
        counter = partial(Counter, registry=self.registry)
        # A route is the path's pattern, without a user's id.
        self.requests = counter("hydra_requests", "HTTP requests", ["route", "status"])
        about = "Chat completions, by why they are not personal"
        self._answers = counter("hydra_answers", about, ["reason"])
        about = "What was left out of an answer because it failed"
        self._failures = counter("hydra_failures", about, ["part"])
        self.feedback = counter("hydra_feedback", "Feedback, by kind", ["kind"])
        self.changes = counter("hydra_user_drift", "Changes of a user's taste that were found")
        about = "Answers at which the adapter left the first candidate"
        self._abstained = counter("hydra_abstained", about)
        stages = partial(Histogram, buckets=SECONDS, registry=self.registry)
        self._stages = stages("hydra_stage_seconds", "Seconds by stage", ["stage"])
        gauge = partial(Gauge, registry=self.registry, multiprocess_mode="livesum")
        self.activity = Activity()
        self.in_flight = gauge("hydra_in_flight", "Requests in flight")
        self.models, self.state = ModelNames(), CollectorRegistry()
        self._count_spend()

    def _count_spend(self) -> None:
        counter = partial(Counter, registry=self.registry)
        of, seconds = ["model", "kind"], partial(Histogram, registry=self.registry)
        about = "Tokens, by direction (prompt, completion) and source (reported, estimated)"
        self._tokens = counter("hydra_tokens", about, [*of, "direction", "source"])
        about = "Money, in the currency of the prices, of models whose price is known"
        self._cost = counter("hydra_cost", about, of)
        about = "Tokens of models whose price is not known"
        self._unpriced = counter("hydra_unpriced_tokens", about, ["model"])
        about = "Requests to the upstream, by status, or cancelled"
        self._calls = counter("hydra_upstream_requests", about, ["model", "status"])
        about = "Seconds until the upstream's answer had come as a whole"
        self._call_seconds = seconds("hydra_upstream_seconds", about, ["model"], buckets=SECONDS)
        about = "Requests that a limit refused, by whose limit it is, of what, and per which time"
        self.limited = counter("hydra_limited", about, ["of", "unit", "per"])

    def figures(self) -> bytes:
        """For Prometheus; of all workers of this server. `state` is read at that time."""
        if METRICS_FOLDER not in os.environ:
            return generate_latest(self.registry) + generate_latest(self.state)
        together = CollectorRegistry()
        MultiProcessCollector(together)
        return generate_latest(together) + generate_latest(self.state)

    def called(self, model: str, status: str, seconds: float) -> None:
        """A request to the upstream has ended."""
        self._calls.labels(model, status).inc()
        self._call_seconds.labels(model).observe(seconds)

    def spent(self, model: str, kind: str, spend: Spend) -> None:
        """An LLM was called; `spend` is of one call, told or estimated as a whole."""
        source = "estimated" if spend.estimated_tokens else "reported"
        tokens = {"prompt": spend.prompt_tokens, "completion": spend.completion_tokens}
        for direction, count in tokens.items():
            self._tokens.labels(model, kind, direction, source).inc(count)
        if spend.money is None:  # no price is known: that is not 0
            self._unpriced.labels(model).inc(spend.unpriced_tokens)
        else:
            self._cost.labels(model, kind).inc(spend.money)

    def answered(
        self, reason: str | None, seconds: Mapping[str, float], abstained: bool | None = None
    ) -> None:
        """There is an answer to a chat request; `abstained` is None where no adapter has chosen."""
        self.activity.answered(reason or "personal", seconds, abstained)
        note(reason=reason or "personal", seconds=seconds)
        self._answers.labels(reason or "personal").inc()
        for stage, spent in seconds.items():
            self._stages.labels(stage).observe(spent)
        self._abstained.inc(int(abstained or False))

    def failed(self, part: str, error: BaseException) -> None:
        """A part failed and was left out. The log has the class: the message may quote a user."""
        self._failures.labels(part).inc()
        log.warning("%s failed and was left out: %s", part, type(error).__name__)
