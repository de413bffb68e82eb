"""The LLM behind the gateway, an OpenAI-compatible endpoint:

    complete  a request's body → a chat completion, as plain JSON
    stream    a request's body → the bytes of a stream of chunks
    models    what there is

Bodies pass through as they are: the endpoint may know fields that this program does not. The URL
comes from settings, never from a request, and the caller's key goes nowhere. No retries here, the
caller's SDK does them, but for a request on a kept connection that the endpoint was closing. Knows
no users. An LLM inside this process is in embedded.py.
"""

import json
import re
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from secrets import token_hex
from typing import Any, Protocol
from urllib.parse import quote

import httpx2

from hydra_llm.gateway.schemas import ApiError
from hydra_llm.llm.endpoint import CapabilityCache, Endpoint, Refusal

AS_JSON = {"content-type": "application/json"}
IDLE_SECONDS = 4.0
"""How long an idle connection is kept: shorter than common servers keep it, which would close it
while a request is on its way.
"""
CUT = (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError)
"""How a request ends on a connection that the endpoint is about to close."""
PASSED_HEADERS = (
    "retry-after",
    "retry-after-ms",
    "x-request-id",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-should-retry",
)
"""Headers of an upstream's error that the caller's SDK acts on."""
ENDS = re.compile(rb'\[DONE\]|"finish_reason": ?"')
"""What every complete stream holds; within an answer's text the quotes are escaped."""
DONE = b"data: [DONE]\n\n"


class UpstreamError(Exception):
    """The upstream answered with an error, not at all, or with nonsense."""

    def __init__(
        self,
        status: int,
        said: Any,
        headers: Mapping[str, str] | None = None,
        *,
        code: str | None = None,
    ):
        self.status, self.headers = status, dict(headers or {})
        error = said.get("error", said) if isinstance(said, dict) else said
        as_sent = error is not said and isinstance(error, dict)
        self.body = said if as_sent else ApiError(status, str(error), code=code).body
        super().__init__(str(self.body["error"]))


class Upstream(Protocol):
    """What the gateway asks."""

    def complete(self, body: Mapping[str, Any]) -> Any:
        """Await a chat completion.

        Raises:
            UpstreamError: there is none.
        """
        ...

    def stream(self, body: Mapping[str, Any]) -> AsyncIterator[bytes]:
        """The bytes of server-sent events, as they come.

        Raises:
            UpstreamError: before the first byte, or where the stream breaks off.
        """
        ...

    def models(self, id: str | None = None) -> Any:
        """Await the list of models, or one of them.

        Raises:
            UpstreamError: as the upstream says.
        """
        ...

    def aclose(self) -> Any:
        """Await the end of all connections."""
        ...


