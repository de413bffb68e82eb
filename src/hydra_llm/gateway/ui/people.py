"""The pages about one user: what is known, records, answers with their reasons, export, deletion.
Each form calls an endpoint's function (record_routes.py, user_routes.py); so checks and limits are
the same.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from secrets import token_hex
from typing import Annotated, Any, TypeVar

from anyio.to_thread import run_sync
from fastapi import Query, Response
from pydantic import BaseModel, ValidationError

from hydra_llm.gateway import record_routes, user_routes
from hydra_llm.gateway.audit import allow
from hydra_llm.gateway.middleware import DASHBOARD
from hydra_llm.gateway.record_routes import shown_records
from hydra_llm.gateway.schemas import (
    MAX_NUMBER,
    ApiError,
    FeedbackIn,
    RecordIn,
    RecordsIn,
    SearchIn,
    SwitchIn,
    id_fault,
)
from hydra_llm.gateway.ui.pages import Form, Here, Visit, go, make_router, one_break, show
from hydra_llm.gateway.ui.words import CORRECTIONS, UNSCORED
from hydra_llm.reasons import in_words
from hydra_llm.store.change import FEEDBACK_ID
from hydra_llm.store.store import Store
from hydra_llm.store.values import Request as AnsweredRequest
from hydra_llm.types import Record

PAGE = 20  # records and answers on a page
FOUND = 20  # records that a search shows

M = TypeVar("M", bound=BaseModel)
Position = Annotated[int | None, Query(ge=0, le=MAX_NUMBER)]
router = make_router()


@router.get("")
@router.get("/")
def home(here: Here) -> Response:
    """Where somebody begins: an administrator with all, a user with what is known."""
    if here.caller.admin:
        return go(here.http, "/activity")
    return go(here.http, "/user" if len(here.caller.users) == 1 else "/users")


# ---- what is known


@router.get("/user")
async def user_page(here: Here) -> Response:
    """What is known about a user."""
    user, profile = here.user, dict[str, Any]()
    with _unknown_is_empty():
        profile = await user_routes.show_user(user, here.http)
    off = await run_sync(_store(here).is_off, user)
    bundle = here.http.app.state.gateway.deployment.bundle
    values = {"profile": profile, "off": off, "learns": bundle is not None}
    return await run_sync(partial(show, here, "user.html", user=user, **values))


@router.post("/user/switch")
async def switch(here: Here, form: Form) -> Response:
    """Switch personal answers off or on."""
    on = form.get("enabled") == "yes"
    await user_routes.switch(here.user, SwitchIn(enabled=on), here.http)
    return go(here.http, "/user", user=here.user, done="on" if on else "off")


@router.post("/user/fit")
async def fit(here: Here, form: Form) -> Response:
    """Fit the heads on all records."""
    await user_routes.fit(here.user, here.http)
    return go(here.http, "/user", user=here.user, done="fit")


# ---- records


@router.get("/records")
async def records_page(here: Here, before: Position = None, q: str = "") -> Response:
    """A user's records, the latest added first, or those that fit some words best."""
    user, more = here.user, None
    if q.strip():
        records = list[dict[str, Any]]()
        with _unknown_is_empty():
            sent = valid(SearchIn, query=q, limit=FOUND)
            records = (await record_routes.search(user, sent, here.http))["data"]
    else:
        read = partial(_store(here).record_page, user, before=before, limit=PAGE + 1)
        page, off = await run_sync(read), await run_sync(_store(here).off_records, user)
        records = shown_records([record for _, record in page[:PAGE]], off)
        more = page[PAGE - 1][0] if len(page) > PAGE else None
    values = {"records": records, "more": more, "q": q, "first": before is None}
    return show(here, "records.html", user=user, **values)


@router.get("/records/new")
def new_record(here: Here) -> Response:
    """The form of a new record."""
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    record = {"id": "", "input": "", "output": "", "time": today}
    return show(here, "record.html", user=here.user, record=record, fault="")


@router.get("/records/edit")
def edit_record(here: Here, id: str) -> Response:
    """The form of a record that is there."""
    record = _record(here, id)
    of, made = id.removeprefix(FEEDBACK_ID), id.startswith(FEEDBACK_ID)
    if made and _store(here).request(of):  # it changes with the feedback of which it was made
        return go(here.http, "/answer", user=here.user, id=of)
    return show(here, "record.html", user=here.user, record=record, fault="")


