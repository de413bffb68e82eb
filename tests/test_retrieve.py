"""Retrieval: scores against an independent Okapi, texts without words, order, and what is kept."""

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_llm import plugins
from hydra_llm.config import load_settings
from hydra_llm.errors import SettingsError
from hydra_llm.history import before
from hydra_llm.retrieve import BM25, RETRIEVERS, make_retriever
from hydra_llm.testing import check_retriever
from hydra_llm.types import Query, Ranked, Record
from hydra_llm.word_index import WordIndex

BUILT_IN = ["bm25", "dense", "hybrid", "recent", "random", "nothing"]

sentence = st.lists(
    st.sampled_from(["the", "The", "cat", "sat", "on", "mat", "a", "dog", "🙂", "café"]), max_size=8
).map(" ".join)


def history(*texts: str, user: str = "u") -> list[Record]:
    return [Record(user, f"r{n}", text, f"answer {n}", position=n) for n, text in enumerate(texts)]


def ask(text: str, user: str = "u") -> Query:
    return Query(user, "q", text)


def ids(ranked: Sequence[Ranked]) -> list[str]:
    return [item.record.id for item in ranked]


def lengths(texts: Sequence[str]) -> np.ndarray:
    """A stand-in encoder: [N, 2], the angle says how long a text is."""
    return np.array([[math.cos(len(text) / 20), math.sin(len(text) / 20)] for text in texts])


def okapi(corpus: list[list[str]], query: list[str]) -> np.ndarray:
    """BM25Okapi written down from its formula (k1 1.5, b 0.75, epsilon 0.25), word by word."""
    counts, total = [Counter(doc) for doc in corpus], len(corpus)
    mean_length = sum(map(len, corpus)) / total
    holders = Counter(word for count in counts for word in count)
    idf = {word: math.log(total - n + 0.5) - math.log(n + 0.5) for word, n in holders.items()}
    floor = max(0.0, 0.25 * sum(idf.values()) / len(idf))
    scores = [0.0] * total
    for word in query:
        weight = idf.get(word, 0.0)
        for place, count in enumerate(counts):
            part = (
                count[word]
                * 2.5
                / (count[word] + 1.5 * (0.25 + 0.75 * len(corpus[place]) / mean_length))
            )
            scores[place] += (weight if weight >= 0 else floor) * part
    return np.array(scores)


# ---- BM25


@settings(deadline=None)
@given(
    st.lists(sentence, min_size=1, max_size=12).filter(
        lambda texts: any(text.split() for text in texts)
    ),
    sentence,
)
def test_bm25_is_okapi(texts: list[str], query: str) -> None:
    records = history(*texts)
    ranked = BM25().retrieve(ask(query), records, len(records))
    expected = okapi([text.split() for text in texts], query.split())
    assert sorted(ids(ranked)) == sorted(record.id for record in records)
    assert [item.score for item in ranked] == pytest.approx(
        [expected[item.record.position] for item in ranked], abs=1e-9
    )
    assert [item.score for item in ranked] == sorted((item.score for item in ranked), reverse=True)


def test_a_word_that_most_records_hold_still_counts_a_little() -> None:
    """rank_bm25's floor: without it, a query of common words would find nothing."""
    texts = ["film one", "film two", "film three", "four five"]
    ranked = BM25().retrieve(ask("film"), history(*texts), 4)
    assert ranked[-1].record.id == "r3"
    assert ranked[0].score > ranked[-1].score == 0


def test_words_are_split_at_blanks_and_keep_case_as_in_lamp() -> None:
    ranked = BM25().retrieve(
        ask("Cat"), history("cat dog bird", "the Cat, slept", "a Cat slept"), 3
    )
    assert ids(ranked)[0] == "r2"
    assert [item.score > 0 for item in ranked] == [True, False, False]


def test_k_beyond_the_corpus() -> None:
    assert ids(BM25().retrieve(ask("a"), history("a", "b", "c"), 10)) == ["r0", "r2", "r1"]


@pytest.mark.parametrize(
    "texts",
    [(), ("",), ("", " \t", "\n"), ("the of and", "the of", "and the")],
    ids=["none", "empty", "blank", "stop words"],
)
def test_a_corpus_without_words(texts: tuple[str, ...]) -> None:
    for query in ("the", "cat", "", " ", "\0", "🙂"):
        ranked = BM25().retrieve(ask(query), history(*texts), 2)
        assert len(ranked) == min(2, len(texts))
        assert all(math.isfinite(item.score) for item in ranked)


