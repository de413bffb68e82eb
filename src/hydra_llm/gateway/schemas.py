"""Bodies of requests and responses: OpenAI's as far as the gateway must know them, and its own.
Errors have OpenAI's body and status, so that the official SDK raises its own classes.
"""

import json
import math
import unicodedata
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from hydra_llm.datasets.native import number_as_text
from hydra_llm.llm.wire import content_fault
from hydra_llm.store.values import PURPOSES, Purpose
from hydra_llm.text import json_text, text_fault

MAX_ID = 200  # characters
MAX_NUMBER = 2**63 - 1  # that a database can hold, or compare with
NOT_IN_IDS = ("Cc", "Cs", "Zl", "Zp")  # Unicode's control characters, surrogates, line separators


def id_fault(id: str) -> str:
    """What makes an id unusable, or ''."""
    if not id.strip():
        return "is blank"
    if any(unicodedata.category(character) in NOT_IN_IDS for character in id):
        return "holds a control character"
    return f"is longer than {MAX_ID} characters" if len(id) > MAX_ID else ""


def _valid_id(id: str) -> str:
    if fault := id_fault(id):
        raise PydanticCustomError("invalid_id", fault)
    return id


Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID), AfterValidator(_valid_id)]
"""Of a user, a record or a request."""
Time = Annotated[
    str,
    BeforeValidator(lambda time: "" if time is None else number_as_text(time)),
    Field(max_length=100),
]
"""As `history.parse_time` reads it, a number or a text; empty: unknown."""
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
RPC_ERROR = -32000  # JSON-RPC's code for an error of the server's own


class ApiError(Exception):
    """An error response; `body` has OpenAI's shape."""

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
        self.status, self.headers, kind = status, headers, ERROR_TYPES.get(status, "api_error")
        self.code = code
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def rpc_body(self) -> dict[str, Any]:
        """The error as JSON-RPC has it, where no single request can be answered."""
        error = {"code": RPC_ERROR, "message": str(self), "data": self.body["error"]}
        return {"jsonrpc": "2.0", "id": None, "error": error}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PersonalizationOptions(_Strict):
    """What one request wants of personalization."""

    enabled: bool = True
    gate: bool = True  # False: the question is the task's, and the records are to be used
    k: Annotated[int, Field(ge=0, le=64)] | None = None  # records in the prompt
    samples: Annotated[int, Field(ge=1, le=64)] | None = Field(
        default=None, validation_alias=AliasChoices("samples", "candidates")
    )
    explain: bool = False  # also texts and probabilities of candidates, records' texts, and why


def _content(value: Any) -> Any:
    if fault := content_fault(value):
        raise PydanticCustomError("content", "{fault}", {"fault": fault})
    return value


class Message(BaseModel):
    """One message of a conversation; other fields are for the upstream."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: Annotated[Any, AfterValidator(_content)] = None


class AnyRequest(BaseModel):
    """What the gateway knows of a request in any protocol; unknown fields are allowed."""

    model_config = ConfigDict(extra="allow")

    model: str
    stream: bool | None = None
    user: str | int | None = None
    safety_identifier: str | int | None = None
    metadata: Any = None  # in the forms that identity.py knows
    personalization: PersonalizationOptions | None = None


class ChatRequest(AnyRequest):
    """A request for a chat completion; unknown fields go to the upstream."""

    # What OpenAI's endpoint refuses is refused here, whatever the upstream takes.
    messages: Annotated[list[Message], Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream_options: dict[str, Any] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None


class ResponseRequest(AnyRequest):
    """A request for a response; unknown fields go to the upstream."""

    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    previous_response_id: Id | None = None
    store: bool | None = None  # None is true
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: list[str] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class PromptRequest(AnyRequest):
    """A request in the form of Anthropic's Messages API; unknown fields are left out."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    stop_sequences: list[str] | None = None
    output_config: dict[str, Any] | None = None


class MessageRequest(PromptRequest):
    """A request for a message of Anthropic's API."""

    max_tokens: Annotated[int, Field(ge=1)]


class TextRequest(AnyRequest):
    """A request for a text's completion, or embeddings; unknown fields go to the upstream."""

    prompt: Any = None
    input: Any = None


def chat_request(body: Mapping[str, Any]) -> ChatRequest:
    """A chat request that was made of another protocol's. Raises `RequestValidationError`."""
    try:
        return ChatRequest.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors(), body=body) from None


class RecordIn(_Strict):
    """One thing that a user did."""

    id: Id
    input: str | list[dict[str, Any]]  # a text, or parts of texts and pictures (image_url)
    output: str
    time: Time = ""
    enabled: Annotated[bool, Field(strict=True)] | None = None  # None: as it is, or true


class RecordsIn(_Strict):
    """Records to add."""

    records: Annotated[list[RecordIn], Field(min_length=1)]


class SearchIn(_Strict):
    """A search among a user's records."""

    query: Annotated[str, Field(min_length=1, description="A question, or words of it.")]
    limit: Annotated[int, Field(ge=1, le=64, description="Max records.")] = 10


class SwitchIn(_Strict):
    """Whether a user's answers are to be personal, or a record is to be used."""

    enabled: Annotated[bool, Field(strict=True)]


class KeyIn(_Strict):
    """A key to create: for users, or as an administrator for all."""

    users: list[Id] = []
    admin: Annotated[bool, Field(strict=True)] = False
    label: Annotated[str, Field(max_length=MAX_ID)] = ""
    purposes: Annotated[list[Purpose], Field(min_length=1)] = list(PURPOSES)


class FeedbackIn(_Strict):
    """What a user made of an answer: exactly one of the four."""

    request_id: Id  # or the completion's own id
    time: Time = ""  # of the record that the answer becomes
    chosen: Annotated[int, Field(ge=0, strict=True)] | None = None  # of the candidates
    rating: Annotated[float, Field(ge=0, le=1, strict=True)] | None = None
    edited: Annotated[str, Field(min_length=1)] | None = None  # the answer as the user changed it
    rejected: Literal[True] | None = None

    def kind(self) -> str:
        """Which of the four was given; `ApiError` if none, or more than one."""
        kinds = ("chosen", "rating", "edited", "rejected")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ApiError(400, f"give exactly one of {', '.join(kinds)}", param="feedback")
        return given[0]


class Json(JSONResponse):
    """JSON that may hold half of a surrogate pair: escaped, as it came."""

    def render(self, content: Any) -> bytes:
        try:
            return super().render(content)
        except ValueError:  # also NaN, which no JSON is but an upstream may have sent
            return json_text(content, ascii=True).encode("ascii")


def body_of(content: bytes) -> Any:
    """The JSON of a request's body. `ApiError` 400: a number that no JSON can hold."""

    def refused(number: str) -> float:
        message = f"{number[:40]} is no number that JSON can hold"
        raise ApiError(400, message, code="invalid_json")

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refused(text)

    return json.loads(content, parse_float=number, parse_constant=refused)


def fault_of(text: str, max_length: int) -> str:
    """What makes a text of a request unusable, or ''."""
    too_long = f"is longer than {max_length} characters" if len(text) > max_length else ""
    return text_fault(text) or too_long
