"""Score the candidates for this user and pick one (paper, section 3.3): `best` takes the highest
score, as published; `expected-gain` reads the scores as a distribution over what the user wants and
maximises the expected gain under the task's gain function: the mode for labels, the median for
ratings, minimum Bayes risk for texts. Knows no LLM. `FirstCandidate` is the null part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from hydra_llm.config import Settings
from hydra_llm.context import Context
from hydra_llm.side_features import Featurizer
from hydra_llm.tasks.base import Task
from hydra_llm.types import Candidate, Query

if TYPE_CHECKING:  # torch: a gateway without a bundle may lack it
    import torch

    from hydra_llm.model.interactions import Groups
    from hydra_llm.model.scorer import Scorer

TIE = 1e-5  # values that differ by less are equal, as of texts that differ in case alone


class Selection(NamedTuple):
    """The candidates as a selector has scored them, and its pick."""

    candidates: list[Candidate]  # with scores, where there is a scorer
    chosen: int  # index of the pick
    abstained: bool = False  # candidate 0 was kept because the pick's margin was too uncertain
    parts: Mapping[str, np.ndarray] = {}
    """What adds up to the scores of the candidates that have one, by name (`Scorer.parts`)."""

    @property
    def ranking(self) -> list[int]:
        """Indices of all candidates: the pick, then by falling score; unscored ones last."""
        scores = [-np.inf if c.score is None else c.score for c in self.candidates]
        return sorted(range(len(scores)), key=lambda i: (i != self.chosen, -scores[i], i))


class Selector(Protocol):
    """Anything that picks one of the candidates for a user."""

    def choose(self, context: Context, candidates: Sequence[Candidate]) -> Selection:
        """The candidates, scored where there is a scorer, and the pick."""
        ...

    @property
    def needs_llm(self) -> bool:
        """Whether the pick may depend on what the LLM says; if not, it need not be asked."""
        return True

    def pairs(self, context: Context, candidates: Sequence[Candidate]) -> list[tuple[str, str]]:
        """What `choose` will have encoded as pairs of texts; by default nothing."""
        return []


class FirstCandidate(Selector):
    """The LLM's first answer."""

    def choose(self, context: Context, candidates: Sequence[Candidate]) -> Selection:
        return Selection(list(candidates), 0)


class ByVotes(Selector):
    """The answer with most of the LLM's votes (`best`: self-consistency, Wang et al. 2023), or with
    the greatest gain if a vote drawn by lot is right (`expected-gain`: minimum Bayes risk).
    """

    def __init__(self, task: Task, how: str):
        self.task, self.how = task, how

    def choose(self, context: Context, candidates: Sequence[Candidate]) -> Selection:
        return Selection(list(candidates), self.pick(candidates))

    def pick(self, candidates: Sequence[Candidate]) -> int:
        """The index of the pick; what cannot be read has no vote."""
        places = [i for i, own in enumerate(candidates) if own.answer is not None and own.votes]
        if not places:
            return 0
        readable = [candidates[i] for i in places]
        votes = np.array([float(candidate.votes) for candidate in readable])
        return places[select(self.task, readable, votes, votes / votes.sum(), self.how)]


class ByWords(Selector):
    """The candidate with the greatest expected ROUGE by the word model."""

    def __init__(self, featurizer: Featurizer):
        self.featurizer = featurizer

    def choose(self, context: Context, candidates: Sequence[Candidate]) -> Selection:
        columns = self.featurizer.adapter(context.query, candidates, context.vectors)
        values = columns[:, self.featurizer.adapter_names.index("expected_rouge")]
        return Selection(list(candidates), first_best(values))


