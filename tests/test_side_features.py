"""Side features against formulas written anew; missing values are neutral."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_llm.errors import DataError
from hydra_llm.side_features import Featurizer, fit_stats
from hydra_llm.tasks.base import CohortStats, Task
from hydra_llm.tasks.classification import BANDWIDTHS, PSEUDO_COUNT
from hydra_llm.tasks.generation import overlap
from hydra_llm.text import words
from hydra_llm.types import Candidate, Query, Ranked, Record
from hydra_llm.word_counts import UserWords

TAGS = Task("tags", "classification", "Which tag? {input}", ("calm", "loud", "odd"))
STARS = Task("stars", "rating", "How many stars? {input}", ("1", "2", "5"))
TITLES = Task("titles", "generation", "Title of: {input}")


class Hashed:
    """Texts as vectors of their words, without an encoder."""

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), 8), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.split() or [""]:
                row += (
                    np.random.default_rng(sum(map(ord, word))).standard_normal(8).astype(np.float32)
                )
            row /= np.linalg.norm(row)
        return rows


def maker(task: Task, stats: CohortStats | None = None) -> Featurizer:
    return Featurizer(task, Hashed(), stats or CohortStats())  # type: ignore[arg-type]


def past(*pairs: tuple[str, str]) -> list[Record]:
    return [Record("u", str(i), text, output, position=i) for i, (text, output) in enumerate(pairs)]


def cosine(one: str, other: str) -> float:
    a, b = Hashed().texts([one, other]).astype(np.float64)
    return float(a @ b)


QUERY = Query("u", "q", "rain night")
HISTORY = past(("rain night", "odd"), ("old war", "calm"), ("rain", "odd"), ("love song", "loud"))


def test_label_shares_are_shrunk_to_the_training_users() -> None:
    own = maker(TAGS, CohortStats((0.5, 0.3, 0.2), reference=0.4))
    table = own.adapter(
        QUERY, [Candidate(label, label) for label in TAGS.labels], own.vectorize(HISTORY)
    )
    assert table.shape == (3, len(own.adapter_names))
    for column, bandwidth in enumerate([*BANDWIDTHS, None]):
        for row, (label, prior) in enumerate(zip(TAGS.labels, (0.5, 0.3, 0.2), strict=True)):
            weights = [
                1.0
                if bandwidth is None
                else math.exp((cosine(QUERY.input, r.input) - 0.4) / bandwidth)
                for r in HISTORY
            ]
            own_share = sum(
                weight for weight, r in zip(weights, HISTORY, strict=True) if r.output == label
            )
            share = (own_share + PSEUDO_COUNT * prior) / (sum(weights) + PSEUDO_COUNT)
            assert table[row, column] == pytest.approx(math.log(share + 1e-4), abs=1e-4)


def test_without_records_shares_are_the_training_users() -> None:
    own = maker(TAGS, CohortStats((0.5, 0.3, 0.2)))
    table = own.adapter(
        QUERY, [Candidate(label, label) for label in TAGS.labels], own.vectorize([])
    )
    assert table[:, 0] == pytest.approx(np.log([0.5001, 0.3001, 0.2001]))
    assert not table[:, -2:].any()  # no samples


def test_votes_are_log_shares_and_zero_without_samples() -> None:
    own = maker(TAGS)
    candidates = [
        Candidate("odd", "odd", 3, greedy=True),
        Candidate("calm", "calm", 1),
        Candidate("loud", "loud"),
    ]
    table = own.adapter(QUERY, candidates, own.vectorize([]))
    at = own.adapter_names.index("llm_votes")
    assert table[:, at] == pytest.approx(
        [math.log(3.5 / 5.5 * 3), math.log(1.5 / 5.5 * 3), math.log(0.5 / 5.5 * 3)]
    )
    assert table[:, own.adapter_names.index("llm_greedy")].tolist() == [1, 0, 0]


def test_ratings_have_columns_of_distance() -> None:
    own = maker(STARS, CohortStats((1 / 3, 1 / 3, 1 / 3)))
    candidates = [
        Candidate("1", "1", 1),
        Candidate("2", "2", 1),
        Candidate("5", "5", 2, greedy=True),
    ]
    table = own.adapter(QUERY, candidates, own.vectorize(past(("x", "5"), ("y", "5"))))
    scale, votes = np.array([0, 0.25, 1]), np.array([0.25, 0.25, 0.5])
    assert table[:, own.adapter_names.index("llm_near")] == pytest.approx(
        -np.abs(scale - votes @ scale)
    )
    share = np.array([2 / 3, 2 / 3, 2 / 3 + 2]) / 4
    assert table[:, own.adapter_names.index("near_all")] == pytest.approx(
        -np.abs(scale - share @ scale)
    )


def test_an_unparsable_candidate_gets_the_lowest_of_each_column() -> None:
    own = maker(TAGS)
    candidates = [Candidate("odd", "odd", 3), Candidate("?", None, 2)]
    table = own.adapter(QUERY, candidates, own.vectorize(HISTORY))
    everyone = own.adapter(
        QUERY,
        [candidates[0], Candidate("calm", "calm"), Candidate("loud", "loud")],
        own.vectorize(HISTORY),
    )
    assert table[1] == pytest.approx(everyone.min(0))


def test_texts_are_compared_with_the_users_own() -> None:
    own, history = maker(TITLES), past(("x", "a quiet night"), ("y", "the loud war film"))
    candidates = [
        Candidate("a quiet night", "a quiet night", 2, greedy=True),
        Candidate("war", "war", 1),
    ]
    table = dict(
        zip(
            own.adapter_names, own.adapter(QUERY, candidates, own.vectorize(history)).T, strict=True
        )
    )
    near = [[cosine(c.text, r.output) for r in history] for c in candidates]
    usual = math.log1p(3.5)
    assert table["own_nearest"] == pytest.approx([max(row) for row in near], abs=1e-5)
    assert table["own_mean"] == pytest.approx([sum(row) / 2 for row in near], abs=1e-5)
    assert table["length_signed"] == pytest.approx([math.log1p(3) - usual, math.log1p(1) - usual])
    assert table["length"] == pytest.approx(-abs(table["length_signed"]))
    assert table["cosine"] == pytest.approx(
        [cosine(c.text, QUERY.input) for c in candidates], abs=1e-5
    )
    assert table["llm_agreement"] == pytest.approx([overlap("a quiet night", "war")] * 2)
    assert table["llm_votes"] == pytest.approx([2 / 3, 1 / 3])
    assert table["llm_greedy"].tolist() == [1, 0]


def test_records_are_compared_with_the_query() -> None:
    own = maker(TAGS)
    ranked = [Ranked(HISTORY[2], 4.0, 0), Ranked(HISTORY[0], 2.0, 1), Ranked(HISTORY[3], 0.0, 2)]
    table = dict(
        zip(own.reranker_names, own.reranker(QUERY, ranked, own.vectorize(HISTORY)).T, strict=True)
    )
    assert table["retriever"] == pytest.approx([1, 0.5, 0])
    assert table["reciprocal_rank"] == pytest.approx([1, 1 / 2, 1 / 3])
    assert table["cosine"] == pytest.approx(
        [cosine(item.record.input, QUERY.input) for item in ranked], abs=1e-5
    )
    assert table["recency"].tolist() == [0.5, 0.5, 0.5]  # no record has a time
    assert table["answer_share"][0] == table["answer_share"][1] > table["answer_share"][2]
    assert table["answer_near"][0] == 0  # the likeliest answer
    titles = maker(TITLES)
    table = titles.reranker(QUERY, ranked, titles.vectorize(HISTORY))
    assert table.shape == (3, len(titles.reranker_names))


def test_recency_goes_by_time_and_not_by_the_order_of_the_file() -> None:
    times = ("2024-06-01", "", "2019-06-01", "2022-06-01")
    records = [Record("u", str(i), "rain", "odd", time, position=i) for i, time in enumerate(times)]
    own = maker(TAGS)
    table = own.reranker(QUERY, [Ranked(r, 1.0, 0) for r in records], own.vectorize(records))
    recency = table[:, own.reranker_names.index("recency")]
    assert recency.tolist() == pytest.approx([1, 0.5, 1 / 3, 2 / 3])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([TAGS, STARS, TITLES]),
    st.lists(st.sampled_from(["", "rain", "🎬", "the", "war film"]), max_size=4),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.floats(0, 5),
)
def test_side_features_are_always_finite(
    task: Task, texts: list[str], votes: list[int], score: float
) -> None:
    own = maker(task)
    outputs = task.labels or ("", "a b")
    history = past(*((text, outputs[i % len(outputs)]) for i, text in enumerate(texts)))
    history_vectors = own.vectorize(history)
    answers = task.labels[: len(votes)] or ("ab", "c", "d")[: len(votes)]
    candidates = [
        Candidate(answer, answer, vote) for answer, vote in zip(answers, votes, strict=False)
    ]
    assert np.isfinite(own.adapter(Query("u", "q", ""), candidates, history_vectors)).all()
    if history:
        ranked = [Ranked(record, score, i) for i, record in enumerate(history)]
        assert np.isfinite(own.reranker(Query("u", "q", ""), ranked, history_vectors)).all()


FREE = Task(
    "free", "classification", "Which tag? {input}", TAGS.labels, extra={"free_history": True}
)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([TAGS, STARS, TITLES, FREE]),
    st.lists(
        st.tuples(st.sampled_from(["rain", "the", "war film"]), st.integers(0, 3)), max_size=6
    ),
    st.data(),
)
def test_pasts_share_arrays_and_are_as_alone(
    task: Task, drawn: list[tuple[str, int]], data: st.DataObject
) -> None:
    own = maker(task)
    outputs = (*(task.labels or ("a", "b c")), *(["no label"] if task is FREE else []))
    history = past(*((text, outputs[i % len(outputs)]) for text, i in drawn))
    vectorize = own.of_pasts(history)
    count = data.draw(st.integers(0, len(history)))
    other = data.draw(st.permutations(history))[:count]
    for visible in (history[:count], other, [*history, *past(("new", outputs[0]))]):
        shared, alone = vectorize(visible), own.vectorize(visible)
        assert all(map(np.array_equal, shared.rows, alone.rows))
    assert vectorize(history).inputs.base is vectorize(history[:1]).inputs.base or not history


def test_an_unknown_label_is_named() -> None:
    with pytest.raises(DataError, match="'purple'.*'tags'"):
        maker(TAGS).vectorize(past(("x", "purple")))


def test_cohort_stats_are_the_training_users() -> None:
    stats = fit_stats(TAGS, Hashed(), [HISTORY, past(("rain", "odd"))])  # type: ignore[arg-type]
    assert stats.label_shares == pytest.approx((2 / 8, 2 / 8, 4 / 8))
    nearest = [max(cosine(a.input, b.input) for b in HISTORY if b is not a) for a in HISTORY]
    assert stats.reference == pytest.approx(sum(nearest) / 4, abs=1e-5)
    titles = fit_stats(
        TITLES, Hashed(), [past(("x", "one two three"), ("y", "one"), ("z", "a b c d e"))]
    )  # type: ignore[arg-type]
    assert titles.words == 3
    assert fit_stats(TITLES, Hashed(), [[]]).words == 10  # type: ignore[arg-type]


class HalfKnown:
    """A word model: the user's answers have "moon" half of the time, and no other word."""

    def probabilities(self, asked: Sequence[str], text: str, own: UserWords) -> np.ndarray:
        self.text, self.own = text, own
        return np.array([0.5 * (word == "moon") for word in asked])


