"""Task, query and records → chat messages inside a token budget.

Knows neither retrieval nor any LLM beyond a function that counts a text's tokens. The best record
stands last, nearest to the question: small instruct models lean on what they read last, and with
one record it makes no difference. What must go to stay inside the budget goes in this order: the
worst records, the end of the last record's input, the end of the query's text. Each cut is told in
one note. Where the LLM itself finds a prompt too long, `Prompt.shorter` builds it again.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple

from hydra_llm.errors import SettingsError
from hydra_llm.tasks.base import Task
from hydra_llm.text import fold, repair
from hydra_llm.types import Message, Query, Ranked, Record

Style = Literal["block", "turns"]
"""Records as a list of examples in the one message, or as earlier turns of the conversation."""
Count = Callable[[str], int]
"""A text's length in the LLM's tokens."""

PER_MESSAGE = 8
"""Tokens that a chat template puts around each message (5 in ChatML; a little room for others)."""
LEAST_INPUT = 40
"""A record whose input would be cut to fewer characters than this is left out instead."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the LLM is asked, and what stands in it."""

    messages: tuple[Message, ...]
    kept: tuple[Ranked | Record, ...]
    """The records that stand in the prompt, best first."""
    notes: tuple[str, ...] = ()
    """One line for each thing that was cut."""
    tokens: int = 0
    """Its length, as it was counted or estimated."""
    again: "Callable[..., Prompt] | None" = field(default=None, repr=False, compare=False)
    """Builds it again in other `max_tokens`."""

    def shorter(self, share: float) -> "Prompt | None":
        """The same question in `share` of its length; None where the instruction has no room."""
        room = int(self.tokens * share)
        try:
            made = self.again(max_tokens=room) if self.again else None
        except SettingsError:
            return None
        note = f"prompt: cut again to {room} tokens by estimate, the LLM's window is smaller"
        return made and replace(made, notes=(note, *made.notes))


def build(
    task: Task,
    query: Query,
    records: Sequence[Ranked | Record],
    *,
    max_tokens: int,
    count: Count | None = None,
    style: Style = "block",
    about: str = "",
) -> Prompt:
    """Show `records` (best first), then ask the query. Without records it is exactly the task's
    instruction.

    `about` is what is known of the person; it stands before all else, as the system message.
    `count` measures a text in tokens; without it `estimate` does.

    Raises:
        SettingsError: the instruction alone is longer than `max_tokens`, or the style is unknown.
    """
    if style not in _STYLES:
        raise SettingsError(f"unknown prompt style '{style}': take one of {', '.join(_STYLES)}")
    page = _Page(task, _STYLES[style], max_tokens, count or estimate, repair(about))
    text = repair(query.input)
    examples = [_example(item) for item in records]
    shown = _fit_records(page, examples, text)
    asked = _cut(text, lambda part: page.fits(shown, part))
    if asked is None:
        raise SettingsError(
            f"a prompt of {max_tokens} tokens has no room for the instruction of task '{task.name}'"
            " alone"
        )
    notes = _notes(examples, shown, page) + _told(
        f"the text of query '{query.id}'", text, asked, page
    )
    again = partial(build, task, query, records, count=count, style=style, about=about)
    return Prompt(
        page.messages(shown, asked),
        tuple(records[: len(shown)]),
        tuple(notes),
        page.tokens(shown, asked),
        again,
    )


def estimate(text: str) -> int:
    """Tokens of a text by rule of thumb: one per 3.5 bytes of UTF-8, rounded up (English needs
    fewer, other scripts about that).
    """
    return math.ceil(len(text.encode("utf-8", "surrogatepass")) / 3.5)


# ---- how records are shown


class _Example(NamedTuple):
    id: str
    input: str
    output: str


_Layout = Callable[[Task, Sequence[_Example], str], tuple[Message, ...]]


def _block(task: Task, shown: Sequence[_Example], text: str) -> tuple[Message, ...]:
    """One message: the examples, best last, then the instruction. Each field stays on its line, so
    that no text can pose as another.
    """
    if not shown:
        return ({"role": "user", "content": task.ask(text)},)
    words = task.strategy.prompt_words()
    lines = [
        f"{words.input}: {fold(one.input)}\n{words.answer}: {fold(one.output)}"
        for one in reversed(shown)
    ]
    parts = [words.header, *lines, f"Now answer as this person would.\n{task.ask(text)}"]
    return ({"role": "user", "content": "\n\n".join(parts)},)


def _turns(task: Task, shown: Sequence[_Example], text: str) -> tuple[Message, ...]:
    """Each example as a question and its answer, best last, then the instruction."""
    messages: list[Message] = []
    for one in reversed(shown):
        messages += [
            {"role": "user", "content": task.ask(one.input)},
            {"role": "assistant", "content": one.output},
        ]
    return (*messages, {"role": "user", "content": task.ask(text)})


_STYLES: Mapping[str, _Layout] = {"block": _block, "turns": _turns}


def _example(item: Ranked | Record) -> _Example:
    record = item.record if isinstance(item, Ranked) else item
    return _Example(record.id, repair(record.input), repair(record.output))


# ---- staying inside the budget


@dataclass(frozen=True, slots=True)
class _Page:
    """A layout and its room."""

    task: Task
    layout: _Layout
    max_tokens: int
    count: Count
    about: str = ""

    def messages(self, shown: Sequence[_Example], text: str) -> tuple[Message, ...]:
        first: tuple[Message, ...] = (
            ({"role": "system", "content": self.about},) if self.about else ()
        )
        return first + self.layout(self.task, shown, text)

    def tokens(self, shown: Sequence[_Example], text: str) -> int:
        return sum(
            self.count(message["content"]) + PER_MESSAGE for message in self.messages(shown, text)
        )

    def fits(self, shown: Sequence[_Example], text: str) -> bool:
        return self.tokens(shown, text) <= self.max_tokens


def _fit_records(page: _Page, examples: list[_Example], text: str) -> list[_Example]:
    """As many of the best examples as there is room for; a single one may lose the end of its
    input.
    """
    for many in range(len(examples), 0, -1):
        if page.fits(examples[:many], text):
            return examples[:many]
    return _cut_input(page, examples[0], text) if examples else []


def _cut_input(page: _Page, example: _Example, text: str) -> list[_Example]:
    part = _cut(example.input, lambda part: page.fits([example._replace(input=part)], text))
    return [] if part is None or len(part) < LEAST_INPUT else [example._replace(input=part)]


def _cut(text: str, fits: Callable[[str], bool]) -> str | None:
    """The longest beginning of `text` that fits, marked with an ellipsis if something is missing;
    None if not even that fits.
    """
    if fits(text):
        return text

    def beginning(length: int) -> str:
        return text[:length].rstrip() + "…"

    length = bisect_left(range(len(text)), True, key=lambda n: not fits(beginning(n))) - 1
    return beginning(length) if length >= 0 else None


def _notes(examples: Sequence[_Example], shown: Sequence[_Example], page: _Page) -> list[str]:
    missing = len(examples) - len(shown)
    notes = (
        [
            f"prompt: {missing} of {len(examples)} records left out to stay within"
            f" {page.max_tokens} tokens"
        ]
        if missing
        else []
    )
    for whole, part in zip(examples, shown, strict=False):
        notes += _told(f"the input of record '{whole.id}'", whole.input, part.input, page)
    return notes


def _told(what: str, whole: str, part: str, page: _Page) -> list[str]:
    cut = (
        f"prompt: {what} cut at its end from {len(whole)} to {len(part)} characters to stay within"
        f" {page.max_tokens} tokens"
    )
    return [] if part == whole else [fold(cut)]