@router.post("/records/save")
async def save_record(here: Here, form: Form) -> Response:
    """Add a record, or change the one of its id."""
    user, given = here.user, {name: form.get(name, "") for name in ("input", "output", "time")}
    id = form.get("id", "")
    known = {} if id_fault(id) else await run_sync(_store(here).some_records, user, [id])
    for record in known.values():
        given = {name: _as_kept(text, getattr(record, name)) for name, text in given.items()}
    try:
        sent = valid(RecordIn, id=id or f"own-{token_hex(8)}", **given)
        added = Record(user, sent.id, str(sent.input), sent.output)
        same = await run_sync(_store(here).same_record, user, added)
        if same and not id:
            return go(here.http, "/records", user=user, done="unchanged")
        counts = await record_routes.add_records(user, RecordsIn(records=[sent]), here.http)
    except ApiError as error:
        if error.status not in (400, 413):
            raise
        fault = str(error).removeprefix("records[0].")
        values = {"record": {"id": id, **given}, "fault": fault}
        return show(here, "record.html", error.status, user=user, **values)
    done = next((what for what in ("added", "changed") if counts[what]), "unchanged")
    return go(here.http, "/records", user=user, done=done)


@router.post("/records/switch")
async def switch_record(here: Here, form: Form) -> Response:
    """Keep a record out of answers, or use it again."""
    on = form.get("enabled") == "yes"
    await record_routes.switch_record(
        here.user, form.get("id", ""), SwitchIn(enabled=on), here.http
    )
    return go(here.http, "/records", user=here.user, done="record-on" if on else "record-off")


@router.get("/records/delete")
def ask_to_delete_record(here: Here, id: str) -> Response:
    """Whether a record is to be deleted."""
    return show(here, "record_delete.html", user=here.user, record=_record(here, id))


@router.post("/records/delete")
async def delete_record(here: Here, form: Form) -> Response:
    """Delete a record."""
    await record_routes.delete_record(here.user, form.get("id", ""), here.http)
    return go(here.http, "/records", user=here.user, done="deleted")


# ---- answers


@router.get("/answers")
def answers_page(here: Here, before: str = "") -> Response:
    """A user's latest personal answers."""
    created, _, id = before.partition("_")
    try:
        place = (float(created), id) if id and not id_fault(id) else None
    except ValueError:
        place = None
    page = _store(here).latest_requests(here.user, PAGE + 1, before=place)
    shown = [_answer(request) for request in page[:PAGE]]
    more = f"{shown[-1]['created']!r}_{shown[-1]['id']}" if len(page) > PAGE else None
    days = here.http.app.state.gateway.settings.retention_days
    values = {"answers": shown, "more": more, "first": place is None, "days": days}
    return show(here, "answers.html", user=here.user, **values)


@router.get("/answer")
def answer_page(here: Here, id: str) -> Response:
    """One answer: candidates, records in the prompt, and why it was picked."""
    return _answer_page(here, id)


@router.post("/answer")
async def correct(here: Here, form: Form) -> Response:
    """Say what was wanted in place of an answer: feedback, as the API takes it."""
    id, kind = form.get("id", ""), form.get("kind", "")
    # of this page's user, whoever else the key may speak for
    request = await run_sync(_request, here, id)
    given: dict[str, Any] = {"request_id": id}
    try:
        if kind == "edited":
            texts = [own["text"] for own in _answer(request)["candidates"]]
            given["edited"] = _as_kept(form.get("edited", ""), *texts[:1])
        elif kind == "chosen":
            given["chosen"] = int(form.get("chosen", "0"))
        elif kind == "rejected":
            given["rejected"] = True
        outcome = await user_routes.feedback(valid(FeedbackIn, **given), here.http)
    except (ApiError, ValueError) as error:
        if isinstance(error, ApiError) and error.status != 400:
            raise
        return await run_sync(_answer_page, here, id, f"Choose or write an answer: {error}")
    done = "repeated" if outcome["repeated"] else "corrected"
    return go(here.http, "/answer", user=here.user, id=id, done=done)