def test_equal_scores_come_latest_first() -> None:
    records = history("x y", "same words", "z", "same words", "same words")
    assert ids(BM25().retrieve(ask("same"), records, 5)) == ["r4", "r3", "r1", "r2", "r0"]
    assert ids(BM25().retrieve(ask("unknown"), records, 3)) == ["r4", "r3", "r2"]


def test_added_or_edited_records_are_retrieved() -> None:
    retriever, records = BM25(), history("cat sat", "dog ran", "a mat")
    assert retriever.retrieve(ask("bird"), records, 1)[0].score == 0
    added = [*records, Record("u", "new", "bird sang", "", position=3)]
    assert ids(retriever.retrieve(ask("bird"), added, 1)) == ["new"]
    edited = [Record("u", "r0", "bird sat", "", position=0), *records[1:]]
    assert ids(retriever.retrieve(ask("bird"), edited, 1)) == ["r0"]
    assert retriever.retrieve(ask("bird"), records, 1)[0].score == 0


@settings(deadline=None)
@given(st.lists(sentence, min_size=2, max_size=8), sentence, st.data())
def test_an_earlier_time_slice_is_scored_without_later_records(
    texts: list[str], query: str, data: st.DataObject
) -> None:
    records, retriever = history(*texts), BM25()
    retriever.retrieve(ask(query), records, 5)  # the whole history's index is there already
    now = Query("u", "q", query, position=data.draw(st.integers(0, len(texts))))
    visible = before(records, now)
    assert retriever.retrieve(now, visible, 5) == BM25().retrieve(
        now, history(*texts[: now.position]), 5
    )


def test_a_text_is_indexed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """New records are added, an earlier slice of time is a part; another text begins anew."""
    added = list[str]()
    real = WordIndex.extend

    def extend(self: WordIndex, texts: Sequence[str]) -> None:
        added.extend(texts)
        real(self, texts)

    monkeypatch.setattr(WordIndex, "extend", extend)
    retriever, records = BM25(), history("cat sat", "dog ran", "a mat", "bird")
    for count in (2, 2, 3, 1, 4, 2):
        retriever.retrieve(ask("cat"), records[:count], 1)
    assert added == ["cat sat", "dog ran", "a mat", "bird"]
    retriever.retrieve(ask("cat"), records[1:], 1)
    assert added[4:] == ["dog ran", "a mat", "bird"]


def test_bm25_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    BM25().retrieve(ask("cat"), history("cat sat", "dog ran"), 1)
    assert capfd.readouterr() == ("", "")


# ---- the others


def test_dense_is_cosine_whatever_the_rows_lengths() -> None:
    texts = ("a", "a" * 10, "a" * 20)
    scaled = make_retriever(
        "dense",
        embed=lambda texts: (
            lengths(texts).astype(np.float32) * np.array([[len(text)] for text in texts])
        ),
    )
    ranked = scaled.retrieve(ask("a" * 12), history(*texts), 3)
    assert ids(ranked) == ["r1", "r2", "r0"]
    assert [item.score for item in ranked] == pytest.approx(
        [math.cos(abs(n - 12) / 20) for n in (10, 20, 1)], abs=1e-6
    )


def test_dense_asks_for_a_historys_vectors_once() -> None:
    counts: list[int] = []
    dense = make_retriever("dense", embed=lambda texts: counts.append(len(texts)) or lengths(texts))
    for _ in range(3):
        dense.retrieve(ask("aa"), history("a", "b", "c"), 2)
    assert sorted(counts) == [1, 1, 1, 3]


def test_dense_of_zero_vectors_falls_back_to_recency() -> None:
    zeros = make_retriever("dense", embed=lambda texts: np.zeros((len(texts), 4)))
    assert [
        (item.record.id, item.score) for item in zeros.retrieve(ask("x"), history("a", "b"), 2)
    ] == [("r1", 0), ("r0", 0)]


