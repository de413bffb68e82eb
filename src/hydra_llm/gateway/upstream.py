"""The LLM behind the gateway: an OpenAI-compatible endpoint, or any LLM of the core inside this
process.

    complete  a request's body → a chat completion, as plain JSON
    stream    a request's body → the bytes of a stream of chunks
    models    what there is

Bodies pass as they are: what this program does not know, the endpoint may. The URL comes from
settings, never from a request, and the caller's key goes nowhere. No retries here, the caller's SDK
does them, but for requests that met a connection which the endpoint was about to close. Knows no
users.
"""

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from secrets import token_hex
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import httpx2

from hydra_llm.errors import LLMError, LLMRefused, SettingsError
from hydra_llm.gateway.schemas import ApiError, chunk_head, chunks_of, delta, role_chunk, text_of
from hydra_llm.llm.base import ChatLLM, Sampling
from hydra_llm.llm.registry import endpoint_of
from hydra_llm.types import Generation, Usage

AS_JSON = {"content-type": "application/json"}
OPENAI_URL = "https://api.openai.com/v1"
IDLE = 4.0
"""Seconds that a connection is kept for the next request: less than common servers keep it, who
would close it amid a request.
"""
CUT = (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError)
"""How a request ends on a connection that the endpoint is about to close."""
STRAIGHT_THROUGH = (
    "retry-after",
    "retry-after-ms",
    "x-request-id",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-should-retry",
)
"""Headers of an upstream's error that the caller's SDK acts on."""
ENDS = re.compile(rb'\[DONE\]|"finish_reason": ?"')
"""What is in every stream that has come to its end; within an answer's text the quotes are escaped.
"""


