"""The words of a text, and how often records have each in the input, in the output and in both.

    text_profile     where and how each word stands in one text
    PopulationWords  counts over many users
    UserWords        counts of one user; `OwnWords` keeps those of the latest users

Words are those of `text.words`: of scripts without blanks each character is one. Letters: V words
of the vocabulary. Knows no models and no files.
"""

import math
import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, Self

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from hydra_llm.text import caseless, words
from hydra_llm.types import Record

_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
_SURFACE = re.compile(r"[^\W_]+")
FAR_SENTENCE = 3  # later ones count as this one


class Place(NamedTuple):
    """Where and how a word stands in a text; the values are of a word that it lacks."""

    inside: float = 0.0
    times: float = 0.0  # log(1 + how often)
    first: float = 1.0  # place, 0 to 1
    last: float = 0.0
    sentence: float = float(FAR_SENTENCE)
    in_last: float = 0.0  # whether the last sentence has it
    capital: float = 0.0  # whether it is ever written with a capital letter
    capital_rate: float = 0.0
    inner_capital: float = 0.0  # the same behind a sentence's first word
    mixed_case: float = 0.0  # a capital letter behind the first: BERT, LaMP
    capital_run: float = 0.0  # beside another such word: a name of several words


ABSENT = Place()


@dataclass(frozen=True)
class TextProfile:
    """The words of one text."""

    tokens: tuple[str, ...]
    places: Mapping[str, Place]
    sentences: int


@lru_cache(maxsize=256)
def text_profile(text: str) -> TextProfile:
    """Where each word stands in a text, how often, and how it is written."""
    tokens = words(text)
    count, total = Counter(tokens), max(1, len(tokens))
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for place, word in enumerate(tokens):
        first.setdefault(word, place)
        last[word] = place
    sentences = [part for part in _SENTENCE.split(text) if part] or [""]
    written, closing = _Written.of(sentences), set(words(sentences[-1]))
    places = {
        word: Place(
            inside=1.0,
            times=math.log1p(times),
            first=first[word] / total,
            last=last[word] / total,
            sentence=float(min(FAR_SENTENCE, written.sentence.get(word, 0))),
            in_last=float(word in closing),
            capital=float(written.capital[word] > 0),
            capital_rate=written.capital[word] / times,
            inner_capital=float(word in written.inner),
            mixed_case=float(word in written.mixed),
            capital_run=float(word in written.run),
        )
        for word, times in count.items()
    }
    return TextProfile(tokens, places, len(sentences))


class _Written(NamedTuple):
    """How the words of a text are written."""

    sentence: dict[str, int]  # the first that has the word
    capital: Counter[str]
    inner: set[str]
    mixed: set[str]
    run: set[str]

    @classmethod
    def of(cls, sentences: Sequence[str]) -> Self:
        written = cls({}, Counter(), set(), set(), set())
        for index, sentence in enumerate(sentences):
            before = ""  # the word before, if it has a capital letter
            for place, match in enumerate(_SURFACE.finditer(sentence)):
                surface, word = match[0], caseless(match[0])
                written.sentence.setdefault(word, index)
                if surface[1:] != surface[1:].lower():
                    written.mixed.add(word)
                if not surface[0].isupper():
                    before = ""
                    continue
                written.capital[word] += 1
                if place:
                    written.inner.add(word)
                if before:
                    written.run.update((before, word))
                before = word
        return written


COUNTS = 7
"""Columns of a population's counts: records with the word in the input, in the output, in both;
places in inputs behind which it stands, and how many of the words there are in the output; the same
of places before which it stands.
"""


