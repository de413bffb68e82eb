"""The upstream with each of its calls counted, timed, priced and traced. Changes nothing of them.

What the upstream tells of tokens counts; where it tells none, and where a call was given up, the
tokens are estimated, and said to be. An error costs nothing.
"""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from hydra_llm.gateway.spend import (
    Bill,
    Ledger,
    bytes_of,
    drawing,
    estimated_spend,
    paying,
    told_spend,
)
from hydra_llm.gateway.telemetry import TOLD, Telemetry, noting
from hydra_llm.gateway.tracing import Span
from hydra_llm.gateway.upstream import Body, Head, Passed, Upstream, UpstreamError
from hydra_llm.llm.wire import json_of

KEPT = 4096  # bytes of a passed response's end, where its tokens are told
USAGE = re.compile(rb'(?<!\\)"usage"\s*:\s*(\{(?:[^{}]|\{[^{}]*\})*\})')
SAID = re.compile(
    rb'"(?:content|text|arguments|reasoning|reasoning_content)"\s*:\s*"((?:[^"\\]|\\.)*)"'
)
_SAID_ESCAPE = re.compile(rb"\\u[0-9a-fA-F]{4}")
COSTLY = ("completions", "embeddings")  # passed requests that cost tokens also where none are told
GIVEN_UP = (asyncio.CancelledError, GeneratorExit)


class MeteredUpstream:
    """An `Upstream` whose calls are counted."""

    def __init__(self, inner: Upstream, ledger: Ledger, telemetry: Telemetry):
        self._inner, self._ledger, self._telemetry = inner, ledger, telemetry
        self.limiter = inner.limiter

    async def complete(self, body: Body) -> Any:
        with self._call(body) as call:
            completion = await self._inner.complete(body)
            call.charge_completion(completion)
            return completion

    async def stream(self, body: Body) -> AsyncIterator[bytes]:
        facts = {} if (noted := noting.get()) is None else noted
        facts.pop(TOLD, None)
        with self._call(body) as call:
            try:
                async for piece in self._inner.stream(body):
                    call.answered += said_in(piece)
                    yield piece
            finally:
                if TOLD in facts or call.answered:
                    call.charge(facts.get(TOLD), call.answered)

    async def models(self, id: str | None = None) -> Any:
        return await self._inner.models(id)

    async def forward(self, sent: Passed) -> tuple[Head, AsyncGenerator[bytes]]:
        body = json_of(sent.content) if isinstance(sent.content, bytes) else None
        body = body if isinstance(body, dict) and sent.method == "POST" else {}
        call = _Call(self, body)
        try:
            head, pieces = await self._inner.forward(sent)
        except BaseException as error:
            call.end(error)
            raise
        passed = self._passed(call, head, sent.path, pieces)
        await anext(passed)  # begun, so that all is closed with it
        return head, passed

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _passed(
        self, call: "_Call", head: Head, path: str, pieces: AsyncGenerator[bytes]
    ) -> AsyncGenerator[bytes]:
        last, fault = b"", None
        try:
            async with aclosing(pieces):
                yield b""
                async for piece in pieces:
                    call.answered += said_in(piece)
                    last = (last + piece)[-KEPT:]
                    yield piece
        except BaseException as error:
            fault = error
            raise
        finally:
            found = USAGE.findall(last)
            usage = json_of(found[-1]) if found else None
            if isinstance(usage, dict):  # embeddings have no answer
                usage = {"completion_tokens": 0, **usage}
            if told_spend(usage) or path in COSTLY:
                call.charge(usage, 0 if path == "embeddings" else call.answered)
            call.end(fault, head.status)

    @contextmanager
    def _call(self, body: Body) -> Iterator["_Call"]:
        call = _Call(self, body)
        try:
            yield call
        except BaseException as error:
            call.end(error)
            raise
        call.end()


def said_in(piece: bytes) -> int:
    """How many bytes of text a piece of a stream says, also where it is no whole event."""
    return sum(len(_SAID_ESCAPE.sub(b"???", text)) for text in SAID.findall(piece))


class _Call:
    """One request to the upstream."""

    def __init__(self, metered: MeteredUpstream, body: Body):
        self._ledger, self._telemetry = metered._ledger, metered._telemetry
        self._body, self._model = body, body.get("model")
        self._bill: Bill | None = paying.get()
        self._kind, self._started = drawing.get(), time.perf_counter()
        self.answered, self._charged = 0, False
        about = {"gen_ai__request__model": self._model, "hydra__kind": self._kind}
        name = f"chat {self._model}" if "messages" in body else "upstream"
        self._span: Span = self._telemetry.tracing.start(name, "client", **about)

    def charge_completion(self, completion: Body) -> None:
        """Charge the call for a whole completion."""
        usage, answered = completion.get("usage"), 0
        if told_spend(usage) is None:
            answered = bytes_of(completion.get("choices"), "message")
        self.charge(usage, answered, completion.get("model"))

    def charge(self, usage: object, answered: int, model: object = None) -> None:
        """Charge the call, as told by `usage`, or by an answer of so many bytes."""
        try:
            self._charge(usage, answered, model)
        except Exception as error:  # whatever it is must not cost the caller an answer
            self._telemetry.failed("spend", error)

    def _charge(self, usage: object, answered: int, model: object) -> None:
        told = told_spend(usage)
        spend, cached = told or (estimated_spend(self._body, answered), 0)
        names = [name for name in (self._model, model) if isinstance(name, str)]
        known = self._ledger.charge(self._bill, self._kind, spend, names or ["unknown"], cached)
        self._charged = True
        self._span.set(
            gen_ai__response__model=model if isinstance(model, str) else None,
            gen_ai__usage__input_tokens=known.prompt_tokens,
            gen_ai__usage__output_tokens=known.completion_tokens,
            hydra__estimated=bool(known.estimated_tokens),
            hydra__cost=known.money,
        )

    def end(self, error: BaseException | None = None, status: int = 200) -> None:
        """The call is over; one that was given up may cost what it was asked."""
        told = str(status)
        if isinstance(error, UpstreamError):
            told = str(error.status)
        elif isinstance(error, GIVEN_UP):
            told = "cancelled"
            if not self._charged and "messages" in self._body:
                self.charge(None, 0)
        elif error is not None:
            told = "error"
        label = self._telemetry.models.label(self._model, answered=error is None)
        self._telemetry.called(label, told, time.perf_counter() - self._started)
        if error is not None:
            self._span.failed(told if isinstance(error, UpstreamError) else error)
        self._span.end()
