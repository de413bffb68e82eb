"""The gateway's own endpoints: records, feedback, fits, export and deletion of users. Those that
only use the store are no coroutines: FastAPI runs them in threads.
"""

import json
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
from hydra_llm.gateway.auth import Caller, pseudonym
from hydra_llm.gateway.feedback import take_feedback
from hydra_llm.gateway.gateway import Gateway
from hydra_llm.gateway.profile import describe, in_words, leanings
from hydra_llm.gateway.routed import NotPersonal
from hydra_llm.gateway.schemas import (
    MAX_ID,
    ApiError,
    FeedbackIn,
    Id,
    Json,
    PersonalizationOptions,
    RecordIn,
    RecordsIn,
    SearchIn,
    SwitchIn,
    id_fault,
)
from hydra_llm.gateway.spend_limits import admit
from hydra_llm.gateway.telemetry import log
from hydra_llm.gateway.user_cache import texts_of
from hydra_llm.history import parse_time
from hydra_llm.store.change import FEEDBACK_ID, StaleVersion
from hydra_llm.store.store import Store
from hydra_llm.store.values import Added, Job
from hydra_llm.store.values import Request as AnsweredRequest
from hydra_llm.text import repair, text_fault
from hydra_llm.types import Record

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


@router.post("/users/{user}/records")
async def add_records(user: User, sent: RecordsIn, http: Request) -> dict[str, Any]:
    """Add records, and the user with them. Idempotent. `unreadable` counts those that the bundle in
    use cannot read: they are kept, for another one.
    """
    gateway = _gateway(http, user)
    settings, most = gateway.settings, gateway.settings.max_records_per_request
    if len(sent.records) > most:
        raise ApiError(413, f"at most {most} records a request", param="records")
    records = [
        _record(user, f"records[{place}]", record, settings.max_text)
        for place, record in enumerate(sent.records)
    ]

    def add() -> Added:
        with gateway.store.change(user, create=True) as change:
            if change.count_with(records) > settings.max_records:
                message = f"a user has at most {settings.max_records} records: delete some first"
                raise ApiError(413, message, param="records")
            return change.add(records)

    added = await run_sync(add)
    if added.replaced:
        await gateway.deployment.forget(user)
        await _forget_texts(gateway, texts_of(added.replaced))
    gateway.deployment.prefetch(user)
    counts = {"added": added.added, "changed": added.changed, "unchanged": added.unchanged}
    return counts | _unreadable(gateway, records)


def _unreadable(gateway: Gateway, records: list[Record]) -> dict[str, Any]:
    """How many of the records no answer will use, and why; nothing if there are none."""
    count = len(records) - len(gateway.deployment.readable(records))
    if not count:
        return {}
    labels = gateway.deployment.pipeline.task.labels
    named = ", ".join(labels[:10]) + ", ..." * (len(labels) > 10)
    why = f"{count} of {len(records)} outputs are none of the bundle's labels ({named})"
    return {
        "unreadable": count,
        "warning": f"{why}: these records are kept, but no answer uses them",
    }


@router.get("/users/{user}/records")
def get_records(user: User, http: Request) -> Response:
    """All records of a user, oldest first."""
    data = {"object": "list", "data": listed_records(user, http)}
    return Response(json.dumps(data, ensure_ascii=False), media_type="application/json")


def listed_records(user: str, http: Request) -> list[dict[str, str]]:
    """A user's records as replies show them, oldest first; `ApiError` 404 for an unknown user."""
    version, records = _gateway(http, user).store.records(user)
    if version is None:
        raise _no_such_user()
    return list(map(_shown, records))


@router.post("/users/{user}/search")
async def search(user: User, sent: SearchIn, http: Request) -> dict[str, Any]:
    """The records that fit a question best, in the order in which its answer would use them."""
    gateway, records = _gateway(http, user), list[Record]()
    options = PersonalizationOptions(k=sent.limit, gate=False)
    try:
        found = await gateway.search(gateway.deployment, user, repair(sent.query), options)
        records = [item.record for item in found.ranked[: sent.limit]]
    except NotPersonal as error:
        reason = str(error)
        if reason == "unknown-user":
            raise _no_such_user() from None
        if reason != "no-history":
            raise ApiError(503, f"the search failed: {reason}", code=reason) from None
    return {"object": "list", "data": list(map(_shown, records))}


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
    store = _gateway(http, user).store
    if store.state(user).version is None:
        raise _no_such_user()
    return [_answered(request) for request in store.latest_requests(user, limit)]


@router.delete("/users/{user}/records/{id:path}")
async def delete_record(user: User, id: PathId, http: Request) -> dict[str, Any]:
    """Delete one record, and the heads that knew it."""
    gateway = _gateway(http, user)

    def remove() -> list[Record]:
        removed = [record for record in gateway.store.records(user)[1] if record.id == id]
        if removed:
            with gateway.store.change(user) as change:
                return removed if change.remove(id) else []
        return removed

    removed = await run_sync(remove)
    if not removed:
        raise ApiError(404, "no such record", code="record_not_found")
    await gateway.deployment.forget(user)
    await _forget_texts(gateway, texts_of(removed))
    return {"id": id, "deleted": True}


