"""One chat request from the caller to its reply, for every protocol that is translated to chat
completions. gateway.py decides what an answer is; a `Wire` writes it as its protocol wants.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from typing import Any, Protocol

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from hydra_llm.gateway.audit import allow
from hydra_llm.gateway.auth import UNVERIFIED, Caller
from hydra_llm.gateway.chunks import DONE, chunks_of, event, role_chunk
from hydra_llm.gateway.gateway import Gateway
from hydra_llm.gateway.identity import NamedUser, named_user
from hydra_llm.gateway.middleware import ClientGone
from hydra_llm.gateway.routed import RoutedRequest
from hydra_llm.gateway.schemas import ChatRequest, Json, chat_request
from hydra_llm.gateway.spend_limits import admit
from hydra_llm.gateway.telemetry import note, note_usage
from hydra_llm.gateway.tracing import Span
from hydra_llm.gateway.upstream import Body, UpstreamError

LIMIT = "max_tokens"
KEEP_ALIVE_SECONDS = 5.0
KEEP_ALIVE = b": still working\n\n"  # a comment: parsers skip it, proxies see it


class Wire(Protocol):
    """How a protocol writes the answer to a chat request."""

    async def whole(self, completion: Body, routed: RoutedRequest) -> Body:
        """The reply that says what the completion says."""
        ...

    def stream(self, pieces: AsyncIterator[bytes], routed: RoutedRequest) -> AsyncIterator[bytes]:
        """The events that say what the completion's chunks say."""
        ...


class ChatWire:
    """Chat completions as they are."""

    async def whole(self, completion: Body, routed: RoutedRequest) -> Body:
        return completion

    def stream(self, pieces: AsyncIterator[bytes], routed: RoutedRequest) -> AsyncIterator[bytes]:
        return pieces


def user_of(http: Request, body: Body) -> NamedUser:
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


async def answer_chat(
    http: Request, asked: ChatRequest, body: Body, user: NamedUser, wire: Wire
) -> Response:
    """Answer a chat request, `asked` as parsed and `body` as sent, as the user would want."""
    gateway = allow(http, None, "answer")
    explains = asked.personalization is not None and asked.personalization.explain
    if explains:  # the reply shows records
        allow(http, None, "read")
    await admit(http, user.id)
    with gateway.telemetry.tracing.request(asked.model, http.headers) as span:

        async def answered() -> Response:
            routed = await gateway.route(asked, body, user.id)
            reads = "read" in http.state.caller.purposes  # ids may say what records do
            routed = replace(routed, names_records=reads)
            note(id=routed.id)
            if http.state.caller is UNVERIFIED:
                routed = routed.passed_through("store-failure")
            elif user.unread:
                routed = routed.passed_through("user-not-recognized")
            if explains and routed.reason is None:
                allow(http, user.id, "read", "explain")
            if asked.stream:
                return await _stream(gateway, routed, wire, span)
            completion, routed = await gateway.answer(routed)
            _spent(completion, routed, span)
            return Json(await wire.whole(completion, routed), headers=_headers(routed))

        response = await while_connected(http, answered())
        if user.unread:
            response.headers["x-hydra-personalized"] += f"; field={user.unread}"
        return response


async def answer_translated(
    http: Request, chat: dict[str, Any], user: NamedUser, wire: Wire
) -> Response:
    """Answer a chat request that was made of another protocol's."""
    name = getattr(http.app.state.gateway.upstream, "limit_name", LIMIT)
    if LIMIT in chat:
        chat[name] = chat.pop(LIMIT)
    return await answer_chat(http, chat_request(chat), chat, user, wire)


def answer_id(prefix: str, routed: RoutedRequest) -> str:
    """The id of an answer. That of a personal one has the request's id, which feedback may name."""
    return prefix + (routed.id if routed.reason is None else routed.id.removeprefix("req_"))


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


async def _stream(gateway: Gateway, routed: RoutedRequest, wire: Wire, span: Span) -> Response:
    if routed.candidates > 1:
        pieces = _stream_pick(gateway, routed, span)
    else:
        try:
            pieces = await _begun(gateway.stream(routed))
        except UpstreamError as error:
            routed = gateway.without_records(routed, error)
            pieces = await _begun(gateway.stream(routed))
            gateway.telemetry.failed("records", error)
        gateway.telemetry.answered(routed.reason, routed.seconds)
        span.set(hydra__reason=routed.reason or "personal")
    span.streams = True
    headers = _headers(routed) | {"cache-control": "no-cache"}
    content = span.around(wire.stream(pieces, routed))
    return StreamingResponse(content, media_type="text/event-stream", headers=headers)


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
    _spent(completion, routed, span)
    completion = {**completion, "id": id}
    if routed.reason is not None and gateway.settings.personalization:  # the header is out already
        completion["personalization"] = {"personalized": False, "reason": routed.reason}
    for chunk in chunks_of(completion, usage=bool(options.get("include_usage"))):
        yield event(chunk)
    yield DONE


def _spent(completion: Body, routed: RoutedRequest, span: Span) -> None:
    note_usage(completion.get("usage"))
    span.spent(completion)
    span.set(hydra__reason=routed.reason or "personal")


def _headers(routed: RoutedRequest) -> dict[str, str]:
    if routed.reason is not None:
        return {"x-hydra-personalized": f"false; reason={routed.reason}"}
    return {"x-hydra-personalized": "true", "x-hydra-request-id": routed.id}
