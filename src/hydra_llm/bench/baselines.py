"""Controls and bounds: what the samples alone, the history alone, or the scorer alone would answer.

`Oracle`, `NthSample` and `ByVoteShare` choose among HYDRA's own candidates; `WithoutLLM` and
`ScorerOnly` ask no LLM. A method that does not beat them has shown nothing. Knows no metrics.
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
    """A bound: the best of what the LLM said, by the gold answer. Labels that it never named are no
    candidates here.
    """

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
    """A bound: the LLM's sample of this place. A query's answers at all places together are what
    one by lot can be expected to be worth.
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
    """The LLM's own votes as the distribution: most votes (self-consistency), or the greatest
    expected gain (minimum Bayes risk).
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
    """What the user's visible records alone answer."""

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
    """Every label by the factorized scorer, without any vote of the LLM: what is missing to `hydra`
    is what the LLM adds.
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


def typical(task: Task, outputs: Sequence[str]) -> str:
    """The lower median of ratings, the most frequent label (the latest of equals), the latest text;
    without records the middle label.
    """
    if not outputs:
        return task.labels[len(task.labels) // 2] if task.labels else ""
    if task.kind == "rating":
        return sorted(outputs, key=float)[(len(outputs) - 1) // 2]
    if task.kind == "generation":
        return outputs[-1]
    return max(reversed(outputs), key=list(outputs).count)
