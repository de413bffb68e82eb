"""OpenAI's endpoints: /v1/chat/completions and /v1/models. Reads requests, streams answers; what an
answer is, is personal.py's.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import StreamingResponse

from hydra_llm.gateway.auth import NOBODY, Caller
from hydra_llm.gateway.gateway import Gateway, Plan, Reply
from hydra_llm.gateway.pseudonyms import named_user
from hydra_llm.gateway.schemas import ApiError, ChatRequest, Json, chunks_of, role_chunk
from hydra_llm.gateway.telemetry import Span
from hydra_llm.gateway.upstream import DONE, UpstreamError, event, first_of
from hydra_llm.text import text_fault

KEEP_ALIVE_SECONDS = 5.0
KEEP_ALIVE = b": still working\n\n"
"""A comment: parsers skip it, proxies see that the line is alive."""
STREAM = "text/event-stream"

LONGEST_ID = 200

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=None)
async def chat(
    request: ChatRequest,
    http: Request,
    x_hydra_user: str | None = Header(default=None, max_length=200),
) -> Response:
    """Answer a conversation, as this user would want where the user has a history."""
    gateway: Gateway = http.app.state.gateway
    body = json.loads(await http.body())
    caller: Caller = http.state.caller
    user = None if caller is NOBODY else _user(caller, body, _in_utf8(x_hydra_user))
    with gateway.observer.span(request.model) as span:
        plan = await gateway.plan(request, body, user)
        if caller is NOBODY:
            plan = replace(plan, reason="store-failure")
        if request.stream:
            return await _stream(gateway, plan, request, span)
        reply = await gateway.answer(plan)
        _answered(gateway, reply, span)
        return Json(reply.completion, headers=_headers(reply.plan))


@router.get("/v1/models", response_model=None)
async def models(http: Request) -> Any:
    """The upstream's models."""
    return Json(await http.app.state.gateway.upstream.models())


@router.get("/v1/models/{id:path}", response_model=None)
async def model(id: str, http: Request) -> Any:
    """One of the upstream's models."""
    return Json(await http.app.state.gateway.upstream.models(id))


def _in_utf8(header: str | None) -> str | None:
    """A header as it was meant: ASGI reads headers as Latin-1, clients send UTF-8."""
    if header is None or header.isascii():
        return header
    try:
        return header.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return header


def _user(caller: Caller, body: dict[str, Any], header: str | None) -> str | None:
    """The user for whom a request is.

    Raises:
        ApiError: 403 for a user for whom this caller may not speak.
    """
    if caller.bound is not None:
        return caller.bound
    named = named_user(body, header)
    if named is not None and (len(named) > LONGEST_ID or text_fault(named)):
        raise ApiError(
            400,
            f"the user's id {text_fault(named) or f'is longer than {LONGEST_ID} characters'}",
            param="user",
        )
    if named is not None:
        caller.check(named)
    return named


async def _stream(gateway: Gateway, plan: Plan, request: ChatRequest, span: Span) -> Response:
    if plan.candidates > 1 and plan.reason is None:
        wants_usage = bool((request.stream_options or {}).get("include_usage"))
        pieces = _picked_stream(gateway, plan, request, wants_usage, span)
    else:
        try:
            first, rest = await first_of(gateway.stream(plan))
        except UpstreamError as error:
            plan = gateway.without_records(plan, error)
            first, rest = await first_of(gateway.stream(plan))
        pieces = _whole(first, rest)
        gateway.observer.answered(plan.reason, plan.seconds)
    return StreamingResponse(
        span.around(pieces),
        media_type=STREAM,
        headers=_headers(plan) | {"cache-control": "no-cache"},
    )


async def _whole(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    try:
        async for piece in rest:
            yield piece
    # the status is out already: the error is the stream's last event, whatever came before it
    except UpstreamError as error:
        yield b"\n\n" + event(error.body)


async def _picked_stream(
    gateway: Gateway, plan: Plan, request: ChatRequest, wants_usage: bool, span: Span
) -> AsyncIterator[bytes]:
    """The role at once, comments while the candidates run, then the pick."""
    id = f"chatcmpl-{plan.id}"
    yield event(role_chunk(id, request.model, request.n or 1))
    answer = asyncio.create_task(gateway.answer(plan))
    try:
        while not (await asyncio.wait({answer}, timeout=KEEP_ALIVE_SECONDS))[0]:
            yield KEEP_ALIVE
        reply = answer.result()
    except (
        UpstreamError
    ) as error:  # the status is out already: the error is the stream's last event
        yield event(error.body)
        return
    finally:
        answer.cancel()
    _answered(gateway, reply, span)
    completion = {**reply.completion, "id": id}
    if (
        reply.plan.reason is not None and gateway.settings.personalization
    ):  # the header was out before anybody knew
        completion["personalization"] = {"personalized": False, "reason": reply.plan.reason}
    for chunk in chunks_of(completion, usage=wants_usage):
        yield event(chunk)
    yield DONE


def _headers(plan: Plan) -> dict[str, str]:
    if plan.reason is not None:
        return {"x-hydra-personalized": f"false; reason={plan.reason}"}
    return {"x-hydra-personalized": "true", "x-hydra-request-id": plan.id}


def _answered(gateway: Gateway, reply: Reply, span: Span) -> None:
    gateway.observer.answered(reply.plan.reason, reply.plan.seconds, abstained=reply.abstained)
    gateway.observer.spent(span, reply.completion)
