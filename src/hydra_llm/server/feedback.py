"""What a user made of an answer → a record, and a head that has moved (learning/online.py). Knows no HTTP.

Everything that feedback changes, the feedback itself, the record and the head, is one transaction on the version that was read; whoever
comes in between makes this one read again. The same feedback twice is one, and the head does not know in which order it came.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import torch

from hydra_llm.adapt import all_labels, candidate_text
from hydra_llm.datasets.dataset import text_fault
from hydra_llm.learning.lesson import rule_of
from hydra_llm.learning.online import WINDOW, moved, moves
from hydra_llm.learning.table import make_table
from hydra_llm.server.people import as_head, as_numbers
from hydra_llm.server.serving import Serving
from hydra_llm.server.settings import ServeSettings
from hydra_llm.server.wire import ApiError, FeedbackIn
from hydra_llm.store.change import FEEDBACK
from hydra_llm.store.store import Store
from hydra_llm.store.values import Contradiction, Head, Judged, Request, Stale
from hydra_llm.types import Candidate, LabelledGroup, Query, Record

ACCEPTED = 0.5
"""A rating from which on the answer counts as what the user wanted."""
TRIES = 8
FITTED = "fitted"
"""Under which name the adapter's head is kept that feedback moves away from."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of feedback."""

    repeated: bool = False
    record: str | None = None
    """Id of the record that the answer became."""
    moved: bool = False
    """Whether the user's head has moved."""


async def take_feedback(store: Store, serving: Serving, said: FeedbackIn, request: Request, settings: ServeSettings) -> Taken:
    """Learn from one piece of feedback.

    Raises:
        ApiError: 400 for a candidate that there was not, 409 where something else was said of this request before.
        StoreError: the store failed; nothing was changed.
    """
    kind = said.kind()
    fault = text_fault(said.edited) if said.edited is not None else ""
    if said.edited is not None and len(said.edited) > settings.max_text:
        fault = f"is longer than {settings.max_text} characters"
    if fault:
        raise ApiError(400, f"edited {fault}", param="edited")
    candidates = [Candidate(each["text"], each["answer"], each["votes"], each["greedy"]) for each in request.content["candidates"]]
    if kind == "chosen" and (said.chosen or 0) >= len(candidates):
        raise ApiError(400, f"there were {len(candidates)} candidates: chosen must be below that", param="chosen")
    wanted = _wanted(said, candidates)
    output = _wanted_text(serving, said, request.content["candidates"])
    record = (
        None if not wanted or text_fault(wanted) else Record(request.user, f"{FEEDBACK}{request.id}", request.question, output or wanted)
    )
    for _ in range(TRIES):
        version, records = await anyio.to_thread.run_sync(store.records, request.user)
        if len(records) >= settings.max_records or len(request.question) > settings.max_text:
            record = None
        if version is None:
            raise ApiError(404, "no such request", code="request_not_found")
        heads = await anyio.to_thread.run_sync(store.heads, request.user, serving.id)
        known = await anyio.to_thread.run_sync(store.judged, request.user, WINDOW)
        texts = [request.question, *(candidate.text for candidate in candidates)]
        group = await serving.together.run(partial(_group, serving, said, candidates, request, wanted, records), texts)
        content = {"said": {kind: getattr(said, kind)}, "bundle": serving.id, "group": group}
        judged = Judged(request.id, request.created, content)
        new = await serving.together.run(partial(_move, serving, request.user, heads, [*known, judged])) if group else {}
        try:
            fresh = await anyio.to_thread.run_sync(partial(_write, store, request.user, version, judged, record, serving.id, heads | new))
        except Stale:
            continue
        except Contradiction as error:
            raise ApiError(409, str(error), code="other_feedback") from None
        return Taken(not fresh, record.id if record else None, bool(fresh and new))
    raise ApiError(409, "too many changes of this user at once: try again", code="busy")


def _write(store: Store, user: str, version: int, judged: Judged, record: Record | None, bundle: str, heads: dict[str, Head]) -> bool:
    """All of it in one transaction; False where exactly this was said before."""
    with store.change(user, version=version) as change:
        if not change.put_feedback(judged):
            return False
        if record is not None:
            change.add([record])
        if heads:
            change.put_heads(bundle, heads)
        return True


