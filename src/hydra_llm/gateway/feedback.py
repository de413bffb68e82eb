"""Feedback on an answer → a record, and an updated head, which does not depend on the order. All is
written in one transaction on the version that was read. The same feedback twice is one; other
feedback on the same answer takes its place, as if it had been the only one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from anyio.to_thread import run_sync

from hydra_llm.datasets.choices import candidates_fault
from hydra_llm.datasets.dataset import time_fault
from hydra_llm.gateway.deployment import Deployment
from hydra_llm.gateway.drift import CHANGED, first_after_change, mark_of
from hydra_llm.gateway.gateway import Gateway
from hydra_llm.gateway.schemas import ApiError, FeedbackIn, fault_of
from hydra_llm.gateway.user_cache import UserSnapshot, from_stored, texts_of, to_stored
from hydra_llm.history import as_query, as_record, parse_time
from hydra_llm.model.head import FEEDBACK_WINDOW, Head
from hydra_llm.select import all_labels, candidate_text
from hydra_llm.store.change import FEEDBACK_ID, StaleVersion
from hydra_llm.store.values import Request, StoredFeedback
from hydra_llm.text import text_fault, without_reasoning
from hydra_llm.types import Candidate, Query, Record

if TYPE_CHECKING:
    from hydra_llm.bundle import Bundle
    from hydra_llm.training.dataset import LabelledGroup, TrainingSet

Heads = Mapping[str, Head]  # by scorer
ACCEPTED = 0.5  # minimum rating of an answer that counts as what the user wanted
TRIES = 8
FITTED = "fitted"  # name of the adapter's head as it was fitted, without feedback


async def take_feedback(gateway: Gateway, given: FeedbackIn, request: Request) -> dict[str, Any]:
    """Learn from one piece of feedback; returns what became of it, as the reply says it. `ApiError`
    400 for an unknown candidate.
    """
    feedback = _checked(gateway, given, request)
    feedback = replace(feedback, detects=gateway.settings.detect_changes)
    texts = [request.question, *(candidate.text for candidate in feedback.candidates)]
    for _ in range(TRIES):
        state = await run_sync(feedback.read)
        learn = partial(feedback.learn, state)
        judged, heads = await feedback.deployment.batcher.run(
            learn, user=request.user, texts=lambda: texts
        )
        has_room = len(state.user.records) + state.off < gateway.settings.max_records
        makes = has_room or state.replaced
        record = feedback.record if makes and not state.same else None
        try:
            fresh = await run_sync(feedback.write, state, judged, record, heads)
        except StaleVersion:
            continue
        if fresh and state.replaced:
            await gateway.deployment.forget(state.user.name)
            replaced = texts_of([state.replaced])
            await run_sync(gateway.deployment.forget_texts, replaced)
        if fresh:
            gateway.telemetry.activity.judged(feedback.agrees)
            gateway.telemetry.changes.inc(CHANGED in heads and CHANGED not in state.user.heads)
        id = record.id if record else state.same  # of the record that the answer became, or is
        return {"repeated": not fresh, "record": id, "head_moved": bool(fresh and heads)}
    raise ApiError(409, "too many changes of this user at once: try again", code="busy")


def _checked(gateway: Gateway, given: FeedbackIn, request: Request) -> "_Feedback":
    deployment, max_text = gateway.deployment, gateway.settings.max_text
    kind, content = given.kind(), request.content
    if given.edited is not None and (fault := fault_of(given.edited, max_text)):
        raise ApiError(400, f"edited {fault}", param="edited")
    if fault := time_fault(given.time):
        raise ApiError(400, fault, param="time")
    stored = [*content["candidates"]]  # then the choices that repeat one of them
    repeats = content.get("repeats", ())
    stored += [{**stored[item["candidate"]], "said": item["said"]} for item in repeats]
    keys = ("text", "answer", "votes", "greedy")
    choices = [Candidate(*(choice[key] for key in keys)) for choice in stored]
    index = given.chosen or 0  # without `chosen` it is about the first, which the user got
    if index >= len(choices) and kind == "chosen":
        fault = f"there were {len(choices)} candidates: chosen must be below that"
        raise ApiError(400, fault, param="chosen")
    # A client may show the reasoning, and send it back with what was edited.
    wanted, record = given.edited and without_reasoning(given.edited), None
    if kind == "chosen" or (given.rating is not None and given.rating >= ACCEPTED):
        wanted = _answer(choices[index])
    if wanted and not text_fault(wanted) and len(request.question) <= max_text:
        output = wanted
        if not deployment.pipeline.task.labels and given.edited is None:
            # as it was written: what the adapter reads of a text may be its first line
            output = stored[index]["said"] or wanted
        id, span = record_id(request), parse_time(given.time)
        record = Record(request.user, id, request.question, output, given.time, span)
    candidates = choices[: len(content["candidates"])]
    value = getattr(given, kind)
    return _Feedback(deployment, request, kind, value, candidates, wanted, record, given.time)


def record_id(request: Request) -> str:
    """The id of the record that an answer becomes."""
    return f"{FEEDBACK_ID}{request.id}"


def _answer(candidate: Candidate) -> str:
    return candidate.answer if candidate.answer is not None else candidate.text


@dataclass(frozen=True)
class _State:
    """What the store has of the user before the feedback is written."""

    user: UserSnapshot  # with all heads, unless one has learned what is replaced
    earlier: list[StoredFeedback]  # which these heads have not learned
    judged: list[StoredFeedback]  # the latest, learned or not, where changes are looked for
    replaced: Record | None  # what earlier feedback on the same answer became
    same: str | None  # another record that says what the feedback does: no second one is made
    relearn: bool  # whether a head has learned that
    off: int  # how many records are switched off, and so not among the user's
    is_off: bool  # whether what it replaces, or what it says, is one of them: no head learns it


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
    time: str  # of that, as it was given
    detects: bool = False  # whether changes of taste are looked for

    def read(self) -> _State:
        store, name, bundle = self.deployment.store, self.request.user, self.deployment.id
        user = self.deployment.users.current(name)
        if user is None:
            raise ApiError(404, "no such request", code="request_not_found")
        read = partial(store.unlearned_feedback, name, FEEDBACK_WINDOW, bundle=bundle)
        earlier, heads = read(), from_stored(store.heads(name, bundle))
        own = record_id(self.request)
        replaced, off = store.some_records(name, [own]).get(own), store.off_records(name)
        same = store.same_record(name, self.record) if self.record else None
        known = own in off or any(feedback.request == self.request.id for feedback in earlier)
        relearn = replaced is not None and not known
        if relearn:
            earlier, heads = read(or_learned=True), {}
        user, is_off = replace(user, heads=heads), (same or own) in off
        judged = read(or_learned=True) if self.detects else []
        return _State(user, earlier, judged, replaced, same, relearn, len(off), is_off)

    def write(
        self, state: _State, judged: StoredFeedback, record: Record | None, heads: Heads
    ) -> bool:
        """All of it in one transaction; False where exactly this feedback was given before."""
        user, store = state.user, self.deployment.store
        with store.change(user.name, version=user.version) as change:
            if not change.put_feedback(judged):
                return False
            if state.relearn:
                change.forget_heads()
            replaced = state.replaced
            stays = replaced and record and record.output == replaced.output
            handed = replaced and not stays and change.hand_over(replaced.id)
            if record is not None:
                change.add([record])
            elif replaced and not handed:
                change.remove(replaced.id, keep_feedback=True)
            # A record's change deletes the heads, but these have not learned it.
            was = {name: head for name, head in user.heads.items() if name != CHANGED or not heads}
            if kept := {**was, **heads}:
                change.put_heads(self.deployment.id, to_stored(kept))
            return True

    # ---- in the scoring thread

    def learn(self, state: _State) -> tuple[StoredFeedback, Heads]:
        """What is stored of the feedback, and the heads that it moves, if it is informative or
        replaces what was.
        """
        bundle, user = self.deployment.bundle, state.user
        group = self._group(user.records)
        said = {self.kind: self.value} | ({"time": self.time} if self.time else {})
        content: dict[str, Any] = {"said": said, "bundle": self.deployment.id, "group": group}
        content |= {"record": state.same} if state.same else {}
        if choice := self.choice:
            content["choice"] = {"candidates": choice.offered, "chosen": choice.gold}
        content |= {"visible": self.request.content["visible"]} if self.detects else {}
        judged = StoredFeedback(self.request.id, self.request.created, content)
        others = [feedback for feedback in state.earlier if feedback.request != judged.request]
        replaces = len(others) < len(state.earlier)
        stays_off = state.is_off and self.record is not None
        if bundle is None or stays_off or not (group or replaces):
            return judged, {}
        first = None
        if self.detects:
            content["rise"] = self._rise(state, judged)
            known = [own for own in state.judged if own.request != judged.request]
            known = sorted([*known, judged], key=lambda own: (own.created, own.request))
            first = first_after_change(known)
        heads = heads_after(bundle, user.name, user.heads, [*others, judged], first)
        return judged, heads | mark_of(first)

    def _rise(self, state: _State, judged: StoredFeedback) -> float | None:
        """As `rise_of`; of the same feedback that was given before, what it was then."""
        for own in state.judged:
            if own.request == judged.request and own.content["group"] == judged.content["group"]:
                known: float | None = own.content.get("rise")
                return known
        if state.relearn or self.deployment.bundle is None:
            return None  # the head has learned what this replaces
        return rise_of(self.deployment.bundle, state.user.name, state.user.heads, judged)

    @property
    def agrees(self) -> bool:
        """Whether the user wanted the answer that they got, which is the first candidate's."""
        if self.kind == "rating":
            return bool(self.value >= ACCEPTED)
        task, wanted = self.deployment.pipeline.task, self.wanted
        if self.kind == "edited" and wanted is not None and task.labels:
            wanted = task.parse(wanted)
        return wanted is not None and wanted == _answer(self.candidates[0])

    @property
    def choice(self) -> Query | None:
        """Of texts among which the user chose: the recorded choice that this is."""
        if self.kind != "chosen" or self.wanted is None or self.deployment.pipeline.task.labels:
            return None
        readable = [own for own in self.candidates if own.answer is not None]
        offered = tuple(own.text for own in readable)
        taken = next((own.text for own in readable if _answer(own) == self.wanted), None)
        if taken is None or candidates_fault(list(offered)):
            return None
        request = self.request
        return Query(request.user, request.id, request.question, taken, offered=offered)

    def _group(self, records: Sequence[Record]) -> dict[str, Any] | None:
        """The candidates with the gain of each, as plain values."""
        task, bundle, request = self.deployment.pipeline.task, self.deployment.bundle, self.request
        readable = [candidate for candidate in self.candidates if candidate.answer is not None]
        if not readable or not bundle or not bundle.adapter or not bundle.adapter.updates_online:
            return None
        visible = self.deployment.readable(records)[: request.content["visible"]]
        if self.choice:
            from hydra_llm.training.labelling import choice_group

            return _stored(choice_group(bundle.featurizer, self.choice, visible, readable))
        offered = all_labels(task, readable) if task.labels else readable
        if self.wanted is not None:
            if (gold := task.parse(self.wanted)) is None:
                return None  # as a record that this task cannot read: kept, but nothing is learned
            gains = [task.gain(candidate.answer, gold) for candidate in offered]
        else:  # the rating is that of the first candidate, which the user got
            rating = self.value if self.kind == "rating" else 0.0
            rated = _answer(self.candidates[0])
            gains = [rating if item.answer == rated else 1.0 - rating for item in offered]
        if len(set(gains)) < 2:
            return None
        query = Query(request.user, request.id, request.question)
        vectors = bundle.featurizer.vectorize(visible)
        rows = bundle.featurizer.adapter(query, offered, vectors).tolist()
        texts = [candidate_text(task, candidate) for candidate in offered]
        return {"left": request.question, "rights": texts, "gains": gains, "evidence": rows}


