"""What the chunks of a chat completion say, piece by piece, for protocols that write it otherwise.
A whole completion is read as one chunk, so that a reply and its stream cannot differ.
"""

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import Any, Literal

from hydra_llm.gateway.chunks import chunk_of
from hydra_llm.llm.sse import EventReader
from hydra_llm.llm.wire import piece_of, place_of, tokens_of

Body = Mapping[str, Any]
Kind = Literal["text", "refusal", "reasoning", "call"]
REASONING = ("reasoning_content", "reasoning")  # fields of endpoints that tell it apart


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer."""

    kind: Kind
    text: str  # of a call: of its arguments, as JSON
    call: str = ""  # the call's id
    name: str = ""  # of the function that is called
    logprobs: Sequence[Body] = ()


class ChunkReader:
    """Reads the first choice of a completion's chunks, and what they say of the whole."""

    def __init__(self) -> None:
        self.model = ""
        self.end = ""  # the finish reason
        self.tokens: tuple[int, int] | None = None  # of prompt and answer; None: not told
        self.usage: Body = {}
        self.personalization: Any = None
        self._calls: dict[int, tuple[str, str]] = {}  # place → id and name

    def take(self, chunk: Body) -> list[Piece]:
        """The pieces in the next chunk."""
        self.model = str(chunk.get("model") or self.model)
        self.personalization = chunk.get("personalization") or self.personalization
        if tokens := tokens_of(chunk.get("usage")):
            self.tokens, self.usage = tokens, chunk["usage"]
        choices = chunk.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(first, Mapping) or place_of(first) != 0:
            return []
        self.end = str(first.get("finish_reason") or self.end)
        return list(self._pieces(first))

    def read(self, completion: Body) -> list[Piece]:
        """The pieces of a whole completion."""
        first = completion["choices"][0]
        message = dict(first["message"])
        if isinstance(calls := message.get("tool_calls"), list):  # in a stream each has its place
            calls = [call for call in calls if isinstance(call, Mapping)]
            message["tool_calls"] = [{"index": place, **call} for place, call in enumerate(calls)]
        return self.take({**completion, "choices": [{**first, "index": 0, "delta": message}]})

    def _pieces(self, choice: Body) -> Iterator[Piece]:
        delta, told = choice.get("delta"), choice.get("logprobs")
        if not isinstance(delta, Mapping):
            return
        thought = next((text for name in REASONING if (text := delta.get(name))), None)
        if isinstance(thought, str):
            yield Piece("reasoning", thought)
        if isinstance(refusal := delta.get("refusal"), str) and refusal:
            yield Piece("refusal", refusal)
        if text := piece_of(delta):
            logprobs = told.get("content") if isinstance(told, Mapping) else None
            yield Piece("text", text, logprobs=logprobs or ())
        calls = delta.get("tool_calls")
        for call in calls if isinstance(calls, list) else []:
            if isinstance(call, Mapping):
                yield self._call(call)

    def _call(self, call: Body) -> Piece:
        place, given = call.get("index"), call.get("function")
        place = place if isinstance(place, int) else 0
        function: Body = given if isinstance(given, Mapping) else {}
        known, id = self._calls.get(place), str(call.get("id") or "")
        if known is None or id not in ("", known[0]):  # some endpoints give every call index 0
            known = (id or f"call_{token_hex(12)}", str(function.get("name") or ""))
            self._calls[place] = known
        arguments = function.get("arguments") or ""
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        return Piece("call", text, *known)


async def chunks_in(pieces: AsyncIterator[bytes]) -> AsyncIterator[Body | bytes]:
    """The chunks of a stream, and its comments as they came."""
    reader = EventReader()
    async for piece in pieces:
        for event in reader.feed(piece):
            chunk = chunk_of(event)
            if isinstance(chunk, Mapping):
                yield chunk
            elif event.raw.startswith(b":"):
                yield event.raw
    for event in reader.end():
        if isinstance(chunk := chunk_of(event), Mapping):
            yield chunk


def named_event(content: Body) -> bytes:
    """A server-sent event that is named by its content's `type`."""
    data = json.dumps(content, separators=(",", ":"))
    return f"event: {content['type']}\ndata: {data}\n\n".encode("ascii")
