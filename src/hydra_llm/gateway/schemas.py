"""Bodies of requests and responses: OpenAI's as far as the gateway must know them, and its own.

Unknown fields pass. Errors have OpenAI's body and status, so that the official SDK raises its own
classes. Knows no store and no model.
"""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from hydra_llm.prompt import text_of

Id = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
"""Of a user, a record or a request: no control characters."""


@dataclass(eq=False)
class ApiError(Exception):
    """An error response in OpenAI's shape."""

    status: int
    message: str
    _: KW_ONLY
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        kind = _ERROR_TYPES.get(self.status, "api_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PersonalizationOptions(_Strict):
    """What one request wants of personalization."""

    enabled: bool = True
    k: Annotated[int, Field(ge=0, le=64)] | None = None  # records in the prompt
    candidates: Annotated[int, Field(ge=1, le=64)] | None = None
    explain: bool = False  # also the candidates' texts and probabilities, and the records' texts


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

    # What OpenAI's endpoint refuses is refused here, whatever the upstream takes.
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


class RecordIn(_Strict):
    """One thing that a user did."""

    id: Id
    input: str
    output: str
    time: Annotated[str, Field(max_length=100)] = ""  # as `history.parse_time` reads; "": unknown


class RecordsIn(_Strict):
    """Records to add; the same again change nothing."""

    records: Annotated[list[RecordIn], Field(min_length=1)]


class FeedbackIn(_Strict):
    """What a user made of an answer: exactly one of the four."""

    request_id: Id
    chosen: Annotated[int, Field(ge=0)] | None = None  # index of the candidate that the user took
    rating: Annotated[float, Field(ge=0, le=1)] | None = None
    edited: Annotated[str, Field(min_length=1)] | None = None  # the answer as the user changed it
    rejected: Literal[True] | None = None

    def kind(self) -> str:
        """Which of the four was given.

        Raises:
            ApiError: none, or more than one.
        """
        kinds = ("chosen", "rating", "edited", "rejected")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ApiError(400, f"give exactly one of {', '.join(kinds)}", param="feedback")
        return given[0]


class Json(JSONResponse):
    """JSON that can also hold half of a surrogate pair: escaped, as it came."""

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
    """A completion as the chunks of a stream behind the role's chunk: the text in pieces, the ends,
    and the usage if asked for.
    """
    deltas: list[dict[str, Any]] = []
    for choice in completion["choices"]:
        index, message, text = choice["index"], choice["message"], text_of(choice["message"])
        # Other fields come first, such as a refusal, and the tokens' probabilities with them.
        named = [(name, value) for name, value in message.items() if value is not None]
        others = {name: value for name, value in named if name not in ("role", "content")}
        starts = range(0, len(text), PIECE)
        pieces = [others] if others else []
        pieces += [{"content": text[start : start + PIECE]} for start in starts]
        said = [delta(index, piece) for piece in pieces]
        if said and choice.get("logprobs"):
            said[0]["logprobs"] = choice["logprobs"]
        deltas += [*said, delta(index, {}, choice.get("finish_reason") or "stop")]
    head = chunk_head(completion["id"], completion["model"], completion.get("created"))
    chunks = [{**head, "choices": [choice]} for choice in deltas]
    if "personalization" in completion:
        chunks[-1]["personalization"] = completion["personalization"]
    if usage:
        chunks.append({**head, "choices": [], "usage": completion.get("usage")})
    return chunks


class StreamReader:
    """Reads a stream of chunks as it passes, up to its end: the usage behind all choices, or
    `[DONE]`.
    """

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


PIECE = 64  # characters in a chunk of an answer that is complete already


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
