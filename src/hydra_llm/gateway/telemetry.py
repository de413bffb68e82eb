"""Prometheus counters, one log line for a failure, GenAI spans. Never a user's id, never a text."""

import logging
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

from opentelemetry import trace
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from hydra_llm.gateway.activity import Activity
from hydra_llm.llm.wire import tokens_of

log = logging.getLogger("hydra_llm.gateway")
tracer = trace.get_tracer("hydra_llm")
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Variable of prometheus_client: the folder in which the processes of one server count."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

noting: ContextVar[dict[str, Any] | None] = ContextVar("noting", default=None)
"""What is known of the request that is being answered, for its line in the log."""


def note(**facts: Any) -> None:
    """Add to the line of the request that is being answered, if there is one; None adds nothing."""
    if (noted := noting.get()) is not None:
        noted.update({name: fact for name, fact in facts.items() if fact is not None})


def note_usage(usage: object) -> tuple[int, ...]:
    """The tokens of prompt and answer that an upstream tells; empty if it does not."""
    if tokens := tokens_of(usage):
        note(prompt_tokens=tokens[0], completion_tokens=tokens[1])
    return tokens or ()


class Telemetry:
    """Counts in a registry of its own, so that a process may hold two servers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        # A route is the path's pattern, without a user's id.
        self.requests = counter("hydra_requests", "HTTP requests", ["route", "status"])
        about = "Chat completions, by why they are not personal"
        self._answers = counter("hydra_answers", about, ["reason"])
        about = "What was left out of an answer because it failed"
        self._failures = counter("hydra_failures", about, ["part"])
        self.feedback = counter("hydra_feedback", "Feedback, by kind", ["kind"])
        about = "Answers at which the adapter left the first candidate"
        self._abstained = counter("hydra_abstained", about)
        stages = partial(Histogram, buckets=SECONDS, registry=self.registry)
        self._stages = stages("hydra_stage_seconds", "Seconds by stage", ["stage"])
        gauge = partial(Gauge, registry=self.registry, multiprocess_mode="livesum")
        self.activity = Activity()
        self.in_flight = gauge("hydra_in_flight", "Requests in flight")

    def figures(self) -> bytes:
        """For Prometheus; of all workers of this server."""
        if METRICS_FOLDER not in os.environ:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)
        return generate_latest(together)

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


@dataclass
class Span:
    """A GenAI span around a chat completion, which may outlive its handler: no content."""

    span: trace.Span
    streams: bool = False

    def spent(self, completion: Mapping[str, Any]) -> None:
        """Model and tokens of an answer, as GenAI's conventions name them."""
        self.span.set_attribute("gen_ai.response.model", str(completion.get("model")))
        tokens = note_usage(completion.get("usage"))
        for kind, count in zip(("input", "output"), tokens, strict=False):
            self.span.set_attribute(f"gen_ai.usage.{kind}_tokens", count)

    async def around(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The same stream; the span ends with it."""
        try:
            async for piece in pieces:
                yield piece
        finally:
            self.span.end()


@contextmanager
def chat_span(model: str) -> Iterator[Span]:
    """A span that ends with its block, or with the stream that its block returns."""
    about = {"operation.name": "chat", "request.model": model, "provider.name": "hydra-llm"}
    attributes = {f"gen_ai.{name}": value for name, value in about.items()}
    kind = trace.SpanKind.SERVER
    span = Span(tracer.start_span(f"chat {model}", kind=kind, attributes=attributes))
    try:
        with trace.use_span(span.span, record_exception=False, set_status_on_exception=False):
            yield span
    finally:
        if not span.streams:
            span.span.end()
