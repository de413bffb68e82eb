"""Spans for OpenTelemetry, the extra `otel`: one of a request, with one of each stage below it.
Without a tracer nothing is made. Numbers, reasons and models' names: never
a text, never a user's id, never an exception's message.
"""

import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from hydra_llm import __version__
from hydra_llm.extras import one_line_imports
from hydra_llm.llm.wire import tokens_of

Headers = Mapping[str, str]
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
TRACESTATE = re.compile(r"[ -~]{1,512}")
NAME = "hydra_llm"

outgoing: ContextVar[Headers] = ContextVar("outgoing", default={})  # noqa: B039
"""Headers of W3C Trace Context for the next request to the upstream."""
_parent: ContextVar[Any] = ContextVar("parent", default=None)
"""OpenTelemetry's context with the span that contains what is done now. Not its own current one:
that would have to be left where it was entered, and a stream is written elsewhere.
"""


class Span:
    """A span, or none."""

    def __init__(self, span: Any = None):
        self._span = span
        self.streams = False  # it ends with its stream

    def set(self, **attributes: Any) -> None:
        """Set attributes; `__` in a name is a dot, and what is None is left out."""
        if self._span is not None:
            for name, value in attributes.items():
                if value is not None:
                    self._span.set_attribute(name.replace("__", "."), value)

    def spent(self, completion: Mapping[str, Any]) -> None:
        """Model and tokens of an answer, as GenAI's conventions name them."""
        tokens = tokens_of(completion.get("usage")) or ()
        self.set(gen_ai__response__model=str(completion.get("model")))
        for kind, count in zip(("input", "output"), tokens, strict=False):
            self.set(**{f"gen_ai__usage__{kind}_tokens": count})

    def failed(self, error: BaseException | str) -> None:
        """Mark it as failed; of an error the class alone."""
        if self._span is not None:
            from opentelemetry.trace import StatusCode

            name = error if isinstance(error, str) else type(error).__name__
            self._span.set_attribute("error.type", name)
            self._span.set_status(StatusCode.ERROR)

    def end(self) -> None:
        if self._span is not None:
            self._span.end()

    async def around(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The same stream; the span ends with it."""
        try:
            async for piece in pieces:
                yield piece
        finally:
            self.end()


class Tracing:
    """Makes spans by a tracer of OpenTelemetry; without one, none."""

    def __init__(self, tracer: Any = None, provider: Any = None):
        self._tracer, self._provider = tracer, provider

    @property
    def parent(self) -> Any:
        """The span around what is done now, for another thread's `stage`."""
        return _parent.get()

    def start(self, name: str, kind: str = "internal", **attributes: Any) -> Span:
        """A span that the caller ends; `kind`: internal, client or server. Of a client's, the
        headers of its request are `outgoing`.
        """
        if self._tracer is None:
            return Span()
        from opentelemetry import trace

        kinds = trace.SpanKind[kind.upper()]
        span = self._tracer.start_span(name, context=_parent.get(), kind=kinds)
        if kind == "client":
            outgoing.set(_headers_of(trace.set_span_in_context(span)))
        made = Span(span)
        made.set(**attributes)
        return made

    def stage(
        self, name: str, parent: Any = None, **attributes: Any
    ) -> AbstractContextManager[Span]:
        """A span around a block. `parent`: of another thread."""
        return (
            nullcontext(Span()) if self._tracer is None else self._stage(name, parent, attributes)
        )

    @contextmanager
    def _stage(self, name: str, parent: Any, attributes: dict[str, Any]) -> Iterator[Span]:
        from opentelemetry import trace

        outer = _parent.set(parent) if parent is not None else None
        span = self.start(name, **attributes)
        inner = _parent.set(trace.set_span_in_context(span._span))
        try:
            yield span
        except BaseException as error:
            span.failed(error)
            raise
        finally:
            _parent.reset(inner)
            if outer is not None:
                _parent.reset(outer)
            span.end()

    def adopt(self, headers: Headers) -> None:
        """Take the span that a caller's headers name for that around what is done from here on.
        Without a tracer the headers go on to the upstream.
        """
        given = _passed(headers)
        if self._tracer is None:
            outgoing.set(given)
            return
        from opentelemetry import context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        _parent.set(TraceContextTextMapPropagator().extract(given, context.get_current()))

    @contextmanager
    def request(self, model: str, headers: Headers) -> Iterator[Span]:
        """The span of a chat request below that which the caller's headers name; it ends with its
        block, or with the stream that its block returns.
        """
        self.adopt(headers)
        if self._tracer is None:
            yield Span()
            return
        from opentelemetry import trace

        about = {"operation__name": "chat", "request__model": model, "provider__name": "hydra-llm"}
        attributes = {f"gen_ai__{name}": value for name, value in about.items()}
        span = self.start(f"chat {model}", "server", **attributes)
        _parent.set(trace.set_span_in_context(span._span))
        try:
            yield span
        except BaseException as error:
            if not 400 <= getattr(error, "status", 500) < 500:  # the caller's own mistake
                span.failed(error)
            raise
        finally:
            if not span.streams:
                span.end()

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()


def open_tracing(mode: str) -> Tracing:
    """`off`, or `otlp`: to the endpoint of the variables OTEL_EXPORTER_OTLP_... (HTTP).
    MissingExtra without the extra `otel`.
    """
    if mode == "off":
        return Tracing()
    with one_line_imports("traces=otlp"):  # another package may have brought the API alone
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    given = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in given
    about = {"service.version": __version__} | ({} if named else {"service.name": "hydra-llm"})
    provider = TracerProvider(resource=Resource.create(about))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider.get_tracer(NAME, __version__), provider)


def _passed(headers: Headers) -> dict[str, str]:
    """The headers of W3C Trace Context that a caller has sent, if they are well formed."""
    parent, state = headers.get("traceparent", ""), headers.get("tracestate", "")
    if not TRACEPARENT.fullmatch(parent):
        return {}
    known = {"tracestate": state} if TRACESTATE.fullmatch(state) else {}
    return {"traceparent": parent, **known}


def _headers_of(context: Any) -> dict[str, str]:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    headers: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(headers, context)
    return headers
