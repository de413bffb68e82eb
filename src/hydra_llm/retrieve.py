"""Which of a user's earlier records may help with a query.

Every retriever is deterministic and takes the later record first where two are equally good. BM25
is Okapi on words between blanks, as in LaMP's evaluation (rank_bm25's BM25Okapi: k1 1.5, b 0.75;
words that more than half of the records hold weigh a quarter of the mean weight); scripts other
than Latin are split into caseless words, those without blanks into characters and their
pairs (`text.search_words`). Knows no LLM.
"""

import logging
import math
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from random import Random as Generator
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hydra_llm.errors import SettingsError
from hydra_llm.history import in_order
from hydra_llm.plugins import RETRIEVERS, read_prompts
from hydra_llm.text import search_words
from hydra_llm.types import Query, Ranked, Record

Floats = NDArray[np.float64]
Embed = Callable[[Sequence[str]], NDArray[np.floating]]  # texts → [N, H], with a cache
Matched = Literal["input", "both"]  # what is matched: a record's input (as LaMP), or its answer too


FUSION = 60  # of reciprocal ranks: with it the first places of one list weigh little more


class Retriever(Protocol):
    """Anything that orders a user's records for a query."""

    def retrieve(self, query: Query, records: Sequence[Record], m: int) -> list[Ranked]:
        """Return at most m of the records that the query may see, best first."""
        ...


@runtime_checkable
class Forgetful(Protocol):
    """A retriever with a cache of what it made of records."""

    def forget(self) -> None:
        """Empty the cache."""
        ...


def make_retriever(
    name: str, *, embed: Embed | None = None, seed: int = 0, text: Matched = "input"
) -> Retriever:
    """The retriever of this name. Raises SettingsError: unknown, or it needs an encoder."""
    retriever: Retriever = RETRIEVERS.load(name)(embed=embed, seed=seed, text=text)
    if not hasattr(retriever, "retrieve"):
        raise SettingsError(f"the retriever '{name}' has no 'retrieve'")
    return retriever


class PromptRecords(NamedTuple):
    """Which records a prompt shows."""

    retriever: Retriever
    k: int


def prompt_records(
    names: str, own: Retriever, *, embed: Embed | None = None, seed: int = 0
) -> tuple[PromptRecords, ...]:
    """Of prompts by the names of the benchmark's methods (`plugins.PROMPTS`), such as
    `zero-shot,recent@4`; `own` is the retriever of `rag`.
    """
    return tuple(
        PromptRecords(make_retriever(name, embed=embed, seed=seed) if name else own, k)
        for name, k in read_prompts(names)
    )


def needs_encoder(name: str) -> bool:
    """Whether the retriever of this name compares vectors."""
    return bool(getattr(RETRIEVERS.load(name), "needs_encoder", False))


class _ByScore:
    """Orders records by a score of their texts against the query's; equal scores by recency."""

    needs_encoder = False

    def __init__(self, *, embed: Embed | None = None, seed: int = 0, text: Matched = "input"):
        if text not in ("input", "both"):
            raise SettingsError(f"a retriever matches 'input' or 'both' of a record, not '{text}'")
        if embed is None and self.needs_encoder:
            name = type(self).__name__.lower()
            raise SettingsError(f"the {name} retriever needs an encoder")
        self.embed, self.seed, self.text = embed, seed, text
        # The key is the texts themselves: an edited record or an earlier slice of time never meets
        # a stale index.
        self._index = lru_cache(maxsize=256)(self.index)

    def retrieve(self, query: Query, records: Sequence[Record], m: int) -> list[Ranked]:
        if m <= 0 or not records:
            return []
        oldest_first = in_order(records)
        scores = self.scores(query, oldest_first)
        best = _best_first(scores)[:m]
        return [Ranked(oldest_first[at], float(scores[at]), rank) for rank, at in enumerate(best)]

    def scores(self, query: Query, records: Sequence[Record]) -> Floats:
        """[N]: how well each record fits, oldest first; by default all alike."""
        return np.zeros(len(records))

    def index(self, texts: tuple[str, ...]) -> Any:
        """What `scores` needs of the records' texts."""
        raise NotImplementedError

    def indexed(self, records: Sequence[Record]) -> Any:
        """The kept index of the records: of their inputs, or of inputs and answers."""
        both = self.text == "both"
        return self._index(tuple(f"{r.input}\n{r.output}" if both else r.input for r in records))

    def forget(self) -> None:
        self._index.cache_clear()


