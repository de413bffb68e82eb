"""The LLM behind the gateway, an OpenAI-compatible endpoint (embedded.py: inside this process).

Bodies are passed on as they are: the endpoint may know fields that this program does not. The URL
comes from settings, never from a request, and the caller's key goes nowhere. The caller's SDK does
the retries, except of a request on a kept connection that the endpoint was closing. Knows no users.
"""

import json
import string
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from secrets import token_hex
from typing import Any, Protocol
from urllib.parse import parse_qsl, quote, unquote_plus, urlsplit

import httpx2

from hydra_llm.environment import http_client_faults
from hydra_llm.gateway.chunks import chunk_of, ends_answer
from hydra_llm.gateway.schemas import ApiError
from hydra_llm.gateway.telemetry import note, note_usage
from hydra_llm.gateway.tracing import outgoing
from hydra_llm.llm.endpoint import CapabilityCache, Endpoint, Refusal
from hydra_llm.llm.limiter import Limiter, limiter_of
from hydra_llm.llm.sse import Event, EventReader
from hydra_llm.llm.wire import WireError, error_in, failure, json_of, tokens_of

Transport = httpx2.AsyncBaseTransport
Body = Mapping[str, Any]
AS_JSON = {"content-type": "application/json"}
AT_ONCE, MOST_POOLS = 8, 125
"""Requests of one pool of connections, and pools: a pool looks at each of its connections, by calls
of the system, twice a request.
"""
LIMITS = httpx2.Limits(max_connections=AT_ONCE, keepalive_expiry=4.0)
"""An idle connection is closed before common servers do, which might have a request on its way."""
# How a request ends on a connection that the endpoint is about to close.
CUT = (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError)
RATE_HEADERS = ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests")
PASSED_HEADERS = ("retry-after", "retry-after-ms", "x-request-id", *RATE_HEADERS, "x-should-retry")
"""Headers of an upstream's error that the caller's SDK acts on."""
FORWARDED = ("content-type", "content-disposition", "content-language", *PASSED_HEADERS)
"""Headers of a passed request's response."""
BLANK = b" \t\r\n\xef\xbb\xbf"  # what may stand before an answer
NO_STREAM = (b"{", b"[", b"<")  # how an answer begins that is JSON or a web page
LONGEST = 2000  # characters of an error that are told


class UpstreamError(ApiError):
    """The upstream answered with an error (its body is passed on), not at all, or with nonsense."""

    def __init__(
        self, status: int, body: Any, headers: Mapping[str, str] | None = None, code: str = ""
    ):
        error = body.get("error", body) if isinstance(body, dict) else body
        super().__init__(status, str(error), code=code or None, headers=headers)
        if error is not body and isinstance(error, dict):
            self.body = {"error": {**self.body["error"], "message": None, **error}}

    @property
    def is_callers(self) -> bool:
        """Whether the request is at fault, as of an unknown model; not the key, rate or time."""
        return 400 <= self.status < 500 and self.status not in (401, 403, 408, 429)

    @classmethod
    def of(
        cls, error: WireError, endpoint: Endpoint, headers: Mapping[str, str], body: Any = None
    ) -> "UpstreamError":
        """The error as the caller sees it: in OpenAI's shape, with the upstream's own fields."""
        passed = {n: endpoint.redact(headers[n]) for n in PASSED_HEADERS if n in headers}
        status = error.status or 502
        if status in (401, 403):  # the server's own key was refused, and some endpoints quote it
            message = "the upstream refused the gateway's own key"
            return cls(status, message, passed, "upstream_key")
        message = endpoint.redact(error.message)[:LONGEST]
        if message.startswith("an answer"):
            message = f"the upstream gave {message}"
        own = body.get("error") if isinstance(body, Mapping) else None
        fields = endpoint.redacted(own) if isinstance(own, Mapping) else {}
        told = {"type": error.kind, "code": error.code, "param": error.param}
        told = {n: endpoint.redact(value) for n, value in told.items() if value} | fields
        return cls(status, {"error": {**told, "message": message}}, passed)


