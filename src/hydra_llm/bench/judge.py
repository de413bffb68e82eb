"""An LLM as a judge: which of two answers would this person rather have?

Its rubric is written by the same LLM from the person's own records that precede the question, once
for each user and past. Each pair is judged in both orders: a verdict that changes with the order is
a tie (Zheng et al. 2023, "Judging LLM-as-a-judge", section 3.4). What the judge is worth is
measured on recorded choices: how often it prefers what people took to what they left. Knows no
methods, and is no metric of the benchmark.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import numpy as np

from hydra_llm.bench.results import rounded
from hydra_llm.bench.stats import Interval, interval
from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import BudgetExceeded, LLMError
from hydra_llm.history import before
from hydra_llm.llm.base import ChatLLM, Sampling
from hydra_llm.llm.concurrency import StageProgress, at_once, map_calls
from hydra_llm.pipeline import answer_text
from hydra_llm.text import fold, length
from hydra_llm.types import Choice, Message, Query, Record

RUBRIC_RECORDS, RUBRIC_TOKENS = 20, 160  # the latest records that it is written from; its length
SHOWN = 1200  # characters of the question, and of each answer, that the judge reads
SIDES = ("A", "B")
RUBRIC = (
    "Below are earlier texts of one person, and what this person answered or took.\n\n{records}\n\n"
    "Write a rubric to judge new answers for this person: three to five short criteria, one a line,"
    " that say what this person prefers (content, style, length) and what this person would not"
    " take. Write the criteria alone."
)
QUESTION = (
    "Which of two answers would this person rather have? Judge by this rubric of the person:\n\n"
    "{rubric}\n\nThe task:\n{question}\n\nAnswer A:\n{a}\n\nAnswer B:\n{b}\n\n"
    "The order of the answers says nothing. Reply with one letter, A or B."
)
UNKNOWN = "Nothing is known of this person."
# "A", "**Answer B**", "A is better"; not the article of "A person like this"
_LETTER = re.compile(
    r"\W*(?:answer\W+)?([ab])\b(?!\s+(?!(?:is|because|as|since|fits)\b)[a-z])", re.IGNORECASE
)


@dataclass(frozen=True)
class Case:
    """A question with two answers. `own` is the method's, or what the person took."""

    query: Query
    visible: tuple[Record, ...]  # the person's records that precede it, oldest first
    own: str
    other: str


@dataclass(frozen=True)
class Verdict:
    """What the judge said of a case; no votes where both answers are equal: nobody was asked."""

    user: str
    query: str
    votes: tuple[float | None, ...] = ()
    """With the own answer shown first, then second: 1 for the own answer, 0 for the other, None if
    the reply names neither.
    """
    error: str = ""  # why there is no verdict; such a case is not scored

    @property
    def score(self) -> float:
        """1 if the own answer wins, 0 if the other one, 0.5 for a tie; NaN if a call failed."""
        if self.error:
            return math.nan
        return self.votes[0] if self.agrees and self.votes[0] is not None else 0.5

    @property
    def agrees(self) -> bool:
        """Whether both orders gave the same verdict."""
        return len(self.votes) == 2 and None not in self.votes and self.votes[0] == self.votes[1]


@dataclass(frozen=True)
class Judge:
    """Asks the LLM at temperature 0; its calls are cached and recorded as any LLM's."""

    llm: ChatLLM
    settings: Settings
    ask: str = "{input}"  # the task's instruction around the question's text
    rubrics: dict[tuple[str, int], str] = field(default_factory=dict)
    locks: dict[tuple[str, int], anyio.Lock] = field(default_factory=dict)

    async def verdict(self, case: Case) -> Verdict:
        """Raises LLMError: a call failed."""
        query = case.query
        if case.own == case.other:
            return Verdict(query.user, query.id)
        rubric = await self.rubric(case)
        first = await self._choice(rubric, query, case.own, case.other)
        second = await self._choice(rubric, query, case.other, case.own)
        votes = (None if first is None else 1.0 - first, None if second is None else float(second))
        return Verdict(query.user, query.id, votes)

    async def rubric(self, case: Case) -> str:
        """The person's rubric, from the records that precede the question."""
        if not case.visible:
            return UNKNOWN
        key = case.query.user, len(case.visible)
        async with self.locks.setdefault(key, anyio.Lock()):
            if key not in self.rubrics:
                sampling = Sampling(max_tokens=RUBRIC_TOKENS)
                text = RUBRIC.replace("{records}", self._listed(case.visible[-RUBRIC_RECORDS:]))
                self.rubrics[key] = await self._generate(text, sampling)
        return self.rubrics[key]

    async def _choice(self, rubric: str, query: Query, a: str, b: str) -> int | None:
        """The place of the preferred answer, 0 or 1; None if the reply names neither."""
        question = self.ask.replace("{input}", query.input)
        named = {"rubric": rubric, "question": question, "a": a, "b": b}
        text = re.sub(r"\{(\w+)\}", lambda mark: named[mark[1]][:SHOWN], QUESTION)
        reply = await self._generate(text, Sampling(max_tokens=8, choices=SIDES))
        letter = _LETTER.match(reply)
        return SIDES.index(letter[1].upper()) if letter else None

    async def _generate(self, text: str, sampling: Sampling) -> str:
        messages: list[Message] = [{"role": "user", "content": text}]
        return answer_text((await self.llm.generate(messages, sampling)).texts[0]).strip()

    def _listed(self, records: Sequence[Record]) -> str:
        """The records, a line each, cut to their share of the prompt."""
        room = int(self.settings.max_prompt_tokens * 3 / len(records)) // 3
        return "\n".join(f"- {_record(record, room)}" for record in records)


