"""OpenAI's endpoints, /v1/chat/completions and /v1/models; gateway.py decides what an answer is."""

import json
from typing import Any

from fastapi import APIRouter, Request, Response

from hydra_llm.gateway.chat import ChatWire, answer_chat, user_of
from hydra_llm.gateway.schemas import ChatRequest, Json

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=None)
async def chat(request: ChatRequest, http: Request) -> Response:
    """Answer a conversation, as this user would want where the user has a history. The user is
    named by the header `x-hydra-user` or the field `user`; the settings list further ones.
    """
    body = json.loads(await http.body())
    return await answer_chat(http, request, body, user_of(http, body), ChatWire())


@router.get("/v1/models", response_model=None)
async def models(http: Request) -> Any:
    """The upstream's models."""
    return Json(await http.app.state.gateway.upstream.models())


@router.get("/v1/models/{id:path}", response_model=None)
async def model(id: str, http: Request) -> Any:
    """One of the upstream's models."""
    return Json(await http.app.state.gateway.upstream.models(id))
