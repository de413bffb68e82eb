"""The upstream of an LLM spec, and an upstream in this process: an embedded model or a fake."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import replace
from secrets import token_hex
from typing import Any

from hydra_llm.errors import LLMError, LLMRefused, SettingsError
from hydra_llm.gateway.chunks import DONE, chunk_head, chunks_of, delta, event, role_chunk
from hydra_llm.gateway.structured import FORMS, form_fault
from hydra_llm.gateway.telemetry import note_usage
from hydra_llm.gateway.turns import FairTurns, asking
from hydra_llm.gateway.upstream import Body, Head, HttpUpstream, Passed, Upstream, UpstreamError
from hydra_llm.llm.base import ChatLLM, Sampling
from hydra_llm.llm.endpoint import Endpoint, endpoint_of
from hydra_llm.llm.wire import text_of
from hydra_llm.types import Generation, Message

CHARACTERS_PER_TOKEN = 100  # more than those of any tokenizer's longest tokens
MAX_WAITING = 64  # requests of one user that wait for the engine


def open_upstream(spec: str, bare: ChatLLM | None, *, timeout: float) -> Upstream:
    """The upstream of an LLM spec: `openai:MODEL[@URL]` is an endpoint, with the key of
    OPENAI_API_KEY; else `bare` is asked. Raises `SettingsError` without a key, or with neither.
    """
    if spec.startswith("openai:"):
        url = endpoint_of(spec.removeprefix("openai:"))[1]
        return HttpUpstream(Endpoint.of(spec, url), timeout=timeout)
    if bare is None:
        raise SettingsError(f"{spec}: is no LLM that can be served")
    return EmbeddedUpstream(bare, alias=spec)


class EmbeddedUpstream:
    """A `ChatLLM` as the upstream. Calls queue where the engine runs one at a time."""

    limiter = None

    def __init__(self, llm: ChatLLM, max_tokens: int = 512, *, alias: str = ""):
        """`alias`: another name of the model, such as the spec that it was opened by."""
        self._llm, self._max_tokens, self._alias = llm, max_tokens, alias
        self._model, self._since = str(llm.identity.get("model", "llm")), int(time.time())
        # Tokens of the longest prompt that leaves room for an answer.
        self.room = max(64, int(getattr(llm, "window", 2**20)) - max_tokens)
        # Requests wait for the engine here, not in threads that others need.
        self._turns = FairTurns(int(getattr(llm, "parallel", 64)))

    @property
    def model(self) -> str:
        """The model's name in requests and replies."""
        return self._model

    async def complete(self, body: Body) -> Any:
        generation, choices = await self._generate(body), []
        for i, (text, end) in enumerate(zip(generation.texts, generation.ends, strict=True)):
            message = {"role": "assistant", "content": text, "refusal": None}
            choice = {"index": i, "message": message, "logprobs": None, "finish_reason": end}
            choices.append(choice)
        head = chunk_head(f"chatcmpl-{token_hex(12)}", self._model) | {"object": "chat.completion"}
        return {**head, "choices": choices, "usage": _usage(generation)}

    async def stream(self, body: Body) -> AsyncIterator[bytes]:
        usage = bool((body.get("stream_options") or {}).get("include_usage"))
        if getattr(self._llm, "streams", False) and (body.get("n") or 1) == 1:
            async for chunk in self._by_token(body, usage):
                yield event(chunk)
        else:
            answer = await self.complete(body)
            yield event(role_chunk(answer["id"], answer["model"], len(answer["choices"])))
            for chunk in chunks_of(answer, usage=usage):
                yield event(chunk)
        yield DONE

    async def _by_token(self, body: Body, usage: bool) -> AsyncIterator[dict[str, Any]]:
        """The chunks of one answer, a token each."""
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def on_token(text: str) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, text)

        work = asyncio.create_task(self._generate(body, on_token=on_token))
        work.add_done_callback(lambda _: pieces.put_nowait(None))
        head = chunk_head(f"chatcmpl-{token_hex(12)}", self._model)
        try:
            piece = await pieces.get()
            if piece is None:
                await work  # an error before the first token is still an error
            yield role_chunk(head["id"], self._model, 1)
            while piece is not None:
                yield {**head, "choices": [delta(0, {"content": piece})]}
                piece = await pieces.get()
            generation = await work
        finally:
            work.cancel()
        yield {**head, "choices": [delta(0, {}, generation.ends[0])]}
        if usage:
            yield {**head, "choices": [], "usage": _usage(generation)}

    async def models(self, id: str | None = None) -> Any:
        kind = {"object": "model", "created": self._since, "owned_by": "hydra-llm"}
        model = {"id": self._model, **kind}
        if id is None:
            return {"object": "list", "data": [model]}
        self._check_model(id)
        return model

    async def forward(self, sent: Passed) -> tuple[Head, AsyncGenerator[bytes]]:
        raise UpstreamError(404, "this model has no such endpoint", code="unknown_url")

    async def aclose(self) -> None:
        await self._llm.aclose()

    def _check_model(self, name: object) -> None:
        if name not in (self._model, self._alias or self._model):
            message = f"the model '{name}' does not exist: take {self._model}"
            raise UpstreamError(404, message, code="model_not_found")

    async def _generate(self, body: Body, **streaming: Any) -> Generation:
        self._check_model(body.get("model"))
        try:
            messages, sampling = _messages(body), self._sampling(body)
            if sum(len(m["content"]) for m in messages) > CHARACTERS_PER_TOKEN * self.room:
                # Found by its length: the engine would read all of it, and others would wait.
                code = "context_length_exceeded"
                raise UpstreamError(400, f"the prompt has more than {self.room} tokens", code=code)
            if self._turns.waiting(user := asking.get()) >= MAX_WAITING:
                raise UpstreamError(429, f"{MAX_WAITING} requests of this user wait already")
            async with self._turns.turn(user):
                generation = await self._llm.generate(messages, sampling, **streaming)
            note_usage(_usage(generation))
            ends = generation.ends or ("stop",) * len(generation.texts)
            return replace(generation, ends=ends)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            message = f"a field of the request has a value that cannot be used: {error}"
            raise UpstreamError(400, message) from None
        except LLMError as error:
            status = 400 if isinstance(error, LLMRefused) else 502
            raise UpstreamError(status, str(error)) from None

    def _sampling(self, body: Body) -> Sampling:
        stop, seed, temperature = body.get("stop"), body.get("seed"), body.get("temperature")
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or self._max_tokens
        form = body.get("response_format") or {"type": "text"}
        if form != {"type": "text"} and not getattr(self._llm, "takes_form", False):
            raise UpstreamError(400, "response_format cannot be used: this model has none")
        if fault := form_fault(form):
            raise UpstreamError(400, f"response_format: {fault}")
        return Sampling(
            form="" if form == {"type": "text"} else json.dumps(form),
            n=int(body.get("n") or 1),
            temperature=1.0 if temperature is None else float(temperature),
            max_tokens=max(1, int(limit)),
            stop=(stop,) if isinstance(stop, str) else tuple(map(str, stop or ())),
            seed=None if seed is None else int(seed),
        )


def _messages(body: Body) -> list[Message]:
    """The request's messages; `UpstreamError` if they hold anything but text."""
    messages: list[Message] = []
    fields = [name for name in ("tools", "functions", "audio", *FORMS) if body.get(name)]
    for message in body["messages"]:
        role, content = str(message.get("role")), message.get("content")
        parts = content if isinstance(content, list) else []
        others = any(not isinstance(part, Mapping) or "text" not in part for part in parts)
        if others or message.get("tool_calls"):
            fields.append(f"messages with {'parts that are no text' if others else 'tool_calls'}")
        role = "system" if role == "developer" else role
        messages.append({"role": role, "content": text_of(message)})
    if fields:
        raise UpstreamError(400, f"this model reads text only: not {', '.join(fields)}")
    return messages


def _usage(generation: Generation) -> dict[str, int] | None:
    prompt, completion = generation.usage.tokens
    if prompt is None or completion is None:
        return None
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    return {**counts, "total_tokens": prompt + completion}
