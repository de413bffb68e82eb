"""What every file, database and engine takes: repaired, folded and checked text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer

from hydra_llm.text import (
    fold,
    length,
    repair,
    search_words,
    spaced,
    text_fault,
    without_reasoning,
    words,
)

ANY = st.text(st.characters(), max_size=30) | st.text("\ud83d\ude00\0 a", max_size=8)


@pytest.mark.parametrize(
    ("text", "repaired"),
    [
        ("", ""),
        ("plain", "plain"),
        ("a\0b", "a b"),
        ("cut \ud83d", "cut \ufffd"),
        ("\udc00\0é", "\ufffd é"),
        ("\ud83d\ude00", "😀"),  # both halves, each on its own, are one character
    ],
)
def test_repair(text: str, repaired: str) -> None:
    assert repair(text) == repaired


@given(ANY)
def test_a_repaired_text_has_no_fault_and_stays(text: str) -> None:
    repaired = repair(text)
    assert not text_fault(repaired, may_be_empty=True)
    assert repair(repaired) == repaired
    assert (repaired == text) == (not text_fault(text, may_be_empty=True))


@given(ANY)
def test_a_folded_text_is_one_line_of_the_same_words(text: str) -> None:
    assert fold(text).split(" ") == (text.split() or [""])
    assert "\n" not in fold(text)


@pytest.mark.parametrize(
    ("text", "fault"), [(" \n", "empty"), ("a\0", "NUL"), ("\ud83d", "surrogate"), ("ok 😀", "")]
)
def test_what_makes_a_text_unusable(text: str, fault: str) -> None:
    assert fault in text_fault(text)
    assert bool(text_fault(text)) == bool(fault)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\nA headline is wanted.\n</think>\n\nA river runs", "A river runs"),
        ("<THINKING>a</Thinking> b", "b"),
        ("<think>a</think><think>b</think>c", "c"),
        ("<think>about <think> tags</think>\nkeep", "keep"),
        ("<think>a<think>b</think>c</think>\nkeep", "keep"),
        ("its beginning stood in the prompt\n</think>\n\nkeep", "keep"),
        ("hm</think>keep", "keep"),
        ("<think>never closed: keep", ""),
        ("keep\n<think>an afterthought", "keep"),
        ("[THINK]x[/THINK]keep", "keep"),
        ("◁think▷x◁/think▷keep", "keep"),
        ("<seed:think>x</seed:think>keep", "keep"),
        ("\ufeff<think >x</think >keep", "keep"),
        ("<longcat_think>x</longcat_think>keep", "keep"),
        ("<scratchpad>x</scratchpad>keep", "keep"),
        ("<|START_THINKING|>x<|END_THINKING|><|START_RESPONSE|>keep<|END_RESPONSE|>", "keep"),
        ("<|begin_of_thought|>x<|end_of_thought|>\nkeep", "keep"),
        ("<|channel|>analysis<|message|>x<|end|><|channel|>final<|message|>keep<|return|>", "keep"),
        ("Wrap it in <think> and </think> tags.", "Wrap it in <think> and </think> tags."),
        ("Use `</think>` here", "Use `</think>` here"),
        (" as it is \n", " as it is \n"),
    ],
)
def test_reasoning_is_no_part_of_an_answer(text: str, answer: str) -> None:
    assert without_reasoning(text) == answer


@given(ANY)
def test_reasoning_that_is_taken_out_leaves_none(text: str) -> None:
    assert without_reasoning(f"<think>{text.replace('think', '')}</think>keep") == "keep"


# ---- words


@given(st.text(st.characters(max_codepoint=127)))
def test_words_of_ascii_are_lamps(text: str) -> None:
    assert list(words(text)) == DefaultTokenizer(use_stemmer=False).tokenize(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Сегодня, хорошая погода!", "сегодня хорошая погода"),
        ("今天天气", "今 天 天 气"),
        ("私はiPhone１２が好き。", "私 は iphone12 が 好 き"),
        ("สวัสดี", "ส วั ส ดี"),
        ("ភាសា", "ភា សា"),
        ("हिन्दी में", "हिन्दी में"),
        ("مرحبا، بالعالم", "مرحبا بالعالم"),
        ("می\u200cخواهم", "میخواهم"),
        ("안녕 세계", "안녕 세계"),
        ("cafe\u0301 CAFÉ", "café café"),
        ("snake_case Straße", "snake case strasse"),
        ("good 👍🏽!", "good 👍 🏽"),
        ("… — ！", ""),
    ],
)
def test_words_of_any_script(text: str, expected: str) -> None:
    assert " ".join(words(text)) == expected


@given(st.text("aéß ’“…-.,!_\t1²", max_size=40))
def test_retrieval_reads_latin_as_lamp_does(text: str) -> None:
    assert search_words(text) == text.split()
    assert spaced(text) == text
    assert length(text) == len(text.split())


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("བོད་ཀྱི་སྐད་ཡིག", 4),
        ("བོད་ཀྱི། སྐད་ཡིག།", 4),
        ("ሰላም፡ዓለም።", 2),
        ("你好，世界", 4),
        ("“你好”……", 2),
        ("私はiPhone１２が好き。", 6),
        ("ភាសា។", 2),
        ("don't 今 — well-known", 3),  # what stands between blanks is one word, as in Latin
        ("кто-то — там", 3),
        ("...", 1),
    ],
)
def test_length_counts_the_words_of_any_script(text: str, count: int) -> None:
    assert length(text) == count
    if not any(sign in text for sign in "-."):
        assert length(text) == len(words(text))


def test_retrieval_has_pairs_of_characters_without_blanks() -> None:
    assert search_words("我喜欢iPhone，Not") == ["我", "喜", "欢", "我喜", "喜欢", "iPhone", "Not"]
    assert search_words("うちの猫") == ["猫", "うち", "ちの", "の猫"]
    assert search_words("ดี ส") == ["ดี", "ส"]
    assert search_words("Погода, ПОГОДА") == ["погода", "погода"]
    assert search_words("Καλή, ΚΑΛΉ α-helix") == ["καλή", "καλή", "α-helix"]
    assert search_words("cafe\u0301 noir") == ["café", "noir"]
    assert length("今天 天气") == 4


@given(ANY, ANY)
def test_words_are_caseless_and_never_cross_blanks(one: str, other: str) -> None:
    assert words(one.upper().lower()) == words(one.upper().lower().casefold())
    assert words(f"{one} {other}") == words(one) + words(other)
