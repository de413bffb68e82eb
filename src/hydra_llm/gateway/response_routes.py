"""OpenAI's Responses API: /v1/responses, answered as chat (responses.py translates). Responses are
kept per user, for `previous_response_id` and to be read again, until they or the user are deleted.
"""

import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request, Response

from hydra_llm.errors import HydraError
from hydra_llm.gateway.audit import allow
from hydra_llm.gateway.auth import Caller
from hydra_llm.gateway.chat import answer_id, answer_translated, user_of
from hydra_llm.gateway.gateway import Gateway
from hydra_llm.gateway.pieces import chunks_in
from hydra_llm.gateway.responses import PREFIX, Item, ResponseWriter, to_chat
from hydra_llm.gateway.routed import RoutedRequest
from hydra_llm.gateway.schemas import ApiError, Id, Json, ResponseRequest, body_of
from hydra_llm.gateway.upstream import Body
from hydra_llm.store.values import StoredResponse

ITEM = re.compile(r"(?:msg|rs|fc)_(\w{1,40})_(\d{1,6})", re.ASCII)  # the id of an item of an output
PER_USER = "responses are kept per user: name the user, for instance in the header x-hydra-user"

router = APIRouter(prefix="/v1/responses", tags=["OpenAI"])


@router.post("", response_model=None)
async def create_response(request: ResponseRequest, http: Request) -> Response:
    """Answer as /v1/chat/completions does, in the form of OpenAI's Responses API."""
    gateway = allow(http, None, "answer")  # before it is told which responses there are
    body = body_of(await http.body())
    user = user_of(http, body)
    kept = _Conversation(gateway, body, user.id)
    await kept.read(request)
    chat = to_chat(body, [*kept.earlier, *kept.items])
    return await answer_translated(http, chat, user, kept)


@router.get("/{id}", response_model=None)
async def get_response(id: Id, http: Request, stream: bool = False) -> Response:
    """A response that is kept, as a whole."""
    if stream:
        message = "stream: a response that is kept has ended, read it without stream"
        raise ApiError(400, message, param="stream", code="unsupported_parameter")
    return Json((await _owned(id, http, "read")).content["response"])


