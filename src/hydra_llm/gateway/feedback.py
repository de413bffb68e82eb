"""What a user made of an answer → a record, and an updated head (`Scorer.online_update`). Knows no
HTTP.

Everything that feedback changes, the feedback itself, the record and the head, is one transaction
on the version that was read; whoever comes in between makes this one read again. The same feedback
twice is one, and the head does not know in which order it came.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio

from hydra_llm.bundle import Bundle
from hydra_llm.gateway.deployment import Deployment
from hydra_llm.gateway.schemas import ApiError, FeedbackIn
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.user_cache import UserCache, to_head, to_stored
from hydra_llm.model.heads import Head
from hydra_llm.model.scorer import FEEDBACK_WINDOW
from hydra_llm.select import all_labels, candidate_text
from hydra_llm.store.change import FEEDBACK_ID
from hydra_llm.store.store import Store
from hydra_llm.store.values import ConflictingFeedback, Request, StaleVersion, StoredFeedback
from hydra_llm.text import text_fault
from hydra_llm.training.dataset import make_training_set
from hydra_llm.training.train_scorer import target_rule
from hydra_llm.types import Candidate, LabelledGroup, Query, Record

ACCEPTED = 0.5  # a rating from which on the answer counts as what the user wanted
TRIES = 8
FITTED = "fitted"  # under which name the adapter's head is kept as it was fitted, without feedback


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of feedback."""

    repeated: bool = False
    record: str | None = None  # id of the record that the answer became
    moved: bool = False  # whether the user's head has moved


@dataclass(frozen=True)
class _Told:
    """What was said of an answer, as far as it does not depend on what the store holds."""

    kind: str
    value: Any
    candidates: list[Candidate]
    wanted: str | None  # the answer that the user wanted, as far as it was told
    record: Record | None  # what the wanted answer becomes


@dataclass(frozen=True)
class _Now:
    """The user, as of a version."""

    version: int
    records: tuple[Record, ...]
    heads: dict[str, Head]
    judged: list[StoredFeedback]  # feedback that no fitted head knows


async def take_feedback(
    store: Store, serving: Deployment, said: FeedbackIn, request: Request, settings: ServeSettings
) -> Taken:
    """Learn from one piece of feedback.

    Raises:
        ApiError: 400 for a candidate that there was not, 409 where something else was said of this
            request before. StoreError: the store failed; nothing was changed.
    """
    told = _understood(serving, said, request, settings)
    texts = [request.question, *(candidate.text for candidate in told.candidates)]
    for _ in range(TRIES):
        now = await anyio.to_thread.run_sync(
            partial(_read, store, serving.users, request.user, serving.id)
        )
        record = told.record if len(now.records) < settings.max_records else None
        judged, heads = await serving.batcher.run(
            partial(_learned, serving, told, request, now), texts
        )
        try:
            write = partial(
                _write,
                store,
                request.user,
                now.version,
                judged,
                record,
                serving.id,
                now.heads | heads if heads else {},
            )
            fresh = await anyio.to_thread.run_sync(write)
        except StaleVersion:
            continue
        except ConflictingFeedback as error:
            raise ApiError(409, str(error), code="other_feedback") from None
        return Taken(not fresh, record.id if record else None, bool(fresh and heads))
    raise ApiError(409, "too many changes of this user at once: try again", code="busy")


def _understood(
    serving: Deployment, said: FeedbackIn, request: Request, settings: ServeSettings
) -> _Told:
    kind = said.kind()
    if said.edited is not None and (fault := _fault(said.edited, settings.max_text)):
        raise ApiError(400, f"edited {fault}", param="edited")
    shown = _shown(request)
    choices = [
        Candidate(each["text"], each["answer"], each["votes"], each["greedy"]) for each in shown
    ]
    if kind == "chosen" and (said.chosen or 0) >= len(choices):
        raise ApiError(
            400, f"there were {len(choices)} candidates: chosen must be below that", param="chosen"
        )
    wanted, record = _wanted(said, choices), None
    if wanted and not text_fault(wanted) and len(request.question) <= settings.max_text:
        output = _wanted_text(serving, said, shown) or wanted
        record = Record(request.user, f"{FEEDBACK_ID}{request.id}", request.question, output)
    return _Told(
        kind, getattr(said, kind), choices[: len(request.content["candidates"])], wanted, record
    )


def _shown(request: Request) -> list[dict[str, Any]]:
    """The candidates, and behind them the choices that repeat one of them; requests of earlier
    versions tell of none.
    """
    candidates, repeats = request.content["candidates"], request.content.get("repeats", ())
    return [
        *candidates,
        *({**candidates[each["candidate"]], "said": each["said"]} for each in repeats),
    ]


def _fault(text: str, most: int) -> str:
    return text_fault(text) or (f"is longer than {most} characters" if len(text) > most else "")


def _read(store: Store, people: UserCache, user: str, bundle: str) -> _Now:
    version = store.state(user).version
    person = None if version is None else people.at_hand(user, version) or people.load(user)
    if person is None:
        raise ApiError(404, "no such request", code="request_not_found")
    return _Now(
        person.version,
        person.records,
        {name: to_head(head) for name, head in store.heads(user, bundle).items()},
        store.unlearned_feedback(user, FEEDBACK_WINDOW, bundle=bundle),
    )


