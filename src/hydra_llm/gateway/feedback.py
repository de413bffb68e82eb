"""Feedback on an answer → a record, and an updated head, which does not depend on the order. All is
written in one transaction on the version that was read. The same feedback twice is one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from anyio.to_thread import run_sync

from hydra_llm.gateway.deployment import Deployment
from hydra_llm.gateway.gateway import Gateway
from hydra_llm.gateway.schemas import ApiError, FeedbackIn, fault_of
from hydra_llm.gateway.user_cache import UserSnapshot, from_stored, to_stored
from hydra_llm.model.head import FEEDBACK_WINDOW, Head
from hydra_llm.select import all_labels, candidate_text
from hydra_llm.store.change import FEEDBACK_ID, ConflictingFeedback, StaleVersion
from hydra_llm.store.values import Request, StoredFeedback
from hydra_llm.text import text_fault
from hydra_llm.types import Candidate, Query, Record

if TYPE_CHECKING:
    from hydra_llm.bundle import Bundle

Heads = Mapping[str, Head]  # by scorer
ACCEPTED = 0.5  # minimum rating of an answer that counts as what the user wanted
TRIES = 8
FITTED = "fitted"  # name of the adapter's head as it was fitted, without feedback


async def take_feedback(gateway: Gateway, given: FeedbackIn, request: Request) -> dict[str, Any]:
    """Learn from one piece of feedback; returns what became of it, as the reply says it. `ApiError`
    400 for an unknown candidate, 409 where the request has other feedback already.
    """
    feedback = _checked(gateway, given, request)
    texts = [request.question, *(candidate.text for candidate in feedback.candidates)]
    for _ in range(TRIES):
        user, earlier = await run_sync(feedback.read)
        learn = partial(feedback.learn, user, earlier)
        judged, heads = await feedback.deployment.batcher.run(learn, texts)
        has_room = len(user.records) < gateway.settings.max_records
        record = feedback.record if has_room else None
        try:
            fresh = await run_sync(feedback.write, user, judged, record, heads)
        except StaleVersion:
            continue
        except ConflictingFeedback as error:
            raise ApiError(409, str(error), code="other_feedback") from None
        id = record.id if record else None  # of the record that the answer became
        return {"repeated": not fresh, "record": id, "head_moved": bool(fresh and heads)}
    raise ApiError(409, "too many changes of this user at once: try again", code="busy")


def _checked(gateway: Gateway, given: FeedbackIn, request: Request) -> "_Feedback":
    deployment, max_text = gateway.deployment, gateway.settings.max_text
    kind, content = given.kind(), request.content
    if given.edited is not None and (fault := fault_of(given.edited, max_text)):
        raise ApiError(400, f"edited {fault}", param="edited")
    stored = [*content["candidates"]]  # then the choices that repeat one of them
    repeats = content.get("repeats", ())
    stored += [{**stored[item["candidate"]], "said": item["said"]} for item in repeats]
    keys = ("text", "answer", "votes", "greedy")
    choices = [Candidate(*(choice[key] for key in keys)) for choice in stored]
    index = given.chosen or 0  # without `chosen` it is about the first, which the user got
    if index >= len(choices) and kind == "chosen":
        fault = f"there were {len(choices)} candidates: chosen must be below that"
        raise ApiError(400, fault, param="chosen")
    wanted, record = given.edited, None
    if kind == "chosen" or (given.rating is not None and given.rating >= ACCEPTED):
        wanted = _answer(choices[index])
    if wanted and not text_fault(wanted) and len(request.question) <= max_text:
        output = wanted
        if not deployment.pipeline.task.labels and given.edited is None:
            # as it was written: what the adapter reads of a text may be its first line
            output = stored[index]["said"] or wanted
        record = Record(request.user, f"{FEEDBACK_ID}{request.id}", request.question, output)
    candidates = choices[: len(content["candidates"])]
    value = getattr(given, kind)
    return _Feedback(deployment, request, kind, value, candidates, wanted, record)


def _answer(candidate: Candidate) -> str:
    return candidate.answer if candidate.answer is not None else candidate.text


@dataclass(frozen=True)
class _Feedback:
    """Checked feedback; its fields do not depend on the user's state in the store."""

    deployment: Deployment
    request: Request
    kind: str
    value: Any
    candidates: list[Candidate]
    wanted: str | None  # the answer that the user wanted, where the feedback says so
    record: Record | None  # what the wanted answer becomes

    def read(self) -> tuple[UserSnapshot, list[StoredFeedback]]:
        """The user with all heads, and the feedback that no fitted head knows."""
        store, name, bundle = self.deployment.store, self.request.user, self.deployment.id
        user = self.deployment.users.current(name)
        if user is None:
            raise ApiError(404, "no such request", code="request_not_found")
        earlier = store.unlearned_feedback(name, FEEDBACK_WINDOW, bundle=bundle)
        return replace(user, heads=from_stored(store.heads(name, bundle))), earlier

    def write(
        self, user: UserSnapshot, judged: StoredFeedback, record: Record | None, heads: Heads
    ) -> bool:
        """All of it in one transaction; False where exactly this feedback was given before."""
        with self.deployment.store.change(user.name, version=user.version) as change:
            if not change.put_feedback(judged):
                return False
            if record is not None:
                change.add([record])
            if heads:
                change.put_heads(self.deployment.id, to_stored({**user.heads, **heads}))
            return True

    # ---- in the scoring thread

    def learn(
        self, user: UserSnapshot, earlier: list[StoredFeedback]
    ) -> tuple[StoredFeedback, Heads]:
        """What is stored of the feedback, and the heads that it moves, if it is informative."""
        bundle = self.deployment.bundle
        group = self._group(user.records)
        content = {"said": {self.kind: self.value}, "bundle": self.deployment.id, "group": group}
        judged = StoredFeedback(self.request.id, self.request.created, content)
        if group is None or bundle is None:
            return judged, {}
        return judged, heads_after(bundle, user.name, user.heads, [*earlier, judged])

    def _group(self, records: Sequence[Record]) -> dict[str, Any] | None:
        """The candidates with the gain of each, as plain values."""
        task, bundle, request = self.deployment.pipeline.task, self.deployment.bundle, self.request
        readable = [candidate for candidate in self.candidates if candidate.answer is not None]
        if not readable or not bundle or not bundle.adapter or not bundle.adapter.updates_online:
            return None
        offered = all_labels(task, readable) if task.labels else readable
        if self.wanted is not None:
            gold = task.parse(self.wanted) or self.wanted
            gains = [task.gain(candidate.answer, gold) for candidate in offered]
        else:  # the rating is that of the first candidate, which the user got
            rating = self.value if self.kind == "rating" else 0.0
            rated = _answer(self.candidates[0])
            gains = [rating if item.answer == rated else 1.0 - rating for item in offered]
        if len(set(gains)) < 2:
            return None
        visible = self.deployment.readable(records)[: request.content["visible"]]
        query = Query(request.user, request.id, request.question)
        vectors = bundle.featurizer.vectorize(visible)
        rows = bundle.featurizer.adapter(query, offered, vectors).tolist()
        texts = [candidate_text(task, candidate) for candidate in offered]
        return {"left": request.question, "rights": texts, "gains": gains, "evidence": rows}


