"""From a request to a page: the session, the form with its token, templates, errors in one line,
and the headers that keep others' pages and scripts out.
"""

import hashlib
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Request, Response
from fastapi.routing import APIRoute
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException

from hydra_llm.gateway.auth import Caller
from hydra_llm.gateway.middleware import DASHBOARD, ERRORS, as_api_error
from hydra_llm.gateway.schemas import ApiError, id_fault
from hydra_llm.gateway.spend import paying
from hydra_llm.gateway.ui.session import Sessions, SignedOut
from hydra_llm.gateway.ui.words import DONE, REASONS

HERE = Path(__file__).parent
ICON = (HERE / "static" / "icon.svg").read_bytes()
SHEET = (HERE / "static" / "ui.css").read_bytes()
SHEET_NAME = f"{hashlib.sha256(SHEET).hexdigest()[:12]}.css"  # a new one is fetched at once
POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none';"
    " frame-ancestors 'none'"
)
GUARDS: Mapping[str, str] = {
    "content-security-policy": POLICY,
    "x-frame-options": "DENY",  # browsers that do not know frame-ancestors
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
MAX_SHOWN = 400  # characters of a text in a list


@dataclass(frozen=True)
class Visit:
    """A request of somebody who is signed in."""

    http: Request
    id: str  # of the session
    caller: Caller

    @property
    def user(self) -> str:
        """Whom a page is about: as named, or the caller's only user. `ApiError` 400, 403."""
        only = self.caller.users[0] if len(self.caller.users) == 1 else ""
        user = self.http.query_params.get("user") or ("" if self.caller.admin else only)
        if fault := id_fault(user):
            raise ApiError(400, f"the user's id {fault}" if user else "name a user", param="user")
        self.caller.check(user)
        return user


class PageRoute(APIRoute):
    """A route whose errors are pages. Who is not signed in is asked for a key."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def guarded(http: Request) -> Response:
            try:
                response = await handler(http)
            except SignedOut:
                ended = "" if http.method == "GET" else "?done=ended"
                response = go(http, f"/sign-in{ended}")
            except Exception as error:
                if not isinstance(error, ERRORS):
                    http.app.state.gateway.telemetry.failed("request", error)
                response = await run_sync(error_page, http, as_api_error(error))
            for name, value in GUARDS.items():
                response.headers.setdefault(name, value)
            response.headers.setdefault("cache-control", "no-store")
            return response

        return guarded


def make_router() -> APIRouter:
    """A router of pages."""
    return APIRouter(prefix=DASHBOARD, route_class=PageRoute, include_in_schema=False)


def visit(http: Request) -> Visit:
    """The session of a request; its caller is that of every endpoint's function. `SignedOut`."""
    sessions: Sessions = http.app.state.sessions
    id = sessions.id_of(http)
    if id is None:
        raise SignedOut
    http.state.caller = sessions.caller(http, id)
    if (bill := paying.get()) is not None:
        bill.key = http.state.caller.key  # who pays for a fit
    http.state.visit = Visit(http, id, http.state.caller)
    return http.state.visit  # type: ignore[no-any-return]


async def form_of(http: Request) -> dict[str, str]:
    """The fields of a form as browsers send it, with line breaks as one character."""
    try:
        pairs = parse_qsl((await http.body()).decode(), keep_blank_values=True, errors="strict")
    except ValueError:
        raise HTTPException(400) from None
    return {name: one_break(value) for name, value in pairs}


def one_break(text: str) -> str:
    """A text with line breaks of one character, as a form's is for a page."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


async def sent(http: Request, here: Annotated[Visit, Depends(visit)]) -> dict[str, str]:
    """The fields of a form of this session. `ApiError` 403: it was not made for it."""
    form = await form_of(http)
    http.app.state.sessions.check_form(here.id, form)
    return form


Here = Annotated[Visit, Depends(visit)]
Form = Annotated[dict[str, str], Depends(sent)]


# ---- answers


def show(here: Visit, template: str, status: int = 200, /, **values: Any) -> Response:
    """A page of the session."""
    token = here.http.app.state.sessions.form_token(here.id)
    return page(here.http, template, status, caller=here.caller, token=token, **values)


def page(http: Request, template: str, status: int = 200, /, **values: Any) -> Response:
    """A template as a page."""
    base = f"{http.scope.get('root_path', '')}{DASHBOARD}"
    about = {"base": base, "style": f"{base}/{SHEET_NAME}", "caller": None, "token": "", "user": ""}
    about |= {"done": DONE.get(http.query_params.get("done", ""), "")}
    text = _templates().get_template(template).render({**about, **values})
    # half of a surrogate pair is no character that a page can have
    content = text.encode("utf-8", "replace")
    return Response(content, status, media_type="text/html; charset=utf-8")


def go(http: Request, path: str, **query: str) -> Response:
    """Go on to another page of the dashboard (303): a reload does not send a form again."""
    where = f"{http.scope.get('root_path', '')}{DASHBOARD}{path}"
    where += f"?{urlencode(query)}" if query else ""
    return Response(status_code=303, headers={"location": where})


def error_page(http: Request, error: ApiError) -> Response:
    """An error as a page, with the navigation of the session if there is one."""
    here: Visit | None = getattr(http.state, "visit", None)
    values = {"status": error.status, "message": str(error)}
    response = show(here, "error.html", error.status, **values) if here else None
    response = response or page(http, "error.html", error.status, **values)
    response.headers.update(error.headers or {})
    return response


@cache
def _templates() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"day": _day, "moment": _moment, "short": _short, "share": _share}
    made.globals |= {"query": lambda **of: urlencode(of), "reasons": REASONS}
    return made


def _moment(seconds: float) -> str:
    return _as(seconds, "%Y-%m-%d %H:%M")


def _day(seconds: float) -> str:
    return _as(seconds, "%Y-%m-%d")


def _as(seconds: float, form: str) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime(form)
    except (OverflowError, OSError, ValueError):
        return "–"


def _short(text: str, length: int = MAX_SHOWN) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"