def _stored(group: "LabelledGroup") -> dict[str, Any]:
    """A group as it is kept with the feedback."""
    rows, gains = group.side_features.tolist(), list(group.gains)
    texts = {"left": group.left, "rights": list(group.rights)}
    return {**texts, "gains": gains, "evidence": rows, "exact": group.exact}


def with_choices(records: Sequence[Record], judged: Sequence[StoredFeedback]) -> list[Record]:
    """The records; those that became of a choice among texts as the choice that it was."""
    choices = {f"{FEEDBACK_ID}{own.request}": own.content.get("choice") for own in judged}

    def as_it_was(record: Record) -> Record:
        if not (choice := choices.get(record.id)):
            return record
        offered, taken = tuple(choice["candidates"]), choice["chosen"]
        return as_record(replace(as_query(record), offered=offered, gold=taken), record.id)

    return list(map(as_it_was, records))


def rise_of(bundle: "Bundle", user: str, heads: Heads, judged: StoredFeedback) -> float | None:
    """As `change_of` takes it: of what the user wanted, the log-loss by the head that has not
    learned it, less that by the shared head. None where it is not known.
    """
    data, scorer = _judged_groups(bundle, user, [judged]), bundle.scorers["adapter"]
    if not bool(data.informative.any()) or scorer.loss == "binary":
        return None
    both = [scorer.score(data.groups, [head]) for head in (heads.get("adapter"), None)]
    own, shared = (scores.log_softmax(-1).where(data.groups.mask, 0.0) for scores in both)
    return float((data.target * (shared - own)).sum())


