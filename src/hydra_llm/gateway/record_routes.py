"""Endpoints about a user's records: add, list, search, switch off, delete."""

import json
from collections.abc import Collection, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response

from hydra_llm.gateway.audit import allow
from hydra_llm.gateway.gateway import Gateway
from hydra_llm.gateway.pictures import all_of
from hydra_llm.gateway.routed import NotPersonal
from hydra_llm.gateway.schemas import (
    ApiError,
    PersonalizationOptions,
    RecordIn,
    RecordsIn,
    SearchIn,
    SwitchIn,
)
from hydra_llm.gateway.spend_limits import admit
from hydra_llm.gateway.user_cache import texts_of
from hydra_llm.gateway.user_routes import PathId, User, forget_texts, no_such_user
from hydra_llm.history import parse_time
from hydra_llm.store.change import FEEDBACK_ID, NoSuchUser, UserChange
from hydra_llm.store.values import Added
from hydra_llm.text import repair, text_fault
from hydra_llm.types import Record

router = APIRouter(prefix="/v1", tags=["users"])


@router.post("/users/{user}/records")
async def add_records(user: User, sent: RecordsIn, http: Request) -> dict[str, Any]:
    """Add records, and the user with them. Idempotent. `unreadable` counts those that the bundle in
    use cannot read: they are kept, for another one.
    """
    gateway = allow(http, user, "write")
    settings, most = gateway.settings, gateway.settings.max_records_per_request
    if len(sent.records) > most:
        raise ApiError(413, f"at most {most} records a request", param="records")
    if not all(isinstance(own.input, str) for own in sent.records):
        await admit(http, user)  # an LLM describes the pictures
    lines = list[str]()  # of pictures
    try:
        in_words = [partial(_in_words, gateway, lines, *own) for own in enumerate(sent.records)]
        records = [
            _record(user, f"records[{place}]", record, settings.max_text)
            for place, record in enumerate(await all_of(in_words))
        ]
        added, switched = await run_sync(_add, gateway, user, sent, records)
    except Exception:
        if lines:  # no deletion would find what is in no record
            await forget_texts(gateway, lines)
        raise
    if added.replaced or switched:
        await gateway.deployment.forget(user)
        await forget_texts(gateway, texts_of(added.replaced))
    gateway.deployment.prefetch(user)
    counts = {"added": added.added, "changed": added.changed, "unchanged": added.unchanged}
    return counts | _unreadable(gateway, records)


async def _in_words(gateway: Gateway, lines: list[str], place: int, sent: RecordIn) -> RecordIn:
    """The record with its pictures described; `lines` gets what is kept of them."""
    if isinstance(sent.input, str):
        return sent
    name = f"records[{place}].input"
    if gateway.pictures is None:
        fix = "give this server the setting `vision`"
        raise ApiError(400, f"{name}: must be a text, as nothing describes pictures: {fix}")
    if gateway.deployment.private:
        why = "private mode shows no record to an LLM, and so none its pictures"
        raise ApiError(400, f"{name}: must be a text: {why}", code="private")
    text = await gateway.pictures.in_words(name, sent.input, lines)
    return sent.model_copy(update={"input": text})


def _add(gateway: Gateway, user: str, sent: RecordsIn, records: list[Record]) -> tuple[Added, bool]:
    """What became of the records, and whether any was switched off or on."""
    most = gateway.settings.max_records
    with gateway.store.change(user, create=True) as change:
        if change.count_with(records) > most:
            message = f"a user has at most {most} records: delete some first"
            raise ApiError(413, message, param="records")
        _check_made(change, records)
        added = change.add(records)
        change.forget_feedback(record.id for record in added.replaced)
        given = [(own.id, not own.enabled) for own in sent.records if own.enabled is not None]
        switched = [change.switch_record(id, off=off) for id, off in given]
    return added, any(switched)