@router.get("/{id}/input_items", response_model=None)
async def get_input_items(
    id: Id,
    http: Request,
    after: str = "",
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """What a response was asked, without the responses before it."""
    items = (await _owned(id, http, "read")).content["input"]
    items = items if order == "asc" else items[::-1]
    start = next((i for i, item in enumerate(items, 1) if item["id"] == after), 0)
    page, more = items[start : start + limit], len(items) > start + limit
    ids = [item["id"] for item in page] or [None]
    about = {"object": "list", "first_id": ids[0], "last_id": ids[-1], "has_more": more}
    return Json({**about, "data": page})


@router.post("/{id}/cancel", response_model=None)
async def cancel_response(id: Id, http: Request) -> Response:
    """Refused: a response that is kept has ended. One that is being made ends with its request."""
    await _owned(id, http, "answer")
    message = "this response has ended: only one that runs in the background can be cancelled, "
    message += "and there are none here. Close the connection to end a request that is under way"
    raise ApiError(400, message, param="id", code="response_not_cancellable")


@router.delete("/{id}", response_model=None)
async def delete_response(id: Id, http: Request) -> dict[str, Any]:
    """Delete a response, and what was kept for feedback on it."""
    response, store = await _owned(id, http, "delete"), http.app.state.gateway.store
    request = id.removeprefix(PREFIX)
    await run_sync(partial(store.delete_response, response.user, id, request=request))
    return {"id": id, "object": "response", "deleted": True}


async def _owned(id: str, http: Request, purpose: str) -> StoredResponse:
    """A response of a user for whom the caller may speak; else `ApiError` 404."""
    caller: Caller = http.state.caller
    caller.need(purpose)
    response: StoredResponse | None = await run_sync(http.app.state.gateway.store.response, id)
    if response is None or not (caller.admin or response.user in caller.users):
        message = "no such response: it was not stored (store, user), deleted, or is too long ago"
        raise ApiError(404, message, code="response_not_found", param="id")
    allow(http, response.user, purpose, "response")
    return response


@dataclass
class _Conversation:
    """A request's conversation: read from the store, answered as a `Wire`, and kept there."""

    gateway: Gateway
    asked: Body
    user: str | None
    previous: str | None = None
    earlier: list[Item] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)  # of this request
    keeps: bool = False
    version: int | None = None  # the user's before the upstream is asked; None: unknown

    async def read(self, request: ResponseRequest) -> None:
        """Find what the request refers to. `ApiError` 404: a response or item is not kept."""
        self.previous = request.previous_response_id
        self.keeps = request.store is not False and self.user is not None
        if self.previous is not None:
            self.earlier = await self._earlier(self.previous)
        text = {"type": "input_text", "text": request.input}
        message: Item = {"type": "message", "role": "user", "content": [text]}
        items = [message] if isinstance(request.input, str) else request.input or []
        if not items and not self.earlier:
            raise ApiError(400, "input: give at least one item", param="input")
        self.items = await self._resolved(items)
        if self.keeps:
            state = partial(self.gateway.store.state, str(self.user))
            try:
                self.version = (await self.gateway.reads.read(state)).version
            except HydraError as error:
                self.gateway.telemetry.failed("store", error)
                self.keeps = False

    async def whole(self, completion: Body, routed: RoutedRequest) -> Body:
        writer = self._writer(routed)
        writer.read(completion)
        await self._keep(writer.response)
        return writer.response

    async def stream(
        self, pieces: AsyncIterator[bytes], routed: RoutedRequest
    ) -> AsyncIterator[bytes]:
        writer = self._writer(routed)
        yield writer.begin()
        async for chunk in chunks_in(pieces):
            if isinstance(chunk, bytes):
                yield chunk
            elif isinstance(error := chunk.get("error"), Mapping):
                writer.fail(error)
                yield writer.last()
                return
            else:
                yield writer.take(chunk)
        yield writer.close()
        await self._keep(writer.response)  # before the end is told: it may be asked for at once
        yield writer.last()

    def _writer(self, routed: RoutedRequest) -> ResponseWriter:
        return ResponseWriter(answer_id(PREFIX, routed), self.asked)

    async def _earlier(self, previous: str) -> list[Item]:
        """The items of a response and those before it."""
        if self.user is None:
            raise ApiError(400, f"previous_response_id: {PER_USER}", param="previous_response_id")
        read = partial(self.gateway.store.conversation, self.user, previous)
        turns = await self.gateway.reads.read(read)
        if not turns or turns[0].previous is not None:
            message = "the response, or one before it, is not there: deleted, or too long ago"
            code, param = "previous_response_not_found", "previous_response_id"
            raise ApiError(404, f"{param}: {message}", code=code, param=param)
        contents = [turn.content for turn in turns]
        return [item for c in contents for item in (*c["input"], *c["response"]["output"])]

    async def _resolved(self, items: list[Item]) -> list[Item]:
        """The items with those of earlier outputs in the place of references to them."""
        places = {
            place: (PREFIX + found[1], int(found[2])) if found else ("", 0)
            for place, item in enumerate(items)
            if item.get("type") == "item_reference" or item.keys() == {"id"}
            for found in [ITEM.fullmatch(str(item.get("id")))]
        }
        if not places:
            return items
        ids = [id for id, _ in places.values()]
        read = partial(self.gateway.store.responses, self.user or "", ids)
        kept, resolved = await self.gateway.reads.read(read), list(items)
        for place, (id, index) in places.items():
            output = kept[id].content["response"]["output"] if id in kept else []
            if index >= len(output):
                where = f"input[{place}]"
                message = f"{where}: no such item. {PER_USER.capitalize()}; or send whole items"
                raise ApiError(404, message, code="item_not_found", param=where)
            resolved[place] = output[index]
        return resolved

    async def _keep(self, response: dict[str, Any]) -> None:
        """Keep the response, if that is wanted; its `store` says whether it is kept."""
        if not self.keeps:
            return
        id, rest = response["id"], response["id"].removeprefix(PREFIX)
        items = [{"id": f"in_{rest}_{i}", **item} for i, item in enumerate(self.items)]
        content = {"input": items, "response": {**response, "store": True}}
        stored = StoredResponse(id, str(self.user), time.time(), self.previous, content)
        add = partial(self.gateway.store.add_response, stored, version=self.version)
        try:
            response["store"] = await self.gateway.reads.read(add)
        except HydraError as error:
            self.gateway.telemetry.failed("store", error)
