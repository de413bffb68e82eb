"""Text that every file, database, terminal and engine takes: repair it, fold it, find its fault;
and its words, in any script.
"""

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

# Scripts without blanks between words: Thai, Lao, Myanmar, Khmer, Tai, Balinese, Javanese, Han,
# Kana, Bopomofo.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u1aaf\u1b00-\u1b7f\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029"
    "\u3031-\u3035\u3038-\u303b\u3041-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua980-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
_PUNCTUATION = re.compile(
    "[\u3000-\u3004\u3008-\u3020\u3030\ufe30-\ufe4f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40"
    "\uff5b-\uff65]"
)
_HAN = re.compile(
    "[\u2e80-\u2fdf\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_HALF = re.compile("[\ud800-\udfff]")
_BLANKS = re.compile("[\u0f01-\u0f14\u1361-\u1368]")  # marks between Tibetan, Ethiopic words
_EMOJI = "\u2600-\u27bf\U0001f000-\U0001faff"
_ASCII_WORD = re.compile("[a-z0-9]+")
# All but Latin, of which retrieval reads words as LaMP does, between blanks; Greek letters alone
# are signs of formulas.
_FAR = re.compile(
    "[\u0400-\u1dff\u2c00-\u2c5f\u2d00-\ufdff\ufe70-\ufefc\uff66-\uffdc\U00010000-\U0001d3ff"
    "\U0001e000-\U0001efff\U00020000-\U0003ffff]|[\u0370-\u03ff\u1f00-\u1fff]{3}"
)
_JOINERS = dict.fromkeys(map(ord, "\u00ad\u200c\u200d\ufe0e\ufe0f"))  # invisible within a word


def repair(text: str) -> str:
    """Lone surrogates, which JSON may hold but UTF-8 cannot, become U+FFFD; NUL becomes a blank."""
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\0", " ")


def json_text(
    value: Any, *, ascii: bool = False, default: Callable[[Any], Any] | None = None
) -> str:
    """A value as JSON that can be written and that every parser takes: NaN and infinity are null,
    and with a lone surrogate, which UTF-8 cannot hold, all is ASCII.
    """
    try:
        text = json.dumps(value, ensure_ascii=ascii, allow_nan=False, default=default)
    except ValueError:
        text = json.dumps(finite(value), ensure_ascii=ascii, allow_nan=False, default=default)
    return json.dumps(json.loads(text)) if _HALF.search(text) else text


def finite(value: Any) -> Any:
    """A JSON value with null for numbers that JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(own) for name, own in value.items()}
    return list(map(finite, value)) if isinstance(value, list | tuple) else value


def fold(text: str) -> str:
    """All white space becomes single blanks: the text stays on one line."""
    return " ".join(text.split())


def counted(count: int, noun: str, plural: str = "") -> str:
    """`1 user`, `2,000 users`."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def text_fault(text: str, may_be_empty: bool = False) -> str:
    """What makes a text unusable, or ''."""
    if not text.strip() and not may_be_empty:
        return "is empty"
    if "\0" in text:
        return "holds a NUL character: remove it"
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return "holds half of a surrogate pair, which is no character: remove it"
    return ""


# ---- words


def caseless(text: str) -> str:
    """Equal for texts that differ in case, width or composition alone (NFKC, case folded)."""
    return text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


@lru_cache(maxsize=16384)
def words(text: str, grams: int = 1) -> tuple[str, ...]:
    """The caseless words of a text: runs of letters, digits and their marks, and emoji. Of a script
    without blanks each character is a word; with `grams=2` each two neighbours are one, and of
    letters Han's alone. Of an ASCII text these are the tokens of LaMP's ROUGE: `[a-z0-9]+`.
    """
    if text.isascii():
        return tuple(_ASCII_WORD.findall(text.lower()))
    run, character, word = _patterns()
    found: list[str] = []
    for match in word.finditer(caseless(text).translate(_JOINERS)):
        if not run.match(match[0]):
            found.append(match[0])
            continue
        own = character.findall(match[0])
        if grams == 1 or len(own) == 1:
            found += own
        else:
            found += [*filter(_HAN.match, own), *map("".join, pairwise(own))]
    return tuple(found)


def search_words(text: str) -> list[str]:
    """The words that retrieval compares: of Latin what stands between blanks, as in LaMP;
    of other scripts `words` with pairs of neighbours.
    """
    if text.isascii():
        return text.split()
    run, _, _ = _patterns()
    text = unicodedata.normalize("NFC", text)
    pieces = run.sub(r" \g<0> ", _PUNCTUATION.sub(" ", text)).split()
    return [w for piece in pieces for w in (words(piece, 2) if _FAR.search(piece) else (piece,))]


def spaced(text: str) -> str:
    """The text with blanks around each character of a script without them, and its punctuation."""
    if text.isascii():
        return text
    _, character, _ = _patterns()
    return character.sub(r" \g<0> ", _PUNCTUATION.sub(r" \g<0> ", text))


def length(text: str) -> int:
    """The number of words: between blanks, or Tibetan and Ethiopic marks in their place; in a text
    with a script without blanks, of its characters and other words, without punctuation.
    """
    if text.isascii():
        return len(text.split())
    _, character, word = _patterns()
    pieces = spaced(_BLANKS.sub(" ", text)).split()
    return len([*filter(word.search, pieces)] if character.search(text) else pieces)


@cache
def marks() -> str:
    """Characters that belong to the one before them, for a character class: accents, vowel signs.
    `re` does not count them as letters.
    """
    codes = range(0x300, 0x20000)
    return "".join(c for c in map(chr, codes) if unicodedata.category(c).startswith("M"))


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """A run of characters of a script without blanks, one of them, and any word or run."""
    character = rf"(?:(?=\w)[{UNSPACED}][{marks()}]*)"
    word = rf"(?:(?![{UNSPACED}])[^\W_][{marks()}]*)+"
    parts = (f"{character}+", character, f"{character}+|{word}|[{_EMOJI}]")
    run, one, either = map(re.compile, parts)
    return run, one, either


# ---- what is no part of an answer

_NAME = r"(?:\w{1,12}[:_])?(?:think(?:ing)?|thoughts?|reasoning|reflection|analysis|scratchpad)\s*"
_OPEN = (
    rf"(?:<{_NAME}>|\[{_NAME}\]|◁{_NAME}▷|<\|(?!end_){_NAME}\|>"
    r"|<\|channel\|>(?:analysis|commentary)[^<\n]*<\|message\|>)"  # gpt-oss
)
_CLOSE = (
    rf"</{_NAME}>|\[/{_NAME}\]|◁/{_NAME}▷|<\|end_{_NAME}\|>"
    r"|<\|channel\|>final[^<\n]*<\|message\|>"
)
_TAG = re.compile(
    rf"(?P<open>^[ \t\ufeff]*{_OPEN})|(?P<inline>{_OPEN})|(?P<close>{_CLOSE})",
    re.IGNORECASE | re.MULTILINE,
)
_CONTROL = re.compile(r"<\|\w+\|>")  # tokens that a server left in the text


def without_reasoning(text: str) -> str:
    """An LLM's text without its reasoning: `<think>…</think>` that begins a line, closed or not,
    and all before a lone `</think>`, which the prompt began. Other tags are text.
    """
    kept, start = list[str](), 0
    inside = found = mentioned = False
    for tag in _TAG.finditer(text):
        if inside:
            inside, start = tag["close"] is None, tag.end()
        elif tag["open"] or (tag["inline"] and found and start == tag.start()):
            kept.append(text[start : tag.start()])
            inside = found = True
        elif tag["inline"]:
            mentioned = True
        elif not mentioned and text[tag.start() - 1 : tag.start()] not in ("`", "'", '"'):
            kept, start, found = [], tag.end(), True
    if not found:
        return text
    return _CONTROL.sub("", "".join(kept if inside else [*kept, text[start:]])).strip()
