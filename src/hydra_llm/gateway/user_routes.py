"""The gateway's own endpoints: records, feedback, fits, export and deletion of users. What they do
is the store's and feedback.py's.
"""

import base64
import json
from functools import partial
from secrets import token_hex
from typing import Annotated, Any
from urllib.parse import unquote

import anyio
from fastapi import APIRouter, Path, Request, Response
from pydantic import BeforeValidator

from hydra_llm.errors import StoreError, UserFault
from hydra_llm.gateway.feedback import take_feedback
from hydra_llm.gateway.schemas import ApiError, FeedbackIn, Id, RecordIn, RecordsIn
from hydra_llm.gateway.telemetry import log
from hydra_llm.gateway.user_cache import texts_of
from hydra_llm.history import parse_time
from hydra_llm.store.store import Store
from hydra_llm.store.values import StaleVersion
from hydra_llm.text import text_fault
from hydra_llm.types import Record

TRIES = 8
IN_LOG = (
    "somebody reads SQLite's log, which still holds pages as they were: it is emptied within"
    " minutes of that reader's end"
)
router = APIRouter(prefix="/v1", tags=["users"])
Decoded = BeforeValidator(unquote)
User = Annotated[Id, Decoded, Path(description="The user's id, as the application names the user.")]
PathId = Annotated[Id, Decoded]


@router.post("/users/{user}/records")
async def add_records(user: User, sent: RecordsIn, http: Request) -> dict[str, int]:
    """Add records, and the user with them. Idempotent: the same id and content again change
    nothing.
    """
    store, settings = _store(http, user), http.app.state.gateway.settings
    if len(sent.records) > settings.max_records_per_request:
        raise ApiError(
            413, f"at most {settings.max_records_per_request} records a request", param="records"
        )
    records = [
        _record(user, place, each, settings.max_text) for place, each in enumerate(sent.records)
    ]
    added = await _in_thread(partial(_add, store, user, records, settings.max_records))
    if added.replaced:
        await _let_go(http, user)
        await _forget_texts(http, store, texts_of(added.replaced), but=None)
    if (prefetcher := http.app.state.gateway.deployment.prefetcher) is not None:
        prefetcher.begin(user)
    return {"added": added.added, "changed": added.changed, "unchanged": added.unchanged}


@router.get("/users/{user}/records")
async def get_records(user: User, http: Request) -> Response:
    """All records of a user, oldest first."""
    content = await _in_thread(partial(_listed, _store(http, user), user))
    if content is None:
        raise _unknown()
    return Response(content, media_type="application/json")


@router.delete("/users/{user}/records/{id:path}")
async def delete_record(user: User, id: PathId, http: Request) -> dict[str, Any]:
    """Delete one record, and the heads that knew it."""
    store = _store(http, user)
    gone = await _in_thread(partial(_remove, store, user, id))
    if gone is None:
        raise ApiError(404, "no such record", code="record_not_found")
    await _let_go(http, user)
    await _forget_texts(http, store, texts_of([gone]), but=None)
    return {"id": id, "deleted": True}


@router.post("/feedback")
async def feedback(said: FeedbackIn, http: Request) -> dict[str, Any]:
    """What the user made of an answer: it becomes a record where it tells what was wanted, and
    moves the user's head.
    """
    kind = said.kind()
    gateway = http.app.state.gateway
    request = await _in_thread(partial(gateway.store.request, said.request_id))
    caller = http.state.caller
    if request is None or not (caller.admin or request.user in caller.users):
        raise ApiError(
            404,
            "no such request, or it is too long ago",
            code="request_not_found",
            param="request_id",
        )
    taken = await take_feedback(gateway.store, gateway.deployment, said, request, gateway.settings)
    gateway.telemetry.feedback(kind)
    return {
        "request_id": said.request_id,
        "repeated": taken.repeated,
        "record": taken.record,
        "head_moved": taken.moved,
    }


@router.post("/users/{user}/fit", status_code=202)
async def fit(user: User, http: Request) -> dict[str, Any]:
    """Fit the user's heads on all records, as a job."""
    store = _store(http, user)
    if http.app.state.gateway.deployment.bundle is None:
        raise ApiError(409, "there is no bundle yet: learn one first", code="no_bundle")
    job = await _in_thread(partial(store.add_job, f"job_{token_hex(12)}", user, "fit"))
    if job is None:
        raise _unknown()
    http.app.state.worker.wake()
    return _job(job)


@router.get("/users/{user}/jobs/{id}")
async def job(user: User, id: PathId, http: Request) -> dict[str, Any]:
    """How far a job is: waiting, running, done or failed."""
    found = await _in_thread(partial(_store(http, user).job, id))
    if found is None or found.user != user:
        raise ApiError(404, "no such job", code="job_not_found")
    return _job(found)


@router.get("/users/{user}/export")
async def export(user: User, http: Request) -> Response:
    """All that is kept about a user, heads included, as one JSON file."""
    content = await _in_thread(partial(_exported, _store(http, user), user))
    if content is None:
        raise _unknown()
    return Response(
        content,
        media_type="application/json",
        headers={"content-disposition": 'attachment; filename="export.json"'},
    )