def heads_after(
    bundle: "Bundle", user: str, heads: Heads, judged: Sequence[StoredFeedback]
) -> dict[str, Head]:
    """The adapter's head after all feedback since it was fitted, and the fitted one beside it.
    Learned are the bundle's latest judged groups, each request's once, oldest first.
    """
    from hydra_llm.training.dataset import LabelledGroup
    from hydra_llm.training.train_scorer import target_rule, training_set

    scorer = bundle.scorers["adapter"]
    fitted = heads.get(FITTED) or heads.get("adapter") or Head.of(scorer.head.empty())
    own = [feedback for feedback in judged if feedback.content["bundle"] == bundle.weights]
    latest = {feedback.request: feedback for feedback in own if feedback.content["group"]}
    ordered = sorted(latest.values(), key=lambda feedback: (feedback.created, feedback.request))
    groups = []
    for position, feedback in enumerate(ordered[-FEEDBACK_WINDOW:]):
        group, query = feedback.content["group"], feedback.request
        rights, gains, side = group["rights"], group["gains"], np.array(group["evidence"])
        groups.append(
            LabelledGroup(user, query, group["left"], rights, gains, side, position, voted=True)
        )
    data = training_set(bundle, target_rule(bundle, "adapter"), scorer, groups)
    return {FITTED: fitted, "adapter": scorer.online_update(fitted, data.groups)}
