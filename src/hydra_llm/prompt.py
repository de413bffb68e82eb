"""Task, query and records → chat messages inside a token budget, for the library and the gateway.

The best record stands last: small instruct models lean on what they read last. What is cut to stay
inside the budget: first the worst records, then the end of the last record's input, then the end of
the query's text; never a conversation's own messages. Knows no retrieval and no LLM.
"""

import json
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hydra_llm.errors import SettingsError
from hydra_llm.llm.wire import text_of
from hydra_llm.tasks.base import NOW_ANSWER, Task
from hydra_llm.text import fold, repair
from hydra_llm.types import Message, Query, Ranked, Record

STYLES = ("block", "turns", "system")  # examples before the question, as turns, as instruction
Count = Callable[[str], int]  # a text's length in the LLM's tokens
Messages = tuple[Message, ...]

PER_MESSAGE = 8  # tokens of a chat template around each message (5 in ChatML)
PER_PART = 1000  # of a picture, a sound or a file: about what vendors count for a picture or a page
NO_TEXT = re.compile(r"image|audio|video|file|document")  # types of parts that are no text
LEAST_INPUT = 40  # a record whose input would be cut to fewer characters is left out instead
IN_FORM = (
    "Where an answer is a text or a label, give it as this person would. Keep to the tools and the"
    " format that are asked for."
)
INSTRUCTING = ("system", "developer")  # roles of the messages behind which example turns begin


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the LLM is asked, and which records are in it."""

    messages: Messages
    records: tuple[Record, ...]  # those in the prompt, best first
    notes: tuple[str, ...] = ()  # one line for each cut
    tokens: int = 0  # its length, counted or estimated
    resized: "Callable[[int], Prompt] | None" = field(default=None, repr=False, compare=False)

    def shorter(self, share: float) -> "Prompt | None":
        """The same question in `share` of its length; None where the instruction has no room."""
        if self.resized is None:
            return None
        room = int(self.tokens * share)
        try:
            prompt = self.resized(room)
        except SettingsError:
            return None
        note = f"prompt: cut again to {room} tokens by estimate, the LLM's window is smaller"
        return replace(prompt, notes=(note, *prompt.notes))


def render(
    task: Task,
    query: Query,
    records: Sequence[Ranked | Record],
    *,
    max_tokens: int,
    count: Count | None = None,
    style: str = "block",
    profile: str = "",
    conversation: Sequence[Mapping[str, Any]] | None = None,
) -> Prompt:
    """Show `records` (best first), then ask the query in the task's instruction.

    Args:
        count: measures a text in tokens; `estimate` by default.
        profile: what is known of the user, as a system message in front.
        conversation: the caller's messages, which end with the question and are kept as they are.
            Where it is not in the task's words, the records' inputs are not either.

    Raises:
        SettingsError: the instruction alone is longer than `max_tokens`, or an unknown style.
    """
    if style not in STYLES:
        raise SettingsError(f"unknown prompt style '{style}': take one of {', '.join(STYLES)}")
    own = None if conversation is None else tuple(conversation)
    page = _Page(task, style, max_tokens, count or estimate, repair(profile), own)
    plain = [item.record if isinstance(item, Ranked) else item for item in records]
    return page.filled(query, plain)


def estimate(text: str) -> int:
    """Tokens of a text by rule of thumb: one per 3.5 bytes of UTF-8, rounded up."""
    return math.ceil(len(text.encode("utf-8", "surrogatepass")) / 3.5)


def message_tokens(message: Mapping[str, Any]) -> int:
    """Tokens of a chat message by rule of thumb: of its text and its calls of tools as `estimate`,
    and PER_PART for every picture, sound or file.
    """
    calls, content = message.get("tool_calls"), message.get("content")
    parts = content if isinstance(content, list) else []
    kinds = [str(part.get("type")) for part in parts if isinstance(part, Mapping)]
    said = estimate(text_of(message)) + (estimate(json.dumps(calls)) if calls else 0)
    return said + PER_MESSAGE + PER_PART * sum(bool(NO_TEXT.search(kind)) for kind in kinds)


@dataclass(frozen=True, slots=True)
class _Page:
    """What stands around the records, and the room that there is."""

    task: Task
    style: str
    max_tokens: int
    count: Count
    profile: str
    conversation: Messages | None

    def filled(self, query: Query, records: Sequence[Record]) -> Prompt:
        """The prompt with as much as fits; SettingsError if the instruction alone does not."""
        text = repair(query.input)
        examples = [replace(r, input=repair(r.input), output=repair(r.output)) for r in records]
        kept = self.fit_records(examples, text)
        question: str | None = text
        if self.conversation is None:  # whose own messages are never cut
            question = _cut(text, lambda part: self.fits(kept, part))
        if question is None:
            raise SettingsError(
                f"a prompt of {self.max_tokens} tokens has no room for the instruction of task"
                f" '{self.task.name}' alone"
            )
        return Prompt(
            messages=self.messages(kept, question),
            records=tuple(records[: len(kept)]),
            notes=_notes(self, query, question, examples, kept),
            tokens=self.tokens(kept, question),
            resized=lambda room: replace(self, max_tokens=room).filled(query, records),
        )

    def messages(self, kept: Sequence[Record], text: str) -> Messages:
        """With the examples, best last: before the question, or as turns behind the instruction."""
        own = self.conversation
        if own is None:
            system = ({"role": "system", "content": self.profile},) if self.profile else ()
            own = (*system, {"role": "user", "content": self.task.ask(text)})
        if self.style == "turns":
            start = _instructions(own)
            turns: list[Message] = []
            for example in reversed(kept):
                turns.append({"role": "user", "content": self._ask(example.input)})
                turns.append({"role": "assistant", "content": example.output})
            return (*own[:start], *turns, *own[start:])
        if not kept:
            return own
        words = self.task.strategy.prompt_words()
        lines = [  # a field a line: none passes for another
            f"{words.input}: {fold(example.input)}\n{words.answer}: {fold(example.output)}"
            for example in reversed(kept)
        ]
        if self.style == "system":
            return _with_system("\n\n".join([words.header, *lines, IN_FORM]), own)
        block = "\n\n".join([words.header, *lines, f"{NOW_ANSWER}\n"])
        content: Any = own[-1]["content"]  # in a conversation also a list of parts, images say
        front = block if isinstance(content, str) else [{"type": "text", "text": block}]
        return (*own[:-1], {**own[-1], "content": front + content})

    def _ask(self, text: str) -> str:
        """A record's input as the question asks: a conversation's records may be whole prompts."""
        if self.conversation is None:
            return self.task.ask(text)
        question = text_of(self.conversation[-1]) if self.conversation else ""
        is_in_task_words = bool(self.task.input_of(question))
        is_whole_prompt = bool(self.task.input_of(text))
        return self.task.ask(text) if is_in_task_words and not is_whole_prompt else text

    def tokens(self, kept: Sequence[Record], text: str) -> int:
        messages = self.messages(kept, text)
        return sum(self.count(text_of(message)) + PER_MESSAGE for message in messages)

    def fits(self, kept: Sequence[Record], text: str) -> bool:
        return self.tokens(kept, text) <= self.max_tokens

    def fit_records(self, examples: list[Record], text: str) -> list[Record]:
        """The best examples that fit; a single one may lose the end of its input."""
        if not self.fits([], text):
            return []  # found once, as a conversation may be long
        for count in range(len(examples), 0, -1):
            if self.fits(examples[:count], text):
                return examples[:count]
        if not examples:
            return []
        best = examples[0]
        part = _cut(best.input, lambda part: self.fits([replace(best, input=part)], text))
        return [] if part is None or len(part) < LEAST_INPUT else [replace(best, input=part)]


def _instructions(messages: Messages) -> int:
    """How many messages at the beginning instruct the LLM."""
    roles = [message.get("role") for message in messages]
    return next((i for i, role in enumerate(roles) if role not in INSTRUCTING), len(messages))


def _with_system(text: str, messages: Messages) -> Messages:
    """The messages with a text in the last system message, which some templates take one of."""
    count = _instructions(messages)
    if not count:
        return ({"role": "system", "content": text}, *messages)
    *before, last = messages[:count]
    content: Any = last.get("content") or ""
    end = f"\n\n{text}" if isinstance(content, str) else [{"type": "text", "text": text}]
    return (*before, {**last, "content": content + end}, *messages[count:])


def _cut(text: str, fits: Callable[[str], bool]) -> str | None:
    """The longest beginning of `text` that fits, with an ellipsis if it was cut; None: nothing."""
    if fits(text):
        return text

    def beginning(length: int) -> str:
        return text[:length].rstrip() + "…"

    length = bisect_left(range(len(text)), True, key=lambda n: not fits(beginning(n))) - 1
    return beginning(length) if length >= 0 else None


def _notes(
    page: _Page, query: Query, question: str, examples: Sequence[Record], kept: Sequence[Record]
) -> tuple[str, ...]:
    missing = len(examples) - len(kept)
    reason = f"to stay within {page.max_tokens} tokens"
    notes = [f"prompt: {missing} of {len(examples)} records left out {reason}"] if missing else []
    pairs = zip(examples, kept, strict=False)
    cuts = [(f"the input of record '{own.id}'", own.input, shown.input) for own, shown in pairs]
    cuts.append((f"the text of query '{query.id}'", repair(query.input), question))
    for name, text, part in cuts:
        if part != text:
            lengths = f"from {len(text)} to {len(part)} characters"
            notes.append(fold(f"prompt: {name} cut at its end {lengths} {reason}"))
    return tuple(notes)
