"""Endpoints about users: answers, feedback, fits, export and deletion. Those that only use the
store are no coroutines: FastAPI runs them in threads.
"""

import re
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from secrets import token_hex
from typing import Annotated, Any
from urllib.parse import unquote

from anyio.to_thread import run_sync
from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from hydra_llm.errors import HydraError, StoreError, UserFault
from hydra_llm.gateway import user_data
from hydra_llm.gateway.audit import allow
from hydra_llm.gateway.auth import Caller, pseudonym
from hydra_llm.gateway.feedback import take_feedback
from hydra_llm.gateway.gateway import Gateway
from hydra_llm.gateway.profile import describe, in_words, leanings
from hydra_llm.gateway.schemas import MAX_ID, ApiError, FeedbackIn, Id, Json, SwitchIn, id_fault
from hydra_llm.gateway.spend_limits import admit
from hydra_llm.gateway.telemetry import log
from hydra_llm.store.change import StaleVersion
from hydra_llm.store.values import Job
from hydra_llm.store.values import Request as AnsweredRequest

LOG_IN_USE = (
    "somebody reads SQLite's log, which still holds pages as they were: it is emptied within"
    " minutes of that reader's end"
)
ANSWER_ID = re.compile(r"^(?:chatcmpl-|resp_|msg_)")  # what stands before the request's id
router = APIRouter(prefix="/v1", tags=["users"])


def _decoded(raw: str) -> str:
    """A part of a path; replacing what is not UTF-8 would make two users one."""
    try:
        return unquote(raw, errors="strict")
    except UnicodeDecodeError:
        raise PydanticCustomError("not_utf8", "is not UTF-8") from None


Decoded = BeforeValidator(_decoded)
User = Annotated[Id, Decoded, Path(description="The user's id, as the application names the user.")]
PathId = Annotated[Id, Decoded]


