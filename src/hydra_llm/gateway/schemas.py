"""What goes over the wire: OpenAI's shapes as far as the gateway must know them, and its own.
Unknown fields pass.

Errors have OpenAI's body and status, so that the official SDK raises its own classes. Knows no
store and no model.
"""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from hydra_llm.prompt import text_of

Id = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
"""Of a user, a record or a request: no control characters."""


class ApiError(Exception):
    """An error that the caller is told, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = (
            status,
            message,
            code,
            param,
            dict(headers or {}),
        )

    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        return {
            "error": {
                "message": self.message,
                "type": _KINDS.get(self.status, "api_error"),
                "param": self.param,
                "code": self.code,
            }
        }


_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class PersonalizationOptions(BaseModel):
    """What one request wants of personalization."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool = True
    k: Annotated[int, Field(ge=0, le=64)] | None = None
    """Records in the prompt."""
    candidates: Annotated[int, Field(ge=1, le=64)] | None = None
    explain: bool = False
    """Also tell the candidates with their scores, and the records' texts."""


class Message(BaseModel):
    """One message of a conversation; what is in it is the upstream's business."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: Any = None


class ChatRequest(BaseModel):
    """A request for a chat completion; fields that are not named here go to the upstream as they
    are.
    """

    model_config = ConfigDict(extra="allow")

    # What OpenAI's own endpoint refuses is refused here, whatever the upstream takes: that is what
    # clients are made for.
    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, Any] | None = None
    personalization: PersonalizationOptions | None = None


class RecordIn(BaseModel):
    """One thing that a user did."""

    model_config = ConfigDict(extra="forbid")

    id: Id
    input: str
    output: str
    time: Annotated[str, Field(max_length=100)] = ""
    """ISO 8601, a year, a day, or seconds since 1970; empty if unknown."""


class RecordsIn(BaseModel):
    """Records to add; the same again change nothing."""

    model_config = ConfigDict(extra="forbid")

    records: Annotated[list[RecordIn], Field(min_length=1)]


class FeedbackIn(BaseModel):
    """What a user made of an answer: exactly one of the four."""

    model_config = ConfigDict(extra="forbid")

    request_id: Id
    chosen: Annotated[int, Field(ge=0)] | None = None
    """Index of the candidate that the user took."""
    rating: Annotated[float, Field(ge=0, le=1)] | None = None
    """How good the answer was."""
    edited: Annotated[str, Field(min_length=1)] | None = None
    """What the user made of it."""
    rejected: Literal[True] | None = None

    def kind(self) -> str:
        """Which of the four was given.

        Raises:
            ApiError: none, or more than one.
        """
        found = [
            name
            for name in ("chosen", "rating", "edited", "rejected")
            if getattr(self, name) is not None
        ]
        if len(found) != 1:
            raise ApiError(
                400, "give exactly one of chosen, rating, edited, rejected", param="feedback"
            )
        return found[0]


class Json(JSONResponse):
    """JSON that can also hold half of a surrogate pair, as somebody's message or an LLM's answer
    may: escaped, as it came.
    """

    def render(self, content: Any) -> bytes:
        try:
            return super().render(content)
        except ValueError:  # also NaN, which no JSON is but an upstream may have sent
            return json.dumps(content, separators=(",", ":")).encode("ascii")


def has_more_than_text(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a conversation holds tool calls or results: it is passed through as it is."""
    return any(
        message.get("role") in ("tool", "function") or message.get("tool_calls")
        for message in messages
    )


def chunks_of(completion: Mapping[str, Any], *, usage: bool) -> list[dict[str, Any]]:
    """A completion as the chunks of a stream, behind the role's chunk: the text in pieces, the
    ends, and the usage if it was asked for.
    """
    head = chunk_head(completion["id"], completion["model"], completion.get("created"))
    out: list[dict[str, Any]] = []
    for choice in completion["choices"]:
        text = text_of(choice["message"])
        pieces = [{"content": text[start : start + PIECE]} for start in range(0, len(text), PIECE)]
        # What else the upstream said of its answer: a refusal, its reasoning, the tokens'
        # probabilities.
        beside = {
            name: value
            for name, value in choice["message"].items()
            if name not in ("role", "content") and value is not None
        }
        said = [delta(choice["index"], piece) for piece in (*([beside] if beside else []), *pieces)]
        if said and choice.get("logprobs"):
            said[0]["logprobs"] = choice["logprobs"]
        out += [{**head, "choices": [each]} for each in said]
        out.append(
            {**head, "choices": [delta(choice["index"], {}, choice.get("finish_reason") or "stop")]}
        )
    if "personalization" in completion:
        out[-1] = {**out[-1], "personalization": completion["personalization"]}
    if usage:
        out.append({**head, "choices": [], "usage": completion.get("usage")})
    return out


class StreamReader:
    """Reads a stream of chunks as it passes, up to its end: the usage behind all choices, or
    `[DONE]`.
    """

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        """By the choice's index."""
        self.head: dict[str, Any] = {}
        """What the chunks have in common."""
        self.ended = False
        self.rest = b""
        """What was not passed on: half a line, or all from the end on."""

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


PIECE = 64
"""Characters in a chunk of an answer that is there already."""


def role_chunk(id: str, model: str, count: int) -> dict[str, Any]:
    """What a stream begins with."""
    choices = [delta(index, {"role": "assistant", "content": ""}) for index in range(count)]
    return {**chunk_head(id, model), "choices": choices}


def chunk_head(id: str, model: str, created: int | None = None) -> dict[str, Any]:
    """What all chunks of a stream have in common."""
    return {
        "id": id,
        "object": "chat.completion.chunk",
        "created": created or int(time.time()),
        "model": model,
    }


def delta(index: int, content: Mapping[str, Any], end: str | None = None) -> dict[str, Any]:
    """A choice of a chunk."""
    return {"index": index, "delta": dict(content), "logprobs": None, "finish_reason": end}
