"""What the scoring thread does for a request: a user's records, and the LLM's choices, in order.
A choice is what an OpenAI completion holds; a candidate is what the pipeline scores.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from hydra_llm.context import Context
from hydra_llm.gate import NOT_RELEVANT, OFF_TASK, OpenGate
from hydra_llm.gateway.deployment import Deployment
from hydra_llm.gateway.telemetry import Telemetry
from hydra_llm.gateway.user_cache import UserSnapshot
from hydra_llm.llm.wire import answer_of
from hydra_llm.pipeline import Pipeline, candidate_key
from hydra_llm.reasons import Reasons
from hydra_llm.reasons import of as reasons_of
from hydra_llm.tasks.base import PromptWords
from hydra_llm.text import repair
from hydra_llm.types import Candidate, Query, Ranked, Record

Choice = dict[str, Any]
SCORED_CHARACTERS = 20_000  # of an answer; a longer one takes longer than all others together


@dataclass(eq=False)
class RecordSearch:
    """A user's records for one question, in two steps as a cross-encoder reads pairs: first `pairs`
    of all waiting requests, which are encoded in one batch (batching.py), then `run`.
    """

    deployment: Deployment
    user: UserSnapshot
    question: str
    telemetry: Telemetry
    k: int  # records that the request asks for: so many are retrieved at least
    in_task_words: bool = False  # whether the question is the task's instruction around a text
    gated: bool = True  # False: the caller knows that records may be used
    seconds: dict[str, float] = field(default_factory=dict, init=False)  # by stage
    beside: list[list[Ranked]] = field(default_factory=list, init=False)
    """The records of each prompt that is asked beside the first; none before `warm`."""
    reason: str = field(default="", init=False)  # why no record may be used; empty if some may
    span: Any = field(default=None, init=False)  # around the search, in the request's own task

    @cached_property
    def context(self) -> Context:
        """The question comes after all of the user's records."""
        visible = self.deployment.readable(self.user.records)
        query = Query(self.user.name, "asked", self.question)
        return self.deployment.pipeline.context(query, visible, self.user.heads)

    @cached_property
    def warm(self) -> bool:
        """Whether the user's history is encoded; else the retriever's order is kept."""
        visible = self.context.visible
        return bool(visible) and self.deployment.users.is_warm(self.user, visible)

    @cached_property
    def ranked(self) -> list[Ranked]:
        """Best first: in the retriever's order until they are reranked."""
        started, deployment = time.perf_counter(), self.deployment
        pipeline, visible = deployment.pipeline, self.context.visible
        if deployment.searches_vectors and not self.warm:
            pipeline = replace(pipeline, retriever=deployment.words)
        with self.telemetry.tracing.stage("retrieve", self.span) as span:
            retrieved = pipeline.retrieve(self.context, self.k)
            span.set(hydra__records=len(visible), hydra__retrieved=len(retrieved))
        self.seconds["retrieve"] = time.perf_counter() - started
        return retrieved

    def texts(self) -> list[str]:
        """The question, if a stage compares its vector: else nobody waits for that."""
        judged = self.gated and self.deployment.pipeline.gate_for(self.in_task_words).reads_vectors
        return [self.question] if self.warm or judged else []

    def pairs(self) -> list[tuple[str, str]]:
        """What a cross-encoder will read."""
        return self.deployment.pipeline.reranker.pairs(self.context, self.ranked)

    def run(self) -> None:
        """Rank the records that pass the gate."""
        with self.telemetry.tracing.stage("rerank", self.span) as span:
            self._run()
            shown, reason = len(self.ranked), self.reason or "relevant"
            span.set(hydra__relevant=shown, hydra__warm=self.warm, hydra__reason=reason)

    def _run(self) -> None:
        pipeline, visible = self.deployment.pipeline, self.context.visible
        words = self.in_task_words
        if not self.gated:
            pipeline = replace(pipeline, gate=OpenGate())
        if visible and not pipeline.belongs(self.context, in_task_words=words):
            self.reason, self.ranked = OFF_TASK, []
            return
        retrieved, started = self.ranked, time.perf_counter()
        if self.warm:
            try:
                self.ranked = pipeline.rerank(self.context, retrieved)
            except Exception as error:  # the answer is worth more than the order
                self.telemetry.failed("reranker", error)
        # What is not encoded yet is not waited for: then the question alone was judged.
        if self.warm or not pipeline.gate.reads_vectors:
            found = self.ranked
            self.ranked = pipeline.relevant(self.context, found, in_task_words=words)
            self.reason = NOT_RELEVANT if found and not self.ranked else ""
        if self.warm:
            self.beside = pipeline.shown_beside(self.context, in_task_words=words)
        self.seconds["rerank"] = time.perf_counter() - started
        self.context = self.context.without_vectors()  # it waits while others are answered