def _check_made(change: UserChange, records: list[Record]) -> None:
    """Those made of feedback can be changed, not added: their deletion deletes the feedback too."""
    new = change.unknown(own.id for own in records if own.id.startswith(FEEDBACK_ID))
    for place, record in enumerate(records):
        if record.id in new:
            fault = f"begins with '{FEEDBACK_ID}', as records made of feedback do: choose another"
            where = f"records[{place}].id"
            raise ApiError(400, f"{where} {fault}", param=where)


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


def listed_records(user: str, http: Request) -> list[dict[str, Any]]:
    """A user's records as replies show them, oldest first; `ApiError` 404 for an unknown user."""
    store = allow(http, user, "read", "records").store
    version, records = store.records(user, off_too=True)
    if version is None:
        raise no_such_user()
    return shown_records(records, store.off_records(user))


@router.post("/users/{user}/search")
async def search(user: User, sent: SearchIn, http: Request) -> dict[str, Any]:
    """The records that fit a question best, in the order in which its answer would use them."""
    gateway, records = allow(http, user, "read", "search"), list[Record]()
    options = PersonalizationOptions(k=sent.limit, gate=False)
    try:
        found = await gateway.search(gateway.deployment, user, repair(sent.query), options)
        records = [item.record for item in found.ranked[: sent.limit]]
    except NotPersonal as error:
        reason = str(error)
        if reason == "unknown-user":
            raise no_such_user() from None
        if reason != "no-history":
            raise ApiError(503, f"the search failed: {reason}", code=reason) from None
    return {"object": "list", "data": shown_records(records)}


@router.delete("/users/{user}/records/{id:path}")
async def delete_record(user: User, id: PathId, http: Request) -> dict[str, Any]:
    """Delete one record, and the heads that knew it."""
    gateway = allow(http, user, "delete", "record")

    def remove() -> list[Record]:
        removed = list(gateway.store.some_records(user, [id]).values())
        if removed:
            with gateway.store.change(user) as change:
                return removed if change.remove(id) else []
        return removed

    removed = await run_sync(remove)
    if not removed:
        raise ApiError(404, "no such record", code="record_not_found")
    await gateway.deployment.forget(user)
    await forget_texts(gateway, texts_of(removed))
    return {"id": id, "deleted": True}


@router.put("/users/{user}/records/{id:path}/personalization")
async def switch_record(user: User, id: PathId, sent: SwitchIn, http: Request) -> dict[str, Any]:
    """Keep a record out of prompts, searches and fits, and forget what heads have learned from it,
    or use it again. It is kept, with its feedback.
    """
    gateway = allow(http, user, "write")

    def write() -> bool | None:
        with suppress(NoSuchUser), gateway.store.change(user) as change:
            return change.switch_record(id, off=not sent.enabled)
        return None

    if (changed := await run_sync(write)) is None:
        raise ApiError(404, "no such record", code="record_not_found")
    if changed:
        await gateway.deployment.forget(user)
        gateway.deployment.prefetch(user)
    return {"user": user, "id": id, "enabled": sent.enabled}


def _record(user: str, place: str, sent: RecordIn, max_text: int) -> Record:
    asked = str(sent.input)
    for name in ("input", "output", "time", "id"):
        text = getattr(sent, name)
        fault = text_fault(text, may_be_empty=name == "time")
        if len(text) > max_text:
            fault = f"is longer than {max_text} characters"
        if fault:
            raise ApiError(400, f"{place}.{name} {fault}", param=f"{place}.{name}")
    try:
        span = parse_time(sent.time)
    except ValueError as error:
        raise ApiError(400, f"{place}.time: {error}", param=f"{place}.time") from None
    return Record(user, sent.id, asked, sent.output, sent.time, span)


def shown_records(records: Iterable[Record], off: Collection[str] = ()) -> list[dict[str, Any]]:
    """Records as replies show them; those of which the id is in `off` are marked."""
    names = ("id", "input", "output", "time")
    shown = [{name: getattr(record, name) for name in names} for record in records]
    return [own | ({"enabled": False} if own["id"] in off else {}) for own in shown]
