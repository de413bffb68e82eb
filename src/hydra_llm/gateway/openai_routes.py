"""OpenAI's endpoints, /v1/chat/completions and /v1/models; gateway.py decides what an answer is."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from hydra_llm.gateway.auth import UNVERIFIED, Caller
from hydra_llm.gateway.chunks import DONE, chunks_of, event, role_chunk
from hydra_llm.gateway.gateway import Gateway, RoutedRequest
from hydra_llm.gateway.identity import NamedUser, named_user
from hydra_llm.gateway.middleware import ClientGone
from hydra_llm.gateway.schemas import ChatRequest, Json
from hydra_llm.gateway.telemetry import Span, chat_span, note
from hydra_llm.gateway.upstream import UpstreamError

KEEP_ALIVE_SECONDS = 5.0
KEEP_ALIVE = b": still working\n\n"  # a comment: parsers skip it, proxies see it

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", response_model=None)
async def chat(request: ChatRequest, http: Request) -> Response:
    """Answer a conversation, as this user would want where the user has a history. The user is
    named by the header `x-hydra-user` or the field `user`; the settings list further ones.
    """
    gateway: Gateway = http.app.state.gateway
    body = json.loads(await http.body())
    caller: Caller = http.state.caller
    user = user_of(http, body)
    with chat_span(request.model) as span:

        async def answered() -> Response:
            routed = await gateway.route(request, body, user.id)
            note(id=routed.id)
            if caller is UNVERIFIED:
                routed = routed.passed_through("store-failure")
            elif user.unread:
                routed = routed.passed_through("user-not-recognized")
            if request.stream:
                return await _stream(gateway, routed, span)
            completion, routed = await gateway.answer(routed)
            span.spent(completion)
            return Json(completion, headers=_headers(routed))

        response = await while_connected(http, answered())
        if user.unread:
            response.headers["x-hydra-personalized"] += f"; field={user.unread}"
        return response


async def while_connected(http: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Await `work`. If the client hangs up before, the work and its calls of the upstream end, and
    `ClientGone` is raised.
    """
    tasks = (asyncio.create_task(work), asyncio.create_task(_hung_up(http)))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _hung_up(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


@router.get("/v1/models", response_model=None)
async def models(http: Request) -> Any:
    """The upstream's models."""
    return Json(await http.app.state.gateway.upstream.models())


@router.get("/v1/models/{id:path}", response_model=None)
async def model(id: str, http: Request) -> Any:
    """One of the upstream's models."""
    return Json(await http.app.state.gateway.upstream.models(id))


def user_of(http: Request, body: Mapping[str, Any]) -> NamedUser:
    """The user for whom a request is: the key's only one, or the one that it names. `ApiError` 403
    if this caller may not speak for the user.
    """
    caller: Caller = http.state.caller
    if caller is UNVERIFIED or caller.bound is not None:
        return NamedUser(caller.bound)
    user = named_user(http.scope["headers"], body, http.app.state.gateway.settings)
    if user.id is not None:
        caller.check(user.id)
    return user


async def _stream(gateway: Gateway, routed: RoutedRequest, span: Span) -> Response:
    if routed.candidates > 1:
        pieces = _stream_pick(gateway, routed, span)
    else:
        try:
            pieces = await _begun(gateway.stream(routed))
        except UpstreamError as error:
            routed = gateway.without_records(routed, error)
            pieces = await _begun(gateway.stream(routed))
        gateway.telemetry.answered(routed.reason, routed.seconds)
    span.streams = True
    headers = _headers(routed) | {"cache-control": "no-cache"}
    return StreamingResponse(span.around(pieces), media_type="text/event-stream", headers=headers)


async def _begun(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A stream whose first bytes have come: an error before them is raised here. The status is out
    with them, so a later error is the stream's last event, whatever came before it.
    """
    first = await anext(stream, None)
    if first is None:
        raise UpstreamError(502, "the upstream's stream is empty")

    async def pieces() -> AsyncIterator[bytes]:
        yield first
        try:
            async for piece in stream:
                yield piece
        except UpstreamError as error:
            yield b"\n\n" + event(error.body)

    return pieces()


async def _stream_pick(gateway: Gateway, routed: RoutedRequest, span: Span) -> AsyncIterator[bytes]:
    """The role at once, comments while the candidates are sampled, then the pick."""
    id, options = routed.completion_id, routed.asked.stream_options or {}
    yield event(role_chunk(id, routed.asked.model, routed.n))
    answer = asyncio.create_task(gateway.answer(routed))
    try:
        while not (await asyncio.wait({answer}, timeout=KEEP_ALIVE_SECONDS))[0]:
            yield KEEP_ALIVE
        completion, routed = answer.result()
    except UpstreamError as error:  # the status is out already, as above
        yield event(error.body)
        return
    finally:
        answer.cancel()
    span.spent(completion)
    completion = {**completion, "id": id}
    if routed.reason is not None and gateway.settings.personalization:  # the header is out already
        completion["personalization"] = {"personalized": False, "reason": routed.reason}
    for chunk in chunks_of(completion, usage=bool(options.get("include_usage"))):
        yield event(chunk)
    yield DONE


def _headers(routed: RoutedRequest) -> dict[str, str]:
    if routed.reason is not None:
        return {"x-hydra-personalized": f"false; reason={routed.reason}"}
    return {"x-hydra-personalized": "true", "x-hydra-request-id": routed.id}
