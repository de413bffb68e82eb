"""Personal data → placeholders such as [EMAIL_1] on the way to an LLM, and back in its answer.

A detector finds spans of a text; the same value has the same placeholder in all texts of a request.
Rules find the usual forms and no others: they lessen what leaves, and prove nothing. Knows no LLM.
"""

import json
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

from hydra_llm.errors import SettingsError
from hydra_llm.plugins import DETECTORS

Span = tuple[int, int]
Detector = Callable[[str], Iterable[Span]]
"""Where a text holds something personal: begin and end of each place, in any order."""

EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,8}")
PHONE = re.compile(
    r"(?<![\w+.-])(?:(?:\+|00)[1-9]\d{0,2}[ ./-]?)?(?:\(\d{1,5}\)[ ./-]?)?"
    r"\d{2,5}(?:[ ./-]?\d{2,5}){1,4}(?![\w-])"
)
CARD = re.compile(r"(?<!\w)\d(?:[ -]?\d){12,18}(?!\w)")
IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?!\w)")
NAMED = re.compile(
    r"\b(?:Mr|Mrs|Ms|Miss|Mx|Dr|Prof|Herrn?|Frau|Monsieur|Madame|Señora?|Signora?|[Mm]y name is"
    r"|[Ii] am called|Dear|Yours,|Regards,|Sincerely,)\.?\s{1,2}"
    r"((?:[^\W\d_][\w'’-]{1,30})(?: [^\W\d_][\w'’-]{1,30}){0,2})"
)
TEXTS: Sequence[str] = (
    *("content", "text", "arguments", "input", "transcript", "refusal"),
    *("reasoning", "reasoning_content", "thinking", "summary"),
)
"""Fields of a message that hold text; the others are of the protocol."""
PLACEHOLDER = re.compile(r"\[\w+\]")
ESCAPE = re.compile(r'\\(?:u([0-9a-fA-F]{4})|([nrtbf"/\\]))')
NESTED = 3  # JSON in JSON in JSON
ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f"}


def email(text: str) -> Iterator[Span]:
    """Addresses of e-mail, also cut ones."""
    yield from (match.span() for match in EMAIL.finditer(text))


def phone(text: str) -> Iterator[Span]:
    """Telephone numbers of 7 to 15 digits that begin with +, 00, 0 or ( or are in three groups."""
    for match in PHONE.finditer(text):
        found, digits = match[0], sum(map(str.isdigit, match[0]))
        groups = len(re.findall(r"\d+", found))
        dated = re.fullmatch(
            r"(?:19|20)\d\d[-./]\d\d[-./]\d\d|\d\d[-./]\d\d[-./](?:19|20)\d\d", found
        )
        if 7 <= digits <= 15 and not dated and (found[0] in "+0(" or groups >= 3):
            yield match.span()


def card(text: str) -> Iterator[Span]:
    """Numbers of cards: 13 to 19 digits with Luhn's check digit."""
    for match in CARD.finditer(text):
        digits = [int(digit) for digit in match[0] if digit.isdigit()][::-1]
        doubled = (sum(divmod(2 * digit, 10)) for digit in digits[1::2])
        if (sum(digits[::2]) + sum(doubled)) % 10 == 0:
            yield match.span()


def iban(text: str) -> Iterator[Span]:
    """IBANs by their check digits (ISO 7064, MOD 97-10), the longest that has the right ones."""
    for match in IBAN.finditer(text):
        start, end = match.span()
        for stop in range(end, start + 14, -1):
            plain = text[start:stop].replace(" ", "")
            whole = stop == end or not text[stop].isalnum()
            number = "".join(str(int(letter, 36)) for letter in plain[4:] + plain[:4])
            if whole and text[stop - 1] != " " and int(number) % 97 == 1:
                yield start, stop
                break


def name(text: str) -> Iterator[Span]:
    """Capitalized words behind a title, a greeting or `my name is`."""
    for match in NAMED.finditer(text):
        end = match.start(1)
        for word in re.finditer(r"\S+", match[1]):
            if not word[0][0].isupper():
                break
            end = match.start(1) + word.end()
        if end > match.start(1):
            yield match.start(1), end


@cache
def detectors(names: str) -> Mapping[str, Detector]:
    """Detectors by their names, as the setting `mask` has them. SettingsError: an unknown one."""
    return {own: DETECTORS.load(own) for own in filter(None, map(str.strip, names.split(",")))}


