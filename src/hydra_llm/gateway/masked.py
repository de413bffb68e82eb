"""An upstream that gets placeholders in place of personal data (masking.py), in chat requests; what
it answers, and streams, has the data again.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from anyio.to_thread import run_sync

from hydra_llm.gateway.chunks import chunk_of, event
from hydra_llm.gateway.upstream import Body, Head, Passed, Upstream
from hydra_llm.llm.sse import EventReader
from hydra_llm.masking import TEXTS, Mask, Restorer, detectors

MASKED = ("messages", "prediction")  # fields of a request


class MaskedUpstream:
    """An `Upstream` behind the detectors of the setting `mask`."""

    def __init__(self, inner: Upstream, names: str):
        self._inner, self._detectors = inner, detectors(names)
        self.limiter = inner.limiter

    async def complete(self, body: Body) -> Any:
        mask, hidden = await run_sync(self._hidden, body)  # a second a megabyte: others go on
        completion = await self._inner.complete(hidden)
        if not mask.values:
            return completion
        shown = mask.show_in(completion["choices"], in_json=_is_json(body))
        return {**completion, "choices": shown}

    async def stream(self, body: Body) -> AsyncIterator[bytes]:
        mask, hidden = await run_sync(self._hidden, body)  # a second a megabyte: others go on
        pieces = self._inner.stream(hidden)
        if not mask.values:
            async for piece in pieces:
                yield piece
            return
        reader, restored = EventReader(), _Chunks(mask, in_json=_is_json(body))
        async for piece in pieces:
            for found in reader.feed(piece):
                chunk = chunk_of(found)
                is_chunk = isinstance(chunk, Mapping) and chunk.get("choices")
                yield event(restored.take(chunk)) if is_chunk else found.raw
        for found in reader.end():
            yield found.raw

    async def models(self, id: str | None = None) -> Any:
        return await self._inner.models(id)

    async def forward(self, sent: Passed) -> tuple[Head, AsyncGenerator[bytes]]:
        return await self._inner.forward(sent)

    async def aclose(self) -> None:
        await self._inner.aclose()

    def _hidden(self, body: Body) -> tuple[Mask, dict[str, Any]]:
        texts = {name: body[name] for name in MASKED if name in body}
        mask = Mask(self._detectors, texts)
        return mask, {**body, **{name: mask.hide_in(own) for name, own in texts.items()}}


def _is_json(body: Body) -> bool:
    form = body.get("response_format")
    return isinstance(form, Mapping) and str(form.get("type")).startswith("json")


class _Chunks:
    """The chunks of one stream: what is held back of a text comes with its choice's end."""

    def __init__(self, mask: Mask, *, in_json: bool):
        self._mask, self._in_json = mask, in_json
        self._texts = dict[tuple[Any, ...], Restorer]()  # by choice and field, or place of a call

    def take(self, chunk: Mapping[str, Any]) -> dict[str, Any]:
        return {**chunk, "choices": [self._choice(own) for own in chunk["choices"]]}

    def _choice(self, choice: Any) -> Any:
        if not isinstance(choice, Mapping):
            return choice
        index, delta = choice.get("index", 0), dict(choice.get("delta") or {})
        for field in TEXTS:
            if isinstance(text := delta.get(field), str):
                delta[field] = self._restorer(index, field).feed(text)
        if isinstance(calls := delta.get("tool_calls"), list):
            delta["tool_calls"] = [self._call(index, own) for own in calls]
        if choice.get("finish_reason"):
            self._end(index, delta)
        return {**choice, "delta": delta}

    def _call(self, index: Any, call: Any) -> Any:
        given = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(given, Mapping) or not isinstance(text := given.get("arguments"), str):
            return call
        told = self._restorer(index, "arguments", call.get("index", 0)).feed(text)
        return {**call, "function": {**given, "arguments": told}}

    def _end(self, index: Any, delta: dict[str, Any]) -> None:
        for (own, field, *place), restorer in self._texts.items():
            if own != index or not (held := restorer.end()):
                continue
            if place:
                call = {"index": place[0], "function": {"arguments": held}}
                delta["tool_calls"] = [*delta.get("tool_calls", ()), call]
            else:
                delta[field] = (delta.get(field) or "") + held

    def _restorer(self, *key: Any) -> Restorer:
        in_json = key[1] == "arguments" or (self._in_json and key[1] == "content")
        if key not in self._texts:
            self._texts[key] = Restorer(self._mask, in_json=in_json)
        return self._texts[key]