def _wanted(said: FeedbackIn, candidates: Sequence[Candidate]) -> str | None:
    """The answer that the user wanted, as far as it was told; the first candidate is what the user got."""
    if said.edited is not None:
        return said.edited
    if said.chosen is not None:
        return _answer(candidates[said.chosen])
    if said.rating is not None and said.rating >= ACCEPTED:
        return _answer(candidates[0])
    return None


def _wanted_text(serving: Serving, said: FeedbackIn, candidates: Sequence[Mapping[str, Any]]) -> str | None:
    """It as it was written, where the answer is a text: what the adapter reads of one may be its first line."""
    if serving.task.labels or said.edited is not None:
        return None
    text: str = candidates[said.chosen or 0]["said"]
    return text


def _answer(candidate: Candidate) -> str:
    return candidate.answer if candidate.answer is not None else candidate.text


# ---- in the scoring thread


def _group(
    serving: Serving,
    said: FeedbackIn,
    candidates: Sequence[Candidate],
    request: Request,
    wanted: str | None,
    records: Sequence[Record],
) -> dict[str, Any] | None:
    """The candidates with what each was worth, as plain values; None where that teaches nothing or nobody learns from it."""
    adapter = serving.scorers.get("adapter")
    readable = [candidate for candidate in candidates if candidate.answer is not None]
    if adapter is None or serving.bundle is None or not moves(adapter) or not readable:
        return None
    offered = all_labels(serving.task, readable) if serving.task.labels else readable
    gains = _gains(serving, said, offered, _answer(candidates[0]), wanted)
    if len(set(gains)) < 2:
        return None
    visible = serving.readable(tuple(records))[: request.content["visible"]]
    evidence = serving.bundle.evidence
    query = Query(request.user, request.id, request.question)
    rows = evidence.adapter(query, offered, evidence.remember(visible)).tolist()
    texts = [candidate_text(serving.task, candidate) for candidate in offered]
    return {"left": request.question, "rights": texts, "gains": gains, "evidence": rows}


def _gains(serving: Serving, said: FeedbackIn, offered: Sequence[Candidate], picked: str, wanted: str | None) -> list[float]:
    """What each candidate was worth: against the wanted answer; or what the pick was rated, and the others the rest."""
    if wanted is not None:
        gold = serving.task.parse(wanted) or wanted
        return [serving.task.gain(candidate.answer, gold) for candidate in offered]
    rated = said.rating or 0.0
    return [rated if candidate.answer == picked else 1.0 - rated for candidate in offered]


def _move(serving: Serving, user: str, heads: dict[str, Head], judged: Sequence[Judged]) -> dict[str, Head]:
    """The adapter's head after all feedback since it was fitted, and the fitted one beside it."""
    bundle, scorer = serving.bundle, serving.scorers["adapter"]
    assert bundle is not None
    nothing = as_head(torch.zeros(scorer.bank.numbers_per_user), 0)
    fitted = heads.get(FITTED) or heads.get("adapter") or nothing
    latest = {each.request: each for each in judged if each.content["bundle"] == serving.id and each.content["group"]}
    ordered = sorted(latest.values(), key=lambda each: (each.created, each.request))[-WINDOW:]
    groups = [_labelled(user, place, each) for place, each in enumerate(ordered)]
    table = make_table(
        bundle.store,
        scorer.combiner,
        groups,
        rule=rule_of(bundle, "adapter"),
        loss=scorer.loss,
        spread=float(scorer.gain_spread),
    )
    serving.people.drop(user)
    scorer.put_head(user, as_numbers(fitted), fitted.known)
    numbers = scorer.head_of(user)
    vector = moved(scorer, scorer.row(user), fitted.known, table)
    numbers[: len(vector)] = vector
    scorer.forget(user)
    return {FITTED: fitted, "adapter": as_head(numbers, fitted.known)}


def _labelled(user: str, place: int, judged: Judged) -> LabelledGroup:
    group = judged.content["group"]
    evidence = tuple(tuple(row) for row in group["evidence"])
    return LabelledGroup(user, judged.request, group["left"], tuple(group["rights"]), tuple(group["gains"]), evidence, place, voted=True)
