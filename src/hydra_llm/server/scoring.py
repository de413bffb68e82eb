"""What runs in the thread that scores (together.py): a user's records for a question, and the user's order of an LLM's choices.

Knows no HTTP, no store and no upstream.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra_llm.personalizer import gather, read_answer
from hydra_llm.server.observe import Observer
from hydra_llm.server.people import Person
from hydra_llm.server.serving import Serving
from hydra_llm.server.wire import readable, text_of
from hydra_llm.types import Candidate, Query, Ranked, Record

LATER = 2**62
"""The position of a question that comes after every record."""


@dataclass(frozen=True)
class Found:
    """A user with the records for a question, best first."""

    person: Person
    visible: tuple[Record, ...]
    ranked: list[Ranked]
    seconds: dict[str, float]
    warm: bool = True
    """Whether the records have been encoded: until then the retriever's order and the first answer are what there is time for."""


def find(serving: Serving, person: Person, question: str, observer: Observer) -> Found | None:
    """The user's records for a question, best first; None where there are none."""
    person = serving.people.seat(person)
    visible = serving.readable(person.records)
    if not visible:
        return None
    query, clock = Query(person.name, "asked", question, position=LATER), [time.perf_counter()]
    retrieved = serving.retriever.retrieve(query, visible, serving.settings.retrieved)
    clock.append(time.perf_counter())
    if not serving.people.is_warm(person, visible):
        return Found(person, tuple(visible), retrieved, {"retrieve": clock[1] - clock[0], "rerank": 0.0}, warm=False)
    try:
        ranked = serving.reranker.order(query, retrieved, visible)
    except Exception as error:  # the retriever's order is what an answer without this program would get
        observer.failed("reranker", error)
        ranked = retrieved
    clock.append(time.perf_counter())
    return Found(person, tuple(visible), ranked, {"retrieve": clock[1] - clock[0], "rerank": clock[2] - clock[1]})


@dataclass(frozen=True)
class Picked:
    """Choices in this user's order, and the candidates that they are: one for each choice that differs from those before it."""

    choices: list[dict[str, Any]]
    candidates: list[Candidate]
    """[i] is what the adapter read of choice i; the choices behind them are repetitions."""
    abstained: bool = False


def as_they_came(choices: Sequence[dict[str, Any]]) -> Picked:
    """The choices in the order in which they came."""
    texts = [readable(text_of(choice["message"])) for choice in choices]
    return Picked(list(choices), [Candidate(text, text, 1) for text in texts])


def choose(
    serving: Serving, person: Person, question: str, visible: Sequence[Record], choices: Sequence[dict[str, Any]], texts: Sequence[str]
) -> Picked:
    """The user's order of the choices: the pick, then by score; equal answers behind all others. `texts`: what each choice says."""
    if serving.task.labels and serving.task.parse(texts[0], "strict") is None:
        return as_they_came(choices)  # the LLM was not asked for a label: no label is an answer
    serving.people.seat(person)  # feedback or others may have pushed the head out
    offered, _ = gather(serving.task, texts, 1, serving.settings)
    chosen = serving.adapter.choose(Query(person.name, "asked", question, position=LATER), offered, visible)
    said: dict[str, int] = {}
    for i, text in enumerate(texts):
        said.setdefault(_key(text, read_answer(serving.task, text, serving.settings)), i)
    scores = [candidate.score if candidate.score is not None else float("-inf") for candidate in chosen.candidates]
    out, candidates, used = [], [], set()
    for which in sorted(range(len(offered)), key=lambda i: (i != chosen.chosen, -scores[i], i)):
        candidate = chosen.candidates[which]
        place = said.get(_key(candidate.text, candidate.answer))
        if place is None and which != chosen.chosen:
            continue  # a label that nobody said
        # The pick may be such a label: the scorer's word against the LLM's.
        out.append(choices[place] if place is not None else _said_by_nobody(choices[0], candidate.text))
        candidates.append(candidate)
        used.add(place)
    rest = [choice for i, choice in enumerate(choices) if i not in used]
    return Picked(out + rest, candidates, chosen.abstained)


def _said_by_nobody(like: dict[str, Any], text: str) -> dict[str, Any]:
    return {**like, "message": {"role": "assistant", "content": text}, "logprobs": None, "finish_reason": "stop"}


def _key(text: str, answer: str | None) -> str:
    """What makes two texts the same candidate."""
    return answer if answer is not None else f"\0{text}"