def heads_after(
    bundle: "Bundle",
    user: str,
    heads: Heads,
    judged: Sequence[StoredFeedback],
    first: StoredFeedback | None = None,
) -> dict[str, Head]:
    """The adapter's head after all feedback since it was fitted, and the fitted one beside it.
    Learned are the bundle's latest judged groups, each request's once, oldest first. `first`: the
    first feedback after a change of taste.
    """
    scorer = bundle.scorers["adapter"]
    fitted = heads.get(FITTED) or heads.get("adapter") or Head.of(scorer.head.empty())
    own = [feedback for feedback in judged if feedback.content["bundle"] == bundle.weights]
    latest = {feedback.request: feedback for feedback in own if feedback.content["group"]}
    ordered = sorted(latest.values(), key=lambda feedback: (feedback.created, feedback.request))
    taken = ordered[-FEEDBACK_WINDOW:]
    changed = None
    if first is not None:
        changed = sum((own.created, own.request) < (first.created, first.request) for own in taken)
    groups = _judged_groups(bundle, user, taken).groups
    return {FITTED: fitted, "adapter": scorer.online_update(fitted, groups, changed)}


def _judged_groups(bundle: "Bundle", user: str, judged: Sequence[StoredFeedback]) -> "TrainingSet":
    """What feedback says, in this order; without that of which nothing can be learned."""
    from hydra_llm.training.dataset import LabelledGroup
    from hydra_llm.training.train_scorer import target_rule, training_set

    groups = []
    for position, feedback in enumerate(own for own in judged if own.content["group"]):
        group, query = feedback.content["group"], feedback.request
        rights, gains, side = group["rights"], group["gains"], np.array(group["evidence"])
        of = LabelledGroup(user, query, group["left"], rights, gains, side, position, voted=True)
        groups.append(replace(of, exact=group.get("exact", False)))
    rule, scorer = target_rule(bundle, "adapter"), bundle.scorers["adapter"]
    return training_set(bundle, rule, scorer, groups)
