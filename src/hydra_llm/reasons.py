"""Why the adapter picked an answer. A score is a sum (`Scorer`), so that each part's share in the
pick's lead over the runner-up is exact; a record's share is the lead that is lost without it.

Records are taken out of what the adapter sees of the history, and with a `Refit` out of what the
user's head was fitted on; without one the head stays as it is. The candidates, which the LLM has
written, always stay.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any, Protocol

from hydra_llm.context import Context
from hydra_llm.model.head import Head
from hydra_llm.pipeline import UserPipeline
from hydra_llm.select import Selection, Selector
from hydra_llm.types import Answer, Candidate, Record

MOST_RECORDS = 200  # the latest ones that are taken out one by one
PAIRS_AMONG = 12  # records with the greatest weight of which every pair is tried
TRIES = 16  # numbers of first records, about, that are tried before those between two of them
LIKELY = 0.5  # a refit is worth its time for records that are to lose so much of the lead
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


class LeaveOut(Protocol):
    """A user's head of the adapter without some of the records that it was fitted on."""

    def without(self, gone: Collection[str]) -> Head:
        """The head as fitted without these records, by id."""
        ...

    @property
    def near(self) -> Mapping[str, Head]:
        """Record → about the head without it, for each that the head has learned from."""
        ...


Refit = Callable[[Context], LeaveOut | None]
"""None where the user has no head that could be fitted again (`training.leave_out`)."""


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


def why(pipeline: UserPipeline, answer: Answer, refit: Refit | None = None) -> Reasons | None:
    """Why a pipeline gave this answer, with the records and heads that it still has; None where no
    adapter decided between two candidates, or it kept the first one as it was unsure. Makes no LLM
    call. `refit` (`training.leave_out.refit_of`): heads are fitted again without the records.
    """
    context = pipeline.context_of(answer.proposal.query)
    selection = pipeline.select(context, answer.proposal.candidates)
    return of(pipeline.selector, context, selection, context.visible[-MOST_RECORDS:], refit)


def of(
    selector: Selector,
    context: Context,
    selection: Selection,
    records: Sequence[Record] = (),
    refit: Refit | None = None,
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
    if records and refit is not None:
        removals.leave_out = refit(context)
    weights = sorted(map(removals.weight, records), key=lambda weight: -weight.lead)
    return Reasons(pick, others[0], parts, tuple(weights), removals.needed(weights))


class _Removals:
    """Picks among the same candidates without some of the records."""

    leave_out: LeaveOut | None = None

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
        near = self.leave_out.near.get(record.id) if self.leave_out else None
        return Weight(record, self.whole - self._lead(self._without({record.id}, near)))

    def _without(self, gone: Collection[str], head: Head | None) -> Selection:
        """The selection if these records were not there; by this head, if given."""
        kept = tuple(record for record in self.context.visible if record.id not in gone)
        heads = self.context.heads if head is None else {**self.context.heads, "adapter": head}
        poorer = replace(self.context, visible=kept, heads=heads)
        return self.selector.choose(poorer, self.candidates)

    def _lead(self, selection: Selection) -> float:
        scores = {own.answer: own.score for own in selection.candidates}
        one, other = scores[self.pick.answer], scores[self.runner_up.answer]
        assert one is not None
        assert other is not None
        return one - other

    def _flips(self, weights: Sequence[Weight]) -> bool:
        gone = {own.record.id for own in weights}
        head = self.leave_out.without(gone) if self.leave_out else None
        selection = self._without(gone, head)
        return selection.candidates[selection.chosen].answer != self.pick.answer

    def _likely(self, weights: Sequence[Weight]) -> bool:
        return self.leave_out is None or sum(w.lead for w in weights) >= LIKELY * self.whole

    def needed(self, weights: Sequence[Weight]) -> tuple[Record, ...]:
        """One record, two of the first ones, or as many of the first as it takes, less those that
        may stay (Yang, Rudin and Wallace, EACL 2023).
        """
        for one in filter(self._likely, self._one_or_two(weights)):
            if self._flips(one):
                return tuple(own.record for own in one)
        needed, before = list(weights[: self._first(weights)]), len(weights) + 1
        while len(needed) < before:  # a record may have become needless as another one went
            before = len(needed)
            for weight in reversed(needed.copy()):
                fewer = [other for other in needed if other is not weight]
                if self._flips(fewer):
                    needed = fewer
        return tuple(own.record for own in needed)

    def _one_or_two(self, weights: Sequence[Weight]) -> Iterator[Sequence[Weight]]:
        yield from ([own] for own in weights)
        yield from combinations(weights[:PAIRS_AMONG], 2)

    def _first(self, weights: Sequence[Weight]) -> int:
        """How many of the first records, of three or more, change the pick; 0 if none was found."""
        every, step = len(weights), max(1, len(weights) // TRIES)
        sizes = [*range(3, every, step), every] if every > 2 else []
        likely = [size for size in sizes if self._likely(weights[:size])]
        count = next((size for size in likely if self._flips(weights[:size])), 0)
        fewer = range(max(3, count - step + 1), count)
        return next((size for size in fewer if self._flips(weights[:size])), count)