class UpstreamError(Exception):
    """The upstream answered with an error, not at all, or with nonsense."""

    def __init__(self, status: int, body: Any, headers: Mapping[str, str] | None = None):
        self.status, self.headers = status, dict(headers or {})
        said = body.get("error", body) if isinstance(body, dict) else body
        self.body = (
            body
            if said is not body and isinstance(said, dict)
            else ApiError(status, str(said)).body()
        )
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
            UpstreamError: before the first byte.
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
        base_url: str,
        key: str,
        *,
        timeout: float,
        transport: httpx2.AsyncBaseTransport | None = None,
    ):
        limits = httpx2.Limits(
            max_connections=1000, max_keepalive_connections=200, keepalive_expiry=IDLE
        )
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx2.AsyncClient(
            base_url=base_url.rstrip("/") + "/",
            headers=headers,
            timeout=timeout,
            limits=limits,
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
        if any(
            part in ("", ".", "..") for part in id.split("/")
        ):  # no way to the endpoint's other paths, which the server's key opens
            raise UpstreamError(404, ApiError(404, "no such model", code="model_not_found").body())
        return await self._send("GET", f"models/{quote(id, safe='/')}")

    async def aclose(self) -> None:
        await self._client.aclose()

    @asynccontextmanager
    async def _answering(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> AsyncIterator[httpx2.Response]:
        """A response that has begun. Whose connection ends before that is sent once more: the
        endpoint may have closed a kept one just when the request was on its way.
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
    if status in (
        401,
        403,
    ):  # it is the server's own key that was refused, and some endpoints quote it
        body = ApiError(
            status, "the upstream refused the gateway's own key", code="upstream_key"
        ).body()
    if status < 400:  # a redirect: nobody follows one with somebody's texts
        status, body = 502, "the upstream answered with a redirect"
    return UpstreamError(
        status, body, {name: headers[name] for name in STRAIGHT_THROUGH if name in headers}
    )


def _unreached(error: Exception) -> UpstreamError:
    if isinstance(error, httpx2.TimeoutException):
        return UpstreamError(504, "the upstream did not answer in time")
    return UpstreamError(502, f"the upstream cannot be reached ({type(error).__name__})")


class EmbeddedUpstream:
    """An LLM of the core: an embedded model, or a fake. Calls queue where the engine takes one at a
    time.
    """

    def __init__(self, llm: ChatLLM, max_tokens: int = 512):
        self._llm, self._max_tokens = llm, max_tokens
        self._model, self._since = str(llm.identity.get("model", "llm")), int(time.time())
        self.room = max(64, int(getattr(llm, "window", 2**20)) - max_tokens)
        """Tokens of the longest prompt that leaves room for an answer."""
        # Whoever waits for the engine waits here, not in a thread that others need.
        self._turn = asyncio.Semaphore(int(getattr(llm, "parallel", 64)))

    async def complete(self, body: Mapping[str, Any]) -> Any:
        made = await self._generate(body)
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": end,
            }
            for i, (text, end) in enumerate(zip(made.texts, _ends(made), strict=True))
        ]
        head = {
            "id": f"chatcmpl-{token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self._model,
        }
        return {**head, "choices": choices, "usage": _used(made.usage)}

    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[bytes]:
        wants_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        if getattr(self._llm, "streams", False) and (body.get("n") or 1) == 1:
            async for piece in self._as_it_comes(body, wants_usage):
                yield piece
            return
        made = await self.complete(body)
        for chunk in (
            role_chunk(made["id"], made["model"], len(made["choices"])),
            *chunks_of(made, usage=wants_usage),
        ):
            yield event(chunk)
        yield DONE

    async def _as_it_comes(
        self, body: Mapping[str, Any], wants_usage: bool
    ) -> AsyncIterator[bytes]:
        """One answer, token by token."""
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        work = asyncio.create_task(
            self._generate(
                body, on_token=lambda text: loop.call_soon_threadsafe(pieces.put_nowait, text)
            )
        )
        work.add_done_callback(lambda _: pieces.put_nowait(None))
        head = chunk_head(f"chatcmpl-{token_hex(12)}", self._model)
        try:
            piece = await pieces.get()
            if piece is None:
                await work  # an error before the first token is still an error
            yield event(role_chunk(head["id"], self._model, 1))
            while piece is not None:
                yield event({**head, "choices": [delta(0, {"content": piece})]})
                piece = await pieces.get()
            made = await work
        finally:
            work.cancel()
        yield event({**head, "choices": [delta(0, {}, _ends(made)[0])]})
        if wants_usage:
            yield event({**head, "choices": [], "usage": _used(made.usage)})
        yield DONE

    async def models(self, id: str | None = None) -> Any:
        model = {
            "id": self._model,
            "object": "model",
            "created": self._since,
            "owned_by": "hydra-llm",
        }
        if id is None:
            return {"object": "list", "data": [model]}
        if id != self._model:
            raise UpstreamError(
                404,
                ApiError(
                    404,
                    f"the model '{id}' does not exist: take {self._model}",
                    code="model_not_found",
                ).body(),
            )
        return model

    async def aclose(self) -> None:
        await self._llm.aclose()

    async def _generate(self, body: Mapping[str, Any], **more: Any) -> Generation:
        if body.get("model") != self._model:
            missing = f"the model '{body.get('model')}' does not exist: take {self._model}"
            raise UpstreamError(404, ApiError(404, missing, code="model_not_found").body())
        if body.get("tools") or body.get("functions") or any(map(_has_more, body["messages"])):
            raise UpstreamError(400, "this model reads texts alone: no tools, images or sound")
        try:
            sampling = _sampling(body, self._max_tokens)
            async with self._turn:
                return await self._llm.generate(
                    [
                        {"role": _role(message), "content": text_of(message)}
                        for message in body["messages"]
                    ],
                    sampling,
                    **more,
                )
        except (TypeError, ValueError, OverflowError) as error:
            raise UpstreamError(
                400, f"a field of the request has a value that cannot be used: {error}"
            ) from None
        except LLMRefused as error:
            raise UpstreamError(400, str(error)) from None
        except LLMError as error:
            raise UpstreamError(502, str(error)) from None


def _ends(made: Generation) -> Sequence[str]:
    return made.ends or ["stop"] * len(made.texts)


def _has_more(message: Mapping[str, Any]) -> bool:
    """Whether a message holds anything that is no text."""
    content = message.get("content")
    return bool(message.get("tool_calls")) or (
        isinstance(content, list)
        and any(not isinstance(part, Mapping) or "text" not in part for part in content)
    )


def _used(usage: Usage) -> dict[str, int]:
    total = usage.prompt_tokens + usage.completion_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": total,
    }


def _sampling(body: Mapping[str, Any], max_tokens: int) -> Sampling:
    """How the LLM is to sample, from a request's fields."""
    stop, seed = body.get("stop"), body.get("seed")
    most = int(body.get("max_completion_tokens") or body.get("max_tokens") or max_tokens)
    return Sampling(
        n=int(body.get("n") or 1),
        temperature=1.0 if body.get("temperature") is None else float(body["temperature"]),
        max_tokens=max(1, most),
        stop=(stop,) if isinstance(stop, str) else tuple(str(each) for each in stop or ()),
        seed=None if seed is None else int(seed),
    )


def _role(message: Mapping[str, Any]) -> str:
    role = str(message.get("role"))
    return "system" if role == "developer" else role


DONE = b"data: [DONE]\n\n"


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


def open_upstream(spec: str, bare: ChatLLM | None, *, timeout: float) -> Upstream:
    """The upstream of a written LLM: `openai:MODEL[@URL]` is an endpoint, with the key of
    OPENAI_API_KEY; else `bare` is asked.

    Raises:
        SettingsError: an endpoint without a key, or neither.
    """
    if spec.startswith("openai:"):
        url = (
            endpoint_of(spec.removeprefix("openai:"))[1]
            or os.environ.get("OPENAI_BASE_URL")
            or OPENAI_URL
        )
        if urlsplit(url).scheme not in ("http", "https"):
            raise SettingsError(
                "OPENAI_BASE_URL is no URL of an endpoint: it begins with http:// or https://"
            )
        key = os.environ.get("OPENAI_API_KEY", "")
        if not key and url == OPENAI_URL:
            raise SettingsError(f"{spec} needs a key: set OPENAI_API_KEY")
        return HttpUpstream(url, key, timeout=timeout)
    if bare is None:
        raise SettingsError(f"{spec}: is no LLM that can be served")
    return EmbeddedUpstream(bare)


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