@router.delete("/users/{user}")
async def delete_user(user: User, http: Request) -> dict[str, Any]:
    """Delete everything about a user: records, heads, feedback, requests, features, keys that speak
    for nobody else.
    """
    gateway, store, features = http.app.state.gateway, _store(http, user), 0
    for _ in range(TRIES):
        version, texts = await _in_thread(partial(_texts, store, user))
        # First what cannot be undone halfway: if features cannot be deleted, the user is still
        # there to be deleted again.
        features += await _forget_texts(http, store, texts, but=user)
        try:
            counts = await _in_thread(partial(store.delete_user, user, version=version))
            break
        except StaleVersion:  # more has come: of that too no features may stay
            continue
    else:
        raise ApiError(
            409, "the user changes faster than it can be deleted: try again", code="busy"
        )
    await _let_go(http, user)
    features += await _forget_texts(http, store, texts, but=None)  # what was encoded meanwhile
    if counts is None:
        raise _unknown()
    taught = gateway.deployment.bundle.trained_on if gateway.deployment.bundle else ()
    report = {
        "deleted": {**counts, "features": features},
        "in_shared_base": user in taught or gateway.pseudonyms.hashed(user) in taught,
    }
    return report if await _in_thread(partial(_shortened, store)) else {**report, "warning": IN_LOG}


# ---- in threads


def _add(store: Store, user: str, records: list[Record], most: int) -> Any:
    with store.change(user, create=True) as change:
        if change.count_with(records) > most:
            raise ApiError(
                413, f"a user has at most {most} records: delete some first", param="records"
            )
        return change.add(records)


def _listed(store: Store, user: str) -> str | None:
    """Their JSON, made where it keeps nobody waiting: there may be many."""
    version, records = store.records(user)
    data = [{"id": r.id, "input": r.input, "output": r.output, "time": r.time} for r in records]
    return (
        None
        if version is None
        else json.dumps({"object": "list", "data": data}, ensure_ascii=False)
    )


def _exported(store: Store, user: str) -> str | None:
    found = store.export_user(user)
    return (
        None
        if found is None
        else json.dumps(
            found, ensure_ascii=False, default=lambda raw: base64.b64encode(raw).decode()
        )
    )


def _remove(store: Store, user: str, id: str) -> Record | None:
    version, records = store.records(user)
    found = next((record for record in records if record.id == id), None)
    if version is None or found is None:
        return None
    with store.change(user) as change:
        return found if change.remove(id) else None


def _texts(store: Store, user: str) -> tuple[int | None, list[str]]:
    """Every text of which there may be features, as of a version of the user."""
    version, records = store.records(user)
    kept = store.export_user(user) or {"requests": [], "feedback": []}
    of_requests = [
        text for row in kept["requests"] for text in (row["question"], *_said(row["content"]))
    ]
    groups = [row["content"]["group"] for row in kept["feedback"] if row["content"].get("group")]
    return version, [
        *texts_of(records),
        *of_requests,
        *(text for group in groups for text in (group["left"], *group["rights"])),
    ]


def _shortened(store: Store) -> bool:
    """Whether the store's log holds nothing any more of what was deleted; that it does is told, and
    undoes nothing.
    """
    try:
        done = store.truncate_log()
    except StoreError:
        done = False
    if not done:
        log.warning("after a deletion: %s", IN_LOG)
    return done


def _said(content: dict[str, Any]) -> list[str]:
    """What an LLM said to a kept request."""
    shown = [*content["candidates"], *content.get("repeats", ())]
    return [each[name] for each in shown for name in ("text", "said") if name in each]


async def _let_go(http: Request, user: str) -> None:
    """Drop what is in memory of a user; when this returns nothing more of it is encoded, and what
    the scoring thread had begun is done.
    """
    serving = http.app.state.gateway.deployment
    if serving.prefetcher is not None:
        await serving.prefetcher.stop(user)
    await serving.batcher.run(partial(serving.forget, user), must=True)


async def _forget_texts(http: Request, store: Store, texts: list[str], *, but: str | None) -> int:
    """As `Deployment.forget_texts`.

    Raises:
        ApiError: 503, they cannot be deleted.
    """
    serving = http.app.state.gateway.deployment
    try:
        forgotten: int = await _in_thread(partial(serving.forget_texts, store, texts, but=but))
        return forgotten
    except UserFault:
        raise ApiError(
            503,
            "the features of these texts cannot be deleted: nothing was, try again",
            code="features_unavailable",
        ) from None


# ---- small things


def _store(http: Request, user: str) -> Store:
    """The store, for a caller who may speak for the user.

    Raises:
        ApiError: 403.
    """
    http.state.caller.check(user)
    store: Store = http.app.state.gateway.store
    return store


def _record(user: str, place: int, sent: RecordIn, most: int) -> Record:
    for name in ("input", "output", "time", "id"):
        text = getattr(sent, name)
        fault = text_fault(text, may_be_empty=name == "time")
        if len(text) > most:
            fault = f"is longer than {most} characters"
        if fault:
            raise ApiError(
                400, f"records[{place}].{name} {fault}", param=f"records[{place}].{name}"
            )
    try:
        span = parse_time(sent.time)
    except ValueError as error:
        raise ApiError(
            400, f"records[{place}].time: {error}", param=f"records[{place}].time"
        ) from None
    return Record(user, sent.id, sent.input, sent.output, sent.time, span)


def _job(job: Any) -> dict[str, Any]:
    return {
        "id": job.id,
        "kind": job.kind,
        "state": job.state,
        "done": job.done,
        "total": job.total,
        "error": job.error or None,
    }


def _unknown() -> ApiError:
    return ApiError(404, "no such user", code="user_not_found")


async def _in_thread(function: Any) -> Any:
    return await anyio.to_thread.run_sync(function)
