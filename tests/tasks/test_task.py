"""Tasks: what task.json may hold, how answers are parsed, their gains."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from hydra_llm.errors import DataError
from hydra_llm.tasks.base import Task
from hydra_llm.tasks.generation import overlap
from hydra_llm.tasks.lamp import LAMP
from hydra_llm.tasks.rating import number_of

RATING = LAMP["LaMP-3"]
NEWS = LAMP["LaMP-2N"]
MOVIES = LAMP["LaMP-2M"]
HEADLINE = LAMP["LaMP-4"]

anything = st.text(max_size=200)
label = anything.map(str.strip).filter(bool)
labels = st.lists(label, min_size=2, max_size=8, unique=True)
scales = st.lists(
    st.integers(-50, 50) | st.integers(-50, 50).map(lambda n: n / 2),
    min_size=2,
    max_size=9,
    unique=True,
)
words = st.text(alphabet="ab cD1é-", max_size=60)


def classes(names: list[str]) -> Task:
    return Task("t", "classification", "{input}", tuple(names))


def ratings(numbers: list[float]) -> Task:
    return Task("t", "rating", "{input}", tuple(str(number) for number in numbers))


# ---- task.json


def task_json(**changed: Any) -> dict[str, Any]:
    data = {
        "name": "n",
        "kind": "rating",
        "labels": ["1", "2"],
        "prompt": "Rate: {input}",
        "metrics": ["mae"],
        **changed,
    }
    return {key: value for key, value in data.items() if value is not None}


@pytest.mark.parametrize(
    ("changed", "field", "said"),
    [
        ({"name": None}, "name", "is missing"),
        ({"name": 7}, "name", "must be a text"),
        ({"name": "  "}, "name", "not empty"),
        ({"kind": None}, "kind", "is missing"),
        ({"kind": "ranking"}, "kind", "'ranking' is not one of classification, rating, generation"),
        ({"prompt": "Rate it"}, "prompt", "{input}"),
        ({"labels": None}, "labels", "at least two"),
        ({"labels": "1 2"}, "labels", "list"),
        ({"labels": ["1", 2]}, "labels", "2 is not a text"),
        ({"labels": ["1", " 2"]}, "labels", "blanks"),
        ({"labels": ["1", ""]}, "labels", "'' is not a text"),
        ({"labels": ["1", "1"]}, "labels", "'1' stands twice"),
        ({"labels": ["1", "1.0"]}, "labels", "different numbers"),
        ({"labels": ["1", "nan"]}, "labels", "numbers"),
        ({"labels": ["good", "bad"]}, "labels", "numbers"),
        ({"kind": "generation", "metrics": ["bleu"]}, "labels", "left out"),
        ({"metrics": ["rouge1"]}, "metrics", "'rouge1' is not one of mae, rmse"),
        ({"metrics": [["mae"]]}, "metrics", "not a text"),
        ({"like": 3}, "like", "must be a text"),
        ({"tokenizer": "zh"}, "tokenizer", "'zh' is not one of lamp, unicode"),
        ({"labels": [str(n) for n in range(102)]}, "labels", "at most 101 labels, not 102"),
        (
            {"kind": "classification", "labels": [f"a{n}" for n in range(3000)], "metrics": None},
            "labels",
            "not 3,000: if the answers are texts or amounts, take the kind generation",
        ),
    ],
)
def test_a_broken_field_is_named(changed: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        Task.from_json(task_json(**changed), file="folder/task.json")
    assert caught.value.field == field
    assert str(caught.value).startswith(f"folder/task.json: field '{field}':")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_must_be_an_object() -> None:
    with pytest.raises(DataError, match="one JSON object"):
        Task.from_json(json.loads("[1]"))


def test_unknown_keys_are_kept_as_extra_and_written_again() -> None:
    data = task_json(source="somewhere", like="LaMP-3", version=2)
    task = Task.from_json(data)
    assert task.extra == {"source": "somewhere", "version": 2}
    assert task.to_json() == data


@pytest.mark.parametrize("task", LAMP.values(), ids=lambda task: task.name)
def test_lamp_tasks_pass_their_own_check(task: Task) -> None:
    assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task
    assert task.ask("X {input} Y").count("X {input} Y") == 1


@pytest.mark.parametrize(
    ("prompt", "text", "within"),
    [
        ("Which? {input}", "Which? a {b}", "a {b}"),
        ("Of {input}\nOne word.", " Of x\ny\nOne word. ", "x\ny"),
        ("Which? {input}", "what else", None),
        ("Which? {input}", "Which? ", None),
        ("Of {input} again", "Of  again", None),
        ("Class {input}", "Classes", None),
        ("Class{input}", "Classes", None),
        ("{input}?", "What is it?", None),
        ("aa{input}aa", "aaa", None),
        ("{input}", "anything", None),
        ("{input} or {input}", "a or a", None),
    ],
)
def test_the_text_within_an_instruction_is_found_again(
    prompt: str, text: str, within: str | None
) -> None:
    assert Task("t", "generation", prompt).input_of(text) == within


def test_lamp_tasks_are_the_benchmarks() -> None:
    assert {name: (task.kind, len(task.labels)) for name, task in LAMP.items()} == {
        "LaMP-1": ("classification", 2),
        "LaMP-2N": ("classification", 15),
        "LaMP-2M": ("classification", 15),
        "LaMP-3": ("rating", 5),
        "LaMP-4": ("generation", 0),
        "LaMP-5": ("generation", 0),
        "LaMP-7": ("generation", 0),
    }


def test_metrics_default_to_the_kinds() -> None:
    assert Task.from_json(task_json(metrics=None)).metrics == ("mae", "rmse")


# ---- reading answers


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        (NEWS, " politics\n", "politics"),
        (NEWS, "Politics", "politics"),
        (NEWS, '**"Politics."**', "politics"),
        (NEWS, "[politics]", "politics"),
        (NEWS, "Category: Style & Beauty", "style & beauty"),
        (NEWS, "style and beauty", "style & beauty"),
        (NEWS, "Sure! It is about healthy_living.", "healthy living"),
        (NEWS, "politics, not sports", "politics"),
        (NEWS, "politics\n\nIt could be sports", "politics"),
        (NEWS, "politics] or [sports", "politics"),
        (NEWS, "politics or sports", None),
        (NEWS, "Sure! politics or sports", None),
        (NEWS, "geopolitics", None),
        (NEWS, "I'm sorry, I can't help with that.", None),
        (NEWS, "", None),
        (MOVIES, "A dark comedy", "dark comedy"),
        (MOVIES, "comedy, perhaps a dark comedy", "comedy"),
        (MOVIES, "Sci Fi", "sci-fi"),
        (LAMP["LaMP-1"], "[2]", "[2]"),
        (LAMP["LaMP-1"], "2", "[2]"),
        (LAMP["LaMP-1"], "Reference 1.", "[1]"),
        (LAMP["LaMP-1"], "[1] because [2] is older", "[1]"),
        (classes(["A", "a"]), "a", "a"),
        (classes(["A", "a"]), "it is a", None),
        (classes(["c", "c#", "c++"]), "In C#.", "c#"),
        (classes(["c", "c#", "c++"]), "C++", "c++"),
        (classes(["-1", "0", "1"]), "Score: -1", "-1"),
        (classes(["food, drink", "food"]), "Food, drink", "food, drink"),
        (classes(["正面", "负面"]), "这是正面的。", "正面"),
        (classes(["好", "不好"]), "不好", "不好"),
        (classes(["カフェ", "バー"]), "ｶﾌｪ", "カフェ"),
        (classes(["дача", "дом"]), "ДАЧА.", "дача"),
        (classes(["дача", "дом"]), "домой", None),
        (classes(["caf\u00e9", "bar"]), "Cafe\u0301!", "caf\u00e9"),
        (classes(["अच्छ", "बुरा"]), "अच्छा", None),
        (classes(["บวก", "ลบ"]), "คำตอบคือบวกครับ", "บวก"),
        (RATING, " 4 ", "4"),
        (RATING, "4.0", "4"),
        (RATING, "Score: 4/5", "4"),
        (RATING, "- 4", "4"),
        (RATING, "On a scale of 1 to 5, this is a 3.", "3"),
        (RATING, "I'd say 3.5 stars", "3.5"),
        (RATING, "0", None),
        (RATING, "10 out of 10", None),
        (RATING, "four", None),
        (RATING, "9" * 400, None),
        (ratings([-2, 0, 2]), "about -2", "-2"),
        (ratings([0.5, 1.0, 1.5]), "1", "1.0"),
        (HEADLINE, '"A Day In May"', "A Day In May"),
        (HEADLINE, "“A Day In May”", "A Day In May"),
        (HEADLINE, "**Headline:** A Day In May\n\nThis works because", "A Day In May"),
        (HEADLINE, 'Here is a headline for the article:\n\n# "A Day In May"', "A Day In May"),
        (HEADLINE, "Here's the title: A Day: In May", "A Day: In May"),
        (HEADLINE, '"A" and "B"', '"A" and "B"'),
        (HEADLINE, "I'm sorry, I can't do that.", "I'm sorry, I can't do that."),
        (HEADLINE, "Headline:", None),
        (HEADLINE, ' "" ', None),
        (HEADLINE, " \n\t", None),
        (HEADLINE, "یک روز", "یک روز"),
    ],
)
def test_lenient_reading(task: Task, text: str, answer: str | None) -> None:
    assert task.parse(text) == answer


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        (NEWS, " politics ", "politics"),
        (NEWS, "Politics", None),
        (NEWS, "politics.", None),
        (RATING, " 4.0\n", "4"),
        (RATING, "3.7", "3.7"),
        (RATING, "9", "9"),
        (RATING, "4 stars", None),
        (RATING, "nan", None),
        (RATING, "-inf", None),
        (HEADLINE, ' "Title: x" \n', '"Title: x"'),
        (HEADLINE, " ", None),
    ],
)
def test_strict_reading(task: Task, text: str, answer: str | None) -> None:
    assert task.parse(text, "strict") == answer


@settings(deadline=None)
@given(labels)
@example(["a", "A"])
@example(["food", "food, drink"])
@example(["[1]", "1", "-1"])
def test_every_label_reads_as_itself(names: list[str]) -> None:
    task = classes(names)
    for name in names:
        assert task.parse(name, "strict") == task.parse(name) == task.parse(f" {name}\n") == name


@settings(deadline=None)
@given(scales)
def test_every_rating_label_reads_as_itself(numbers: list[float]) -> None:
    task = ratings(numbers)
    for name in task.labels:
        assert task.parse(name, "strict") == task.parse(name) == name


@settings(deadline=None)
@given(
    st.lists(st.text("abcdefg", min_size=1, max_size=6), min_size=2, max_size=6, unique=True),
    st.data(),
)
def test_a_label_alone_in_a_sentence_is_found(names: list[str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(names))
    for text in (f"**{name.upper()}**", f"'{name}'.", f"XY: {name}!", f"{name}, xy"):
        assert classes(names).parse(text) == name


@settings(deadline=None)
@given(labels, anything)
def test_lenient_reads_all_that_strict_reads_as_a_label(names: list[str], text: str) -> None:
    strict = classes(names).parse(text, "strict")
    assert strict is None or classes(names).parse(text) == strict


@settings(deadline=None)
@given(scales, anything | st.floats().map(str) | st.integers().map(str))
def test_ratings_are_read_in_range_and_the_same_way_by_both(
    numbers: list[float], text: str
) -> None:
    task = ratings(numbers)
    low, high = min(numbers), max(numbers)
    lenient, strict = task.parse(text), task.parse(text, "strict")
    assert lenient is None or low <= number_of(lenient) <= high
    if strict is not None and low <= number_of(strict) <= high:
        assert lenient == strict


@settings(deadline=None)
@given(anything)
@example("Title: Headline: 'x'")
@example("\0")
@example("# # x")
def test_reading_a_text_again_changes_nothing(text: str) -> None:
    for parsing in ("lenient", "strict"):
        answer = HEADLINE.parse(text, parsing)
        assert answer is None or (
            answer == HEADLINE.parse(answer, parsing) and answer == answer.strip() != ""
        )


@settings(deadline=None)
@given(st.text(st.characters(), max_size=300), st.sampled_from(list(LAMP.values())))
def test_reading_never_raises_and_gives_a_label_or_none(text: str, task: Task) -> None:
    for parsing in ("lenient", "strict"):
        answer = task.parse(text, parsing)
        if task.kind == "classification":
            assert answer is None or answer in task.labels
        assert 0 <= task.gain(answer, task.labels[0] if task.labels else "gold") <= 1


# ---- typical answers


def test_typical_answers() -> None:
    stars = ratings([1, 2, 3, 4, 5]).strategy.typical
    assert stars(["5", "1", "4", "2"]) == "2"
    assert stars([]) == "3"
    assert classes(["calm", "loud"]).strategy.typical(["calm", "loud", "calm", "loud"]) == "loud"
    assert HEADLINE.strategy.typical(["a", "b"]) == "b"
    assert HEADLINE.strategy.typical([]) == ""


# ---- gains


def test_gains_by_hand() -> None:
    assert [NEWS.gain(a, "crime") for a in ("crime", "sports", None)] == [1, 0, 0]
    assert [RATING.gain(a, "5") for a in ("5", "4", "3.5", "1", "9", None)] == [
        1,
        0.75,
        0.625,
        0,
        0,
        0,
    ]
    # "the cat sat" against "the cat ran far": two words in common, in order: F = 2 * 2 / (3 + 4)
    # both times
    assert HEADLINE.gain("the cat sat", "the cat ran far") == pytest.approx(4 / 7)
    # reversed order: all words in common, but only one in sequence
    assert HEADLINE.gain("cat the", "the cat") == pytest.approx((1 + 0.5) / 2)
    assert HEADLINE.gain(None, "x") == 0


def test_a_gold_rating_must_be_a_number() -> None:
    with pytest.raises(DataError, match="'great' is not a number"):
        RATING.gain("4", "great")


rouge = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)


@settings(deadline=None)
@given(words, words)
@example("a a b", "a b b a")
@example("Don't stop", "don t STOP")
def test_generation_gain_is_rouge_scores(answer: str, gold: str) -> None:
    scores = rouge.score(gold, answer)
    expected = (scores["rouge1"].fmeasure + scores["rougeL"].fmeasure) / 2
    if expected or (
        any(c in "abcd1" for c in answer.lower()) and any(c in "abcd1" for c in gold.lower())
    ):
        assert overlap(answer, gold) == pytest.approx(expected, abs=1e-12)


def test_generation_gain_sees_other_scripts() -> None:
    assert overlap("мир и война", "война и мир") == pytest.approx((1 + 1 / 3) / 2)
    assert overlap("🙂", "🙂") == 1
    assert overlap("🙂", "🙁") == overlap("", "x") == 0


@settings(deadline=None)
@given(st.sampled_from(["rating", "classification", "generation"]), st.data())
def test_gain_matrix_is_symmetric_with_ones_on_the_diagonal(kind: str, data: st.DataObject) -> None:
    task = {"rating": RATING, "classification": NEWS, "generation": HEADLINE}[kind]
    numbers = st.floats(-20, 20).map(str)
    answers = data.draw(
        st.lists(
            numbers
            if kind == "rating"
            else st.sampled_from(task.labels)
            if task.labels
            else anything,
            max_size=6,
        )
    )
    matrix = task.gain_matrix(answers)
    assert [len(row) for row in matrix] == [len(answers)] * len(answers)
    for i, row in enumerate(matrix):
        assert row[i] == 1
        for j, value in enumerate(row):
            assert 0 <= value <= 1
            assert value == matrix[j][i] == task.gain(answers[i], answers[j])
