"""Feedback on an answer → a record, and an updated head (`Scorer.online_update`). Knows no HTTP.

The feedback itself, the record and the head are written in one transaction on the version that was
read; after a change in between it is read again. The same feedback twice is one, and the head does
not depend on the order of feedback.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from anyio import to_thread

from hydra_llm.bundle import Bundle
from hydra_llm.gateway.deployment import Deployment
from hydra_llm.gateway.schemas import ApiError, FeedbackIn
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.user_cache import to_head, to_stored
from hydra_llm.model.heads import Head
from hydra_llm.model.scorer import FEEDBACK_WINDOW
from hydra_llm.select import all_labels, candidate_text
from hydra_llm.store.change import FEEDBACK_ID
from hydra_llm.store.store import Store
from hydra_llm.store.values import ConflictingFeedback, Request, StaleVersion, StoredFeedback
from hydra_llm.tasks.base import Task
from hydra_llm.text import text_fault
from hydra_llm.training.train_scorer import target_rule, training_set
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
class _Feedback:
    """Checked feedback, as far as it does not depend on what the store holds."""

    request: Request
    kind: str
    value: Any
    candidates: list[Candidate]
    wanted: str | None  # the answer that the user wanted, where the feedback says so
    record: Record | None  # what the wanted answer becomes


@dataclass(frozen=True)
class _State:
    """The user, as of a version."""

    version: int
    records: tuple[Record, ...]
    heads: dict[str, Head]
    judged: list[StoredFeedback]  # feedback that no fitted head knows


@dataclass(frozen=True)
class _Update:
    """What one transaction writes."""

    judged: StoredFeedback
    record: Record | None
    heads: dict[str, Head]


async def take_feedback(
    store: Store,
    deployment: Deployment,
    given: FeedbackIn,
    request: Request,
    settings: ServeSettings,
) -> Taken:
    """Learn from one piece of feedback.

    Raises:
        ApiError: 400 for a candidate that there was not, 409 where other feedback was given on this
            request before. StoreError: the store failed; nothing was changed.
    """
    feedback = _checked(deployment, given, request, settings)
    texts = [request.question, *(candidate.text for candidate in feedback.candidates)]
    for _ in range(TRIES):
        state = await to_thread.run_sync(partial(_read, store, deployment, request.user))
        learn = partial(_learned, deployment, feedback, state)
        judged, heads = await deployment.batcher.run(learn, texts)
        record = feedback.record if len(state.records) < settings.max_records else None
        update = _Update(judged, record, state.heads | heads if heads else {})
        write = partial(_write, store, deployment.id, request.user, state.version, update)
        try:
            fresh = await to_thread.run_sync(write)
        except StaleVersion:
            continue
        except ConflictingFeedback as error:
            raise ApiError(409, str(error), code="other_feedback") from None
        return Taken(not fresh, record.id if record else None, bool(fresh and heads))
    raise ApiError(409, "too many changes of this user at once: try again", code="busy")


def _checked(
    deployment: Deployment, given: FeedbackIn, request: Request, settings: ServeSettings
) -> _Feedback:
    kind, shown = given.kind(), _shown(request)
    if given.edited is not None and (fault := _fault(given.edited, settings.max_text)):
        raise ApiError(400, f"edited {fault}", param="edited")
    keys = ("text", "answer", "votes", "greedy")
    choices = [Candidate(*(choice[key] for key in keys)) for choice in shown]
    if kind == "chosen" and (given.chosen or 0) >= len(choices):
        fault = f"there were {len(choices)} candidates: chosen must be below that"
        raise ApiError(400, fault, param="chosen")
    wanted, record = _wanted(given, choices), None
    if wanted and not text_fault(wanted) and len(request.question) <= settings.max_text:
        output = wanted
        if not deployment.task.labels and given.edited is None:
            # as it was written: what the adapter reads of a text may be its first line
            output = shown[given.chosen or 0]["said"] or wanted
        record = Record(request.user, f"{FEEDBACK_ID}{request.id}", request.question, output)
    candidates = choices[: len(request.content["candidates"])]
    return _Feedback(request, kind, getattr(given, kind), candidates, wanted, record)


def _shown(request: Request) -> list[dict[str, Any]]:
    """The candidates, then the choices that repeat one of them."""
    candidates, repeats = request.content["candidates"], request.content.get("repeats", ())
    repeated = [{**candidates[each["candidate"]], "said": each["said"]} for each in repeats]
    return [*candidates, *repeated]


def _fault(text: str, most: int) -> str:
    return text_fault(text) or (f"is longer than {most} characters" if len(text) > most else "")


def _read(store: Store, deployment: Deployment, name: str) -> _State:
    version, users, bundle = store.state(name).version, deployment.users, deployment.id
    user = None if version is None else users.at_hand(name, version) or users.load(name)
    if user is None:
        raise ApiError(404, "no such request", code="request_not_found")
    heads = {scorer: to_head(head) for scorer, head in store.heads(name, bundle).items()}
    judged = store.unlearned_feedback(name, FEEDBACK_WINDOW, bundle=bundle)
    return _State(user.version, user.records, heads, judged)


def _write(store: Store, bundle: str, user: str, version: int, update: _Update) -> bool:
    """All of it in one transaction; False where exactly this feedback was given before."""
    with store.change(user, version=version) as change:
        if not change.put_feedback(update.judged):
            return False
        if update.record is not None:
            change.add([update.record])
        if update.heads:
            heads = {name: to_stored(head) for name, head in update.heads.items()}
            change.put_heads(bundle, heads)
        return True


def _wanted(given: FeedbackIn, choices: Sequence[Candidate]) -> str | None:
    """The answer that the user wanted, if the feedback says so; the user got the first choice."""
    if given.edited is not None:
        return given.edited
    if given.chosen is not None:
        return _answer(choices[given.chosen])
    if given.rating is not None and given.rating >= ACCEPTED:
        return _answer(choices[0])
    return None


def _answer(candidate: Candidate) -> str:
    return candidate.answer if candidate.answer is not None else candidate.text


# ---- in the scoring thread


def _learned(
    deployment: Deployment, feedback: _Feedback, state: _State
) -> tuple[StoredFeedback, dict[str, Head]]:
    """What is stored of the feedback, and the heads that it moves, if it is informative."""
    request, bundle = feedback.request, deployment.bundle
    group = _group(deployment, feedback, state.records)
    content = {"said": {feedback.kind: feedback.value}, "bundle": deployment.id, "group": group}
    judged = StoredFeedback(request.id, request.created, content)
    if group is None or bundle is None:
        return judged, {}
    return judged, heads_after(bundle, request.user, state.heads, [*state.judged, judged])


def _group(
    deployment: Deployment, feedback: _Feedback, records: tuple[Record, ...]
) -> dict[str, Any] | None:
    """The candidates with the gain of each, as plain values."""
    task, bundle, request = deployment.task, deployment.bundle, feedback.request
    adapter = deployment.scorers.get("adapter")
    readable = [candidate for candidate in feedback.candidates if candidate.answer is not None]
    if adapter is None or bundle is None or not adapter.updates_online or not readable:
        return None
    offered = all_labels(task, readable) if task.labels else readable
    gains = _gains(task, feedback, offered)
    if len(set(gains)) < 2:
        return None
    visible = deployment.readable(records)[: request.content["visible"]]
    query = Query(request.user, request.id, request.question)
    vectors = bundle.featurizer.vectorize(visible)
    rows = bundle.featurizer.adapter(query, offered, vectors).tolist()
    texts = [candidate_text(task, candidate) for candidate in offered]
    return {"left": request.question, "rights": texts, "gains": gains, "evidence": rows}


def _gains(task: Task, feedback: _Feedback, offered: Sequence[Candidate]) -> list[float]:
    """Each candidate's gain against the wanted answer; without one the rating, or 1 - rating."""
    if feedback.wanted is not None:
        gold = task.parse(feedback.wanted) or feedback.wanted
        return [task.gain(candidate.answer, gold) for candidate in offered]
    rating = feedback.value if feedback.kind == "rating" else 0.0
    picked = _answer(feedback.candidates[0])
    return [rating if candidate.answer == picked else 1.0 - rating for candidate in offered]


