"""One index for a whole history and its pasts: golden scores of bm25s, appending, deletion."""

import gc
import math
from collections.abc import Sequence

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_llm.retrieve import BM25
from hydra_llm.text import search_words
from hydra_llm.types import Query, Record
from hydra_llm.word_index import WordIndex

VOCABULARY = [
    "the",
    "The",
    "cat",
    "sat",
    "on",
    "mat",
    "a",
    "dog",
    "🙂",
    "café",
    "猫が好き",
    "w1",
    "w2",
]
text = st.lists(st.sampled_from(VOCABULARY), max_size=9).map(" ".join)
texts = st.lists(text, max_size=14)


def indexed(texts: Sequence[str]) -> WordIndex:
    index = WordIndex()
    index.extend(texts)
    return index


def by_bm25s(texts: Sequence[str], query: str) -> np.ndarray:
    """Okapi by bm25s: its `atire` has Okapi's shares, and its word weights are replaced."""
    tokens, words = [search_words(text) for text in texts], search_words(query)
    if not any(tokens) or not words:
        return np.zeros(len(texts))
    index = bm25s.BM25(k1=1.5, b=0.75, method="atire", idf_method="lucene", dtype="float64")
    index.index(tokens, show_progress=False)
    holders, total = np.diff(index.scores["indptr"]), len(texts)
    weights = np.log(total - holders + 0.5) - np.log(holders + 0.5)
    mean = math.fsum(weights) / len(weights)
    weights = np.where(weights < 0, max(0.0, 0.25 * mean), weights)
    lucene = np.log1p((total - holders + 0.5) / (holders + 0.5))
    index.scores["data"] *= np.repeat(weights / lucene, holders)
    return index.get_scores(words)


@settings(deadline=None)
@given(texts.filter(bool), text)
def test_scores_are_those_of_bm25s_to_the_last_bit(texts: list[str], query: str) -> None:
    """Scores that are equal but for rounding rank as they always did: prompts are recorded."""
    assert indexed(texts).scores(query, len(texts)).tolist() == by_bm25s(texts, query).tolist()


@pytest.mark.parametrize("size", [50, 400])
def test_long_histories_have_the_scores_of_bm25s(size: int) -> None:
    rng = np.random.default_rng(size)
    drawn = [" ".join(f"w{n}" for n in rng.zipf(1.3, 20) % 500) for _ in range(size + 5)]
    index = indexed(drawn[:size])
    for query in drawn[size:]:
        assert index.scores(query, size).tolist() == by_bm25s(drawn[:size], query).tolist()


@settings(deadline=None)
@given(texts, text, st.data())
def test_appended_texts_and_pasts_are_as_indexed_alone(
    texts: list[str], query: str, data: st.DataObject
) -> None:
    """Whatever was asked in between, and however many texts came at once."""
    grown, start = WordIndex(), 0
    while start < len(texts):
        end = data.draw(st.integers(start + 1, len(texts)))
        grown.extend(texts[start:end])
        count = data.draw(st.integers(0, end))
        expected = indexed(texts[:count]).scores(query, count)
        assert grown.scores(query, count).tolist() == expected.tolist()
        start = end
    assert vars(grown).keys() == vars(indexed(texts)).keys()
    for count in range(len(texts), -1, -1):
        expected = indexed(texts[:count]).scores(query, count)
        assert grown.scores(query, count).tolist() == expected.tolist()


def test_a_count_without_words_scores_nothing() -> None:
    index = indexed(["", "cat sat", "cat"])
    assert index.scores("cat", 1).tolist() == [0]
    assert index.scores("", 3).tolist() == index.scores("dog", 3).tolist() == [0, 0, 0]
    assert WordIndex().scores("cat", 0).tolist() == []


def held_by(root: object) -> str:
    """All that can be reached from an object, as one text."""
    seen, rest, found = set[int](), [root], list[str]()
    while rest:
        item = rest.pop()
        if id(item) in seen or isinstance(item, type) or callable(item):
            continue
        seen.add(id(item))
        found += [item] if isinstance(item, str) else []
        rest += gc.get_referents(item)
    return "\n".join(found)


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_deleted_record_leaves_no_text_behind(gone: int) -> None:
    records = [
        Record("u", str(n), word, "", position=n) for n, word in enumerate(("ox", "secret", "emu"))
    ]
    retriever, query = BM25(), Query("u", "q", "ox secret emu")
    retriever.retrieve(query, records, 3)
    assert all(record.input in held_by(retriever) for record in records)
    rest = [record for record in records if record is not records[gone]]
    retriever.forget()  # as the gateway calls it
    assert not any(record.input in held_by(retriever) for record in records)
    ranked = retriever.retrieve(query, rest, 3)
    assert [item.record for item in ranked] == [
        item.record for item in BM25().retrieve(query, rest, 3)
    ]
    assert records[gone].input not in held_by(retriever)


def test_an_edited_record_drops_the_index_that_held_it() -> None:
    records = [Record("u", str(n), f"text{n}", "", position=n) for n in range(4)]
    retriever, query = BM25(), Query("u", "q", "text2")
    retriever.retrieve(query, records, 1)
    retriever.retrieve(query, [records[0], *records[2:]], 1)
    assert "text1" not in held_by(retriever)
    assert "text3" in held_by(retriever)
