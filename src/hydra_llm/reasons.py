"""Why the adapter picked an answer. A score is a sum (`Scorer`), so that each part's share in the
pick's lead over the runner-up is exact; a record's share is the lead that is lost without it.

Records are taken out of what the adapter sees of the history. The candidates, which the LLM has
written, and the user's head, which was fitted before, stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from hydra_llm.context import Context
from hydra_llm.pipeline import UserPipeline
from hydra_llm.select import LearnedSelector, Selection
from hydra_llm.types import Answer, Candidate, Record

MOST_RECORDS = 200  # the latest ones that are taken out one by one
PAIRS_AMONG = 12  # records with the greatest weight of which every pair is tried


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


def why(pipeline: UserPipeline, answer: Answer) -> Reasons | None:
    """Why a pipeline gave this answer, with the records and heads that it still has; None where no
    adapter decided between two candidates, or it kept the first one as it was unsure. Makes no LLM
    call.
    """
    selector, context = pipeline.selector, pipeline.context_of(answer.proposal.query)
    if not isinstance(selector, LearnedSelector):
        return None
    scored = [candidate for candidate in answer.candidates if candidate.score is not None]
    pick = answer.candidates[answer.chosen]
    if answer.abstained or len(scored) < 2 or pick.score is None:
        return None
    return _Removals(selector, context, answer.candidates, pick).reasons()


class _Removals:
    """Picks among the same candidates without some of the records."""

    def __init__(
        self,
        selector: LearnedSelector,
        context: Context,
        candidates: Sequence[Candidate],
        pick: Candidate,
    ):
        self.selector, self.context, self.pick = selector, context, pick
        self.candidates = [replace(own, score=None, probability=None) for own in candidates]
        ranked = Selection(list(candidates), candidates.index(pick)).ranking
        self.runner_up = candidates[ranked[1]]

    def reasons(self) -> Reasons:
        parts = self.selector.parts(self.context, self.candidates)
        readable = [own.answer for own in self.candidates if own.answer is not None]
        one, other = (readable.index(own.answer or "") for own in (self.pick, self.runner_up))
        leads = {name: float(values[one] - values[other]) for name, values in parts.items()}
        ordered = dict(sorted(leads.items(), key=lambda item: -abs(item[1])))
        whole = self._lead(self.without(()))
        latest = self.context.visible[-MOST_RECORDS:]
        weights = [Weight(r, whole - self._lead(self.without([r]))) for r in latest]
        weights.sort(key=lambda weight: -weight.lead)
        needed = self._needed([weight.record for weight in weights])
        return Reasons(self.pick, self.runner_up, ordered, tuple(weights), needed)

    def without(self, records: Sequence[Record]) -> Selection:
        """The selection if these records were not there."""
        gone = set(map(id, records))
        kept = tuple(record for record in self.context.visible if id(record) not in gone)
        return self.selector.choose(replace(self.context, visible=kept), self.candidates)

    def _lead(self, selection: Selection) -> float:
        scores = {own.answer: own.score for own in selection.candidates}
        one, other = scores[self.pick.answer], scores[self.runner_up.answer]
        assert one is not None
        assert other is not None
        return one - other

    def _flips(self, records: Sequence[Record]) -> bool:
        selection = self.without(records)
        return selection.candidates[selection.chosen].answer != self.pick.answer

    def _needed(self, records: Sequence[Record]) -> tuple[Record, ...]:
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