class Mask:
    """Values and placeholders of one request."""

    def __init__(self, detectors: Mapping[str, Detector], sent: object):
        """`sent`: all that is sent, to be searched for what looks like a placeholder already."""
        self._detectors, self._taken = detectors, set(PLACEHOLDER.findall(str(sent)))
        self._placeholders = dict[str, str]()  # by value
        self._numbers = Counter[str]()  # the last one of each kind
        self.values = dict[str, str]()  # by placeholder

    def hide(self, text: str) -> str:
        """The text with placeholders."""
        parts, end = list[str](), 0
        for start, stop, kind in self._spans(text):
            parts += [text[end:start], self._placeholder(kind, unescaped(text[start:stop]))]
            end = stop
        return "".join([*parts, text[end:]])

    def show(self, text: str, *, in_json: bool = False) -> str:
        """The text with values in place of placeholders; `in_json`: it is JSON, or part of it."""
        if not self.values:
            return text

        def value(match: re.Match[str]) -> str:
            found = self.values.get(match[0])
            if found is None:  # the LLM's own, or the caller's
                return match[0]
            return json.dumps(found, ensure_ascii=False)[1:-1] if in_json else found

        return PLACEHOLDER.sub(value, text)

    def hide_in(self, message: Any) -> Any:
        """A message, or several, with placeholders in its texts; JSON stays JSON."""
        return _changed(message, self._hide_field)

    def show_in(self, message: Any, *, in_json: bool = False) -> Any:
        """The reverse, in an answer; `in_json`: its content is JSON."""

        def shown(text: str, field: str) -> str:
            return self.show(text, in_json=field == "arguments" or (in_json and field == "content"))

        return _changed(message, shown)

    def _hide_field(self, text: str, field: str) -> str:
        if field == "arguments":
            try:
                value = json.loads(text)
            except ValueError:
                return self.hide(text)
            hidden = _changed(value, lambda own, _: self.hide(own), every=True)
            return json.dumps(hidden, ensure_ascii=False) if hidden != value else text
        return self.hide(text)

    def _spans(self, text: str) -> list[tuple[int, int, str]]:
        """What is found, in order; what overlaps is one."""
        read, places = searched(text)
        found = [(*span, kind) for kind, own in self._detectors.items() for span in own(read)]
        merged = list[tuple[int, int, str]]()
        for first, last, kind in sorted(found, key=lambda own: (own[0], -own[1])):
            if not 0 <= first < last <= len(read):
                raise SettingsError(f"the detector '{kind}' found a span outside of the text")
            start, stop = places[first], places[last]
            if merged and start < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]), merged[-1][2])
            else:
                merged.append((start, stop, kind))
        return merged

    def _placeholder(self, kind: str, value: str) -> str:
        if value not in self._placeholders:
            word, new = re.sub(r"\W+", "_", kind).upper(), ""
            while not new or new in self._taken:
                self._numbers[word] += 1
                new = f"[{word}_{self._numbers[word]}]"
            self._taken.add(new)  # also where another kind is the same word
            self._placeholders[value], self.values[new] = new, value
        return self._placeholders[value]


class Restorer:
    """Puts values back in a text that comes in pieces: a placeholder may be cut anywhere."""

    def __init__(self, mask: Mask, *, in_json: bool = False):
        self._mask, self._in_json, self._held = mask, in_json, ""
        self._longest = max(map(len, mask.values), default=0)

    def feed(self, piece: str) -> str:
        """What is known of the text by now."""
        text = self._held + piece
        cut = text.rfind("[")
        tail = text[cut : cut + self._longest] if cut >= 0 else ""
        begins = len(tail) == len(text) - cut < self._longest and re.fullmatch(r"\[\w*", tail)
        self._held = tail if begins else ""
        return self._mask.show(text[: len(text) - len(self._held)], in_json=self._in_json)

    def end(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held


def searched(text: str) -> tuple[str, Sequence[int]]:
    """The text as detectors read it, and where in the text each of its characters begins, then the
    end. The escapes of JSON are what they mean: the `n` of a line break is of no address. Digits,
    blanks, dashes and full-width characters of every script are those of ASCII.
    """
    places: Sequence[int] = range(len(text) + 1)
    for _ in range(NESTED if "\\" in text else 0):
        text, found = _without_escapes(text)
        places = array("I", (places[place] for place in found))
    return text if text.isascii() else "".join(map(_ascii, text)), places


def unescaped(value: str) -> str:
    """A value as it is read in a text that is not JSON."""
    if ESCAPE.search(value):
        try:
            return str(json.loads(f'"{value}"', strict=False))
        except ValueError:
            pass
    return value


def _without_escapes(text: str) -> tuple[str, Sequence[int]]:
    parts, places, end = list[str](), array("I"), 0
    for match in ESCAPE.finditer(text):
        read = chr(int(match[1], 16)) if match[1] else ESCAPED.get(match[2], match[2])
        parts += [text[end : match.start()], read]
        places.extend(range(end, match.start() + 1))
        end = match.end()
    places.extend(range(end, len(text) + 1))
    return "".join([*parts, text[end:]]), places


@lru_cache(4096)
def _ascii(char: str) -> str:
    """The character of ASCII that means the same in a number or an address, or itself."""
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    if "！" <= char <= "～":  # full width
        return chr(ord(char) - 0xFEE0)
    return {"Pd": "-", "Zs": " "}.get(unicodedata.category(char), char)


def _changed(
    value: Any, change: Callable[[str, str], str], field: str = "", *, every: bool = False
) -> Any:
    """The same with other texts; `every`: not of the fields `TEXTS` alone, and names of fields."""
    if isinstance(value, str):
        return change(value, field) if every or field in TEXTS else value
    if isinstance(value, Mapping):
        named = {own: change(own, field) if every else own for own in value}
        parts = ((own, _changed(part, change, own, every=every)) for own, part in value.items())
        return {named[own]: part for own, part in parts}
    if isinstance(value, list | tuple):
        return [_changed(part, change, field, every=every) for part in value]
    return value
