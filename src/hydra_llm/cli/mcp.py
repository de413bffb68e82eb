"""`hydra-llm mcp`: the tools of a running gateway on stdin and stdout, for assistants that start a
program instead of opening a URL.

It holds no data and no rights: each call is one request to the gateway's `/mcp`. So the database,
the bundle and the checks of keys stay in one process, and the gateway may be restarted meanwhile.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import quote

from typer import Option

from hydra_llm.environment import http_client_faults
from hydra_llm.errors import SettingsError, UserFault
from hydra_llm.extras import require
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.llm.endpoint import KEY, is_url, without_userinfo

if TYPE_CHECKING:
    import httpx2
    from mcp.client import Client
    from mcp.types import CallToolRequestParams, CallToolResult, ListToolsResult

R = TypeVar("R")
SECONDS = 120.0  # that an answer may take: a description of a user scores records
KEY_HELP = "The gateway's key; better as HYDRA_MCP_KEY, for a command line can be seen by others."


def mcp(
    url: Annotated[str, Option(help="The gateway.")] = "http://127.0.0.1:8000",
    user: Annotated[str, Option(help="The user's id; not needed with a key of one user.")] = "",
    key: Annotated[str, Option(help=KEY_HELP, show_default=False)] = "",
) -> None:
    """Give an assistant (Claude Desktop, Cursor, ...) a running gateway's tools, over stdio.

    They search, add, list and delete a user's records, say what is known, and take feedback.
    """
    require("mcp", "`hydra-llm mcp`")
    address, headers = _address(url), {"x-hydra-user": user} if user else {}
    if key := key.strip():
        if not KEY.fullmatch(key):
            problem = "holds a blank, a line break or a character outside ASCII"
            raise SettingsError(f"HYDRA_MCP_KEY {problem}: remove it (it is not shown here)")
        headers["authorization"] = f"Bearer {key}"
    run_sync(lambda: _serve(address, headers, user))


def _address(url: str) -> str:
    """The gateway's `/mcp`, of its address with or without a path."""
    if not is_url(url):
        fix = "write it as http://127.0.0.1:8000"
        raise SettingsError(f"--url {without_userinfo(url)} is no URL: {fix}")
    base = url.rstrip("/")
    for path in ("/mcp", "/v1"):
        base = base.removesuffix(path)
    return f"{base}/mcp"


async def _serve(address: str, headers: dict[str, str], user: str) -> None:
    """Until stdin ends. Raises UserFault where the gateway does not answer at the start, or the key
    is not the user's.
    """
    import httpx2
    from mcp.server.lowlevel import Server
    from mcp.server.stdio import stdio_server

    from hydra_llm import __version__

    with http_client_faults():
        encoded = httpx2.Headers(headers, encoding="utf-8")  # a user's id may be any text
        http = httpx2.AsyncClient(headers=encoded, timeout=SECONDS)
    async with http:
        relay = _Relay(address, http)
        if user:
            await relay.check(user)
        server: Server[Any] = Server(
            "hydra-llm",
            version=__version__,
            instructions=await relay.instructions(),
            on_list_tools=relay.list_tools,
            on_call_tool=relay.call_tool,
        )
        async with stdio_server() as (read, write):
            await server.run(read, write, server.create_initialization_options())


@dataclass(frozen=True)
class _Relay:
    """Passes calls on to a gateway."""

    address: str
    http: "httpx2.AsyncClient"

    async def check(self, user: str) -> None:
        """Raises UserFault where the key may not speak for the user: it would speak for its own."""
        import httpx2

        known = f"{self.address.removesuffix('/mcp')}/v1/users/{quote(user, safe='')}"
        with suppress(httpx2.HTTPError):  # the first request of the protocol tells of it
            if (await self.http.get(known)).status_code == 403:
                raise UserFault(f"the key is not for the user '{user}': leave --user out")

    async def instructions(self) -> str | None:
        """What the gateway says of itself."""
        from mcp.types import DiscoverRequest, DiscoverResult, RequestParams

        request = DiscoverRequest(params=RequestParams())
        about = await self._ask(lambda it: it.session.send_request(request, DiscoverResult))
        return about.instructions

    async def list_tools(self, context: Any = None, params: Any = None) -> "ListToolsResult":
        return await self._ask(lambda it: it.list_tools())

    async def call_tool(self, context: Any, params: "CallToolRequestParams") -> "CallToolResult":
        from mcp.types import CallToolRequest, CallToolRequestParams, CallToolResult, TextContent

        # Not by `call_tool`, which lists the tools before each answer to check it.
        own = CallToolRequestParams(name=params.name, arguments=params.arguments)
        request = CallToolRequest(params=own)
        try:
            return await self._ask(lambda it: it.session.send_request(request, CallToolResult))
        except UserFault as fault:
            return CallToolResult(content=[TextContent(text=str(fault))], is_error=True)

    async def _ask(self, call: "Callable[[Client], Awaitable[R]]") -> R:
        """One request. Raises UserFault: the gateway refuses it, or does not answer."""
        import httpx2
        from mcp.client import Client
        from mcp.client.streamable_http import streamable_http_client
        from mcp.shared.exceptions import MCPError
        from mcp.types.version import LATEST_MODERN_VERSION

        transport = streamable_http_client(self.address, http_client=self.http)
        at = f"the gateway at {without_userinfo(self.address)}"
        try:
            async with Client(transport, mode=LATEST_MODERN_VERSION, cache=None) as gateway:
                return await call(gateway)
        except* MCPError as group:
            reason = " ".join(str(_first(group)).split())
            raise UserFault(f"{at} refuses: {reason}") from None
        except* httpx2.HTTPError as group:
            fix = "start `hydra-llm serve`, or name it by --url"
            raise UserFault(f"{at} does not answer ({_first(group)}): {fix}") from None


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
