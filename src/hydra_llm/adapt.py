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
    """Picks by the user's factorized scorer."""

    def __init__(self, scorer: FactorizedScorer, evidence: EvidenceMaker, *, select: str = "expected-gain"):
        self.scorer, self.evidence, self.select = scorer, evidence, select

    def choose(self, query: Query, candidates: Sequence[Candidate], visible: Sequence[Record]) -> tuple[list[Candidate], int]:
        task = self.evidence.task
        readable = [candidate for candidate in candidates if candidate.answer is not None]
        if not readable:
            return list(candidates), 0
        by_label = self.scorer.combiner.kind == "label"
        offered = all_labels(task, readable) if by_label else readable
        rows = self.evidence.adapter(query, offered, self.evidence.remember(visible))
        texts = [candidate_text(task, candidate) for candidate in offered]
        groups = make_groups(self.evidence.store, self.scorer.combiner, [query.input], [texts], [rows.tolist()])
        scores = dict(zip([c.answer for c in offered], self.scorer.score(groups, [query.user])[0].tolist(), strict=True))
        own = np.array([scores[candidate.answer] for candidate in readable])
        shares = self._shares(own)
        pick = readable[select(task, readable, own, shares, self.select)]
        score_of = {id(c): (float(s), float(p)) for c, s, p in zip(readable, own, shares, strict=True)}
        scored = [replace(c, score=score_of[id(c)][0], probability=score_of[id(c)][1]) if id(c) in score_of else c for c in candidates]
        return scored, next(i for i, candidate in enumerate(candidates) if candidate is pick)

    def _shares(self, scores: np.ndarray) -> np.ndarray:
        """Scores of a group as a distribution."""
        odds = np.exp(scores - scores.max()) if self.scorer.loss == "listwise" else 1 / (1 + np.exp(-scores))
        return np.asarray(odds / max(float(odds.sum()), 1e-12))


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
