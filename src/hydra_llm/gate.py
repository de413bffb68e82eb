"""Whether records may help a question; else it is asked without them ("never worse").

Two decisions. A question *belongs* to the task if it is like the inputs of records, and not like
the generic requests in `data/generic_requests.txt`. A record is *relevant* if it is predicted to be
worth more than no record. `LearnedGate` is a bundle's (training/gate.py fits it); without one,
`LexicalGate` compares words with the user's own records. Knows no LLM and no scorer.
Letters: N texts, D numbers of a text's form, H width of the encoder, M records.
"""

import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hydra_llm.context import Context
from hydra_llm.text import words
from hydra_llm.types import Ranked

Floats = NDArray[np.float64]
Embed = Callable[[Sequence[str]], NDArray[np.floating]]

OFF_TASK, NOT_RELEVANT = "off-task", "not-relevant"
VERSION = 1  # of `form`: weights of another version cannot be used
BUCKETS = 1024  # of hashed words and character trigrams
READ = 2000  # characters of a text that its form is made from
SURFACE_WEIGHT = 0.5
NEAR_DUPLICATE = 0.8  # Jaccard index of the words of a question and a record's input


class Gate(Protocol):
    """Anything that decides whether records may help."""

    reads_vectors: bool = False  # whether `relevant` needs the records encoded

    def belongs(self, context: Context) -> bool:
        """Whether the question belongs to the task."""
        ...

    def relevant(self, context: Context, ranked: Sequence[Ranked]) -> list[Ranked]:
        """Those of the records that are worth more than none, in the same order."""
        ...


class OpenGate(Gate):
    """The null part: every question belongs, and every record is relevant."""

    def belongs(self, context: Context) -> bool:
        return True

    def relevant(self, context: Context, ranked: Sequence[Ranked]) -> list[Ranked]:
        return list(ranked)


# ---- a text as numbers


@cache
def generic_requests() -> tuple[str, ...]:
    """Requests that belong to no particular task: a package's file of our own text."""
    text = (files("hydra_llm") / "data" / "generic_requests.txt").read_text(encoding="utf-8")
    lines = (line for line in text.splitlines() if line and not line.startswith("# "))
    return tuple(line.replace("\\n", "\n") for line in lines)


ASKING = frozenset(
    words(
        "what whats who whom whose when where why how which is are was were do does did can could"
        " would should will shall may might am has have hi hey hello thanks thank ok okay please"
        " write give make tell show explain describe summarize summarise translate convert compute"
        " calculate solve find list create generate draft fix rewrite rephrase compare help let"
        " suggest recommend name define act pretend imagine you im i my no yes sorry and"
        " qué cuál cómo quién por wie was wer warum que quel quelle comment pourquoi come qual"
    )
)
"""Words with which a request begins more often than a text."""
ADDRESSING = frozenset(words("you your me my i im we our us please"))
CODE = frozenset("{}[]()<>=;_\\|`#$^*+~@")
QUOTES = frozenset('"“”«»')
ENDS = ".!?…。！？"


def surface(text: str) -> list[float]:
    """What a text looks like: length, marks, case, code, script, and how it addresses the reader.
    Each number is about 0 to 1.
    """
    plain, size, marks = text.strip(), max(1, len(text)), Counter(text)
    tokens = [w.strip(".,:;!?\"'()“”").lower().replace("'", "") for w in text.split()]
    count = max(1, len(tokens))
    letters = {c: n for c, n in marks.items() if c.isalpha()}
    share = 1 / max(1, sum(letters.values()))
    marked = text.translate(dict.fromkeys(map(ord, ENDS + ":\n"), "\n"))
    sentences = [s.split() for s in marked.split("\n") if s.strip()] or [[""]]
    asks = [s[0].strip(".,;\"'()“”").lower().replace("'", "") in ASKING for s in sentences]
    return [
        math.log1p(size) / 8,
        math.log1p(count) / 6,
        math.log1p(count / len(sentences)) / 4,
        min(1.0, sum(letters.values()) / count / 10),
        plain[-1:] in ("?", "？"),
        "?" in marks or "？" in marks,
        plain[-1:] in (".", "!", "…", "。"),
        plain[-1:] == ":",
        plain[:1].islower(),
        plain[:1].isupper(),
        min(1.0, 4 * sum(n for c, n in marks.items() if c.isdigit()) / size),
        min(1.0, 8 * sum(marks[c] for c in CODE) / size),
        min(1.0, math.log1p(marks["\n"]) / 3),
        next(filter(None, tokens), "") in ASKING,
        min(1.0, 3 * sum(t in ADDRESSING for t in tokens) / count),
        "you" in tokens or "your" in tokens,
        share * sum(n for c, n in letters.items() if c > "\u024f"),
        share * sum(n for c, n in letters.items() if c > "\x7f"),
        min(1.0, 3 * share * sum(n for c, n in letters.items() if c.isupper())),
        not QUOTES.isdisjoint(marks),
        ":" in marks,
        min(1.0, 5 * marks[","] / count),
        size <= 12,
        sum(asks) / len(asks),
        *(any(asks), asks[-1]),
    ]


