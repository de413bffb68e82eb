"""What runs in the thread that scores (together.py): a user's records for a question, and the
user's order of an LLM's choices.

Knows no HTTP, no store and no upstream.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hydra_llm.gateway.deployment import Deployment
from hydra_llm.gateway.schemas import text_of
from hydra_llm.gateway.telemetry import Telemetry
from hydra_llm.gateway.user_cache import UserSnapshot
from hydra_llm.pipeline import candidate_key
from hydra_llm.rerank import LearnedReranker, record_text
from hydra_llm.select import LearnedSelector, candidate_text
from hydra_llm.text import repair
from hydra_llm.types import Candidate, Query, Ranked, Record

LATER = 2**62
"""The position of a question that comes after every record."""


@dataclass(frozen=True)
class Found:
    """A user with the records for a question, best first."""

    person: UserSnapshot
    visible: tuple[Record, ...]
    ranked: list[Ranked]
    seconds: dict[str, float]
    warm: bool = True
    """Whether the records have been encoded: until then the retriever's order and the first answer
    are what there is time for.
    """


@dataclass
class Search:
    """A user's records for a question, in two steps: scorers of pairs get those of all who wait
    encoded between them.
    """

    serving: Deployment
    person: UserSnapshot
    question: str
    observer: Telemetry
    wanted: int = 0
    """Records that the request wants in its prompt, where it says so: so many are retrieved at
    least.
    """
    _retrieved: list[Ranked] | None = None
    _visible: list[Record] = field(default_factory=list)
    _seconds: dict[str, float] = field(default_factory=dict)

    @property
    def query(self) -> Query:
        return Query(self.person.name, "asked", self.question, position=LATER)

    def pairs(self) -> list[tuple[str, str]]:
        """What the reranker will read, where it reads pairs."""
        if not _reads_pairs(self.serving.pipeline.reranker):
            return []
        with_answer = self.serving.settings.record_answer
        return [
            (self.question, record_text(item.record, with_answer=with_answer))
            for item in self._retrieve()
        ]

    def found(self) -> Found | None:
        """The records, best first; None where there are none."""
        serving = self.serving
        retrieved = self._retrieve()
        if not self._visible:
            return None
        found = partial(Found, self.person, tuple(self._visible))
        if not serving.people.is_warm(self.person, self._visible):
            return found(retrieved, {**self._seconds, "rerank": 0.0}, warm=False)
        started = time.perf_counter()
        try:
            context = serving.pipeline.context(self.query, self._visible, self.person.heads)
            ranked = serving.pipeline.rerank(context, retrieved)
        except (
            Exception
        ) as error:  # the retriever's order is what an answer without this program would get
            self.observer.failed("reranker", error)
            ranked = retrieved
        return found(ranked, {**self._seconds, "rerank": time.perf_counter() - started})

    def _retrieve(self) -> list[Ranked]:
        if self._retrieved is None:
            self._visible = self.serving.readable(self.person.records)
            started = time.perf_counter()
            retriever, most = (
                self.serving.pipeline.retriever,
                max(self.serving.settings.retrieved, self.wanted),
            )
            self._retrieved = (
                retriever.retrieve(self.query, self._visible, most) if self._visible else []
            )
            self._seconds = {"retrieve": time.perf_counter() - started}
        return self._retrieved


def _reads_pairs(scorer: Any) -> bool:
    """Whether a reranker or adapter is a learned one that reads a question and a text at once."""
    return (
        isinstance(scorer, LearnedReranker | LearnedSelector)
        and scorer.scorer.interaction.reads_pairs
    )


def pairs_of(serving: Deployment, question: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    """What the adapter will read of an LLM's texts, where it reads pairs."""
    if not _reads_pairs(serving.pipeline.selector) or _says_no_label(serving, texts):
        return []
    offered, _ = serving.pipeline.read(texts, 1)
    return [
        (question, candidate_text(serving.task, each))
        for each in offered
        if each.answer is not None
    ]


def _says_no_label(serving: Deployment, texts: Sequence[str]) -> bool:
    """Whether the LLM was not asked for a label: then no label is an answer."""
    return bool(serving.task.labels) and serving.task.parse(texts[0], "strict") is None


@dataclass(frozen=True)
class Picked:
    """Choices in this user's order, and the candidates that they are: one for each choice that
    differs from those before it.
    """

    choices: list[dict[str, Any]]
    candidates: list[Candidate]
    """[i] is what the adapter read of choice i; the choices behind them are repetitions."""
    abstained: bool = False
    repeats: tuple[int, ...] = ()
    """Of each choice behind the candidates, which of them it repeats."""


def as_they_came(choices: Sequence[dict[str, Any]]) -> Picked:
    """The choices in the order in which they came."""
    texts = [repair(text_of(choice["message"])) for choice in choices]
    return Picked(list(choices), [Candidate(text, text, 1) for text in texts])


def choose(
    serving: Deployment,
    person: UserSnapshot,
    question: str,
    visible: Sequence[Record],
    choices: Sequence[dict[str, Any]],
    texts: Sequence[str],
) -> Picked:
    """The user's order of the choices: the pick, then by score; equal answers behind all others.
    `texts`: what each choice says.
    """
    if _says_no_label(serving, texts):
        return as_they_came(choices)
    offered, _ = serving.pipeline.read(texts, 1)
    query = Query(person.name, "asked", question, position=LATER)
    context = serving.pipeline.context(query, visible, person.heads)
    chosen = serving.pipeline.select(context, offered)
    keys, said = (
        [candidate_key(text, serving.task.read(text, serving.settings.parsing)) for text in texts],
        dict[str, int](),
    )
    for i, key in enumerate(keys):
        said.setdefault(key, i)
    scores = [
        candidate.score if candidate.score is not None else float("-inf")
        for candidate in chosen.candidates
    ]
    out, candidates, used = [], [], set()
    for which in sorted(range(len(offered)), key=lambda i: (i != chosen.chosen, -scores[i], i)):
        candidate = chosen.candidates[which]
        place = said.get(candidate_key(candidate.text, candidate.answer))
        if place is None and which != chosen.chosen:
            continue  # a label that nobody said
        # The pick may be such a label: the scorer's word against the LLM's.
        out.append(
            choices[place] if place is not None else _said_by_nobody(choices[0], candidate.text)
        )
        candidates.append(candidate)
        used.add(place)
    placed = {candidate_key(each.text, each.answer): place for place, each in enumerate(candidates)}
    rest = [i for i in range(len(choices)) if i not in used]
    return Picked(
        [*out, *(choices[i] for i in rest)],
        candidates,
        chosen.abstained,
        tuple(placed[keys[i]] for i in rest),
    )


def _said_by_nobody(like: dict[str, Any], text: str) -> dict[str, Any]:
    return {
        **like,
        "message": {"role": "assistant", "content": text},
        "logprobs": None,
        "finish_reason": "stop",
    }
