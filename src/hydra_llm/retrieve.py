"""Which of a user's earlier records may help with a query.

Every retriever is deterministic and takes the later record first where two are equally good. BM25
is Okapi on words between blanks, as in LaMP's evaluation (rank_bm25's BM25Okapi: k1 1.5, b 0.75;
words that more than half of the records hold weigh a quarter of the mean weight); scripts other
than Latin are split into caseless words, those without blanks into characters and their
pairs (`text.search_words`). Knows no LLM.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from random import Random as Generator
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from hydra_llm.errors import SettingsError
from hydra_llm.history import in_order
from hydra_llm.plugins import RETRIEVERS, read_prompts
from hydra_llm.types import Query, Ranked, Record
from hydra_llm.word_index import WordIndex

Floats = NDArray[np.float64]
Embed = Callable[[Sequence[str]], NDArray[np.floating]]  # texts → [N, H], with a cache
Matched = Literal["input", "both"]  # what is matched: a record's input (as LaMP), or its answer too

INDEXES = 256  # of the latest users, kept
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

    def __reduce__(self) -> tuple[Any, ...]:  # another process makes indexes of its own
        return partial(type(self), embed=self.embed, seed=self.seed, text=self.text), ()

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


def _best_first(scores: Floats) -> NDArray[np.intp]:
    """[N] places by score; of equal scores the later place first."""
    return np.lexsort((-np.arange(len(scores)), -scores))


class Index(Protocol):
    """What is kept of one user's texts, oldest first."""

    texts: list[str]

    def extend(self, texts: Sequence[str]) -> None:
        """Add texts behind the others."""
        ...

    def scores(self, query: str, count: int) -> Floats:
        """[count] how well each of the first texts fits, as if there were no others."""
        ...


class _ByIndex(_ByScore):
    """Keeps an index for each of the latest users: new records are added to it, and an earlier
    slice of time is its beginning. Any thread may call.
    """

    def __init__(self, *, embed: Embed | None = None, seed: int = 0, text: Matched = "input"):
        super().__init__(embed=embed, seed=seed, text=text)
        self._kept: LRUCache[str, Index] = LRUCache(INDEXES)
        self._lock = threading.Lock()

    def index(self) -> Index:
        """An empty one."""
        raise NotImplementedError

    def scores(self, query: Query, records: Sequence[Record]) -> Floats:
        both = self.text == "both"
        texts = [f"{r.input}\n{r.output}" if both else r.input for r in records]
        with self._lock:
            return self._index(query.user, texts).scores(query.input, len(texts))

    def _index(self, user: str, texts: list[str]) -> Index:
        """The index that begins with these texts; a new one where a kept text is not among them."""
        index = self._kept.get(user)
        if index is None or index.texts[: len(texts)] != texts[: len(index.texts)]:
            index = self._kept[user] = self.index()
        if len(index.texts) < len(texts):
            index.extend(texts[len(index.texts) :])
        return index

    def forget(self) -> None:
        with self._lock:
            self._kept.clear()


class BM25(_ByIndex):
    """Words in common, rare ones weighing more."""

    def index(self) -> Index:
        return WordIndex()


class Dense(_ByIndex):
    """Nearest in the encoder's space by cosine, -1 to 1; a zero vector scores 0."""

    needs_encoder = True

    def index(self) -> Index:
        assert self.embed is not None
        return _Vectors(self.embed)


class _Vectors:
    """Texts as vectors of length 1; zero vectors stay zero."""

    def __init__(self, embed: Embed):
        self.texts: list[str] = []
        self._embed, self._rows = embed, np.zeros((0, 0))

    def extend(self, texts: Sequence[str]) -> None:
        rows = self._unit(texts)
        self._rows = np.concatenate([self._rows, rows]) if self.texts else rows
        self.texts += texts

    def scores(self, query: str, count: int) -> Floats:
        return np.asarray(self._rows[:count] @ self._unit([query])[0])

    def _unit(self, texts: Sequence[str]) -> Floats:
        rows = np.asarray(self._embed(texts), dtype=np.float64)
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