def _best_first(scores: Floats) -> NDArray[np.intp]:
    """[N] places by score; of equal scores the later place first."""
    return np.lexsort((-np.arange(len(scores)), -scores))


class BM25(_ByScore):
    """Words in common, rare ones weighing more; the index of the visible records is kept."""

    def scores(self, query: Query, records: Sequence[Record]) -> Floats:
        """[N]: BM25Okapi; all 0 where query or records have no words."""
        words, index = search_words(query.input), self.indexed(records)
        if index is None or not words:  # bm25s raises on an empty query
            return np.zeros(len(records))
        return np.asarray(index.get_scores(words), dtype=np.float64)

    def index(self, texts: tuple[str, ...]) -> Any:
        """A bm25s index that scores as rank_bm25's BM25Okapi; None where no text has a word. bm25s
        has Okapi's term weights (`atire`) but not its word weights: they replace `lucene`'s.
        """
        tokens = [search_words(text) for text in texts]
        if not any(tokens):
            return None
        if "bm25s" not in sys.modules:  # its import sets DEBUG
            import_module("bm25s")
            logging.getLogger("bm25s").setLevel(logging.WARNING)
        import bm25s

        index = bm25s.BM25(k1=1.5, b=0.75, method="atire", idf_method="lucene", dtype="float64")
        index.index(tokens, show_progress=False)
        holders, total = np.diff(index.scores["indptr"]), len(texts)  # [V] records with each word
        # Log of the odds that a record does not hold the word; where negative, a quarter of the
        # mean, but at least 0: with few records rank_bm25 puts the best match last.
        weights = np.log(total - holders + 0.5) - np.log(holders + 0.5)
        # The same in every process: bm25s orders the words by their hash, `fsum` needs no order.
        mean = math.fsum(weights) / len(weights)
        weights = np.where(weights < 0, max(0.0, 0.25 * mean), weights)
        lucene = np.log1p((total - holders + 0.5) / (holders + 0.5))
        index.scores["data"] *= np.repeat(weights / lucene, holders)
        return index


class Dense(_ByScore):
    """Nearest in the encoder's space by cosine, -1 to 1; a zero vector scores 0."""

    needs_encoder = True

    def scores(self, query: Query, records: Sequence[Record]) -> Floats:
        return np.asarray(self.indexed(records) @ self.index((query.input,))[0])

    def index(self, texts: tuple[str, ...]) -> Floats:
        """[N, H] of length 1; zero rows stay zero."""
        assert self.embed is not None
        rows = np.asarray(self.embed(texts), dtype=np.float64)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.asarray(rows / np.maximum(length, np.finfo(np.float64).tiny))


class Hybrid(_ByScore):
    """BM25 and dense by reciprocal rank fusion: the sum of 1 / (60 + place), place from 1 (Cormack
    et al. 2009). Records without a common word have no place by BM25.
    """

    needs_encoder = True

    def __init__(self, *, embed: Embed | None = None, seed: int = 0, text: Matched = "input"):
        super().__init__(embed=embed, seed=seed, text=text)
        self.parts = (BM25(text=text), Dense(embed=embed, text=text))

    def scores(self, query: Query, records: Sequence[Record]) -> Floats:
        total, shares = np.zeros(len(records)), 1 / (FUSION + 1 + np.arange(len(records)))
        by_words, by_vector = (part.scores(query, records) for part in self.parts)
        with_words = _best_first(by_words)[: np.count_nonzero(by_words > 0)]
        total[with_words] += shares[: len(with_words)]
        total[_best_first(by_vector)] += shares
        return total

    def forget(self) -> None:
        for part in self.parts:
            part.forget()


class Recent(_ByScore):
    """The latest records; all score 0, so that recency alone decides."""


class Random(_ByScore):
    """Random records: the same for the same seed, user, query and records, on every machine."""

    def scores(self, query: Query, records: Sequence[Record]) -> Floats:
        random = Generator(f"{self.seed}\n{query.user}\n{query.id}")
        return np.array([random.random() for _ in records])


class Nothing(_ByScore):
    """No records at all: zero-shot."""

    def retrieve(self, query: Query, records: Sequence[Record], m: int) -> list[Ranked]:
        return []