def form(text: str) -> Floats:
    """[D] hashed words and character trigrams, of length 1, then `surface`, then a constant."""
    text = text[:READ]
    grams: defaultdict[str, float] = defaultdict(float)
    for word, count in Counter(words(text, 2)).items():
        grams[f" {word} "] += 1.5 * count
        marked = f"^{word}$"
        for start in range(len(word)):
            grams[marked[start : start + 3]] += 0.5 * count
    for mark, count in Counter(text).items():
        if not (mark.isalnum() or mark.isspace()):
            grams[mark] += count
    codes = np.array([zlib.crc32(gram.encode("utf-8", "replace")) for gram in grams], np.int64)
    weights = np.sqrt([*grams.values()])
    hashed = np.bincount((codes >> 1) % BUCKETS, np.where(codes & 1, weights, -weights), BUCKETS)
    return np.concatenate(
        [
            hashed / (np.linalg.norm(hashed) or 1.0),
            SURFACE_WEIGHT * np.array(surface(text), float),
            [1.0],
        ]
    )


FORM_WIDTH = len(form(""))


def forms(texts: Iterable[str]) -> Floats:
    """[N, D] of `form`."""
    return np.stack([form(text) for text in texts])


def repeats(question: str, inputs: Iterable[str]) -> bool:
    """Whether the question nearly repeats one of these texts."""
    asked = set(words(question[:READ], 2))
    if not asked:
        return False
    known = (set(words(text[:READ], 2)) for text in inputs)
    return any(len(asked & own) >= NEAR_DUPLICATE * len(asked | own) for own in known)


# ---- with a bundle


class Floor(NamedTuple):
    """Predicted gain of a record above none: linear in its cosine and its usefulness."""

    constant: float = 0.0  # all 0: every record passes
    cosine: float = 0.0
    usefulness: float = 0.0

    def gain(self, cosine: Floats, usefulness: Floats) -> Floats:
        """[M] predicted gains above none."""
        return self.constant + self.cosine * cosine + self.usefulness * usefulness


@dataclass(frozen=True)
class GateWeights:
    """What a bundle keeps of a gate."""

    weights: Floats  # [H + D] of the encoder's vector and the form, scaled
    threshold: float
    floor: Floor

    def scores(self, vectors: NDArray[np.floating], texts: Floats) -> Floats:
        """[N] log odds that these texts belong, from their vectors [N, H] and forms [N, D]."""
        return np.asarray(np.concatenate([vectors, texts], 1) @ self.weights, dtype=np.float64)

    def config(self) -> dict[str, Any]:
        """All but the weights, as JSON values."""
        return {"version": VERSION, "threshold": self.threshold, "floor": list(self.floor)}

    @classmethod
    def restore(cls, config: Mapping[str, Any] | None, weights: Any) -> "GateWeights | None":
        """The inverse of `config`; None for a bundle that has no gate of this version."""
        if not config or config.get("version") != VERSION:
            return None
        numbers = np.asarray(weights, dtype=np.float64)
        return cls(numbers, float(config["threshold"]), Floor(*config["floor"]))


class LearnedGate(Gate):
    """A bundle's gate."""

    reads_vectors = True

    def __init__(self, learned: GateWeights, embed: Embed):
        self.learned, self.embed = learned, embed

    def belongs(self, context: Context) -> bool:
        """Above the threshold, or nearly a repetition of a record's input."""
        question = context.query.input
        score = self.learned.scores(self.embed([question]), forms([question]))[0]
        if score >= self.learned.threshold:
            return True
        return repeats(question, (record.input for record in context.visible))

    def relevant(self, context: Context, ranked: Sequence[Ranked]) -> list[Ranked]:
        """The records whose predicted gain is not below that of none."""
        if not ranked or self.learned.floor == Floor():
            return list(ranked)
        vectors = self.embed([context.query.input, *(item.record.input for item in ranked)])
        cosine = np.asarray(vectors[1:] @ vectors[0], dtype=np.float64)
        usefulness = np.array([item.usefulness or 0.0 for item in ranked])
        gains = self.learned.floor.gain(cosine, usefulness)
        return [item for item, gain in zip(ranked, gains, strict=True) if gain >= 0]


