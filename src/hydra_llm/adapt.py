"""Score the candidates as this user would, and pick (paper section 3.3; choosing: DESIGN 5).

    best            the candidate with the highest score, as published
    expected-gain   the scores are read as a distribution over what the user wants, and the pick maximises the expected gain
                    under the task's own gain: the mode for labels, the median for ratings, minimum Bayes risk for texts
Knows no LLM. `FirstCandidate` is the null part, `RandomCandidate` a control.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from hydra_llm.evidence import EvidenceMaker
from hydra_llm.model.cases import make_groups
from hydra_llm.model.scorer import FactorizedScorer
from hydra_llm.tasks.task import Task
from hydra_llm.types import Candidate, Query, Record


class Adapter(Protocol):
    """Anything that picks one of the candidates for a user."""

    def choose(self, query: Query, candidates: Sequence[Candidate], visible: Sequence[Record]) -> tuple[list[Candidate], int]:
        """The candidates, scored where there is a scorer, and the index of the pick."""
        ...


class FirstCandidate:
    """The LLM's first answer: no adapter."""

    def choose(self, query: Query, candidates: Sequence[Candidate], visible: Sequence[Record]) -> tuple[list[Candidate], int]:
        return list(candidates), 0


class RandomCandidate:
    """A control: each of the LLM's samples is as likely as its votes; the same one for the same seed and query."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def choose(self, query: Query, candidates: Sequence[Candidate], visible: Sequence[Record]) -> tuple[list[Candidate], int]:
        lots = [i for i, candidate in enumerate(candidates) for _ in range(candidate.votes)]
        return list(candidates), random.Random(f"{self.seed}\n{query.user}\n{query.id}").choice(lots or [0])


class LearnedAdapter:
    """Picks by the user's factorized scorer; without `votes`, labels are scored as if nobody had been asked."""

    def __init__(self, scorer: FactorizedScorer, evidence: EvidenceMaker, *, select: str = "expected-gain", votes: bool = True):
        self.scorer, self.evidence, self.select, self.votes = scorer, evidence, select, votes

    def choose(self, query: Query, candidates: Sequence[Candidate], visible: Sequence[Record]) -> tuple[list[Candidate], int]:
        task = self.evidence.task
        places = [place for place, candidate in enumerate(candidates) if candidate.answer is not None]
        if not places:
            return list(candidates), 0
        readable = [candidates[place] for place in places]
        offered = all_labels(task, readable) if self.scorer.combiner.kind == "label" else readable
        by_answer = dict(zip([candidate.answer for candidate in offered], self._scores(query, offered, visible), strict=True))
        scores = torch.stack([by_answer[candidate.answer] for candidate in readable])
        shares = self.scorer.shares(scores)
        pick = select(task, readable, scores.numpy(), shares.numpy(), self.select)
        scored = list(candidates)
        for place, score, share in zip(places, scores.tolist(), shares.tolist(), strict=True):
            scored[place] = replace(candidates[place], score=score, probability=share)
        return scored, places[pick]

    def _scores(self, query: Query, offered: Sequence[Candidate], visible: Sequence[Record]) -> torch.Tensor:
        """[C] the user's scores of the offered candidates."""
        if not self.votes and self.evidence.task.labels:
            offered = [replace(candidate, votes=0, greedy=False) for candidate in offered]
        rows = self.evidence.adapter(query, offered, self.evidence.remember(visible))
        texts = [candidate_text(self.evidence.task, candidate) for candidate in offered]
        groups = make_groups(self.evidence.store, self.scorer.combiner, [query.input], [texts], [rows.tolist()])
        return self.scorer.score(groups, [query.user], [len(visible)])[0]


def select(task: Task, candidates: Sequence[Candidate], scores: np.ndarray, shares: np.ndarray, how: str) -> int:
    """The index of the pick; ties go to the earlier candidate, so to the greedy answer first."""
    if how == "best" or task.kind == "classification":  # for labels the mode maximises the expected gain
        return int(np.argmax(scores))
    gains = np.asarray(task.gain_matrix([candidate.answer or "" for candidate in candidates]))
    return int(np.argmax(np.round(gains @ shares, 12)))


def all_labels(task: Task, candidates: Sequence[Candidate]) -> list[Candidate]:
    """One candidate per label in the task's order, with the votes that it has among `candidates`."""
    known = {candidate.answer: candidate for candidate in candidates}
    return [known.get(label) or Candidate(label, label) for label in task.labels]


def candidate_text(task: Task, candidate: Candidate) -> str:
    """What the adapter reads of a candidate."""
    return (candidate.answer or candidate.text) if task.labels else candidate.text