@dataclass
class PopulationWords:
    """Counts over many users' records."""

    counts: dict[str, list[int]] = field(default_factory=dict)  # word → `COUNTS` numbers
    records: int = 0
    output_words: int = 0  # the outputs' lengths
    input_words: int = 0  # distinct words of each input
    kept_words: int = 0  # of them, in the output

    @classmethod
    def of(cls, histories: Iterable[Sequence[Record]], *, least_users: int = 2) -> Self:
        """The counts of these users; words of fewer users than `least_users` are left out: they
        tell little of others, and much of whom they are from.
        """
        population, users = cls(), Counter[str]()
        for history in histories:
            seen: set[str] = set()
            for record in history:
                population._add(record)
                seen.update(words(record.input), words(record.output))
            users.update(seen)
        counts = population.counts
        population.counts = {
            word: counts[word] for word in sorted(counts) if users[word] >= least_users
        }
        return population

    def _add(self, record: Record) -> None:
        tokens, output = words(record.input), words(record.output)
        given, out, counts = set(tokens), set(output), self.counts
        for word in given | out:
            row = counts.setdefault(word, [0] * COUNTS)
            row[0] += word in given
            row[1] += word in out
            row[2] += word in given and word in out
        for left, right in pairwise(tokens):
            row = counts[left]
            row[3] += 1
            row[4] += right in out
            row = counts[right]
            row[5] += 1
            row[6] += left in out
        self.records += 1
        self.output_words += len(output)
        self.input_words += len(given)
        self.kept_words += len(given & out)

    @property
    def length(self) -> float:
        """Mean number of words of an output."""
        return self.output_words / max(1, self.records)

    def common(self, count: int) -> list[str]:
        """The words that most outputs have."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1][1], item[0]))
        return [word for word, row in ordered[:count] if row[1]]

    def rows(self, asked: Sequence[str]) -> NDArray[np.float64]:
        """[W, COUNTS] of these words."""
        none = [0] * COUNTS
        rows = np.array([self.counts.get(word, none) for word in asked], dtype=np.float64)
        return rows.reshape(len(asked), COUNTS)


@dataclass
class UserWords:
    """Counts of one user's records."""

    inputs: Counter[str] = field(default_factory=Counter)  # records with the word in the input
    outputs: Counter[str] = field(default_factory=Counter)  # in the output
    both: Counter[str] = field(default_factory=Counter)
    records: int = 0
    output_words: int = 0  # the outputs' lengths

    def add(self, records: Iterable[Record]) -> None:
        """Count more records."""
        for record in records:
            given, output = set(words(record.input)), words(record.output)
            out = set(output)
            self.inputs.update(given)
            self.outputs.update(out)
            self.both.update(given & out)
            self.records += 1
            self.output_words += len(output)

    def copy(self) -> "UserWords":
        """One that can be added to."""
        own = Counter(self.inputs), Counter(self.outputs), Counter(self.both)
        return UserWords(*own, self.records, self.output_words)

    def rows(self, asked: Sequence[str]) -> NDArray[np.float64]:
        """[W, 3] records with the word in the input, in the output, in both."""
        counters = (self.inputs, self.outputs, self.both)
        rows = [[counter[word] for counter in counters] for word in asked]
        return np.array(rows, dtype=np.float64).reshape(len(asked), 3)


class OwnWords:
    """The counts of the latest users, kept: records that come later are added, and where one is
    gone all are counted anew. Any thread may call.
    """

    def __init__(self, users: int = 256):
        self._kept: LRUCache[str, tuple[tuple[Record, ...], UserWords]] = LRUCache(users)
        self._lock = threading.Lock()

    def of(self, records: Sequence[Record]) -> UserWords:
        """The counts of one user's visible records; not to be changed."""
        if not records:
            return UserWords()
        name, visible = records[0].user, tuple(records)
        with self._lock:
            known, counts = self._kept.get(name, ((), UserWords()))
        if known == visible:
            return counts
        grown = visible[: len(known)] == known
        counts = counts.copy() if grown else UserWords()
        counts.add(visible[len(known) if grown else 0 :])
        with self._lock:
            self._kept[name] = visible, counts
        return counts

    def forget(self) -> None:
        """Drop the counts, and the records that they are of."""
        with self._lock:
            self._kept.clear()
