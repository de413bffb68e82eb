"""Metrics against scikit-learn, rouge_score, sacrebleu, and by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import sacrebleu
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, root_mean_squared_error

from hydra_llm.bench.stats import Metric, score
from hydra_llm.errors import DataError, LLMError
from hydra_llm.tasks.base import Task

LABELS = ("politics", "sports", "food & drink", "never")
CLASSES = Task("c", "classification", "{input}", LABELS)
RATINGS = Task("r", "rating", "{input}", ("1", "2", "3", "4", "5"))
TEXTS = Task("t", "generation", "{input}")

lost = LLMError("HTTP 500")
classified = st.lists(
    st.tuples(st.sampled_from([*LABELS, None]), st.sampled_from(LABELS[:3])),
    min_size=1,
    max_size=30,
)
rated = st.lists(
    st.tuples(st.sampled_from(["1", "2", "3.5", "5", "7"]), st.sampled_from("12345")),
    min_size=1,
    max_size=30,
)
text = st.lists(
    st.sampled_from(["the", "cat", "sat", "on", "mat", "a", "Cat", "café", "2.5", "!"]), max_size=12
).map(" ".join)
written = st.lists(st.tuples(text, text), min_size=1, max_size=8)


def values(task: Task, pairs: list[tuple[str | None, str]]) -> dict[str, Metric]:
    return score(task, [answer for answer, _ in pairs], [gold for _, gold in pairs])


@settings(deadline=None)
@given(classified)
def test_classification_is_scikit_learns(pairs: list[tuple[str | None, str]]) -> None:
    result = values(CLASSES, pairs)
    given_, gold = [answer or "unparsable" for answer, _ in pairs], [gold for _, gold in pairs]
    assert list(result) == ["accuracy", "macro_f1"]
    assert result["accuracy"].value == pytest.approx(accuracy_score(gold, given_))
    assert result["macro_f1"].value == pytest.approx(
        f1_score(gold, given_, labels=LABELS, average="macro", zero_division=0)
    )
    assert result["accuracy"].rows[:, 0].tolist() == [
        float(answer == gold) for answer, gold in pairs
    ]


@settings(deadline=None)
@given(rated)
def test_rating_is_scikit_learns(pairs: list[tuple[str | None, str]]) -> None:
    result = values(RATINGS, pairs)
    answers, golds = (
        [float(answer or "nan") for answer, _ in pairs],
        [float(gold) for _, gold in pairs],
    )
    assert result["mae"].value == pytest.approx(mean_absolute_error(golds, answers))
    assert result["rmse"].value == pytest.approx(root_mean_squared_error(golds, answers))
    assert not result["mae"].spec.higher_is_better
    assert not result["rmse"].spec.higher_is_better


def test_an_unparsable_rating_counts_as_the_farthest_end() -> None:
    result = values(RATINGS, [(None, "2"), (None, "5"), (None, "3"), ("4", "4")])
    assert result["mae"].rows[:, 0].tolist() == [3, 4, 2, 0]
    assert result["rmse"].value == pytest.approx(math.sqrt((9 + 16 + 4) / 4))
    assert not np.isnan(result["mae"].rows).any()


@settings(max_examples=40, deadline=None)
@given(written)
@example([("!", "!")])
def test_generation_is_rouge_scores_and_sacrebleus(pairs: list[tuple[str | None, str]]) -> None:
    result = values(replace(TEXTS, tokenizer="lamp"), pairs)
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    for name in ("rouge1", "rougeL"):
        each = [scorer.score(gold, answer or "")[name].fmeasure for answer, gold in pairs]
        assert result[name].rows[:, 0].tolist() == each
        assert result[name].value == pytest.approx(np.mean(each))
    expected = sacrebleu.corpus_bleu(
        [answer or "" for answer, _ in pairs], [[gold for _, gold in pairs]]
    ).score
    assert result["bleu"].value == pytest.approx(expected, abs=1e-9)


def test_texts_of_signs_alone_are_compared_by_sign() -> None:
    """rouge_score's own words are ASCII: it knows no word of such a text."""
    result = values(TEXTS, [("!", "!"), ("!", "?"), ("→ !", "!"), ("", "")])
    assert result["rouge1"].rows[:, 0].tolist() == [1, 0, pytest.approx(2 / 3), 0]


def test_generation_by_hand() -> None:
    result = values(TEXTS, [("the cat sat", "the cat ran far"), (None, "x y")])
    assert result["rouge1"].rows[:, 0].tolist() == [pytest.approx(4 / 7), 0]
    assert result["rougeL"].value == pytest.approx(2 / 7)
    same = values(TEXTS, [("a b c d e", "a b c d e")])
    assert same["bleu"].value == pytest.approx(100)


