"""Baselines and bounds: the answer of the samples alone, the history alone, or the scorer alone.

`Oracle`, `NthSample` and `ByVoteShare` choose among HYDRA's own candidates; `WithoutLLM` and
`ScorerOnly` call no LLM. A method must beat them to show anything. Knows no metrics.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from hydra_llm.context import Context
from hydra_llm.pipeline import UserPipeline
from hydra_llm.select import Selection, Selector, all_labels, select
from hydra_llm.tasks.base import Task
from hydra_llm.types import Answer, Candidate, Proposal, Query, Record

# ---- among the LLM's samples


@dataclass(frozen=True)
class Oracle(Selector):
    """Upper bound: the best of the LLM's samples by the gold answer."""

    task: Task

    def choose(self, context: Context, candidates: Sequence[Candidate]) -> Selection:
        gold = context.query.gold or ""
        gains = [self.task.gain(c.answer, gold) if c.votes else -1.0 for c in candidates]
        return Selection(list(candidates), gains.index(max(gains)))


@dataclass(frozen=True)
class NthSample(Selector):
    """The LLM's sample of this index; their mean is the expected score of a random sample."""

    place: int

    def choose(self, context: Context, candidates: Sequence[Candidate]) -> Selection:
        samples = [i for i, c in enumerate(candidates) for _ in range(c.votes)] or [0]
        return Selection(list(candidates), samples[self.place % len(samples)])


@dataclass(frozen=True)
class ByVoteShare(Selector):
    """By vote shares the mode (self-consistency) or the best expected gain (minimum Bayes risk)."""

    task: Task
    how: str

    def choose(self, context: Context, candidates: Sequence[Candidate]) -> Selection:
        places = [i for i, c in enumerate(candidates) if c.answer is not None and c.votes]
        if not places:
            return Selection(list(candidates), 0)
        parsed = [candidates[i] for i in places]
        votes = np.array([float(candidate.votes) for candidate in parsed])
        pick = select(self.task, parsed, votes, votes / votes.sum(), self.how)
        return Selection(list(candidates), places[pick])


# ---- without any LLM


@dataclass(frozen=True)
class WithoutLLM:
    """An answer from the user's visible records alone."""

    personalizer: UserPipeline
    answer: Callable[[Query, Sequence[Record]], str]

    async def aanswer(self, query: Query) -> Answer:
        started = perf_counter()
        context = self.personalizer.context_of(query)
        text = self.answer(query, context.visible)
        candidates, seconds = (Candidate(text, text),), {"retrieve": perf_counter() - started}
        proposal = Proposal(query, (), (), (), candidates, seconds=seconds)
        return Answer(text, proposal, candidates, 0)


@dataclass(frozen=True)
class ScorerOnly:
    """All labels by the scorer, without the LLM's votes: what `hydra` is better by is the LLM's."""

    personalizer: UserPipeline

    async def aanswer(self, query: Query) -> Answer:
        labels = tuple(all_labels(self.personalizer.task, []))
        proposal = Proposal(query, (), (), (), labels)
        return self.personalizer.decide(self.personalizer.context_of(query), proposal)