@router.get("/users/{user}/requests")
def list_requests(
    user: User, http: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> Response:
    """The latest answered requests, newest first: the id for feedback, the question, and the
    candidates, best first.
    """
    return Json({"object": "list", "data": answered_requests(user, http, limit)})


def answered_requests(user: str, http: Request, limit: int) -> list[dict[str, Any]]:
    """A user's latest requests as replies show them; `ApiError` 404 for an unknown user."""
    store = allow(http, user, "read", "requests").store
    if store.state(user).version is None:
        raise no_such_user()
    return [_answered(request) for request in store.latest_requests(user, limit)]


@router.post("/feedback")
async def feedback(sent: FeedbackIn, http: Request) -> dict[str, Any]:
    """Feedback on an answer: a wanted answer becomes a record and moves the head. Of several on one
    answer the last one stands.
    """
    kind, gateway, caller = sent.kind(), allow(http, None, "write"), http.state.caller
    id = ANSWER_ID.sub("", sent.request_id)
    request = await run_sync(gateway.store.request, id)
    if request is None or not (caller.admin or request.user in caller.users):
        message = "no such request: its answer was not personal, or it is too long ago"
        raise ApiError(404, message, code="request_not_found", param="request_id")
    outcome = await take_feedback(gateway, sent, request)
    gateway.telemetry.feedback.labels(kind).inc()
    return {"request_id": sent.request_id, **outcome}


@router.post("/users/{user}/fit", status_code=202)
async def fit(user: User, http: Request) -> dict[str, Any]:
    """Fit the user's heads on all records, as a job."""
    gateway = allow(http, user, "write")
    if gateway.deployment.bundle is None:
        raise ApiError(409, "there is no bundle yet: learn one first", code="no_bundle")
    await admit(http, user)  # the LLM may have to label candidates
    id = f"job_{token_hex(12)}"
    job = await run_sync(gateway.store.add_job, id, user, "fit")
    if job is None:
        raise no_such_user()
    http.app.state.worker.wake.set()
    return _job_json(job)


@router.get("/users/{user}/jobs/{id}")
def job(user: User, id: PathId, http: Request) -> dict[str, Any]:
    """How far a job is: waiting, running, done or failed."""
    job = allow(http, user, "write").store.job(user, id)
    if job is None:
        raise ApiError(404, "no such job", code="job_not_found")
    return _job_json(job)


@router.put("/users/{user}/personalization")
async def switch(user: User, sent: SwitchIn, http: Request) -> dict[str, Any]:
    """Switch personal answers of a user off, or on again. Nothing is deleted."""
    gateway = allow(http, user, "write")

    def write() -> None:
        with gateway.store.change(user, create=True) as change:
            change.switch(off=not sent.enabled)

    await run_sync(write)
    return {"user": user, "enabled": sent.enabled}


@router.get("/users")
def list_users(
    http: Request,
    after: str = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    contains: Annotated[str, Query(max_length=MAX_ID)] = "",
) -> dict[str, Any]:
    """Users by id with counts of what is kept; `after` is the last id of the page before. A key
    sees the users for whom it may speak.
    """
    for name, part in (("after", after), ("contains", contains)):
        if part and (fault := id_fault(part)):
            raise ApiError(400, f"{name}: {fault}", param=name)
    caller: Caller = http.state.caller
    names = None if caller.admin else caller.users
    store = allow(http, None, "read", "users").store
    page = store.user_counts(after=after, limit=limit + 1, names=names, contains=contains)
    data = [asdict(counts) for counts in page[:limit]]
    return {"object": "list", "data": data, "has_more": len(page) > limit}


@router.get("/users/{user}")
async def show_user(user: User, http: Request) -> dict[str, Any]:
    """A user in words: counts, how the user answers, what was learned, the records most used."""
    gateway = allow(http, user, "read", "profile")
    kept = await run_sync(gateway.store.export_user, user)
    if kept is None:
        raise no_such_user()
    _, records = await run_sync(gateway.store.records, user)
    bundle, learned = gateway.deployment.bundle, dict[str, Any]()
    if bundle is not None:
        with suppress(HydraError):  # this bundle is not in use any more
            of = partial(leanings, kept, records, bundle)
            learned = await gateway.deployment.batcher.run(of, user=user, idle=True)
    task = bundle.task if bundle else None
    profile = await run_sync(describe, kept, records, learned, task)
    return {**profile, "text": "\n".join(in_words(profile))}


@router.get("/users/{user}/export")
def export(user: User, http: Request) -> Response:
    """All that is kept about a user, heads included, as one JSON file."""
    kept = allow(http, user, "read", "export").store.export_user(user)
    if kept is None:
        raise no_such_user()
    content = user_data.as_json(kept)
    as_file = {"content-disposition": 'attachment; filename="export.json"'}
    return Response(content, media_type="application/json", headers=as_file)


@router.delete("/users/{user}")
async def delete_user(user: User, http: Request) -> dict[str, Any]:
    """Delete everything about a user: records, heads, feedback, requests, features, keys for this
    user only.
    """
    gateway = allow(http, user, "delete", "user")

    def forget(texts: list[str], but: str | None) -> int:
        return gateway.deployment.forget_texts(texts, but=but)

    try:
        counts, texts = await run_sync(user_data.delete_user, gateway.store, user, forget)
    except StaleVersion as error:
        raise ApiError(409, str(error), code="busy") from None
    except UserFault:
        raise _features_unavailable() from None
    await gateway.deployment.forget(user)
    features = await forget_texts(gateway, texts)  # what was encoded meanwhile
    if counts is None:
        raise no_such_user()
    counts["features"] += features
    bundle = gateway.deployment.bundle
    names = {user, pseudonym(gateway.salt, user)}
    in_base = bundle is not None and not names.isdisjoint(bundle.trained_on)
    report = {"deleted": counts, "in_shared_base": in_base}
    emptied = False
    with suppress(StoreError):
        emptied = await run_sync(gateway.store.erase)
    if not emptied:
        log.warning("after a deletion: %s", LOG_IN_USE)
        report["warning"] = LOG_IN_USE
    return report


async def forget_texts(gateway: Gateway, texts: list[str]) -> int:
    """As `Deployment.forget_texts`, but `ApiError` 503 where they cannot be deleted."""
    try:
        return await run_sync(gateway.deployment.forget_texts, texts)
    except UserFault:
        raise _features_unavailable() from None


def _features_unavailable() -> ApiError:
    message = "the features of these texts cannot be deleted: nothing was, try again"
    return ApiError(503, message, code="features_unavailable")


def no_such_user() -> ApiError:
    """What a caller is told who names an unknown user."""
    return ApiError(404, "no such user", code="user_not_found")


def _answered(request: AnsweredRequest) -> dict[str, Any]:
    time = datetime.fromtimestamp(request.created, UTC).isoformat(timespec="seconds")
    texts = [own.get("said", own["text"]) for own in request.content["candidates"]]
    return {"id": request.id, "time": time, "question": request.question, "candidates": texts}


def _job_json(job: Job) -> dict[str, Any]:
    names = ("id", "kind", "state", "done", "total")
    return {name: getattr(job, name) for name in names} | {"error": job.error or None}