@router.post("/feedback")
async def feedback(sent: FeedbackIn, http: Request) -> dict[str, Any]:
    """Feedback on an answer: a wanted answer becomes a record and moves the head. Of several on one
    answer the last one stands.
    """
    kind, gateway, caller = sent.kind(), http.app.state.gateway, http.state.caller
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
    gateway = _gateway(http, user)
    if gateway.deployment.bundle is None:
        raise ApiError(409, "there is no bundle yet: learn one first", code="no_bundle")
    await admit(http, user)  # the LLM may have to label candidates
    id = f"job_{token_hex(12)}"
    job = await run_sync(gateway.store.add_job, id, user, "fit")
    if job is None:
        raise _no_such_user()
    http.app.state.worker.wake.set()
    return _job_json(job)


@router.get("/users/{user}/jobs/{id}")
def job(user: User, id: PathId, http: Request) -> dict[str, Any]:
    """How far a job is: waiting, running, done or failed."""
    job = _gateway(http, user).store.job(user, id)
    if job is None:
        raise ApiError(404, "no such job", code="job_not_found")
    return _job_json(job)


@router.put("/users/{user}/personalization")
async def switch(user: User, sent: SwitchIn, http: Request) -> dict[str, Any]:
    """Switch personal answers of a user off, or on again. Nothing is deleted."""
    gateway = _gateway(http, user)

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
    store: Store = http.app.state.gateway.store
    page = store.user_counts(after=after, limit=limit + 1, names=names, contains=contains)
    data = [asdict(counts) for counts in page[:limit]]
    return {"object": "list", "data": data, "has_more": len(page) > limit}


@router.get("/users/{user}")
async def show_user(user: User, http: Request) -> dict[str, Any]:
    """A user in words: counts, how the user answers, what was learned, the records most used."""
    gateway = _gateway(http, user)
    kept = await run_sync(gateway.store.export_user, user)
    if kept is None:
        raise _no_such_user()
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
    kept = _gateway(http, user).store.export_user(user)
    if kept is None:
        raise _no_such_user()
    content = user_data.as_json(kept)
    as_file = {"content-disposition": 'attachment; filename="export.json"'}
    return Response(content, media_type="application/json", headers=as_file)


@router.delete("/users/{user}")
async def delete_user(user: User, http: Request) -> dict[str, Any]:
    """Delete everything about a user: records, heads, feedback, requests, features, keys for this
    user only.
    """
    gateway = _gateway(http, user)

    def forget(texts: list[str], but: str | None) -> int:
        return gateway.deployment.forget_texts(texts, but=but)

    try:
        counts, texts = await run_sync(user_data.delete_user, gateway.store, user, forget)
    except StaleVersion as error:
        raise ApiError(409, str(error), code="busy") from None
    except UserFault:
        raise _features_unavailable() from None
    await gateway.deployment.forget(user)
    features = await _forget_texts(gateway, texts)  # what was encoded meanwhile
    if counts is None:
        raise _no_such_user()
    counts["features"] += features
    bundle = gateway.deployment.bundle
    names = {user, pseudonym(gateway.salt, user)}
    in_base = bundle is not None and not names.isdisjoint(bundle.trained_on)
    report = {"deleted": counts, "in_shared_base": in_base}
    emptied = False
    with suppress(StoreError):
        emptied = await run_sync(gateway.store.truncate_log)
    if not emptied:
        log.warning("after a deletion: %s", LOG_IN_USE)
        report["warning"] = LOG_IN_USE
    return report


async def _forget_texts(gateway: Gateway, texts: list[str]) -> int:
    """As `Deployment.forget_texts`, but `ApiError` 503 where they cannot be deleted."""
    try:
        return await run_sync(gateway.deployment.forget_texts, texts)
    except UserFault:
        raise _features_unavailable() from None


def _features_unavailable() -> ApiError:
    message = "the features of these texts cannot be deleted: nothing was, try again"
    return ApiError(503, message, code="features_unavailable")


def _gateway(http: Request, user: str) -> Gateway:
    """The gateway, for a caller who may speak for the user; else `ApiError` 403."""
    http.state.caller.check(user)
    gateway: Gateway = http.app.state.gateway
    return gateway


def _no_such_user() -> ApiError:
    return ApiError(404, "no such user", code="user_not_found")


def _record(user: str, place: str, sent: RecordIn, max_text: int) -> Record:
    for name in ("input", "output", "time", "id"):
        text = getattr(sent, name)
        fault = text_fault(text, may_be_empty=name == "time")
        if len(text) > max_text:
            fault = f"is longer than {max_text} characters"
        if fault:
            raise ApiError(400, f"{place}.{name} {fault}", param=f"{place}.{name}")
    if sent.id.startswith(FEEDBACK_ID):  # its deletion deletes the feedback too
        message = f"begins with '{FEEDBACK_ID}', as records made of feedback do: choose another"
        raise ApiError(400, f"{place}.id {message}", param=f"{place}.id")
    try:
        span = parse_time(sent.time)
    except ValueError as error:
        raise ApiError(400, f"{place}.time: {error}", param=f"{place}.time") from None
    return Record(user, sent.id, sent.input, sent.output, sent.time, span)


def _shown(record: Record) -> dict[str, str]:
    return {name: getattr(record, name) for name in ("id", "input", "output", "time")}


def _answered(request: AnsweredRequest) -> dict[str, Any]:
    time = datetime.fromtimestamp(request.created, UTC).isoformat(timespec="seconds")
    texts = [own.get("said", own["text"]) for own in request.content["candidates"]]
    return {"id": request.id, "time": time, "question": request.question, "candidates": texts}


def _job_json(job: Job) -> dict[str, Any]:
    names = ("id", "kind", "state", "done", "total")
    return {name: getattr(job, name) for name in names} | {"error": job.error or None}