@dataclass(frozen=True)
class Passed:
    """A request that is passed on as it is, to a path below the endpoint's URL."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    content: bytes | AsyncIterator[bytes]


@dataclass(frozen=True)
class Head:
    """How the response to a passed request begins."""

    status: int
    headers: Mapping[str, str]


class Upstream(Protocol):
    """What the gateway asks; every method raises `UpstreamError` where the upstream fails."""

    @property
    def limiter(self) -> Limiter | None: ...  # of samples; None: the upstream has turns of its own

    async def complete(self, body: Body) -> Any: ...  # a completion, as plain JSON

    def stream(self, body: Body) -> AsyncIterator[bytes]: ...  # events, as they come

    async def models(self, id: str | None = None) -> Any: ...  # the list, or one of them

    async def forward(self, sent: Passed) -> tuple[Head, AsyncGenerator[bytes]]: ...

    async def aclose(self) -> None: ...


class Pools:
    """HTTP clients of one endpoint: the first that has fewer than `AT_ONCE` requests sends the
    next, so that few requests use few connections again and again.
    """

    def __init__(self, make: Callable[[], httpx2.AsyncClient]):
        self._make, self._clients, self._busy = make, [make()], [0]

    @contextmanager
    def client(self) -> Iterator[httpx2.AsyncClient]:
        """A client for one request."""
        place = next((i for i, busy in enumerate(self._busy) if busy < AT_ONCE), len(self._busy))
        if place == MOST_POOLS:
            place = self._busy.index(min(self._busy))
        elif place == len(self._busy):
            self._clients.append(self._make())
            self._busy.append(0)
        self._busy[place] += 1
        try:
            yield self._clients[place]
        finally:
            self._busy[place] -= 1

    async def aclose(self) -> None:
        for client in self._clients:
            await client.aclose()


class HttpUpstream:
    """An OpenAI-compatible endpoint."""

    def __init__(self, endpoint: Endpoint, *, timeout: float, transport: Transport | None = None):
        self.endpoint = endpoint
        self.limiter = limiter_of(endpoint)  # labelling in this process has the same one
        key = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        url = endpoint.url.rstrip("/") + "/"
        options: dict[str, Any] = {"base_url": url, "headers": key, "limits": LIMITS}
        options["params"] = endpoint.query or None  # of every request, behind its path
        host = f".{urlsplit(url).hostname}"
        is_openai = host.endswith((".openai.com", ".openai.azure.com"))
        self.limit_name = "max_completion_tokens" if is_openai else "max_tokens"
        """The field that limits an answer: new models of OpenAI refuse the one that others know."""
        with http_client_faults():
            options["verify"] = httpx2.create_ssl_context()  # read once for all pools
            self._pools = Pools(
                partial(httpx2.AsyncClient, timeout=timeout, transport=transport, **options)
            )

    async def complete(self, body: Body) -> Any:
        answer = await self._send("chat/completions", body)
        named = {} if "id" in answer else {"id": f"chatcmpl-{token_hex(12)}"}
        return {**named, "model": body.get("model"), **answer}

    async def stream(self, body: Body) -> AsyncIterator[bytes]:
        """Whole events, as they come. An error among them is raised."""
        async with self._answering("POST", "chat/completions", json.dumps(body)) as response:
            reader, said, ended, start = EventReader(), False, False, b""
            try:
                async for piece in response.aiter_bytes():
                    start += b"" if said else piece
                    for event in reader.feed(piece):
                        said, ended = said or event.data is not None, self._ends(event) or ended
                        if said or event.raw.startswith(b":"):  # a comment
                            yield event.raw
            except ValueError as error:
                raise UpstreamError(502, f"the upstream's stream cannot be read: {error}") from None
            for event in reader.end():
                said, ended = said or event.data is not None, self._ends(event) or ended
                if said:
                    yield event.raw
            if not said:
                if start.strip(BLANK)[:1] in NO_STREAM:
                    self._read(response, start)
                raise UpstreamError(502, "the upstream answered with something else than a stream")
            if not ended:  # to a client a stream that stops looks like one that has ended
                raise UpstreamError(502, "the upstream's stream ended before its answer did")

    def _ends(self, event: Event) -> bool:
        """Whether the answer ends with an event; raises the error that it tells."""
        chunk = chunk_of(event)
        error = error_in(chunk) if isinstance(chunk, Mapping | list) else None
        if event.kind == "error" and error is None:
            error = WireError(str(event.data))
        if error is not None:
            raise UpstreamError.of(error, self.endpoint, {}, chunk)
        if isinstance(chunk, Mapping):
            note_usage(chunk.get("usage"))
        return ends_answer(event, chunk)

    async def models(self, id: str | None = None) -> Any:
        if id is None:
            return await self._send("models", needs="")
        # No way to the endpoint's other paths, which the server's key opens.
        if any(part in ("", ".", "..") for part in id.split("/")):
            raise UpstreamError(404, "no such model", code="model_not_found")
        return await self._send(f"models/{quote(id, safe='/')}", needs="")

    async def forward(self, sent: Passed) -> tuple[Head, AsyncGenerator[bytes]]:
        stack = AsyncExitStack()
        query = self._query(sent.query)
        answering = self._answering(
            sent.method, f"/{sent.path}", sent.content, headers=sent.headers, query=query
        )
        response = await stack.enter_async_context(answering)
        told = {name: response.headers[name] for name in FORWARDED if name in response.headers}
        head = Head(response.status_code, {name: self.endpoint.redact(told[name]) for name in told})

        async def pieces() -> AsyncGenerator[bytes]:
            async with stack:
                yield b""
                async for piece in response.aiter_bytes():
                    yield piece

        body = pieces()
        await anext(body)  # begun, so that the connection is closed with it
        return head, body

    def _query(self, asked: str) -> str:
        """A request's own query; where it has a parameter of the endpoint's, that one stands."""
        own = {name for name, _ in parse_qsl(self.endpoint.query, keep_blank_values=True)}
        parts = (part for part in asked.split("&") if unquote_plus(part.split("=")[0]) not in own)
        whole = "&".join(filter(None, (self.endpoint.query, *parts)))
        return quote(whole, safe=string.punctuation)

    async def aclose(self) -> None:
        await self._pools.aclose()

    @asynccontextmanager
    async def _answering(
        self,
        method: str,
        path: str,
        content: Any = None,
        *,
        headers: Mapping[str, str] = AS_JSON,
        query: str = "",
    ) -> AsyncIterator[httpx2.Response]:
        """A response that has begun. A request whose connection ends before that is sent once more:
        the endpoint may have closed an idle connection while the request was on its way.
        """
        try:
            with self._pools.client() as client:
                sent = {**headers, **outgoing.get()}
                request = client.build_request(method, path, content=content, headers=sent)
                if query:
                    request.url = request.url.copy_with(query=query.encode())
                try:
                    response = await client.send(request, stream=True)
                except CUT:
                    if not isinstance(content, str | bytes | None):
                        raise  # what was streamed is gone
                    response = await client.send(request, stream=True)
                try:
                    note(upstream=response.status_code)
                    if 300 <= response.status_code < 400:  # not followed with a user's texts
                        raise UpstreamError(502, "the upstream answered with a redirect")
                    if response.status_code >= 400:
                        self._read(response, await response.aread())
                    yield response
                finally:
                    await response.aclose()
        except httpx2.TimeoutException:
            raise UpstreamError(504, "the upstream did not answer in time") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            message = f"the upstream cannot be reached ({type(error).__name__})"
            raise UpstreamError(502, message) from None

    async def _send(self, path: str, body: Body | None = None, needs: str = "choices") -> Any:
        method, content = ("GET", None) if body is None else ("POST", json.dumps(body))
        async with self._answering(method, path, content) as response:
            return self._read(response, await response.aread(), needs)

    def _read(self, response: httpx2.Response, content: bytes, needs: str = "choices") -> Any:
        """The JSON of an answer; raises the error that it tells, or that it is."""
        body = json_of(content)
        if error := failure(response.status_code, content, needs=needs, body=body):
            raise UpstreamError.of(error, self.endpoint, response.headers, body)
        return body


def learn_samples(
    known: CapabilityCache, sent: Body, results: Sequence[Body | UpstreamError]
) -> None:
    """Learn what a model takes from the results of the caller's own request, which is first, and of
    the requests for samples; the last of them had the body `sent`.

    A refusal that names no parameter is taken for one of `n`, then of the samples' temperature: the
    caller's request, which was answered, had all the rest. With a seed nothing is learned: it may
    be what was refused.
    """
    first, last = results[0], results[-1]
    if len(results) < 2 or isinstance(first, UpstreamError) or "seed" in sent:
        return
    model = str(sent.get("model"))
    before = known.of(model)
    if not isinstance(last, UpstreamError):
        if len(last["choices"]) < (sent.get("n") or 1):
            known.learn(model, replace(before, native_n=False))
    elif last.status in (400, 422):
        after = before.after(Refusal.of(last.status, last.body), sent)
        if after == before and "n" in sent:
            after = replace(before, native_n=False)
        elif after == before:
            after = replace(before, refused=before.refused | {"temperature"})
        known.learn(model, after)


def usage_of(completions: Sequence[Mapping[str, Any]]) -> Any:
    """What several completions spent together, None where one does not tell its tokens; of a single
    one all that the upstream reports.
    """
    usages = [completion.get("usage") for completion in completions]
    if len(completions) == 1:
        return usages[0]
    told = [usage for usage in usages if isinstance(usage, Mapping) and tokens_of(usage)]
    if len(told) < len(usages):
        return None
    sums = _sums(told)
    names = ("prompt_tokens", "completion_tokens")
    total: dict[str, Any] = {name: sums[name] for name in names}
    total["total_tokens"] = sum(total.values())
    for name in ("prompt_tokens_details", "completion_tokens_details"):
        details = [usage[name] for usage in told if isinstance(usage.get(name), Mapping)]
        if details:
            total[name] = _sums(details)
    return total


def _sums(usages: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The sum of each field that is a number."""
    total = Counter[str]()
    for usage in usages:
        total.update({name: count for name, count in usage.items() if isinstance(count, int)})
    return dict(total)
