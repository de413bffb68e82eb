"""Where a user's records stand in a conversation. The caller's own messages are neither changed nor
dropped. Knows no users.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from hydra_llm.gateway.schemas import text_of
from hydra_llm.prompt import PER_MESSAGE, estimate
from hydra_llm.text import fold
from hydra_llm.types import Ranked, Record

Messages = list[dict[str, Any]]
Ask = Callable[[str], str]
FIRST = ("system", "developer")


def place(
    messages: Sequence[Mapping[str, Any]],
    records: Sequence[Ranked],
    *,
    placement: str,
    max_tokens: int,
    ask: Ask = str,
) -> tuple[Messages, list[Record]]:
    """The conversation with as many of the records (best first) as there is room for, the best one
    nearest to it; and those records.

    `turns`: each record as a question and its answer, behind the caller's system messages. `block`:
    a list in a system message there.
    `ask` makes the question out of a record's input, as the caller's own was made.
    """
    layout: Callable[[Sequence[Record]], Messages] = (
        partial(_turns, ask=ask) if placement == "turns" else _block
    )
    own = [dict(message) for message in messages]
    head = next((i for i, message in enumerate(own) if message.get("role") not in FIRST), len(own))
    room = max_tokens - sum(estimate(text_of(message)) + PER_MESSAGE for message in own)
    shown: list[Record] = []
    for item in records:
        made = layout([*shown, item.record])
        if sum(estimate(str(message["content"])) + PER_MESSAGE for message in made) > room:
            continue
        shown.append(item.record)
    return [*own[:head], *layout(shown), *own[head:]], shown


def _turns(records: Sequence[Record], ask: Ask) -> Messages:
    return [
        message
        for record in reversed(records)
        for message in (
            {"role": "user", "content": ask(record.input)},
            {"role": "assistant", "content": record.output},
        )
    ]


def _block(records: Sequence[Record]) -> Messages:
    """Each field stays on its line, so that no text can pose as another."""
    lines = [
        f"Asked: {fold(record.input)}\nThis person's answer: {fold(record.output)}"
        for record in reversed(records)
    ]
    return (
        [
            {
                "role": "system",
                "content": "\n\n".join(["Here is how this person answered earlier.", *lines]),
            }
        ]
        if lines
        else []
    )