# ---- without a bundle

LEAST_RECORDS = 8  # with fewer, no classifier is fitted: the words in common decide alone
MOST_RECORDS = 150  # the latest, which the classifier is fitted on
LEXICAL_THRESHOLD = -0.15  # of a classifier with targets −1 and 1
LEXICAL_FLOOR = 0.03  # share of the question's weight of words that a record must have
FEW_FLOOR = 0.1  # the same with few records
NEAR_COSINE = 0.4  # of a record that needs no word in common, where there is an encoder
COMMON = 1 / 25  # words in more than this share of generic requests weigh nothing


class _Generic(NamedTuple):
    """What is computed of the generic requests once."""

    inverse: Floats  # [D, D] of their regularized second moments
    summed: Floats  # [D]
    weights: Mapping[str, float]  # of words: the log of how much rarer than `COMMON` each is
    unseen: float
    size: int


@cache
def _generic() -> _Generic:
    texts = generic_requests()
    x, count = forms(texts), len(texts)
    holders = Counter(word for text in texts for word in set(words(text, 2)))

    def weight(holding: float) -> float:
        return max(0.0, math.log((count + 1) / (holding + 0.5)) + math.log(COMMON))

    inverse: Floats = np.linalg.inv(x.T @ x + np.eye(x.shape[1])).astype(np.float64)
    known = {word: weight(holding) for word, holding in holders.items()}
    return _Generic(inverse, x.sum(0), known, weight(0), count)


def coverage(question: str, inputs: Sequence[str]) -> Floats:
    """[M] share of the question's words, weighed by rarity, that each text has; 0 to 1. Words that
    are common in requests weigh nothing.
    """
    generic, asked = _generic(), set(words(question[:READ], 2))
    weights = {word: generic.weights.get(word, generic.unseen) for word in asked}
    total = sum(weights.values())
    if total <= 0:
        return np.array([float(repeats(question, [text])) for text in inputs])
    known = (set(words(text[:READ], 2)) for text in inputs)
    return np.array([sum(weights[word] for word in asked & own) / total for own in known])


class LexicalGate(Gate):
    """Compares a question with the user's own records by their words and form: a ridge classifier
    of the records' inputs against the generic requests, and words in common with each record.
    `embed` is for a gateway that has an encoder, but no bundle.
    """

    def __init__(self, embed: Embed | None = None):
        self.embed, self.reads_vectors = embed, embed is not None
        self._classifier = lru_cache(maxsize=256)(self.fit)

    def __reduce__(self) -> tuple[Any, ...]:  # another process fits its own
        return LexicalGate, (self.embed,)

    def belongs(self, context: Context) -> bool:
        question, inputs = context.query.input, self._inputs(context)
        if len(inputs) < LEAST_RECORDS or repeats(question, inputs):
            return True
        return float(form(question) @ self._classifier(inputs)) >= LEXICAL_THRESHOLD

    def relevant(self, context: Context, ranked: Sequence[Ranked]) -> list[Ranked]:
        """The records with words of the question that are not common in requests; with an encoder
        also those that are near it.
        """
        few = len(self._inputs(context)) < LEAST_RECORDS
        question, inputs = context.query.input, [item.record.input for item in ranked]
        passed = coverage(question, inputs) >= (FEW_FLOOR if few else LEXICAL_FLOOR)
        if self.embed is not None and inputs:
            vectors = self.embed([question, *inputs])
            passed |= vectors[1:] @ vectors[0] >= NEAR_COSINE
        return [item for item, passes in zip(ranked, passed, strict=True) if passes]

    @staticmethod
    def fit(inputs: tuple[str, ...]) -> Floats:
        """[D] the weights; both classes count alike. Woodbury: only the records' rows are new."""
        generic, x = _generic(), forms(inputs)
        weight = generic.size / len(inputs)
        xa = x @ generic.inverse
        core = np.linalg.solve(np.eye(len(x)) / weight + xa @ x.T, xa)
        right = weight * x.sum(0) - generic.summed
        return np.asarray(generic.inverse @ right - xa.T @ (core @ right))

    def forget(self) -> None:
        """Drop what was made of users' records."""
        self._classifier.cache_clear()

    @staticmethod
    def _inputs(context: Context) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.input for r in context.visible[-MOST_RECORDS:]))
