"""A chat request on its way: as the caller wrote it, as the upstream will be asked, and what its
reply says of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any

from hydra_llm.gateway.deployment import Deployment
from hydra_llm.gateway.drift import CHANGED
from hydra_llm.gateway.sampling import Body
from hydra_llm.gateway.schemas import ChatRequest, PersonalizationOptions
from hydra_llm.gateway.scoring import RankedChoices, RecordSearch, choice_texts
from hydra_llm.gateway.structured import Form, is_text, question_of
from hydra_llm.tasks.base import PromptWords
from hydra_llm.text import repair
from hydra_llm.types import Record

COMPLETION_ID = "chatcmpl-"
"""Prefix of a personal completion's id; the request's id follows, so that feedback may name it."""


class NotPersonal(Exception):
    """A request is passed through, for the reason in the message."""


@dataclass(frozen=True)
class RoutedRequest:
    """What the upstream will be asked."""

    asked: ChatRequest  # what the gateway knows of it
    body: Body  # with records in its messages, if personal
    plain: Body  # as the caller wrote it
    deployment: Deployment
    reason: str | None = None  # why it is not personal; None where it is
    id: str = field(default_factory=lambda: f"req_{token_hex(12)}")
    seconds: dict[str, float] = field(default_factory=dict)
    beside: Sequence[Any] = ()  # messages of other prompts, each asked in place of a sample
    names_records: bool = True  # whether the reply has their ids
    candidates: int = 1  # how many to ask for; more only with an adapter and an encoded history

    @property
    def n(self) -> int:  # choices that the caller wants
        return self.asked.n or 1

    @property
    def completion_id(self) -> str:
        return f"{COMPLETION_ID}{self.id}"

    @property
    def options(self) -> PersonalizationOptions:
        return self.asked.personalization or PersonalizationOptions()

    def passed_through(self, reason: str) -> "RoutedRequest":
        """The same request as the caller wrote it."""
        return RoutedRequest(
            asked=self.asked,
            body=self.plain,
            plain=self.plain,
            deployment=self.deployment,
            reason=reason,
            id=self.id,
            seconds=self.seconds,
            names_records=self.names_records,
        )


@dataclass(frozen=True, kw_only=True)
class PersonalRequest(RoutedRequest):
    """A request with a user's records in its messages."""

    search: RecordSearch
    prompt_records: tuple[Record, ...]
    in_task_words: bool  # whether the question is the task's instruction around a text
    form: Form
    words: PromptWords | None  # what its prompt says around the records, if that may be repeated

    @property
    def unscored(self) -> str:
        """Why the LLM is asked for one text, which no adapter scores."""
        bundle = self.deployment.bundle
        if self.form == "fixed":
            return "not-text"
        if bundle is None or not bundle.adapter:
            return "no-bundle" if bundle is None else "no-adapter"
        return "one-sample" if self.search.warm else "not-encoded"

    @property
    def sample_if(self) -> Callable[[Body], bool] | None:
        """Whether an answer can be scored, where only it shows that; None where any can."""
        task = self.deployment.pipeline.task
        in_chat = bool(task.labels) and not self.in_task_words
        if self.form == "text" and (not in_chat or task.prompt.strip() == "{input}"):
            return None

        def scorable(completion: Body) -> bool:
            choices = completion["choices"]
            label = not in_chat or task.parse(choice_texts(choices)[0], "strict")
            return bool(label) and all(map(is_text, choices))

        return scorable


def asked_question(routed: RoutedRequest, shown: Sequence[str] = ()) -> str:
    """The question of a request that may be personal; `shown`: what its pictures show."""
    if not routed.options.enabled:
        raise NotPersonal("disabled")
    messages = routed.plain["messages"]
    question = question_of(messages)
    if not question.strip() and not shown:
        raise NotPersonal("no-question")
    return repair(question)


def personalization_of(
    request: PersonalRequest, ranked: RankedChoices, kept: bool
) -> dict[str, Any]:
    """The object `personalization` of a reply."""
    scores = [candidate.score for candidate in ranked.candidates]
    unread = "no-label" if all(score is None for score in scores) else None
    answer: dict[str, Any] = {
        "request_id": request.id if kept else None,
        "records": [own.id for own in request.prompt_records if request.names_records],
        "warm": request.search.warm,
        "candidates": len(ranked.candidates),
        "abstained": ranked.abstained,
        "scores": scores,
        "scores_reason": ranked.unscored or unread,
        "seconds": {stage: round(seconds, 4) for stage, seconds in request.seconds.items()},
    }
    if CHANGED in request.search.user.heads:
        answer["drift"] = True
    if request.options.explain:
        answer["texts"] = choice_texts(ranked.choices[: len(ranked.candidates)])
        answer["probabilities"] = [candidate.probability for candidate in ranked.candidates]
        records = request.prompt_records
        answer["why"] = ranked.reasons and ranked.reasons.to_json()
        answer["shown"] = [{"id": r.id, "input": r.input, "output": r.output} for r in records]
    return answer
