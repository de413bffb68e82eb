"""OpenAI's endpoints but that of responses; gateway.py decides what an answer is."""

from typing import Any

from fastapi import APIRouter, Request, Response

from hydra_llm.gateway.audit import allow
from hydra_llm.gateway.chat import ChatWire, answer_chat, answer_translated, user_of
from hydra_llm.gateway.embedded import EmbeddedUpstream
from hydra_llm.gateway.forward import pass_on
from hydra_llm.gateway.gateway import Gateway
from hydra_llm.gateway.schemas import ChatRequest, Json, TextRequest, body_of
from hydra_llm.gateway.texts import Embedder, TextWire, to_chat

ANYONE = "-"  # whose turn it is where a request names no user
router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=None)
async def chat(request: ChatRequest, http: Request) -> Response:
    """Answer a conversation, as this user would want where the user has a history. The user is
    named by the header `x-hydra-user` or the field `user`; the settings list further ones.
    """
    body = body_of(await http.body())
    return await answer_chat(http, request, body, user_of(http, body), ChatWire())


@router.post("/v1/completions", response_model=None)
async def complete(request: TextRequest, http: Request) -> Response:
    """The upstream's completion of a text, without records; an embedded model reads the text as a
    user's message.
    """
    if not isinstance(http.app.state.gateway.upstream, EmbeddedUpstream):
        return await pass_on(http, "completions")
    body = body_of(await http.body())
    user = user_of(http, body)
    return await answer_translated(http, to_chat(body), user, TextWire())


@router.post("/v1/embeddings", response_model=None)
async def embed(request: TextRequest, http: Request) -> Response:
    """The upstream's embeddings of texts; beside an embedded model those of the encoder."""
    gateway: Gateway = http.app.state.gateway
    if not isinstance(gateway.upstream, EmbeddedUpstream):
        return await pass_on(http, "embeddings")
    allow(http, None, "answer")
    body = body_of(await http.body())
    user = user_of(http, body).id or http.state.caller.key or ANYONE
    embedder: Embedder = http.app.state.embedder
    return Json(await embedder.embed(gateway.deployment, body, user, gateway.settings.max_text))


@router.get("/v1/models", response_model=None)
async def models(http: Request) -> Any:
    """The upstream's models."""
    return Json(await http.app.state.gateway.upstream.models())


@router.get("/v1/models/{id:path}", response_model=None)
async def model(id: str, http: Request) -> Any:
    """One of the upstream's models."""
    return Json(await http.app.state.gateway.upstream.models(id))
