"""Reranking: the user's own order over what was retrieved; nothing is lost, and ties keep the
retriever's order.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from hydra_llm.context import Context
from hydra_llm.model.heads import Head, make_head
from hydra_llm.model.interactions import Cross, Tower
from hydra_llm.model.scorer import Scorer
from hydra_llm.rerank import KeepOrder, LearnedReranker, Reranker, record_text
from hydra_llm.side_features import Featurizer
from hydra_llm.tasks.base import CohortStats, Task
from hydra_llm.types import Query, Ranked, Record

TAGS = Task("tags", "classification", "Which tag? {input}", ("calm", "loud", "odd"))
TITLES = Task("titles", "generation", "Title of: {input}")
QUERY = Query("u", "q", "rain night")
PAST = [
    Record("u", str(i), text, label, str(2020 + i), position=i)
    for i, (text, label) in enumerate([("old war", "odd"), ("rain", "calm"), ("night", "loud")])
]
RETRIEVED = [Ranked(PAST[2], 3.0, 0), Ranked(PAST[0], 2.0, 1), Ranked(PAST[1], 1.0, 2)]


class Seen:
    """Texts and pairs as vectors of their words; remembers what it has encoded."""

    version = 0

    def __init__(self) -> None:
        self.asked: list[str] = []

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        self.asked += texts
        rows = np.zeros((len(texts), 8), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.split() or [""]:
                row += (
                    np.random.default_rng(sum(map(ord, word))).standard_normal(8).astype(np.float32)
                )
            row /= np.linalg.norm(row)
        return rows

    def pairs(self, left: Sequence[str], right: Sequence[str]) -> np.ndarray:
        return self.texts([f"{a} | {b}" for a, b in zip(left, right, strict=True)])


def reranker(
    task: Task = TAGS,
    weights: dict[str, float] | None = None,
    *,
    with_answer: bool = True,
    cross: bool = False,
) -> LearnedReranker:
    featurizer = Featurizer(task, Seen(), CohortStats())  # type: ignore[arg-type]
    torch.manual_seed(0)
    interaction = Cross(8) if cross else Tower(8, 4)
    scorer = Scorer(interaction, make_head("linear", interaction), featurizer.reranker_names).eval()
    for name, weight in (weights or {}).items():
        scorer.side_weight.data[featurizer.reranker_names.index(name)] = weight
    return LearnedReranker(scorer, featurizer, with_answer=with_answer)


def order(
    chooser: Reranker,
    retrieved: Sequence[Ranked] = RETRIEVED,
    past: Sequence[Record] = PAST,
    query: Query = QUERY,
    heads: Mapping[str, Head] | None = None,
) -> list[Ranked]:
    featurizer = getattr(chooser, "featurizer", None)
    vectorize = featurizer and featurizer.vectorize
    context = Context(query, tuple(past), heads or {}, vectorize=vectorize)
    return chooser.order(context, retrieved)


def test_equal_scores_keep_the_retrievers_order() -> None:
    ranked = order(reranker())
    assert [item.record for item in ranked] == [item.record for item in RETRIEVED]
    assert [item.usefulness for item in ranked] == [0.0] * 3
    assert order(KeepOrder()) == RETRIEVED


@pytest.mark.parametrize("task", [TAGS, TITLES], ids=lambda task: task.name)
@pytest.mark.parametrize(
    ("column", "weight", "expected"),
    [("recency", 1.0, "210"), ("recency", -1.0, "012"), ("retriever", -1.0, "102")],
)
def test_records_stand_in_the_order_of_their_scores(
    task: Task, column: str, weight: float, expected: str
) -> None:
    ranked = order(reranker(task, {column: weight}))
    assert "".join(item.record.id for item in ranked) == expected
    scores = [item.usefulness or 0.0 for item in ranked]
    assert scores == sorted(scores, reverse=True)
    assert {(item.record.id, item.score, item.rank) for item in ranked} == {
        (item.record.id, item.score, item.rank) for item in RETRIEVED
    }


def test_a_record_with_the_label_of_similar_records_is_first() -> None:
    past = [*PAST, *(Record("u", f"x{i}", "rain night", "calm", position=10 + i) for i in range(4))]
    assert order(reranker(TAGS, {"answer_share": 1.0}), past=past)[0].record.output == "calm"


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("with_answer", [False, True])
def test_the_records_answer_is_read_where_it_should_be(with_answer: bool, cross: bool) -> None:
    chooser = reranker(with_answer=with_answer, cross=cross)
    order(chooser)
    texts = [record_text(record, with_answer=with_answer) for record in PAST]
    assert texts == (
        [f"{r.input} → {r.output}" for r in PAST] if with_answer else [r.input for r in PAST]
    )
    encoded = chooser.featurizer.features.asked  # type: ignore[attr-defined]
    assert all((f"{QUERY.input} | {text}" if cross else text) in encoded for text in texts)
    assert with_answer or not any("→" in text for text in encoded)


def test_no_records_no_order() -> None:
    assert order(reranker(), [], []) == []


def test_each_user_has_an_own_order() -> None:
    chooser = reranker(cross=True)
    vectors = chooser.featurizer.features.pairs(
        [QUERY.input] * 3, [record_text(item.record, with_answer=True) for item in RETRIEVED]
    )
    own = Head.of(np.append(vectors[2] - (vectors[0] + vectors[1]) / 2, 0.0))
    assert order(chooser, heads={"reranker": own})[0].record == RETRIEVED[2].record
    other = Query("stranger", "q", QUERY.input)
    assert [item.record for item in order(chooser, query=other)] == [
        item.record for item in RETRIEVED
    ]
