"""Requests that are passed on to the upstream as they are, with its own key: all paths of /v1 that
no other module answers. The user is hidden in JSON and in forms. Bodies are streamed, both ways.
"""

import json
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from hydra_llm.gateway.audit import allow
from hydra_llm.gateway.auth import Caller
from hydra_llm.gateway.chat import user_of, while_connected
from hydra_llm.gateway.gateway import Gateway
from hydra_llm.gateway.identity import hide_user, hide_user_in_form
from hydra_llm.gateway.middleware import ClientGone, ConnectionCut
from hydra_llm.gateway.sampling import without
from hydra_llm.gateway.schemas import ApiError
from hydra_llm.gateway.spend_limits import admit
from hydra_llm.gateway.upstream import Passed, UpstreamError

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
OWN = ("users", "feedback", "responses", "messages", "chat")
"""First parts of the paths of which nothing is passed on: what is about users stays here."""
PART = re.compile(r"[\w.:@+~,=-]+", re.ASCII)
"""Of a path: nothing that an endpoint, or a proxy before it, may read as another path."""
PASSED = ("content-type", "accept", "openai-beta", "range", "idempotency-key")
"""Headers that the upstream gets; the caller's key is not among them."""

router = APIRouter(tags=["pass-through"])


async def forward(http: Request) -> Response:
    """Pass a request on to the upstream, with the upstream's key. The setting `passthrough` says
    whose requests.
    """
    gateway: Gateway = http.app.state.gateway
    caller: Caller = http.state.caller
    whose = gateway.settings.passthrough
    path = _path(http)
    if whose == "off" or not path or path.partition("/")[0].lower() in OWN:
        raise ApiError(404, "no such endpoint", code="unknown_url")
    if whose == "admin" and not caller.admin:
        message = "this key opens no other endpoints of the upstream: see the setting passthrough"
        raise ApiError(403, message, code="endpoint_not_allowed")
    return await pass_on(http, path)


async def pass_on(http: Request, path: str) -> Response:
    """The upstream's response to a request for a path, with the user hidden."""
    gateway = allow(http, None, "answer")
    gateway.telemetry.tracing.adopt(http.headers)
    await admit(http, None)  # the key; the user, once the body is read
    headers = {name: value for name in PASSED if (value := http.headers.get(name, "")).isascii()}
    headers = {name: value for name, value in headers.items() if value}
    try:
        content = await _content(http, gateway)
        sent = Passed(http.method, path, http.url.query, headers, content)
        if isinstance(content, bytes):
            return await while_connected(http, _answered(gateway, sent))
        return await _answered(gateway, sent)  # which reads the body, and so sees a client leave
    except ClientDisconnect:
        raise ClientGone from None


def _path(http: Request) -> str:
    """The path below /v1/ as it was sent; '' if it may lead to another place."""
    raw = http.scope.get("raw_path") or quote(http.scope["path"]).encode()
    below = raw.decode("latin-1").removeprefix(http.scope.get("root_path", ""))
    parts = below.removeprefix("/v1/").split("/")
    return "/".join(parts) if all(PART.fullmatch(p) and p.strip(".") for p in parts) else ""


async def _content(http: Request, gateway: Gateway) -> bytes | AsyncIterator[bytes]:
    """The body, with the user hidden where it is JSON or a form."""
    kind, _, options = http.headers.get("content-type", "").partition(";")
    fields = gateway.settings.user_fields
    match kind.strip().lower():
        case "application/json":
            body = _json(await http.body())
            if not isinstance(body, dict):
                return await http.body()
            user = user_of(http, body).id  # may the caller speak for the user?
            if user is not None:
                await admit(http, user)
                await gateway.read_payer(user)
            hidden = hide_user(without(body, "personalization"), gateway.salt, fields)
            return json.dumps(hidden).encode()
        case "multipart/form-data" if named := re.search(r'boundary="?([^";]+)', options):
            return hide_user_in_form(await http.body(), named[1], gateway.salt, fields)
        case "" | "application/x-www-form-urlencoded" if _has_body(http):  # a user may be in it
            message = "send the body as application/json or multipart/form-data"
            raise ApiError(400, message, param="content-type", code="invalid_request")
    return http.stream() if _has_body(http) else b""


def _has_body(http: Request) -> bool:
    length = http.headers.get("content-length", "")
    return "transfer-encoding" in http.headers or length not in ("", "0")


def _json(content: bytes) -> Any:
    try:
        return json.loads(content or b"null")
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON", code="invalid_request") from None


async def _answered(gateway: Gateway, sent: Passed) -> Response:
    """The response that has begun; one that is cut, or too large, must not look whole."""
    head, body = await gateway.metered.forward(sent)
    most = gateway.settings.max_body_bytes

    async def pieces() -> AsyncIterator[bytes]:
        size = 0
        try:
            async with aclosing(body):  # of one that is cut, the connection ends too
                async for piece in body:
                    if (size := size + len(piece)) > most:
                        fault = f"the upstream's answer has more than {most} bytes"
                        raise UpstreamError(502, fault)
                    yield piece
        except UpstreamError as error:
            gateway.telemetry.failed("upstream", error)
            raise ConnectionCut from None

    kind = head.headers.get("content-type", "application/octet-stream")
    return StreamingResponse(pieces(), head.status, headers=dict(head.headers), media_type=kind)


for method in METHODS:  # each has an id of its own in the description of the API
    name = f"{method.lower()}_other"
    router.add_api_route(
        "/v1/{path:path}", forward, methods=[method], operation_id=name, response_model=None
    )