def _write(
    store: Store,
    user: str,
    version: int,
    judged: StoredFeedback,
    record: Record | None,
    bundle: str,
    heads: dict[str, Head],
) -> bool:
    """All of it in one transaction; False where exactly this was said before."""
    with store.change(user, version=version) as change:
        if not change.put_feedback(judged):
            return False
        if record is not None:
            change.add([record])
        if heads:
            change.put_heads(bundle, {name: to_stored(head) for name, head in heads.items()})
        return True


def _wanted(said: FeedbackIn, choices: Sequence[Candidate]) -> str | None:
    """The answer that the user wanted, as far as it was told; the first choice is what the user
    got.
    """
    if said.edited is not None:
        return said.edited
    if said.chosen is not None:
        return _answer(choices[said.chosen])
    if said.rating is not None and said.rating >= ACCEPTED:
        return _answer(choices[0])
    return None


def _wanted_text(
    serving: Deployment, said: FeedbackIn, shown: Sequence[Mapping[str, Any]]
) -> str | None:
    """It as it was written, where the answer is a text: what the adapter reads of one may be its
    first line.
    """
    if serving.task.labels or said.edited is not None:
        return None
    text: str = shown[said.chosen or 0]["said"]
    return text


def _answer(candidate: Candidate) -> str:
    return candidate.answer if candidate.answer is not None else candidate.text


# ---- in the scoring thread


def _learned(
    serving: Deployment, told: _Told, request: Request, now: _Now
) -> tuple[StoredFeedback, dict[str, Head]]:
    """What is kept of the feedback, and the heads that it moves; none where it teaches nothing or
    nobody learns from it.
    """
    group = _group(serving, told, request, now.records)
    judged = StoredFeedback(
        request.id,
        request.created,
        {"said": {told.kind: told.value}, "bundle": serving.id, "group": group},
    )
    if group is None or serving.bundle is None:
        return judged, {}
    return judged, heads_after(serving.bundle, request.user, now.heads, [*now.judged, judged])


def _group(
    serving: Deployment, told: _Told, request: Request, records: tuple[Record, ...]
) -> dict[str, Any] | None:
    """The candidates with what each was worth, as plain values."""
    adapter = serving.scorers.get("adapter")
    readable = [candidate for candidate in told.candidates if candidate.answer is not None]
    if adapter is None or serving.bundle is None or not adapter.updates_online or not readable:
        return None
    offered = all_labels(serving.task, readable) if serving.task.labels else readable
    gains = _gains(serving, told, offered)
    if len(set(gains)) < 2:
        return None
    visible = serving.readable(records)[: request.content["visible"]]
    evidence = serving.bundle.featurizer
    query = Query(request.user, request.id, request.question)
    rows = evidence.adapter(query, offered, evidence.vectorize(visible)).tolist()
    texts = [candidate_text(serving.task, candidate) for candidate in offered]
    return {"left": request.question, "rights": texts, "gains": gains, "evidence": rows}


def _gains(serving: Deployment, told: _Told, offered: Sequence[Candidate]) -> list[float]:
    """What each candidate was worth: against the wanted answer; or what the pick was rated, and the
    others the rest.
    """
    if told.wanted is not None:
        gold = serving.task.parse(told.wanted) or told.wanted
        return [serving.task.gain(candidate.answer, gold) for candidate in offered]
    rated = told.value if told.kind == "rating" else 0.0
    picked = _answer(told.candidates[0])
    return [rated if candidate.answer == picked else 1.0 - rated for candidate in offered]


def heads_after(
    bundle: Bundle, user: str, heads: Mapping[str, Head], judged: Sequence[StoredFeedback]
) -> dict[str, Head]:
    """The adapter's head after all feedback since it was fitted, and the fitted one beside it."""
    scorer = bundle.scorers["adapter"]
    fitted = heads.get(FITTED) or heads.get("adapter") or Head.of(scorer.head.empty())
    data = make_training_set(
        bundle.store,
        scorer.interaction,
        _groups(bundle, user, judged),
        rule=target_rule(bundle, "adapter"),
        loss=scorer.loss,
        spread=float(scorer.gain_spread),
    )
    return {FITTED: fitted, "adapter": scorer.online_update(fitted, data.groups)}


def _groups(bundle: Bundle, user: str, judged: Sequence[StoredFeedback]) -> list[LabelledGroup]:
    """The latest judged groups of this bundle, each request's once, oldest first."""
    latest = {
        each.request: each
        for each in judged
        if each.content["bundle"] == bundle.weights and each.content["group"]
    }
    ordered = sorted(latest.values(), key=lambda each: (each.created, each.request))
    return [_labelled(user, i, each) for i, each in enumerate(ordered[-FEEDBACK_WINDOW:])]


def _labelled(user: str, place: int, judged: StoredFeedback) -> LabelledGroup:
    group = judged.content["group"]
    evidence = tuple(tuple(row) for row in group["evidence"])
    return LabelledGroup(
        user,
        judged.request,
        group["left"],
        tuple(group["rights"]),
        tuple(group["gains"]),
        evidence,
        place,
        voted=True,
    )