def test_hybrid_adds_the_reciprocal_places_of_both() -> None:
    # by words r2, r0 (the others have none); by length r1, r3 (later than r0), r0, r2, r4
    records = history("cat dog", "a" * 12, "cat cat cat cat cat cat", "b" * 7, "z" * 40)
    hybrid = make_retriever("hybrid", embed=lengths)
    ranked = hybrid.retrieve(ask("cat" + " " * 9), records, 5)
    assert {item.record.id: item.score for item in ranked} == pytest.approx(
        {"r0": 1 / 62 + 1 / 63, "r1": 1 / 61, "r2": 1 / 61 + 1 / 64, "r3": 1 / 62, "r4": 1 / 65}
    )
    assert ids(hybrid.retrieve(ask("c"), history("a", "b", "a"), 3)) == ["r2", "r1", "r0"]


@pytest.mark.parametrize(
    ("query", "right", "others"),
    [
        ("手机坏了怎么办", "我的手机坏了", ("今天天气很好", "我想吃火锅")),
        ("猫が好き", "うちの猫は可愛い", ("今日は雨です", "電車が遅れた")),
        ("โทรศัพท์เสีย", "โทรศัพท์ของฉันพัง", ("วันนี้ฝนตก", "อยากกินข้าว")),
        ("Погода?", "сегодня хорошая погода.", ("я купил машину", "кот спит")),
        ("ទូរស័ព្ទ", "ទូរស័ព្ទខូច", ("ថ្ងៃនេះភ្លៀង", "ខ្ញុំឃ្លាន")),
        ("الطقس؟", "كيف الطقس، اليوم", ("اشتريت سيارة", "القطة نائمة")),
    ],
)
def test_bm25_finds_words_of_every_script(query: str, right: str, others: tuple[str, ...]) -> None:
    ranked = BM25().retrieve(ask(query), history(right, *others), 3)
    assert ids(ranked)[0] == "r0"
    assert ranked[0].score > ranked[1].score


def test_recent_takes_the_latest_by_time_then_position() -> None:
    records = [
        Record("u", "b", "", "", span=(5.0, 5.0), position=0),
        Record("u", "a", "", "", span=(1.0, 1.0), position=1),
    ]
    assert ids(make_retriever("recent").retrieve(ask("x"), records, 1)) == ["b"]
    assert ids(make_retriever("recent").retrieve(ask("x"), history("x", "y", "z"), 2)) == [
        "r2",
        "r1",
    ]


def test_random_depends_on_seed_user_and_query_only() -> None:
    records = history(*"abcdefghij")

    def drawn(seed: int, query: Query) -> list[str]:
        return ids(make_retriever("random", seed=seed).retrieve(query, records, 5))

    first = drawn(0, Query("u", "q1", "text"))
    assert first == drawn(0, Query("u", "q1", "another text"))
    others = [
        drawn(1, Query("u", "q1", "")),
        drawn(0, Query("u", "q2", "")),
        drawn(0, Query("v", "q1", "")),
    ]
    assert all(first != other for other in others)
    assert (
        Counter(
            item for n in range(400) for item in drawn(n, Query("u", "q", ""))[:1]
        ).most_common()[-1][1]
        > 15
    )


def test_random_is_the_same_in_another_process() -> None:
    code = (
        "from hydra_llm.retrieve import *; from hydra_llm.types import *\nrecords = [Record('u',"
        " f'r{n}', '', '', position=n) for n in range(10)]\nprint([r.record.id for r in"
        " make_retriever('random', seed=3).retrieve(Query('u', 'q', ''), records, 4)])"
    )
    again = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    expected = ids(make_retriever("random", seed=3).retrieve(ask(""), history(*[""] * 10), 4))
    assert again == {f"{expected}\n"}


def test_the_nothing_retriever_returns_nothing() -> None:
    assert make_retriever("nothing").retrieve(ask("cat"), history("cat"), 5) == []


# ---- all of them


@pytest.mark.parametrize("name", BUILT_IN)
@settings(deadline=None)
@given(
    texts=st.lists(st.text(max_size=20) | sentence, max_size=6),
    query=st.text(max_size=20) | sentence,
    m=st.integers(-1, 8),
)
def test_every_retriever_keeps_the_contract(
    name: str, texts: list[str], query: str, m: int
) -> None:
    retriever, records = make_retriever(name, embed=lengths), history(*texts)
    ranked = retriever.retrieve(ask(query), records, m)
    assert len(ranked) == (0 if name == "nothing" else max(0, min(m, len(records))))
    assert [item.rank for item in ranked] == list(range(len(ranked)))
    assert len(set(ids(ranked))) == len(ranked)
    assert all(item.record in records and item.usefulness is None for item in ranked)
    assert [item.score for item in ranked] == sorted((item.score for item in ranked), reverse=True)
    assert (
        retriever.retrieve(ask(query), records[::-1], m) == ranked
    )  # whatever order the records came in