class LearnedSelector(Selector):
    """Picks by the user's factorized scorer. Without `vote_share`, labels are scored as if the LLM
    had not been sampled. Candidate 0 is kept unless the pick's expected-gain margin exceeds
    `abstention_threshold` posterior standard deviations.
    """

    def __init__(self, scorer: "Scorer", featurizer: Featurizer, settings: Settings):
        self.scorer, self.featurizer, self.settings = scorer, featurizer, settings
        self.task, self.how = featurizer.task, settings.select
        if self.how == "auto":
            by_words = set(self.task.strategy.word_columns) & set(scorer.side_names)
            self.how = "best" if by_words else "expected-gain"

    @property
    def needs_llm(self) -> bool:
        """False where every label is a candidate and the LLM's votes have no weight in a score."""
        hears = self.scorer.hears_llm and self.settings.vote_share
        return hears or not needs_votes_only(self.task, self.settings)

    def choose(self, context: Context, candidates: Sequence[Candidate]) -> Selection:
        places = [i for i, candidate in enumerate(candidates) if candidate.answer is not None]
        if not places:
            return Selection(list(candidates), 0)
        readable = [candidates[i] for i in places]
        groups, rows = self._encoded(context, readable)
        head = context.heads.get("adapter")
        scores = self.scorer.score(groups, [head])[0][rows]
        every = self.scorer.parts(groups, head)
        parts = {name: np.asarray(own[rows]) for name, own in every.items()}
        shares = self.scorer.shares(scores)
        # Of recorded choices one was taken: no other one is worth a part of it.
        how = "best" if context.query.offered else self.how
        pick = select(self.task, readable, np.asarray(scores), np.asarray(shares), how)
        scored = list(candidates)
        for place, score, share in zip(places, scores.tolist(), shares.tolist(), strict=True):
            scored[place] = replace(candidates[place], score=score, probability=share)
        if self.settings.abstention_threshold and places[0] == 0 and pick != 0:
            covariance = self.scorer.covariance(groups, head)
            if covariance is not None:  # a head without a posterior never abstains
                own = covariance[rows][:, rows]  # of the readable candidates
                if self._is_unsure(readable, shares, own, pick):
                    return Selection(scored, 0, True, parts)
        return Selection(scored, places[pick], parts=parts)

    def pairs(self, context: Context, candidates: Sequence[Candidate]) -> list[tuple[str, str]]:
        if not self.scorer.interaction.reads_pairs:
            return []
        texts = [candidate_text(self.task, c) for c in candidates if c.answer is not None]
        return [(context.query.input, text) for text in texts]

    def groups(self, context: Context, offered: Sequence[Candidate]) -> "Groups":
        """The offered candidates as the scorer reads them."""
        if not self.settings.vote_share and self.task.labels:
            offered = [replace(candidate, votes=0, greedy=False) for candidate in offered]
        features = self.featurizer.adapter(context.query, offered, context.vectors)
        texts = [candidate_text(self.task, candidate) for candidate in offered]
        return self.arranged(context.query.input, texts, features)

    def arranged(self, text: str, texts: Sequence[str], side: np.ndarray) -> "Groups":
        """A query's text, its candidates' texts and their side features [C, E] as one group."""
        from hydra_llm.model.interactions import make_groups

        store = self.featurizer.features
        return make_groups(store, self.scorer.interaction, [text], [texts], [side])

    def _is_unsure(
        self,
        readable: Sequence[Candidate],
        shares: "torch.Tensor",
        covariance: "torch.Tensor",
        pick: int,
    ) -> bool:
        """Whether the pick's margin over candidate 0 is below the threshold."""
        gains = _gains(self.task, readable, self.how)
        return _margin(shares, gains, covariance, pick) < self.settings.abstention_threshold

    def _encoded(
        self, context: Context, readable: Sequence[Candidate]
    ) -> "tuple[Groups, list[int]]":
        """What the scorer reads, and the row of each readable candidate in it."""
        by_label = self.scorer.interaction.by_label  # its features are of all labels
        offered = all_labels(self.task, readable) if by_label else readable
        row_of = {candidate.answer: row for row, candidate in enumerate(offered)}
        return self.groups(context, offered), [row_of[c.answer] for c in readable]


def needs_votes_only(task: Task, settings: Settings) -> bool:
    """Whether an adapter needs no LLM but for votes: every label is a candidate anyway."""
    of_all = bool(task.labels) and settings.candidates == "labels"
    return of_all and settings.abstention_threshold == 0


def select(
    task: Task, candidates: Sequence[Candidate], scores: np.ndarray, shares: np.ndarray, how: str
) -> int:
    """The index of the pick; ties go to the earlier candidate, so to the greedy answer first."""
    if _counts_only_the_wanted(task, how):  # the greatest expected gain is the highest score
        return first_best(scores)
    return first_best(_gains(task, candidates, how) @ shares)


def first_best(values: np.ndarray) -> int:
    """The index of the first value that is the largest to within `TIE`."""
    return int(np.flatnonzero(values >= values.max() - TIE)[0])


def all_labels(task: Task, candidates: Sequence[Candidate]) -> list[Candidate]:
    """One candidate per label in the task's order, with its votes among `candidates`."""
    known = {candidate.answer: candidate for candidate in candidates}
    return [known.get(label) or Candidate(label, label) for label in task.labels]


def offered_candidates(query: Query) -> tuple[Candidate, ...]:
    """The candidates of a recorded choice, in the order shown."""
    return tuple(Candidate(text, text) for text in query.offered)


def candidate_text(task: Task, candidate: Candidate) -> str:
    """What the adapter reads of a candidate."""
    return (candidate.answer or candidate.text) if task.labels else candidate.text


def _counts_only_the_wanted(task: Task, how: str) -> bool:
    """Whether any other answer than the wanted one is worth 0: of labels, and by `best` of all."""
    return how == "best" or task.strategy.zero_one_gain


def _gains(task: Task, candidates: Sequence[Candidate], how: str) -> np.ndarray:
    """[C, C] the gain of each candidate if another is wanted."""
    if _counts_only_the_wanted(task, how):
        return np.eye(len(candidates))
    return task.gain_matrix([candidate.answer or "" for candidate in candidates])


def _margin(
    shares: "torch.Tensor", gains: np.ndarray, covariance: "torch.Tensor", pick: int
) -> float:
    """The expected gain of the pick over candidate 0, in posterior standard deviations.

    It is Δ·p(s) with Δ the difference of the two gains; to first order its variance is gᵀ Σ g with
    Σ [C, C] the covariance of the scores and g = p ∘ (Δ − Δ·p) the gradient by the scores.
    """
    gain = shares.new_tensor(gains)
    difference = gain[pick] - gain[0]
    margin = difference @ shares
    gradient = shares * (difference - margin)
    deviation = (gradient @ covariance @ gradient).clamp_min(0).sqrt()
    return float(margin / deviation.clamp_min(1e-12))