def _answer_page(here: Visit, id: str, fault: str = "") -> Response:
    request, store = _request(here, id), _store(here)
    content = request.content
    answer = _answer(request)
    ids = content.get("records", [])
    known = store.some_records(here.user, ids)
    given = store.unlearned_feedback(here.user, or_learned=True)
    said: Mapping[str, Any] = next((own.content["said"] for own in given if own.request == id), {})
    correction = next((CORRECTIONS[kind] for kind in CORRECTIONS if kind in said), "")
    values = {"answer": answer, "records": [(own, known.get(own)) for own in ids], "fault": fault}
    values |= {"correction": correction, "visible": content.get("visible")}
    return show(here, "answer.html", 400 if fault else 200, user=here.user, **values)


# ---- everything


@router.get("/export")
def export(here: Here) -> Response:
    """All that is kept about a user, as a file."""
    return user_routes.export(here.user, here.http)


@router.get("/delete")
def ask_to_delete(here: Here) -> Response:
    """Whether everything about a user is to be deleted."""
    return _ask_to_delete(here)


@router.post("/delete")
async def delete(here: Here, form: Form) -> Response:
    """Delete everything about a user, if the id was written to confirm it."""
    user = here.user
    if form.get("confirm", "").strip() != user.strip():
        fault = "Write the id exactly as it is shown: nothing was deleted."
        return await run_sync(_ask_to_delete, here, fault)
    report = await user_routes.delete_user(user, here.http)
    return show(here, "deleted.html", gone=user, report=report)


def _ask_to_delete(here: Visit, fault: str = "") -> Response:
    (counts,) = _store(here).user_counts(names=[here.user]) or (None,)
    own = not here.caller.admin and here.caller.users == (here.user,)
    values = {"counts": counts, "fault": fault, "ends": own}
    return show(here, "delete.html", 400 if fault else 200, user=here.user, **values)


# ---- what the pages are made of


def _store(here: Visit) -> Store:
    """The store, for a caller who may read what is kept of the page's user."""
    page = here.http.scope["route"].path.removeprefix(DASHBOARD)
    return allow(here.http, here.user, "read", f"page {page}").store


def _record(here: Visit, id: str) -> dict[str, Any]:
    known = {} if id_fault(id) else _store(here).some_records(here.user, [id])
    if (record := known.get(id)) is None:
        raise ApiError(404, "there is no such record: it may have been deleted")
    return shown_records([record])[0]


def _as_kept(text: str, *kept: str) -> str:
    """A form's text, or the kept one that the form showed, if it is the same but for line breaks:
    of these a form has one kind only.
    """
    return next((own for own in kept if one_break(own) == one_break(text)), text)


def _request(here: Visit, id: str) -> AnsweredRequest:
    """An answered request of the page's user; else `ApiError` 404."""
    request = None if id_fault(id) else _store(here).request(id)
    if request is None or request.user != here.user:
        raise ApiError(404, "there is no such answer: it was deleted, or is too long ago")
    return request


def _answer(request: AnsweredRequest) -> dict[str, Any]:
    """An answer as pages show it; what an earlier version has not kept is None."""
    content, candidates = request.content, list[dict[str, Any]]()
    for own in content["candidates"]:
        names = ("votes", "greedy", "score", "probability")
        kept = {name: own.get(name) for name in names}
        candidates.append({"text": own.get("said") or own["text"], **kept})
    about = {"id": request.id, "created": request.created, "question": request.question}
    reasons = content.get("why") or {}
    parts = in_words(reasons.get("parts", {}))
    return {**about, "candidates": candidates, "why": _why(content), "parts": parts}


def _why(content: Mapping[str, Any]) -> str:
    """Why the first candidate was the answer, in one line."""
    candidates = content["candidates"]
    scores = [own.get("score") for own in candidates]
    if reason := content.get("unscored"):
        return f"Not chosen by the model: {UNSCORED.get(reason, reason)}."
    if len(candidates) < 2:
        return "All of the LLM's answers were the same."
    if scores[0] is None:  # the unreadable ones have none
        return "The candidates have no scores: it was the LLM's first answer."
    of = f"{sum(score is not None for score in scores)} candidates"
    if content.get("abstained"):
        return f"The LLM's own answer was kept: of {of} no other was better by a clear margin."
    return f"Of {of} this one fits the user best, by the scores below."


def valid(kind: type[M], **given: Any) -> M:
    """A body of an endpoint; what it refuses is raised as its caller is told."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ApiError(400, f"{place} {first['msg'].lower()}", param=place) from None


@contextmanager
def _unknown_is_empty() -> Iterator[None]:
    """A user of whom nothing is kept is shown as one with nothing."""
    try:
        yield
    except ApiError as error:
        if error.code != "user_not_found":
            raise
