"""Why the adapter picked an answer. A score is a sum (`Scorer`), so that each part's share in the
pick's lead over the runner-up is exact; a record's share is the lead that is lost without it.

Records are taken out of what the adapter sees of the history. The candidates, which the LLM has
written, and the user's head, which was fitted before, stay as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any

from hydra_llm.context import Context
from hydra_llm.pipeline import UserPipeline
from hydra_llm.select import Selection, Selector
from hydra_llm.types import Answer, Candidate, Record

MOST_RECORDS = 200  # the latest ones that are taken out one by one
PAIRS_AMONG = 12  # records with the greatest weight of which every pair is tried
IN_WORDS = {
    "shared": "the model that all users share",
    "head": "what was learned of this user",
    "share_all": "share of this label in the user's records",
    "share_*": "share of this label in records like the question",
    "near_all": "closeness to the user's mean rating",
    "near_*": "closeness to the mean rating of records like the question",
    "llm_votes": "the LLM's votes, or its probability",
    "llm_greedy": "the LLM's first answer",
    "llm_near": "closeness to the mean of the LLM's votes",
    "llm_agreement": "agreement with the LLM's other answers",
    "own_*": "similarity to the user's own answers",
    "length*": "length, against the user's usual length",
    "cosine": "similarity to the question",
    "expected_rouge": "words that this user is expected to use",
    "choice_*": "form of the candidate",
    "habit_*": "form of the candidates that the user takes",
    "rejected_*": "similarity to candidates that the user left",
    "taste": "similarity to candidates that the user took, less those left",
}
"""Part of a score, or pattern of its name → what it tells. Parts of one meaning are added up."""


def in_words(parts: Mapping[str, float]) -> dict[str, float]:
    """Parts of a lead by what they tell, the largest first."""
    told: dict[str, float] = {}
    for name, value in parts.items():
        pattern = next((own for own in IN_WORDS if fnmatchcase(name, own)), name)
        words = IN_WORDS.get(pattern, name)
        told[words] = told.get(words, 0.0) + value
    return _largest_first(told)


def _largest_first(parts: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(parts.items(), key=lambda item: -abs(item[1])))


@dataclass(frozen=True, slots=True)
class Weight:
    """What a record adds to the pick's lead over the runner-up."""

    record: Record
    lead: float


@dataclass(frozen=True, slots=True)
class Reasons:
    """Why one candidate was picked and not the next one."""

    pick: Candidate
    runner_up: Candidate
    parts: dict[str, float]
    """What each part of the score adds to the lead, the largest first: `shared` head, the user's
    own `head`, and side features by name. The sum is the difference of the two scores.
    """
    records: tuple[Weight, ...]  # all that were tried, the greatest lead first
    needed: tuple[Record, ...]
    """The smallest set found, of these records, without which another candidate is picked: checked
    by picking again. Empty if none was found.
    """

    @property
    def lead(self) -> float:
        """The pick's score minus the runner-up's. Negative where an expected gain decided."""
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """Records by their ids."""
        return {
            "pick": self.pick.answer,
            "runner_up": self.runner_up.answer,
            "lead": self.lead,
            "parts": self.parts,
            "records": [{"id": own.record.id, "lead": own.lead} for own in self.records],
            "needed": [record.id for record in self.needed],
        }


def why(pipeline: UserPipeline, answer: Answer) -> Reasons | None:
    """Why a pipeline gave this answer, with the records and heads that it still has; None where no
    adapter decided between two candidates, or it kept the first one as it was unsure. Makes no LLM
    call.
    """
    context = pipeline.context_of(answer.proposal.query)
    selection = pipeline.select(context, answer.proposal.candidates)
    return of(pipeline.selector, context, selection, context.visible[-MOST_RECORDS:])


def of(
    selector: Selector, context: Context, selection: Selection, records: Sequence[Record] = ()
) -> Reasons | None:
    """Why a selector picked so, as of `why`; `records` are those that are taken out in turn."""
    pick, *others = [selection.candidates[place] for place in selection.ranking]
    if selection.abstained or not others or others[0].score is None or not selection.parts:
        return None
    scored = [own for own in selection.candidates if own.score is not None]
    one, other = scored.index(pick), scored.index(others[0])
    leads = {name: float(own[one] - own[other]) for name, own in selection.parts.items()}
    parts = _largest_first(leads)
    removals = _Removals(selector, context, selection, pick, others[0])
    weights = sorted(map(removals.weight, records), key=lambda weight: -weight.lead)
    needed = removals.needed([weight.record for weight in weights])
    return Reasons(pick, others[0], parts, tuple(weights), needed)


class _Removals:
    """Picks among the same candidates without some of the records."""

    def __init__(
        self,
        selector: Selector,
        context: Context,
        selection: Selection,
        pick: Candidate,
        runner_up: Candidate,
    ):
        self.selector, self.context, self.pick, self.runner_up = selector, context, pick, runner_up
        self.whole = self._lead(selection)
        self.candidates = [
            replace(own, score=None, probability=None) for own in selection.candidates
        ]

    def weight(self, record: Record) -> Weight:
        return Weight(record, self.whole - self._lead(self._without([record])))

    def _without(self, records: Sequence[Record]) -> Selection:
        """The selection if these records were not there."""
        gone = {record.id for record in records}
        kept = tuple(record for record in self.context.visible if record.id not in gone)
        return self.selector.choose(replace(self.context, visible=kept), self.candidates)

    def _lead(self, selection: Selection) -> float:
        scores = {own.answer: own.score for own in selection.candidates}
        one, other = scores[self.pick.answer], scores[self.runner_up.answer]
        assert one is not None
        assert other is not None
        return one - other

    def _flips(self, records: Sequence[Record]) -> bool:
        selection = self._without(records)
        return selection.candidates[selection.chosen].answer != self.pick.answer

    def needed(self, records: Sequence[Record]) -> tuple[Record, ...]:
        """One record, two of the first ones, or as many of the first as it takes, less those that
        may stay.
        """
        for one in records:
            if self._flips([one]):
                return (one,)
        for pair in combinations(records[:PAIRS_AMONG], 2):
            if self._flips(pair):
                return pair
        count = next((n for n in range(3, len(records) + 1) if self._flips(records[:n])), 0)
        needed, before = list(records[:count]), count + 1
        while len(needed) < before:  # a record may have become needless as another one went
            before = len(needed)
            for record in reversed(needed.copy()):
                fewer = [other for other in needed if other is not record]
                if self._flips(fewer):
                    needed = fewer
        return tuple(needed)