def _record(record: Record, room: int) -> str:
    line = f"{fold(record.input)[:room]} → {fold(record.output)[:room]}"
    if not isinstance(record, Choice):
        return line
    left = [fold(text)[:room] for text in record.candidates if text != record.output]
    return f"{line} (not taken: {left[0]})"


async def judged(
    judge: Judge, cases: Sequence[Case], progress: StageProgress | None = None
) -> list[Verdict]:
    """The verdicts in the order of the cases; a failed call is a verdict with its error. Raises
    LLMError: every call failed, or the budget is spent.
    """
    faults: list[LLMError] = []

    async def one(case: Case) -> Verdict:
        try:
            return await judge.verdict(case)
        except BudgetExceeded:
            raise
        except LLMError as error:
            faults.append(error)
            return Verdict(case.query.user, case.query.id, error=str(error))

    report = None if progress is None else lambda done, total: progress("judge", done, total)
    limit = at_once(judge.llm, judge.settings.concurrency)
    found = await map_calls(one, cases, limit, report)
    verdicts = [own for own in found if isinstance(own, Verdict)]  # all: other errors are raised
    if faults and not any(verdict.votes for verdict in verdicts):
        raise faults[0]
    return verdicts


@dataclass(frozen=True)
class JudgeScore:
    """Verdicts together, with 95 % intervals over users."""

    cases: int
    users: int
    rate: float  # mean score: share of wins, ties count half
    rate_interval: Interval
    equal: int  # cases with equal answers, which are ties
    failed: int  # not scored
    unread: int  # replies that named no answer
    shown_first: float  # share of replies for the answer that was shown first; 0.5 without a bias
    consistent: float  # share of judged cases in which both orders gave the same verdict

    def to_json(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("rate", "shown_first", "consistent"):
            own[name] = rounded([own[name]])[0]
        return own | {"rate_interval": rounded(self.rate_interval)}


def score(verdicts: Sequence[Verdict]) -> JudgeScore:
    """The figures of verdicts; NaN where nothing was judged."""
    known = [verdict for verdict in verdicts if not verdict.error]
    asked = [verdict for verdict in known if verdict.votes]
    replies = [(place, vote) for own in asked for place, vote in enumerate(own.votes)]
    first = [float(vote == 1 - place) for place, vote in replies if vote is not None]
    scores = [verdict.score for verdict in verdicts]
    return JudgeScore(
        cases=len(verdicts),
        users=len({verdict.user for verdict in verdicts}),
        rate=mean([verdict.score for verdict in known]),
        rate_interval=interval(scores, [verdict.user for verdict in verdicts]),
        equal=len(known) - len(asked),
        failed=len(verdicts) - len(known),
        unread=len(replies) - len(first),
        shown_first=mean(first),
        consistent=mean([float(verdict.agrees) for verdict in asked]),
    )


def mean(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return float(np.mean(values)) if values else math.nan


def by_lot(cases: Sequence[Case], limit: int | None, seed: int) -> list[Case]:
    """At most `limit` cases, of the users in turn; a higher limit adds to those of a lower one."""
    turns, order = Counter[str](), list[tuple[int, int]]()
    for place in np.random.default_rng(seed).permutation(len(cases)).tolist():
        user = cases[place].query.user
        order.append((turns[user], place))
        turns[user] += 1
    return [cases[place] for _, place in sorted(order, key=lambda own: own[0])[:limit]]


def choice_cases(data: DataSet, limit: int | None, seed: int) -> list[Case]:
    """New users' recorded choices: what was taken, and one drawn of those that were left."""
    cases = []
    for user in data.users("test"):
        history = data.history(user)
        for query in data.queries(user):
            if query.offered and query.gold in query.offered:
                seen = tuple(before(history, query))
                cases.append(Case(query, seen, query.gold or "", ""))
    chosen, rng = by_lot(cases, limit, seed), np.random.default_rng(seed)
    left = [[text for text in case.query.offered if text != case.own] for case in chosen]
    return [
        replace(case, other=texts[rng.integers(len(texts))])
        for case, texts in zip(chosen, left, strict=True)
    ]


def longer_taken(cases: Sequence[Case]) -> float:
    """How often people took the longer of two texts: what a judge of lengths alone would reach."""
    sizes = [(length(case.own), length(case.other)) for case in cases]
    return mean([0.5 if own == other else float(own > other) for own, other in sizes])
