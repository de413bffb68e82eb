"""Streams of chat completions: their chunks, written and read."""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from hydra_llm.llm.sse import Event, EventReader
from hydra_llm.llm.wire import piece_of, place_of
from hydra_llm.tasks.base import PromptWords

DONE = b"data: [DONE]\n\n"
PIECE = 64  # characters in a chunk of an answer that is complete already


def event(chunk: Mapping[str, Any]) -> bytes:
    """A chunk as a server-sent event."""
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode("ascii") + b"\n\n"


def chunks_of(completion: Mapping[str, Any], *, usage: bool) -> list[dict[str, Any]]:
    """A completion as a stream's chunks after the role's: text, finish reasons, usage if wanted."""
    deltas: list[dict[str, Any]] = []
    for choice in completion["choices"]:
        index, message = choice["index"], choice["message"]
        # Other fields come first, such as a refusal, and the tokens' probabilities with them.
        written = ("role", "content")
        others = {k: v for k, v in message.items() if v is not None and k not in written}
        if calls := others.get("tool_calls"):  # in a stream each has its place
            others["tool_calls"] = [{"index": place, **call} for place, call in enumerate(calls)]
        content = message.get("content") or ""
        cut = content if isinstance(content, str) else [content]  # a list of parts stays one
        step = PIECE if isinstance(content, str) else 1
        pieces = [{"content": cut[i : i + step]} for i in range(0, len(cut), step)]
        parts = [delta(index, piece) for piece in ([others] if others else []) + pieces]
        if parts and choice.get("logprobs"):
            parts[0]["logprobs"] = choice["logprobs"]
        deltas += [*parts, delta(index, {}, choice.get("finish_reason") or "stop")]
    head = chunk_head(completion["id"], completion["model"], completion.get("created"))
    chunks = [{**head, "choices": [choice]} for choice in deltas]
    if "personalization" in completion:
        chunks[-1]["personalization"] = completion["personalization"]
    if usage:
        chunks.append({**head, "choices": [], "usage": completion.get("usage")})
    return chunks


class StreamReader:
    """Reads a stream of chunks as it passes, up to its usage chunk or `[DONE]`. With `words`, those
    that announce an answer in the prompt are left out where its one choice begins with them.
    """

    def __init__(self, id: str, words: PromptWords | None = None) -> None:
        self.id = id  # in the place of the upstream's own
        self.texts: dict[int, str] = {}  # by the choice's index
        self.head: dict[str, Any] = {}  # what the chunks have in common
        self.ended = False
        self.answered = False  # whether a choice has ended
        self.rest = b""  # all from the end on
        self._events = EventReader()
        self._words, self._held = words, list[Event]()
        self._has_text = False  # whether the latest event has

    def take(self, piece: bytes) -> bytes:
        """The next bytes; returns those that may be passed on: whole events before the end."""
        return self._passed(self._events.feed(piece))

    def close(self) -> bytes:
        """The stream is over; what it left without a blank line may be its end all the same."""
        return self._passed(self._events.end()) + self._released()

    @property
    def choices(self) -> list[dict[str, Any]]:
        """As those of a completion."""
        texts = [text for _, text in sorted(self.texts.items())]
        return [{"message": {"role": "assistant", "content": text}} for text in texts]

    def _passed(self, events: Sequence[Event]) -> bytes:
        passed = list[bytes]()
        for place, one in enumerate(events):
            if self._ends(one):
                self.ended = True
                behind = [*events[place:], *self._events.end()]
                self.rest = b"".join(with_id(event, self.id) for event in behind)
                return b"".join([*passed, self._released()])
            passed.append(self._shown(one))
        return b"".join(passed)

    def _shown(self, one: Event) -> bytes:
        """What may be passed on by now: no text that may still be the prompt's words."""
        if self._words is None or not (self._has_text or self.answered):
            return with_id(one, self.id)
        self._held.append(one)
        undecided = self._words.announcement(self.texts.get(0, "")) is None
        return b"" if undecided and not self.answered else self._released()

    def _released(self) -> bytes:
        """The events that were held back, without the words that announce the answer."""
        text, held = self.texts.get(0, ""), self._held
        drop = self._words.announcement(text) or 0 if self._words else 0
        self._words, self._held = None, []
        if not drop:
            return b"".join(with_id(one, self.id) for one in held)
        self.texts[0] = text[drop:]
        chunks = [chunk_of(one) for one in held]  # they become one
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
        whole = {name: value for one in deltas for name, value in one.items()}
        choice = {**chunks[-1]["choices"][0], "delta": {**whole, "content": text[drop:]}}
        return event({**chunks[-1], "id": self.id, "choices": [choice]})

    def _ends(self, event: Event) -> bool:
        """Whether the stream ends with this event; else it is read."""
        self._has_text = False
        if event.data is None:
            return False
        chunk = chunk_of(event)
        if chunk is None:
            return event.data.strip() == "[DONE]"
        with contextlib.suppress(Exception):  # what cannot be read goes out as it came
            if chunk.get("usage") and not chunk["choices"]:
                return True
            self.answered = self.answered or ends_answer(event, chunk)
            common = ("id", "object", "created", "model")
            self.head |= {name: chunk[name] for name in common if name in chunk}
            for choice in chunk["choices"]:
                index, text = place_of(choice), piece_of(choice["delta"])
                self.texts[index] = self.texts.get(index, "") + text
                self._has_text = self._has_text or bool(text)
        return False


def with_id(one: Event, id: str) -> bytes:
    """An event's bytes with this id in its chunk, all else as the upstream wrote it."""
    chunk = chunk_of(one)
    if not isinstance(chunk, dict) or "id" not in chunk:
        return one.raw
    old, new = json.dumps(chunk["id"]).encode(), json.dumps(id).encode()
    if one.raw.count(old) == 1:
        return one.raw.replace(old, new)
    return event({**chunk, "id": id})


def chunk_of(event: Event) -> Any:
    """The JSON of an event, None where it holds none."""
    try:
        return json.loads(event.data or "")
    except (ValueError, RecursionError):
        return None


def only_tells_usage(piece: bytes) -> bool:
    """Whether a piece of a stream is the event that `include_usage` adds, and nothing else."""
    if b'"usage"' not in piece:
        return False
    reader = EventReader()
    events = [one for one in (*reader.feed(piece), *reader.end()) if one.data is not None]
    chunk = chunk_of(events[0]) if len(events) == 1 else None
    told = isinstance(chunk, Mapping) and chunk.get("choices") == [] and chunk.get("usage")
    return bool(told)


def ends_answer(event: Event, chunk: Any) -> bool:
    """Whether an event is `[DONE]`, or its chunk ends a choice."""
    choices = chunk.get("choices") if isinstance(chunk, Mapping) else None
    ends = (isinstance(choice, Mapping) and choice.get("finish_reason") for choice in choices or ())
    return (event.data or "").strip() == "[DONE]" or any(ends)


def role_chunk(id: str, model: str, count: int) -> dict[str, Any]:
    """What a stream begins with."""
    choices = [delta(index, {"role": "assistant", "content": ""}) for index in range(count)]
    return {**chunk_head(id, model), "choices": choices}


def chunk_head(id: str, model: str, created: int | None = None) -> dict[str, Any]:
    """What all chunks of a stream have in common."""
    created = created or int(time.time())
    return {"id": id, "object": "chat.completion.chunk", "created": created, "model": model}


def delta(index: int, content: Mapping[str, Any], end: str | None = None) -> dict[str, Any]:
    """A choice of a chunk."""
    return {"index": index, "delta": dict(content), "logprobs": None, "finish_reason": end}