def test_a_failed_call_is_nan_and_never_zero() -> None:
    result = score(RATINGS, ["4", lost, None], ["5", "1", "1"])
    assert result["mae"].value == pytest.approx((1 + 4) / 2)
    assert np.isnan(result["mae"].rows[:, 0]).tolist() == [False, True, False]


@pytest.mark.parametrize(("task", "gold"), [(CLASSES, "sports"), (RATINGS, "1"), (TEXTS, "x")])
def test_where_every_call_failed_no_figure_is_given(task: Task, gold: str) -> None:
    for metric in score(task, [lost, lost], [gold, gold]).values():
        assert math.isnan(metric.value)
        assert np.isnan(metric.rows).all()


@settings(deadline=None)
@given(classified, st.data())
def test_failed_samples_change_no_figure(
    pairs: list[tuple[str | None, str]], data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(pairs)))
    answers: list[str | LLMError | None] = [answer for answer, _ in pairs]
    golds = [gold for _, gold in pairs]
    whole = score(CLASSES, answers, golds)
    with_failure = score(
        CLASSES,
        [*answers[:place], lost, *answers[place:]],
        [*golds[:place], "sports", *golds[place:]],
    )
    assert {name: m.value for name, m in whole.items()} == {
        name: m.value for name, m in with_failure.items()
    }


def test_only_the_tasks_metrics_are_computed() -> None:
    assert list(score(Task("t", "generation", "{input}", metrics=("rougeL",)), ["a"], ["a"])) == [
        "rougeL"
    ]


def test_golds_must_fit_the_task_and_the_answers() -> None:
    with pytest.raises(DataError, match="'five' is not a number"):
        score(RATINGS, ["5"], ["five"])
    with pytest.raises(ValueError, match="shorter"):
        score(RATINGS, ["5", "4"], ["5"])


# ---- words of any script


SCRIPTS = {
    "Han": "今天天气很好",
    "Cyrillic": "сегодня очень хорошая погода",
    "Arabic": "الطقس جميل جدا اليوم",
    "Thai": "วันนี้อากาศดีมาก",
    "Devanagari": "आज मौसम बहुत अच्छा है",
    "Hangul": "오늘 날씨 정말 좋네요",
    "Kana": "きょうはいいてんき",
    "Latin": "good weather again today",
}


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_equal_texts_are_equal_in_every_script(text: str) -> None:
    result = {name: metric.value for name, metric in values(TEXTS, [(text, text)]).items()}
    assert result == {"rouge1": 1, "rougeL": 1, "bleu": pytest.approx(100)}
    others = [(text, other) for other in SCRIPTS.values() if other != text]
    assert all(row == 0 for row in values(TEXTS, others)["rouge1"].rows[:, 0])


def test_the_order_and_the_share_of_words_count_in_every_script() -> None:
    chinese = values(TEXTS, [("天气很好", "今天天气很好")])
    assert chinese["rouge1"].value == pytest.approx(2 * 4 / (4 + 6))
    turned = values(TEXTS, [("война и мир", "мир и война")])
    assert (turned["rouge1"].value, turned["rougeL"].value) == (1, pytest.approx(1 / 3))
    assert TEXTS.gain("天气很好", "今天天气很好") == pytest.approx(0.8)


@pytest.mark.parametrize("tokenizer", ["lamp", None])
def test_lamps_tasks_keep_lamps_words(tokenizer: str | None) -> None:
    task = Task.from_json(
        {"name": "t", "kind": "generation", "prompt": "{input}", "like": "LaMP-4"}
        | ({"tokenizer": tokenizer} if tokenizer else {})
    )
    assert (task.words, TEXTS.words) == ("lamp", "unicode")
    assert ("tokenizer" in task.to_json()) == bool(tokenizer)
    assert values(task, [("сегодня", "сегодня")])["rouge1"].value == 0
    assert values(task, [("the café", "the café")])["rouge1"].value == 1


@settings(max_examples=40)
@given(st.lists(st.tuples(*[st.text("今天气。好 ab,!", max_size=12)] * 2), min_size=1, max_size=4))
def test_bleu_of_chinese_is_sacrebleus_zh(pairs: list[tuple[str, str]]) -> None:
    expected = sacrebleu.corpus_bleu(
        [answer for answer, _ in pairs], [[gold for _, gold in pairs]], tokenize="zh"
    )
    assert values(TEXTS, list(pairs))["bleu"].value == pytest.approx(expected.score, abs=1e-9)
