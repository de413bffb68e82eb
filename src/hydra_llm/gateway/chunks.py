"""Streams of chat completions: their chunks, written and read."""

import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any

from hydra_llm.llm.wire import text_of

DONE = b"data: [DONE]\n\n"
PIECE = 64  # characters in a chunk of an answer that is complete already


def event(chunk: Mapping[str, Any]) -> bytes:
    """A chunk as a server-sent event."""
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode("ascii") + b"\n\n"


def chunks_of(completion: Mapping[str, Any], *, usage: bool) -> list[dict[str, Any]]:
    """A completion as a stream's chunks after the role's: text, finish reasons, usage if wanted."""
    deltas: list[dict[str, Any]] = []
    for choice in completion["choices"]:
        index, message, text = choice["index"], choice["message"], text_of(choice["message"])
        # Other fields come first, such as a refusal, and the tokens' probabilities with them.
        written = ("role", "content")
        others = {k: v for k, v in message.items() if v is not None and k not in written}
        pieces = [{"content": text[i : i + PIECE]} for i in range(0, len(text), PIECE)]
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
    """Reads a stream of chunks as it passes, up to its usage chunk or `[DONE]`."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}  # by the choice's index
        self.head: dict[str, Any] = {}  # what the chunks have in common
        self.ended = False
        self.rest = b""  # what was not passed on: half a line, or all from the end on

    def take(self, piece: bytes) -> bytes:
        """The next bytes; returns those that may be passed on: whole lines before the end."""
        *lines, self.rest = (self.rest + piece).split(b"\n")
        for place, line in enumerate(lines):
            if self._ends(line):
                self.ended, self.rest = True, b"\n".join([*lines[place:], self.rest])
                lines = lines[:place]
                break
        return b"".join(line + b"\n" for line in lines)

    @property
    def choices(self) -> list[dict[str, Any]]:
        """As those of a completion."""
        texts = [text for _, text in sorted(self.texts.items())]
        return [{"message": {"role": "assistant", "content": text}} for text in texts]

    def _ends(self, line: bytes) -> bool:
        """Whether the stream ends with this line; else it is read."""
        if not line.startswith(b"data:"):
            return False
        data = line[5:].strip()
        if data == b"[DONE]":
            return True
        with contextlib.suppress(Exception):  # what cannot be parsed goes out as it came
            chunk = json.loads(data)
            if chunk.get("usage") and not chunk["choices"]:
                return True
            common = ("id", "object", "created", "model")
            self.head |= {name: chunk[name] for name in common if name in chunk}
            for choice in chunk["choices"]:
                index, text = choice.get("index", 0), choice["delta"].get("content") or ""
                self.texts[index] = self.texts.get(index, "") + text
        return False


def with_id(lines: bytes, id: str) -> bytes:
    """Whole lines of a stream with this id in their chunks; what is no chunk stays as it is."""
    return b"".join(_line_with_id(line, id) for line in lines.splitlines(keepends=True))


def _line_with_id(line: bytes, id: str) -> bytes:
    try:
        chunk = json.loads(line.removeprefix(b"data:"))
    except ValueError:
        return line
    if not isinstance(chunk, dict) or "id" not in chunk:
        return line
    old, new = json.dumps(chunk["id"]).encode(), json.dumps(id).encode()
    if line.count(old) == 1:  # all else stays as the upstream wrote it
        return line.replace(old, new)
    return event({**chunk, "id": id}).rstrip(b"\n") + line[len(line.rstrip(b"\r\n")) :]


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
