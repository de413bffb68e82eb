"""Anthropic's Messages API: /v1/messages, answered as chat (messages.py translates)."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from hydra_llm.gateway.chat import answer_id, answer_translated, user_of
from hydra_llm.gateway.messages import PREFIX, MessageWriter, count_tokens, error_event, to_chat
from hydra_llm.gateway.pieces import chunks_in, named_event
from hydra_llm.gateway.routed import RoutedRequest
from hydra_llm.gateway.schemas import MessageRequest, PromptRequest, body_of
from hydra_llm.gateway.upstream import Body

router = APIRouter(prefix="/v1/messages", tags=["Anthropic"])


@router.post("", response_model=None)
async def create_message(request: MessageRequest, http: Request) -> Response:
    """Answer as /v1/chat/completions does, in the form of Anthropic's Messages API. The key may be
    in the header `x-api-key`, the user in `metadata.user_id` or the header `x-hydra-user`.
    """
    body = body_of(await http.body())
    wire = _MessageWire(request.model)
    return await answer_translated(http, to_chat(body), user_of(http, body), wire)


@router.post("/count_tokens", response_model=None)
async def count(request: PromptRequest, http: Request) -> dict[str, Any]:
    """The tokens of a request by rule of thumb, without those of records."""
    body = body_of(await http.body())
    user_of(http, body)
    return {"input_tokens": count_tokens(to_chat(body))}


@dataclass(frozen=True)
class _MessageWire:
    """Writes messages."""

    model: str

    async def whole(self, completion: Body, routed: RoutedRequest) -> Body:
        writer = MessageWriter(answer_id(PREFIX, routed), self.model)
        writer.read(completion)
        return writer.message

    async def stream(
        self, pieces: AsyncIterator[bytes], routed: RoutedRequest
    ) -> AsyncIterator[bytes]:
        writer = MessageWriter(answer_id(PREFIX, routed), self.model)
        yield writer.begin()
        async for chunk in chunks_in(pieces):
            if isinstance(chunk, bytes):  # a comment that keeps the connection open
                yield named_event({"type": "ping"})
            elif isinstance(error := chunk.get("error"), Mapping):
                yield error_event(error)
                return
            else:
                yield writer.take(chunk)
        yield writer.close()
