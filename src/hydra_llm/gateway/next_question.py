"""The question that tells most about a user: `GET /v1/users/{user}/next-question`."""

from functools import partial
from pathlib import Path as File
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request

from hydra_llm.errors import DataError, SettingsError
from hydra_llm.gateway.audit import allow
from hydra_llm.gateway.schemas import ApiError
from hydra_llm.gateway.user_routes import User

MOST = 500  # texts of a pool
router = APIRouter(prefix="/v1", tags=["users"])


def read_pool(file: File | None) -> tuple[str, ...]:
    """The texts of a pool, one per line. DataError: it cannot be read, or has none, or too many."""
    if file is None:
        return ()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"question_pool cannot be read as text ({error})", file=file) from None
    texts = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not 0 < len(texts) <= MOST:
        fix = f"write a question per line, at most {MOST}"
        raise DataError(f"question_pool has {len(texts)} questions: {fix}", file=file)
    return texts


@router.get("/users/{user}/next-question")
async def next_question(
    user: User, http: Request, limit: Annotated[int, Query(ge=1, le=50)] = 1
) -> dict[str, Any]:
    """Of the pool's questions that the user has not answered, those whose answers tell most about
    the user, in order; `worth` is by how much an answer lowers the expected log-loss, in nats. An
    answer counts once it is a record of the user. A user without records may be asked too.
    """
    gateway = allow(http, user, "read", "question")
    deployment, pool = gateway.deployment, http.app.state.question_pool
    bundle = deployment.bundle
    if bundle is None:
        raise ApiError(409, "there is no bundle yet: learn one first", code="no_bundle")
    if not pool:
        message = "there are no questions: name a file of them in the setting question_pool"
        raise ApiError(409, message, code="no_questions")
    known = await run_sync(deployment.users.current, user)
    records = deployment.readable(known.records) if known else ()
    head = known.heads.get("adapter") if known else None
    from hydra_llm.training.questions import next_questions

    chosen = partial(next_questions, bundle, records, pool, limit, head)
    texts = [*pool, *(record.input for record in records)]
    try:
        found = await deployment.batcher.run(chosen, user=user, texts=lambda: texts)
    except SettingsError as error:
        raise ApiError(409, str(error), code="no_uncertainty") from None
    data = [{"question": text, "worth": round(worth, 6)} for text, worth in found]
    return {"object": "list", "user": user, "data": data}