def test_a_records_answer_is_matched_only_on_request() -> None:
    records = [
        *history("cat", "dog"),
        Record("u", "answered", "fish", "zebra", position=2),
        *history("bird"),
    ]
    assert ids(make_retriever("bm25", text="both").retrieve(ask("zebra"), records, 1)) == [
        "answered"
    ]
    assert make_retriever("bm25").retrieve(ask("zebra"), records, 1)[0].score == 0
    seen: list[str] = []
    for text in ("input", "both"):
        make_retriever(
            "dense", embed=lambda texts: seen.extend(texts) or lengths(texts), text=text
        ).retrieve(ask("q"), records[2:3], 1)
    assert sorted(seen) == ["fish", "fish\nzebra", "q", "q"]


# ---- the door


def test_unknown_names_and_missing_parts_are_named() -> None:
    with pytest.raises(
        SettingsError,
        match=r"unknown retriever 'bm52' \(did you mean 'bm25'\?\): take one of bm25, dense,",
    ):
        make_retriever("bm52")
    for name in ("dense", "hybrid"):
        with pytest.raises(SettingsError, match=f"the {name} retriever needs an encoder"):
            make_retriever(name)
    with pytest.raises(SettingsError, match=r"'retriever': .*'hybrd' \(did you mean 'hybrid'\?\)"):
        load_settings(retriever="hybrd")
    with pytest.raises(SettingsError, match="'input' or 'both'"):
        make_retriever("bm25", text="output")  # type: ignore[arg-type]


class Oldest:
    """What a plug-in package would bring."""

    def __init__(self, **options: object) -> None:
        self.given = options

    def retrieve(self, query: Query, records: Sequence[Record], m: int) -> list[Ranked]:
        return [Ranked(record, 0.0, rank) for rank, record in enumerate(records[:m])]


def test_a_package_can_bring_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("oldest", f"{__name__}:Oldest", RETRIEVERS.group)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point])
    oldest = make_retriever("oldest", seed=4)
    assert oldest.given == {"embed": None, "seed": 4, "text": "input"}  # type: ignore[attr-defined]
    assert ids(oldest.retrieve(ask("x"), history("a", "b"), 1)) == ["r0"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_built_in_ones_keep_the_contract(name: str) -> None:
    check_retriever(name)


class Broken(BM25):
    """Returns the records as they come, whatever the query."""

    def __init__(self, fault: str):
        super().__init__()
        self.fault, self.calls = fault, 0

    def retrieve(self, query: Query, records: Sequence[Record], m: int) -> list[Ranked]:
        ranked = super().retrieve(query, records, m)
        self.calls += 1
        if self.fault == "too many":
            return super().retrieve(query, records, m + 1)
        if self.fault == "worst first":
            return [replace(item, rank=i) for i, item in enumerate(reversed(ranked))]
        if self.fault == "another order each time":
            return ranked if self.calls % 2 else ranked[:-1]
        return [replace(item, score=float("nan")) for item in ranked]


@pytest.mark.parametrize("fault", ["too many", "worst first", "another order each time", "nan"])
def test_a_broken_retriever_fails_the_contract(fault: str) -> None:
    with pytest.raises(AssertionError):
        check_retriever(Broken(fault))


HASHED = """
from hydra_llm.retrieve import BM25
from hydra_llm.types import Query, Record

texts = [" ".join(f"w{n * m % 41}" for m in range(n % 13 + 2)) + " all" for n in range(40)]
records = [Record("u", str(n), text, "") for n, text in enumerate(texts)]
print(BM25().scores(Query("u", "q", "all w1 w3 w20"), records).tolist())
"""


@pytest.mark.slow
def test_scores_are_the_same_in_every_process() -> None:
    """Python's hashes differ by process: a last digit more or less would change what is learned,
    and with it the LLM calls of a resumed command.
    """
    scores = {
        subprocess.run(
            [sys.executable, "-c", HASHED],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in range(3)
    }
    assert len(scores) == 1
