"""What every file, database and engine takes: repaired, folded and checked text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.text import fold, repair, text_fault

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
