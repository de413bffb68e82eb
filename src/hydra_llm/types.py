"""The values that pass between the stages: frozen dataclasses, no behaviour beyond arithmetic.

Knows neither files, torch nor any LLM. The letters used for shapes in other modules:
B pairs, G groups, C candidates of a group, H feature width, E evidence width, U users, K rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

Message = Mapping[str, str]
"""A chat message: `{"role": "system"|"user"|"assistant", "content": text}`."""

Span = tuple[float, float]
"""The seconds since 1970 (UTC) between which a written time lies: a day is a day long, a year a
year.
"""

ALWAYS: Span = (-math.inf, math.inf)
"""The span of a time that is not known: only the position orders it."""


@dataclass(frozen=True, slots=True)
class Record:
    """One thing that a user did: an input and the answer that the user gave or wanted."""

    user: str
    id: str
    input: str
    output: str
    time: str = ""
    """As written in the data; empty if unknown."""
    span: Span = ALWAYS
    """`time` as an interval, see `history.parse_time`."""
    position: int = 0
    """Place in the user's order; decides where times are equal or too coarse to tell."""


ARROW = " → "


def as_one_text(input: str, output: str) -> str:
    """A record's input and answer, where a scorer reads both: features are kept, and deleted, under
    this text too.
    """
    return f"{input}{ARROW}{output}"


@dataclass(frozen=True, slots=True)
class Query:
    """What is to be answered for a user. `gold` is None where nobody knows the answer."""

    user: str
    id: str
    input: str
    gold: str | None = None
    time: str = ""
    span: Span = ALWAYS
    position: int = 2**62
    """After every record of the user unless the data say otherwise."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A record with its place in an order, best first."""

    record: Record
    score: float
    """The retriever's score."""
    rank: int
    """0 is the retriever's best."""
    usefulness: float | None = None
    """The reranker's score for this user; None where no reranker ran."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer cost. Adds up with `+`."""

    calls: int = 0
    """LLM calls that were really made."""
    cached: int = 0
    """Calls answered by the cache."""
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    """In the currency of the prices in the settings; 0 where none are given."""
    seconds: float = 0.0
    """Seconds waited for the LLM; a cached call counts what it took when it was made."""

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.calls + other.calls,
            self.cached + other.cached,
            self.failed + other.failed,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cost + other.cost,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True, slots=True)
class Spent:
    """What a stage of learning took."""

    users: int
    """Whom it concerned: those who were labelled, trained on, or fitted."""
    seconds: float
    """Of the LLM as measured when it was asked, and of everything else in this run."""
    usage: Usage = Usage()

    def to_json(self) -> dict[str, float]:
        usage = self.usage
        asked = {
            "calls": usage.calls + usage.cached,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
        }
        return {"users": self.users, "seconds": self.seconds, **asked}


@dataclass(frozen=True, slots=True)
class Generation:
    """What one call to an LLM gave: its texts, in order, and what they cost."""

    texts: tuple[str, ...]
    usage: Usage = Usage()
    ends: tuple[str, ...] = ()
    """Why each text ended, `stop` or `length`; empty where that is not known."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One possible answer with the evidence for it."""

    text: str
    """As the LLM wrote it, or the label itself."""
    answer: str | None
    """The parsed answer: a label, a number as text, or the text itself; None if it cannot be
    parsed.
    """
    votes: int = 0
    """How many of the LLM's samples gave this answer."""
    greedy: bool = False
    """Whether the LLM's temperature-0 sample gave it."""
    score: float | None = None
    """The adapter's score for this user; None where no adapter ran."""
    probability: float | None = None
    """The calibrated share of this candidate within its group."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """Everything up to the candidates: what was retrieved, in which order, what the LLM was asked
    and said.
    """

    query: Query
    retrieved: tuple[Ranked, ...]
    """In the retriever's order."""
    records: tuple[Ranked, ...]
    """In the order of the reranker; the first k stand in the prompt."""
    messages: tuple[Message, ...]
    candidates: tuple[Candidate, ...]
    usage: Usage = Usage()
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds per stage: retrieve, rerank, prompt, llm, adapt."""
    notes: tuple[str, ...] = ()
    """One line for each thing that was cut, dropped or failed on the way."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer for one user, and how it came about."""

    text: str
    proposal: Proposal
    candidates: tuple[Candidate, ...]
    """As proposed, with scores where an adapter ran."""
    chosen: int
    """Index into `candidates`."""
    abstained: bool = False
    """True where the adapter left the choice at the first candidate."""

    @property
    def usage(self) -> Usage:
        return self.proposal.usage

    @property
    def seconds(self) -> Mapping[str, float]:
        return self.proposal.seconds


@dataclass(frozen=True, slots=True)
class LabelledGroup:
    """Pairs of one query that compete with each other, and how good each was in the eyes of the
    user.
    """

    user: str
    query: str
    """The query's id."""
    left: str
    """The query's text."""
    rights: tuple[str, ...]
    """[C] records with their answers (reranker) or candidates' texts (adapter)."""
    gains: tuple[float, ...]
    """[C] 0 to 1, from the task's gain."""
    evidence: tuple[tuple[float, ...], ...]
    """[C][E] what is known of each pair beside its text; the columns are named by the scorer."""
    position: int = 0
    """The query's place in the user's order: how many records it may see."""
    voted: bool = False
    """Whether the evidence holds what the LLM's samples said."""
