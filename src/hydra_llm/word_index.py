"""BM25 over one user's texts, to which texts are added and of which any first n are searched.

A word's postings are in order of time: those of the first n texts are found by binary search, and
word weights and the mean length are computed from them at query time. So one index serves a user's
whole history and each past of it. Letters: N texts, P postings (a word of a text).
"""

import math
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hydra_llm.text import search_words

Floats = NDArray[np.float64]
Ints = NDArray[np.integer]
K1, B = 1.5, 0.75
FLOOR = 0.25  # of the mean word weight: what a word weighs that more than half of the texts have


class _Postings(NamedTuple):
    """Of one word."""

    texts: "array[int]"  # that have it, ascending
    times: "array[int]"  # how often each has it

    def first(self, count: int) -> tuple[Ints, Ints]:
        """Those of the first `count` texts."""
        end = bisect_left(self.texts, count)
        return np.frombuffer(self.texts, np.int32)[:end], np.frombuffer(self.times, np.int32)[:end]


class WordIndex:
    """Texts in order, by their words. Scores are rank_bm25's BM25Okapi, whose negative word weights
    become a quarter of the mean weight, but at least 0: with few texts it puts the best one last.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._postings: dict[str, _Postings] = {}
        self._nth = array("i")  # [P], text by text: how many texts up to this one have the word
        self._ends, self._words = array("q", [0]), array("q", [0])  # [N + 1] of P; of all words
        self._reach, self._reached = np.zeros(2, np.int64), 0  # see `_mean_weight`

    def extend(self, texts: Iterable[str]) -> None:
        """Add texts behind the others."""
        for text in texts:
            self._add(text)

    def _add(self, text: str) -> None:
        words = search_words(text)
        for word, times in Counter(words).items():
            own = self._postings.get(word)
            if own is None:
                own = self._postings[word] = _Postings(array("i"), array("i"))
            own.texts.append(len(self.texts))
            own.times.append(times)
            self._nth.append(len(own.texts))
        self.texts.append(text)
        self._ends.append(len(self._nth))
        self._words.append(self._words[-1] + len(words))

    def scores(self, query: str, count: int) -> Floats:
        """[count] of the first texts, as if there were no others; 0 where no word is in common."""
        words = [word for word in search_words(query) if word in self._postings]
        first = {word: self._postings[word].first(count) for word in words}
        if not any(len(texts) for texts, _ in first.values()):
            return np.zeros(count)
        texts, times = map(np.concatenate, zip(*first.values(), strict=True))
        lengths = np.diff(np.frombuffer(self._words, np.int64)[: count + 1])
        usual = K1 * (1 - B + B * lengths / (self._words[count] / count))
        shares = times * (K1 + 1) / (times + usual[texts])
        holders = np.array([len(own) for own, _ in first.values()])
        terms = self._weighted(shares, holders, count)
        of_word = dict(zip(first, np.split(terms, np.cumsum(holders)[:-1]), strict=True))
        # A repeated word adds once more, in the query's order: so equal texts have equal sums.
        found = np.concatenate([first[word][0] for word in words])
        added = np.concatenate([of_word[word] for word in words])
        return np.bincount(found, added, minlength=count).astype(np.float64, copy=False)

    def _weighted(self, shares: Floats, holders: Ints, count: int) -> Floats:
        """[hits] the shares of the hits of words, which so many of the first texts have, times the
        words' weights: rounded as by bm25s, so that ties fall as in runs that are recorded.
        """
        weights = _log_odds(holders, count)
        if weights.min() < 0:
            weights = np.where(weights < 0, max(0.0, FLOOR * self._mean_weight(count)), weights)
        odds = (count - holders + 0.5) / (holders + 0.5)
        lucene = np.array([math.log(1 + own) for own in odds])
        weighted: Floats = np.repeat(lucene, holders) * shares
        weighted *= np.repeat(weights / np.log1p(odds), holders)
        return weighted

    def _mean_weight(self, count: int) -> float:
        """Of all words of the first texts. How many words at least 1, 2, … texts have is kept, and
        counted on for a longer past.
        """
        if count < self._reached:
            self._reach, self._reached = np.zeros(2, np.int64), 0
        added = np.frombuffer(self._nth, np.int32)[self._ends[self._reached] : self._ends[count]]
        reach = np.bincount(added, minlength=len(self._reach))
        reach[: len(self._reach)] += self._reach
        self._reach, self._reached = reach, count
        words = reach[1:] - np.append(reach[2:], 0)  # that exactly 1, 2, … texts have
        holders = np.flatnonzero(words) + 1
        weights, words = _log_odds(holders, count), words[holders - 1]
        short = weights.astype(np.float32).astype(np.float64)  # times a count it is exact
        return math.fsum([*(words * short), *(words * (weights - short))]) / int(reach[1])


def _log_odds(holders: Ints, count: int) -> Floats:
    """The log of the odds that a text does not have a word."""
    odds: Floats = np.log(count - holders + 0.5) - np.log(holders + 0.5)
    return odds
