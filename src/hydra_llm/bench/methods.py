"""Methods to compare: each is a name with parameters and a `Personalizer` with other parts (STYLE: a baseline is a null part).

Knows neither data sets nor metrics. Sources: HYDRA, sections 4.1 and 4.2; LaMP; DESIGN 5.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from hydra_llm.adapt import FirstCandidate, RandomCandidate
from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.errors import SettingsError
from hydra_llm.history import before
from hydra_llm.llm.base import ChatLLM
from hydra_llm.personalizer import Personalizer
from hydra_llm.retrieve import Nothing
from hydra_llm.tasks.task import Task
from hydra_llm.types import Answer, Candidate, Proposal, Query, Record


class Answerer(Protocol):
    """What a method is when it runs."""

    async def aanswer(self, query: Query) -> Answer:
        """The method's answer. Raises LLMError where the LLM gave none."""
        ...


@dataclass(frozen=True)
class Parts:
    """What methods are built from."""

    bundle: Bundle
    llm: ChatLLM
    settings: Settings
    records: Mapping[str, Sequence[Record]]

    def personalizer(self, *, rerank: bool = False, adapt: bool = False, **settings: object) -> Personalizer:
        """The main path with the chosen parts; the others are null parts. Records are those of the run's users."""
        chosen = self.settings.model_copy(update=settings)
        return replace(self.bundle.personalizer(self.llm, chosen, rerank=rerank, adapt=adapt), records=self.records)


@dataclass(frozen=True)
class Method:
    """A line of the table."""

    name: str
    what: str
    """One line for people."""
    group: str
    """prompt, hydra or control."""
    build: Callable[[Parts], Answerer]


def _zero_shot(parts: Parts) -> Answerer:
    return replace(parts.personalizer(samples=1, greedy_first=True, k=0), retriever=Nothing(), adapter=FirstCandidate())


def _rag(parts: Parts) -> Answerer:
    return parts.personalizer(samples=1, greedy_first=True)


def _reranker(parts: Parts) -> Answerer:
    return parts.personalizer(rerank=True, samples=1, greedy_first=True)


def _adapter(parts: Parts) -> Answerer:
    return replace(parts.personalizer(adapt=True, k=0), retriever=Nothing())


def _published(parts: Parts) -> Answerer:
    sampled = {"candidates": "sampled", "select": "best", "temperature": 1.0, "greedy_first": False}
    return parts.personalizer(rerank=True, adapt=True, **sampled)


def _hydra(parts: Parts) -> Answerer:
    return parts.personalizer(rerank=True, adapt=True)


def _random(parts: Parts) -> Answerer:
    return replace(parts.personalizer(rerank=True), adapter=RandomCandidate(parts.settings.seed))


@dataclass(frozen=True)
class UserMajority:
    """The user's own most frequent label, or median rating: a control without any LLM."""

    task: Task
    records: Mapping[str, Sequence[Record]]

    async def aanswer(self, query: Query) -> Answer:
        visible = before(self.records.get(query.user, ()), query)
        text = typical(self.task, [record.output for record in visible])
        candidate = Candidate(text, text)
        return Answer(text, Proposal(query, (), (), (), (candidate,)), (candidate,), 0)


def typical(task: Task, outputs: Sequence[str]) -> str:
    """The lower median of ratings, the most frequent label (the latest of equals), the latest text; without records the middle label."""
    if not outputs:
        return task.labels[len(task.labels) // 2] if task.labels else ""
    if task.kind == "rating":
        return sorted(outputs, key=float)[(len(outputs) - 1) // 2]
    if task.kind == "generation":
        return outputs[-1]
    return max(reversed(outputs), key=list(outputs).count)


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("zero-shot", "the LLM without any record", "prompt", _zero_shot),
        Method("rag", "the retriever's first k records in the prompt", "prompt", _rag),
        Method("hydra-reranker", "reranked records, first answer", "hydra", _reranker),
        Method("hydra-adapter", "answers without records, the adapter picks", "hydra", _adapter),
        Method("hydra-published", "reranker and adapter: sampled candidates at temperature 1, best score", "hydra", _published),
        Method("hydra", "reranker and adapter with this project's choosing", "hydra", _hydra),
        Method("random", "one of hydra's sampled answers by lot", "control", _random),
        Method("user-majority", "the user's own median or majority, no LLM", "control", lambda p: UserMajority(p.bundle.task, p.records)),
    )
}


def find_methods(names: Sequence[str]) -> list[Method]:
    """The methods of these names; `all` is every one.

    Raises:
        SettingsError: an unknown name, or none at all.
    """
    if not names:
        raise SettingsError(f"no method is named: take some of {', '.join(METHODS)}, or all")
    if list(names) == ["all"]:
        return list(METHODS.values())
    for name in names:
        if name not in METHODS:
            raise SettingsError(f"unknown method '{name}': take some of {', '.join(METHODS)}, or all")
    return [METHODS[name] for name in names]
