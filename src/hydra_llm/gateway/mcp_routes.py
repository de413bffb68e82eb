"""The Model Context Protocol at `/mcp` (streamable HTTP), by the official SDK, which is the extra
`mcp`. Keys, Host and Origin, rates and sizes of bodies are checked before (middleware.py).

It has no sessions: every call is one POST with its own key, so nothing outlives a key, and any of
several servers can answer it.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from hydra_llm import __version__
from hydra_llm.errors import MissingExtra
from hydra_llm.extras import require
from hydra_llm.gateway.chat import user_of
from hydra_llm.gateway.gateway import Gateway
from hydra_llm.gateway.mcp_tools import INSTRUCTIONS, TOOLS, Result, Tool
from hydra_llm.gateway.middleware import ERRORS, MCP_PATH, ClientGone, as_api_error
from hydra_llm.gateway.schemas import ApiError
from hydra_llm.gateway.telemetry import note

if TYPE_CHECKING:
    from mcp.server.lowlevel import Server
    from mcp.types import CallToolResult


router = APIRouter()


@router.post(MCP_PATH, include_in_schema=False)
async def mcp(http: Request) -> Response:
    """One message of the protocol. `ApiError` 501 where the SDK is not installed."""
    try:
        require("mcp", MCP_PATH)
    except MissingExtra as missing:
        raise ApiError(501, str(missing), code="no_mcp") from None
    await run_sync(make_server)  # the SDK takes a second to import
    try:
        return _SdkResponse(await http.body())
    except ClientDisconnect:
        raise ClientGone from None


class _SdkResponse(Response):
    """What the SDK answers to a request, whose body has been read: a fault of that is none of the
    SDK's.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

        unread = [{"type": "http.request", "body": self.body, "more_body": False}]

        async def read() -> Message:
            return unread.pop() if unread else await receive()

        most = Request(scope).app.state.gateway.settings.max_body_bytes
        manager = StreamableHTTPSessionManager(
            make_server(), json_response=True, stateless=True, max_request_body_size=most
        )
        async with manager.run():
            await manager.handle_request(scope, read, send)


@cache
def make_server() -> "Server[Any]":
    """The SDK's server with all tools; it keeps nothing of a request."""
    from mcp.server.lowlevel import Server
    from mcp.types import (
        CallToolRequestParams,
        CallToolResult,
        ListToolsResult,
        PaginatedRequestParams,
    )

    async def list_tools(context: Any, params: PaginatedRequestParams | None) -> ListToolsResult:
        may = context.request.state.caller.purposes
        return ListToolsResult(tools=[_listed(own) for own in TOOLS.values() if own.purpose in may])

    async def call_tool(context: Any, params: CallToolRequestParams) -> CallToolResult:
        return await _called(params.name, params.arguments or {}, context.request)

    return Server(
        "hydra-llm",
        version=__version__,
        instructions=INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


def _listed(tool: Tool) -> Any:
    """A tool as the protocol lists it."""
    from mcp import types

    hints = types.ToolAnnotations(
        read_only_hint=tool.reads,
        destructive_hint=not tool.reads,
        idempotent_hint=True,
        open_world_hint=False,
    )
    return types.Tool(
        name=tool.name,
        title=tool.title,
        description=tool.description,
        input_schema=tool.arguments.model_json_schema(),
        annotations=hints,
    )


async def _called(name: str, arguments: Mapping[str, Any], http: Request) -> "CallToolResult":
    """The result of a tool; whatever fails is a result too, which says it in one line."""
    from mcp.types import CallToolResult, TextContent

    gateway: Gateway = http.app.state.gateway
    try:
        result = await _run(name, arguments, http)
    except Exception as error:
        if not isinstance(error, ERRORS):
            gateway.telemetry.failed("tool", error)
        fault = as_api_error(error)
        note(tool_error=fault.code or fault.status)
        return CallToolResult(content=[TextContent(text=str(fault))], is_error=True)
    text = result.get("text") or json.dumps(result, ensure_ascii=False)
    return CallToolResult(content=[TextContent(text=text)], structured_content=result)


async def _run(name: str, arguments: Mapping[str, Any], http: Request) -> Result:
    """Run a tool for the user of the request. Raises one of ERRORS."""
    tool = TOOLS.get(name)
    if tool is None:
        raise ApiError(404, f"there is no tool of that name: {', '.join(TOOLS)}", code="no_tool")
    note(tool=name)
    user = user_of(http, {}).id
    if user is None:
        headers = http.app.state.gateway.settings.user_headers
        fix = f"send the header '{headers[0]}', or a key that was made for one user"
        raise ApiError(400, f"the request names no user: {fix}", code="no_user")
    # From here on the request may speak for this user only, whatever else its key may do.
    own = replace(http.state.caller, admin=False, users=(user,), bound=user)
    http.state.caller = own
    try:
        given = tool.arguments.model_validate(arguments)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
    return await tool.run(user, given, http)