class HttpUpstream:
    """An OpenAI-compatible endpoint."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        timeout: float,
        transport: httpx2.AsyncBaseTransport | None = None,
    ):
        self.endpoint = endpoint
        self._client = httpx2.AsyncClient(
            base_url=endpoint.url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {},
            timeout=timeout,
            limits=httpx2.Limits(
                max_connections=1000, max_keepalive_connections=200, keepalive_expiry=IDLE_SECONDS
            ),
            transport=transport,
        )

    async def complete(self, body: Mapping[str, Any]) -> Any:
        answer = await self._send("POST", "chat/completions", body)
        if not isinstance(answer, dict) or not _are_choices(answer.get("choices")):
            raise UpstreamError(502, "the upstream answered without choices")
        return {"id": f"chatcmpl-{token_hex(12)}", "model": body.get("model"), **answer}

    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[bytes]:
        try:
            async with self._answering("POST", "chat/completions", body) as response:
                if response.status_code >= 300:
                    raise _error_of(response.status_code, await response.aread(), response.headers)
                if "json" in response.headers.get("content-type", ""):
                    raise UpstreamError(
                        502, "the upstream answered with something else than a stream"
                    )
                tail, ended = b"", False
                async for piece in response.aiter_bytes():
                    ended = ended or ENDS.search(tail + piece) is not None
                    tail = piece[-32:]
                    yield piece
                if not ended:  # to a client a stream that stops looks like one that has ended
                    raise UpstreamError(502, "the upstream's stream ended before its answer did")
        except httpx2.HTTPError as error:
            raise _unreached(error) from None

    async def models(self, id: str | None = None) -> Any:
        if id is None:
            return await self._send("GET", "models")
        # No way to the endpoint's other paths, which the server's key opens.
        if any(part in ("", ".", "..") for part in id.split("/")):
            raise UpstreamError(404, "no such model", code="model_not_found")
        return await self._send("GET", f"models/{quote(id, safe='/')}")

    async def aclose(self) -> None:
        await self._client.aclose()

    @asynccontextmanager
    async def _answering(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> AsyncIterator[httpx2.Response]:
        """A response that has begun. A request whose connection ends before that is sent once more:
        the endpoint may have closed an idle connection while the request was on its way.
        """
        request = self._client.build_request(
            method, path, content=None if body is None else json.dumps(body), headers=AS_JSON
        )
        try:
            response = await self._client.send(request, stream=True)
        except CUT:
            response = await self._client.send(request, stream=True)
        try:
            yield response
        finally:
            await response.aclose()

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            async with self._answering(method, path, body) as response:
                await response.aread()
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise _unreached(error) from None
        if response.status_code >= 300:
            raise _error_of(response.status_code, response.content, response.headers)
        try:
            return response.json()
        except ValueError:
            raise UpstreamError(502, "the upstream's answer is not JSON") from None


def _are_choices(found: Any) -> bool:
    """Whether these are choices as far as the gateway reads them."""
    return (
        isinstance(found, list)
        and bool(found)
        and all(isinstance(each, dict) and isinstance(each.get("message"), dict) for each in found)
    )


def _error_of(status: int, content: bytes, headers: Mapping[str, str]) -> UpstreamError:
    try:
        body = json.loads(content)
    except ValueError:
        body = "the upstream answered with an error that is not JSON"
    passed = {name: headers[name] for name in PASSED_HEADERS if name in headers}
    if status < 400:  # a redirect is not followed with a user's texts
        return UpstreamError(502, "the upstream answered with a redirect", passed)
    if status in (401, 403):  # the server's own key was refused, and some endpoints quote it
        said = "the upstream refused the gateway's own key"
        return UpstreamError(status, said, passed, code="upstream_key")
    return UpstreamError(status, body, passed)


def _unreached(error: Exception) -> UpstreamError:
    if isinstance(error, httpx2.TimeoutException):
        return UpstreamError(504, "the upstream did not answer in time")
    return UpstreamError(502, f"the upstream cannot be reached ({type(error).__name__})")


def learn_samples(
    known: CapabilityCache,
    sent: Mapping[str, Any],
    made: Sequence[Mapping[str, Any] | UpstreamError],
) -> None:
    """Learn what a model takes from the caller's own request, whose outcome is first, and from the
    requests for samples; the last of them had the body `sent`.

    A refusal that names no parameter is taken for one of `n`, then of the samples' temperature: the
    caller's request, which was answered, had all the rest. One with a seed of the caller's teaches
    nothing: the seed may be what was refused.
    """
    first, last = made[0], made[-1]
    if len(made) < 2 or isinstance(first, UpstreamError) or "seed" in sent:
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


def event(chunk: Mapping[str, Any]) -> bytes:
    """A chunk as a server-sent event."""
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode("ascii") + b"\n\n"


async def first_of(stream: AsyncIterator[bytes]) -> tuple[bytes, AsyncIterator[bytes]]:
    """A stream's first bytes and the rest of it, so that an error before them can still be an
    error.

    Raises:
        UpstreamError: there are none.
    """
    try:
        first = await anext(stream)
    except StopAsyncIteration:
        raise UpstreamError(502, "the upstream's stream is empty") from None
    return first, stream


def usage_of(completions: Sequence[Mapping[str, Any]]) -> Any:
    """What several completions spent together; of a single one all that the upstream tells."""
    if len(completions) == 1:
        return completions[0].get("usage")
    told = [each["usage"] for each in completions if isinstance(each.get("usage"), Mapping)]
    out: dict[str, Any] = _summed(told, ("prompt_tokens", "completion_tokens", "total_tokens"))
    for name in ("prompt_tokens_details", "completion_tokens_details"):
        details = [usage[name] for usage in told if isinstance(usage.get(name), Mapping)]
        if details:
            out[name] = _summed(
                details,
                dict.fromkeys(
                    key for each in details for key, count in each.items() if isinstance(count, int)
                ),
            )
    return out


def _summed(counts: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, int]:
    """Of each name the sum of what is a number."""
    return {
        name: sum(count for each in counts if isinstance(count := each.get(name), int))
        for name in names
    }