def test_expected_rouge_by_the_word_model() -> None:
    model = HalfKnown()
    own = Featurizer(TITLES, Hashed(), CohortStats(words=6), model)  # type: ignore[arg-type]
    offered = [Candidate(text, text) for text in ("The Moon", "moon moon moon", "a sun", "!")]
    for history, usual in ((HISTORY, 1.0), ([], 6.0)):  # mean words of an answer
        table = own.adapter(QUERY, offered, own.vectorize(history))
        assert own.adapter_names[-1] == "expected_rouge"
        expected = [1.5 * 0.5 / (count + 0.5 * usual) for count in (2, 3)]
        assert table[:, -1] == pytest.approx([*expected, 0, 0])
        assert (model.text, model.own.records) == (QUERY.input, len(history))
    assert maker(TITLES).adapter_names == own.adapter_names[:-1]  # without a word model
    ranked = [Ranked(record, 1.0, 0) for record in past(("x", "a moon"), ("y", "a sun"))]
    table = own.reranker(QUERY, ranked, own.vectorize(HISTORY))
    assert own.reranker_names[-1] == "word_overlap"
    assert table[:, -1] == pytest.approx([1.5 * 0.5 / (2 + 0.5), 0])
    tags = Featurizer(TAGS, Hashed(), CohortStats(), model)  # type: ignore[arg-type]
    assert tags.adapter_names == maker(TAGS).adapter_names


