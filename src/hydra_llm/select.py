"""Score the candidates as this user would, and pick (paper section 3.3; choosing: DESIGN 5).

    best            the candidate with the highest score, as published
    expected-gain   the scores are read as a distribution over what the user wants, and the pick
                    maximises the expected gain
                    under the task's own gain: the mode for labels, the median for ratings, minimum
                    Bayes risk for texts
With caution it abstains, and the first candidate stands, where what the pick would gain is less
than `caution` times what this user's head leaves uncertain. Knows no LLM. `FirstCandidate` is the
null part.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import torch

from hydra_llm.model.grouping import make_groups
from hydra_llm.model.interactions import Groups
from hydra_llm.model.scorer import Scorer
from hydra_llm.side_features import Featurizer
from hydra_llm.tasks.base import Task
from hydra_llm.types import Candidate, Query, Record

TIE = 1e-5
"""How far apart values are that stand for equal ones."""


class Choice(NamedTuple):
    """What an adapter made of candidates."""

    candidates: list[Candidate]
    """With scores, where there is a scorer."""
    chosen: int
    """Index of the pick."""
    abstained: bool = False
    """Whether another one would have been picked, were its lead more certain."""


class Selector(Protocol):
    """Anything that picks one of the candidates for a user."""

    def choose(
        self, query: Query, candidates: Sequence[Candidate], visible: Sequence[Record]
    ) -> Choice:
        """The candidates, scored where there is a scorer, and the pick."""
        ...


class FirstCandidate:
    """The LLM's first answer: no adapter."""

    def choose(
        self, query: Query, candidates: Sequence[Candidate], visible: Sequence[Record]
    ) -> Choice:
        return Choice(list(candidates), 0)


class LearnedSelector:
    """Picks by the user's factorized scorer; without `votes`, labels are scored as if nobody had
    been asked.
    """

    def __init__(
        self,
        scorer: Scorer,
        evidence: Featurizer,
        *,
        select: str = "expected-gain",
        votes: bool = True,
        caution: float = 0.0,
    ):
        self.scorer, self.evidence, self.select, self.votes, self.caution = (
            scorer,
            evidence,
            select,
            votes,
            caution,
        )

    def choose(
        self, query: Query, candidates: Sequence[Candidate], visible: Sequence[Record]
    ) -> Choice:
        task = self.evidence.task
        places = [
            place for place, candidate in enumerate(candidates) if candidate.answer is not None
        ]
        if not places:
            return Choice(list(candidates), 0)
        readable = [candidates[place] for place in places]
        offered = (
            all_labels(task, readable) if self.scorer.interaction.kind == "label" else readable
        )
        groups = self._groups(query, offered, visible)
        by_answer = {candidate.answer: row for row, candidate in enumerate(offered)}
        rows = [by_answer[candidate.answer] for candidate in readable]
        scores = self.scorer.score(groups, [query.user], [len(visible)])[0][rows]
        shares = self.scorer.shares(scores)
        gains = _gains(task, readable, self.select)
        pick = _best(scores.numpy(), shares.numpy(), gains)
        scored = list(candidates)
        for place, score, share in zip(places, scores.tolist(), shares.tolist(), strict=True):
            scored[place] = replace(candidates[place], score=score, probability=share)
        if self.caution and places[0] == 0 and pick != 0:
            spread = self.scorer.covariance(groups, query.user, len(visible))
            if (
                spread is not None
                and _lead(shares, gains, spread[rows][:, rows], pick) < self.caution
            ):
                return Choice(scored, 0, abstained=True)
        return Choice(scored, places[pick])

    def _groups(
        self, query: Query, offered: Sequence[Candidate], visible: Sequence[Record]
    ) -> Groups:
        """The offered candidates as the scorer reads them."""
        if not self.votes and self.evidence.task.labels:
            offered = [replace(candidate, votes=0, greedy=False) for candidate in offered]
        rows = self.evidence.adapter(query, offered, self.evidence.vectorize(visible))
        texts = [candidate_text(self.evidence.task, candidate) for candidate in offered]
        return make_groups(
            self.evidence.store, self.scorer.interaction, [query.input], [texts], [rows.tolist()]
        )


def select(
    task: Task, candidates: Sequence[Candidate], scores: np.ndarray, shares: np.ndarray, how: str
) -> int:
    """The index of the pick; ties go to the earlier candidate, so to the greedy answer first."""
    return _best(scores, shares, _gains(task, candidates, how))


def _gains(task: Task, candidates: Sequence[Candidate], how: str) -> np.ndarray | None:
    """[C, C] what each candidate is worth where another one is wanted; None where only the wanted
    one is worth anything.
    """
    if how == "best" or task.strategy.zero_one_gain:
        return None
    return task.gain_matrix([candidate.answer or "" for candidate in candidates])


def _best(scores: np.ndarray, shares: np.ndarray, gains: np.ndarray | None) -> int:
    return first_best(scores if gains is None else gains @ shares)


def first_best(values: np.ndarray) -> int:
    """The index of the largest value, the first of those that are as large to within rounding:
    texts that differ in case alone are one and the same to an uncased encoder, and which of them
    is ahead by a last digit is the processor's choice.
    """
    return int(np.flatnonzero(values >= values.max() - TIE)[0])


def _lead(
    shares: torch.Tensor, gains: np.ndarray | None, covariance: torch.Tensor, pick: int
) -> float:
    """How much more the pick is expected to gain than candidate 0, in standard deviations under the
    head's uncertainty.

    The expected gain is Δ·p(s) with Δ the difference of the two gains; to first order its variance
    is gᵀ Σ g, where Σ is the covariance of the scores and g = p ∘ (Δ − Δ·p) the derivative by the
    scores.
    """
    worth = torch.eye(len(shares)) if gains is None else torch.from_numpy(gains).float()
    difference = worth[pick] - worth[0]
    lead = difference @ shares
    slope = shares * (difference - lead)
    deviation = (slope @ covariance @ slope).clamp_min(0).sqrt()
    return float(lead / deviation.clamp_min(1e-12))


def all_labels(task: Task, candidates: Sequence[Candidate]) -> list[Candidate]:
    """One candidate per label in the task's order, with its votes among `candidates`."""
    known = {candidate.answer: candidate for candidate in candidates}
    return [known.get(label) or Candidate(label, label) for label in task.labels]


def candidate_text(task: Task, candidate: Candidate) -> str:
    """What the adapter reads of a candidate."""
    return (candidate.answer or candidate.text) if task.labels else candidate.text