@dataclass(frozen=True)
class RankedChoices:
    """Choices, best first: those that differ, then those that repeat one of them."""

    choices: list[Choice]
    candidates: list[Candidate]  # [i] of choice i; the choices behind them are repetitions
    abstained: bool = False
    repeats: tuple[int, ...] = ()  # index of the choice that a repetition repeats
    unscored: str | None = None  # why the candidates have no scores; None where they have
    reasons: Reasons | None = None  # why the first one was picked

    def stored(self, count: int, visible: int) -> dict[str, Any]:
        """What the store keeps of a request for feedback. `count`: choices that the caller saw."""
        texts = choice_texts(self.choices)
        names = ("text", "answer", "votes", "greedy", "score", "probability")
        candidates = [
            {"said": text, **{name: getattr(candidate, name) for name in names}}
            for candidate, text in zip(self.candidates, texts, strict=False)
        ]
        repeated = zip(self.repeats, texts[len(candidates) : count], strict=False)
        repeats = [{"candidate": which, "said": text} for which, text in repeated]
        how: dict[str, Any] = {"abstained": self.abstained, "unscored": self.unscored}
        if self.reasons:
            how["why"] = self.reasons.to_json()
        return {"candidates": candidates, "repeats": repeats, "visible": visible, **how}


def choice_texts(choices: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each choice answers, as every file and encoder takes it."""
    return [repair(answer_of(choice["message"])) for choice in choices]


def scored_texts(choices: Sequence[Mapping[str, Any]]) -> list[str]:
    """The beginning of each, as scorers read it: candidates are compared word by word."""
    return [text[:SCORED_CHARACTERS] for text in choice_texts(choices)]


def without_words(words: PromptWords, choice: Choice) -> Choice:
    """The choice without what its answer repeats of the prompt; its reasoning stays."""
    content = choice["message"].get("content")
    answer = answer_of(choice["message"])
    clean = words.stripped(answer)
    if not isinstance(content, str) or clean == answer:
        return choice
    shown = content.rpartition(answer)[0] + clean
    return {**choice, "message": {**choice["message"], "content": shown}}


def unranked(choices: Sequence[Choice], reason: str) -> RankedChoices:
    """The choices in the order in which they came, without scores for this reason."""
    candidates = [Candidate(text, text, 1) for text in choice_texts(choices)]
    return RankedChoices(list(choices), candidates, unscored=reason)


def rank(
    pipeline: Pipeline,
    context: Context,
    choices: Sequence[Choice],
    greedy: int,
    explained: Sequence[Record] = (),
) -> RankedChoices:
    """The choices in the user's order: the pick, then by score; equal answers behind all others.
    The first `greedy` choices are of temperature 0; `explained` are records of which the reasons
    tell what each adds.
    """
    texts, parsing = scored_texts(choices), pipeline.settings.parsing
    offered, _ = pipeline.read(texts, greedy)
    selection = pipeline.select(context, offered)
    keys = [candidate_key(text, pipeline.task.read(text, parsing)) for text in texts]
    first = {key: keys.index(key) for key in keys}
    order: list[Choice] = []
    ranked: dict[str, Candidate] = {}
    for index in selection.ranking:
        candidate = selection.candidates[index]
        key = candidate_key(candidate.text, candidate.answer)
        if key in first:
            order.append(choices[first[key]])
        elif index == selection.chosen:  # a label that the LLM never gave, picked by the scorer
            message = {"role": "assistant", "content": candidate.text}
            changed = {"message": message, "logprobs": None, "finish_reason": "stop"}
            order.append({**choices[0], **changed})
        else:
            continue
        ranked[key] = candidate
    rest = [i for i, key in enumerate(keys) if i != first[key]]
    repeats = tuple(list(ranked).index(keys[i]) for i in rest)
    order += [choices[i] for i in rest]
    reasons = reasons_of(pipeline.selector, context, selection, explained)
    return RankedChoices(
        order, list(ranked.values()), selection.abstained, repeats, reasons=reasons
    )
