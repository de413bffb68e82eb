"""Signing in and out, the style sheet, and what is no page."""

import secrets

from anyio.to_thread import run_sync
from fastapi import Request, Response

from hydra_llm.gateway.schemas import ApiError
from hydra_llm.gateway.ui.pages import (
    ICON,
    SHEET,
    SHEET_NAME,
    Form,
    Here,
    form_of,
    go,
    make_router,
    page,
)
from hydra_llm.gateway.ui.session import Sessions

router = make_router()


@router.get("/sign-in")
def sign_in_page(http: Request) -> Response:
    """The form for a key."""
    return _form(http)


@router.post("/sign-in")
async def sign_in(http: Request) -> Response:
    """Begin a session, in place of any that this browser has."""
    form, sessions = await form_of(http), _sessions(http)
    sessions.check_form(sessions.id_of(http, "form") or "", form)
    key = form.get("key", "").strip()
    try:
        new = await run_sync(sessions.begin, http, key)
    except ApiError as error:
        if error.status != 401:
            raise
        fault = "This key is not valid." if key else "Enter your key."
        return await run_sync(_form, http, fault)
    if old := sessions.id_of(http):
        await run_sync(sessions.end, old)
    response = go(http, "")
    sessions.put(http, response, new)
    sessions.remove(http, response, "form")
    return response


@router.post("/sign-out")
async def sign_out(here: Here, form: Form) -> Response:
    """End the session, also for whoever may have copied its cookie."""
    sessions = _sessions(here.http)
    await run_sync(sessions.end, here.id)
    response = go(here.http, "/sign-in", done="out")
    sessions.remove(here.http, response)
    return response


@router.get(f"/{SHEET_NAME}")
def style() -> Response:
    """The one style sheet; its name changes with its content."""
    headers = {"cache-control": "public, max-age=31536000, immutable"}
    return Response(SHEET, media_type="text/css", headers=headers)


@router.get("/icon.svg")
def icon() -> Response:
    """What a browser's tab shows."""
    kept = {"cache-control": "public, max-age=86400"}
    return Response(ICON, media_type="image/svg+xml", headers=kept)


@router.get("/{rest:path}")
def nothing(here: Here) -> Response:
    """No page."""
    raise ApiError(404, "there is no such page", code="not_found")


def _form(http: Request, fault: str = "") -> Response:
    """The form for a key. Its token belongs to an id that is no session yet."""
    sessions = _sessions(http)
    id = sessions.id_of(http, "form") or secrets.token_urlsafe(32)
    values = {"fault": fault, "needs_key": sessions.needs_key(), "token": sessions.form_token(id)}
    response = page(http, "sign_in.html", 401 if fault else 200, **values)
    sessions.put(http, response, id, "form")
    return response


def _sessions(http: Request) -> Sessions:
    sessions: Sessions = http.app.state.sessions
    return sessions
