"""Baselines and bounds: the answer of the samples alone, the history alone, or the scorer alone.

`Oracle`, `NthSample` and `ByVoteShare` choose among HYDRA's own candidates; `WithoutLLM` and
`ScorerOnly` call no LLM. A method must beat them to show anything. Knows no metrics.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from hydra_llm.history import before
from hydra_llm.select import Choice, Selector, all_labels, select
from hydra_llm.tasks.base import Task
from hydra_llm.types import Answer, Candidate, Proposal, Query, Record

# ---- among the LLM's samples


@dataclass(frozen=True)
class Oracle:
    """Upper bound: the best of the LLM's samples by the gold answer."""

    task: Task

    def choose(
        self, query: Query, candidates: Sequence[Candidate], visible: Sequence[Record]
    ) -> Choice:
        gains = [
            self.task.gain(each.answer, query.gold or "") if each.votes else -1.0
            for each in candidates
        ]
        return Choice(list(candidates), gains.index(max(gains)))


@dataclass(frozen=True)
class NthSample:
    """The LLM's sample of this index; the mean over all indices is the expected score of a
    uniformly random sample.
    """

    place: int

    def choose(
        self, query: Query, candidates: Sequence[Candidate], visible: Sequence[Record]
    ) -> Choice:
        samples = [
            place for place, candidate in enumerate(candidates) for _ in range(candidate.votes)
        ] or [0]
        return Choice(list(candidates), samples[self.place % len(samples)])


@dataclass(frozen=True)
class ByVoteShare:
    """Vote shares as the distribution: the mode (self-consistency), or the highest expected gain
    (minimum Bayes risk).
    """

    task: Task
    how: str

    def choose(
        self, query: Query, candidates: Sequence[Candidate], visible: Sequence[Record]
    ) -> Choice:
        readable = [
            place
            for place, candidate in enumerate(candidates)
            if candidate.answer is not None and candidate.votes
        ]
        if not readable:
            return Choice(list(candidates), 0)
        votes = np.array([float(candidates[place].votes) for place in readable])
        pick = select(
            self.task, [candidates[i] for i in readable], votes, votes / votes.sum(), self.how
        )
        return Choice(list(candidates), readable[pick])


# ---- without any LLM


@dataclass(frozen=True)
class WithoutLLM:
    """An answer from the user's visible records alone."""

    records: Mapping[str, Sequence[Record]]
    answer: Callable[[Query, Sequence[Record]], str]

    async def aanswer(self, query: Query) -> Answer:
        started = perf_counter()
        text = self.answer(query, before(self.records.get(query.user, ()), query))
        candidate = Candidate(text, text)
        seconds = {"retrieve": perf_counter() - started}
        return Answer(
            text, Proposal(query, (), (), (), (candidate,), seconds=seconds), (candidate,), 0
        )


@dataclass(frozen=True)
class ScorerOnly:
    """All labels by the factorized scorer, without the LLM's votes: the difference to `hydra` is
    what the LLM adds.
    """

    task: Task
    records: Mapping[str, Sequence[Record]]
    adapter: Selector

    async def aanswer(self, query: Query) -> Answer:
        started = perf_counter()
        visible = before(self.records.get(query.user, ()), query)
        blank = tuple(all_labels(self.task, []))
        candidates, chosen, _ = self.adapter.choose(query, blank, visible)
        proposal = Proposal(query, (), (), (), blank, seconds={"adapt": perf_counter() - started})
        return Answer(candidates[chosen].text, proposal, tuple(candidates), chosen)