def heads_after(
    bundle: Bundle, user: str, heads: Mapping[str, Head], judged: Sequence[StoredFeedback]
) -> dict[str, Head]:
    """The adapter's head after all feedback since it was fitted, and the fitted one beside it."""
    scorer = bundle.scorers["adapter"]
    fitted = heads.get(FITTED) or heads.get("adapter") or Head.of(scorer.head.empty())
    groups = _groups(bundle, user, judged)
    data = training_set(bundle, target_rule(bundle, "adapter"), scorer, groups)
    return {FITTED: fitted, "adapter": scorer.online_update(fitted, data.groups)}


def _groups(bundle: Bundle, user: str, judged: Sequence[StoredFeedback]) -> list[LabelledGroup]:
    """The latest judged groups of this bundle, each request's once, oldest first."""
    own = (each for each in judged if each.content["bundle"] == bundle.weights)
    latest = {each.request: each for each in own if each.content["group"]}
    ordered = sorted(latest.values(), key=lambda each: (each.created, each.request))
    return [_labelled(user, i, each) for i, each in enumerate(ordered[-FEEDBACK_WINDOW:])]


def _labelled(user: str, position: int, judged: StoredFeedback) -> LabelledGroup:
    group = judged.content["group"]
    rights, gains = tuple(group["rights"]), tuple(group["gains"])
    side, query = tuple(map(tuple, group["evidence"])), judged.request
    return LabelledGroup(user, query, group["left"], rights, gains, side, position, voted=True)
