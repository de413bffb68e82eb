"""The values that pass between the stages. Letters that other modules use for shapes: B pairs,
G groups, C candidates of a group, H feature width, E side features, U users, K rank.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, field
from operator import add
from typing import Any, TypeVar

T = TypeVar("T")
Message = Mapping[str, str]
"""A chat message: `{"role": "system"|"user"|"assistant", "content": text}`."""

Span = tuple[float, float]
"""First and last second, since 1970 (UTC), of a written time: a date spans a day, a year a year."""

ALWAYS: Span = (-math.inf, math.inf)
"""The span of an unknown time: such a record is ordered by its position only."""

UNREADABLE: Span = (-math.inf, sys.float_info.max)
"""The span of a written time that cannot be read: as unknown, and not read again."""

ARROW = " → "


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a user's history: an input and the answer that the user gave or wanted."""

    user: str
    id: str
    input: str
    output: str
    time: str = ""  # as written in the data; empty if unknown
    span: Span = ALWAYS  # `time` as an interval, see `history.parse_time`
    position: int = 0  # place in the user's order; decides where spans are equal or overlap


@dataclass(frozen=True, slots=True)
class Choice(Record):
    """A record of an answer that was taken from several: `output` is `candidates[chosen]`."""

    candidates: tuple[str, ...] = ()  # two or more distinct texts, in the order shown
    chosen: int = 0  # index of the one that was taken


class Overlaid(Mapping[str, T]):
    """`new` over `old`, without a copy of what may be a million users'."""

    def __init__(self, new: Mapping[str, T], old: Mapping[str, T]):
        self.new: Mapping[str, T] = new
        self.old: Mapping[str, T] = old
        if isinstance(old, Overlaid) and isinstance(new, dict):  # layers do not pile up
            self.new, self.old = {**old.new, **new}, old.old

    def __getitem__(self, key: str) -> T:
        value = self.new.get(key)
        return self.old[key] if value is None else value

    def __contains__(self, key: object) -> bool:
        return key in self.new or key in self.old

    def __iter__(self) -> Iterator[str]:
        yield from self.old
        yield from (key for key in self.new if key not in self.old)

    def __len__(self) -> int:
        return len(self.old) + sum(key not in self.old for key in self.new)


def as_one_text(input: str, output: str) -> str:
    """A record's input and answer as a scorer reads them. Features are cached under this text."""
    return f"{input}{ARROW}{output}"


@dataclass(frozen=True, slots=True)
class Query:
    """A question of a user. `gold`: the known answer; None if there is none."""

    user: str
    id: str
    input: str
    gold: str | None = None
    time: str = ""
    span: Span = ALWAYS
    position: int = 2**62  # by default after every record of the user
    offered: tuple[str, ...] = ()  # of a recorded choice: its candidates, in the order shown


@dataclass(frozen=True, slots=True)
class Ranked:
    """A record in a ranking, best first."""

    record: Record
    score: float  # of the retriever
    rank: int  # 0 is the retriever's best
    usefulness: float | None = None  # the reranker's score for this user; None if none ran


@dataclass(frozen=True, slots=True)
class Usage:
    """LLM calls and what they cost. Adds up with `+`."""

    calls: int = 0  # sent to the LLM
    cached: int = 0  # answered by the cache
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0  # in the currency of the prices in the settings; 0 where none are given
    seconds: float = 0.0  # of waiting; a cached call counts what it took when it was sent
    untold: int = 0  # calls, cached ones included, whose tokens and cost the LLM did not tell

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(*map(add, astuple(self), astuple(other)))

    @property
    def tokens(self) -> tuple[int, int] | tuple[None, None]:
        """Of prompts and answers; None where a call's are not known."""
        return (None, None) if self.untold else (self.prompt_tokens, self.completion_tokens)

    def to_json(self) -> dict[str, Any]:
        """All fields; what is not known is None."""
        names = ("prompt_tokens", "completion_tokens", "cost") if self.untold else ()
        return {**asdict(self), **dict.fromkeys(names)}


@dataclass(frozen=True, slots=True)
class StageCost:
    """What a stage of training cost."""

    users: int  # labelled, trained on, or fitted
    seconds: float  # the LLM's as measured when it was called, and all others of this run
    usage: Usage = Usage()

    def to_json(self) -> dict[str, float | None]:
        usage = self.usage
        prompt, completion = usage.tokens
        return {
            "users": self.users,
            "seconds": self.seconds,
            "calls": usage.calls + usage.cached,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
        }


@dataclass(frozen=True, slots=True)
class Generation:
    """What one LLM call returned: its texts, in order, and their cost."""

    texts: tuple[str, ...]
    usage: Usage = Usage()
    ends: tuple[str, ...] = ()  # each text's finish reason, `stop` or `length`; empty if unknown
    # of each choice, given that one of them is the answer; empty where the LLM does not tell them
    probabilities: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One possible answer, with what is known of it."""

    text: str  # as the LLM wrote it, or the label itself
    answer: str | None  # parsed: a label, a number as text, or the text; None: cannot be parsed
    votes: int = 0  # how many of the LLM's samples gave this answer
    greedy: bool = False  # whether the LLM's temperature-0 sample gave it
    llm_probability: float | None = None  # of a label by the LLM itself (`label_probabilities`)
    score: float | None = None  # the adapter's score for this user; None where no adapter ran
    probability: float | None = None  # the calibrated probability within its group


@dataclass(frozen=True, slots=True)
class Proposal:
    """All stages up to the candidates: retrieval, reranking, the prompt and the samples."""

    query: Query
    retrieved: tuple[Ranked, ...]  # in the retriever's order
    records: tuple[Ranked, ...]  # in the reranker's order; the first k are in the prompt
    messages: tuple[Message, ...]
    candidates: tuple[Candidate, ...]
    usage: Usage = Usage()
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds per stage: retrieve, rerank, prompt, llm, adapt."""
    notes: tuple[str, ...] = ()  # one line for each thing that was cut, dropped or failed
    shown: int = 0  # how many of `records` are in the prompt, the first ones


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer for one user, and how it was made."""

    text: str
    proposal: Proposal
    candidates: tuple[Candidate, ...]  # those of the proposal, scored where an adapter ran
    chosen: int  # index into `candidates`
    abstained: bool = False  # the adapter kept the first candidate: it was not sure of a better one

    @property
    def usage(self) -> Usage:
        return self.proposal.usage

    @property
    def seconds(self) -> Mapping[str, float]:
        return self.proposal.seconds