class Characters:
    """A word model that was asked for some words: of them the answer has those of `likely`."""

    def __init__(self, likely: str):
        self.likely, self.asked = likely, set[str]()

    def probabilities(self, asked: Sequence[str], text: str, own: UserWords) -> np.ndarray:
        self.asked.update(asked)
        return np.array([float(word in self.likely) for word in asked])


@pytest.mark.parametrize(
    ("likely", "texts", "shared"),
    [("月亮", ("月亮升起", "太阳落山"), (2, 0)), ("ฝน", ("ฝนตก", "แดดออก"), (2, 0))],
)
def test_words_without_blanks_are_asked_one_by_one(
    likely: str, texts: tuple[str, str], shared: tuple[int, int]
) -> None:
    model = Characters(likely)
    own = Featurizer(TITLES, Hashed(), CohortStats(words=4), model)  # type: ignore[arg-type]
    candidates = [Candidate(text, text) for text in texts]
    column = own.adapter(QUERY, candidates, own.vectorize([]))[:, -1]
    lengths = [len(words(text)) for text in texts]
    assert min(lengths) > 1
    assert model.asked == {word for text in texts for word in words(text)}
    expected = [1.5 * n / (size + 2) for n, size in zip(shared, lengths, strict=True)]
    assert column == pytest.approx(expected)
