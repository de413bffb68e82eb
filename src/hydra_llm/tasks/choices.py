"""Side features of a choice among texts: how a candidate looks beside the others, and how its user
has chosen before. Chosen by cross-validation over training users (docs/lab.md, Recorded choices).

    choice_*   what it looks like (`ATTRIBUTES`), less the mean of the candidates
    habit_*    the same, times the mean of what the user took before, drawn to 0
    rejected   cosine to what the user has left, the nearest and in the mean
    taste      cosine to what was taken less what was left, in the mean

The place is evidence of the display, not of the taste: it is 0 for all where none was shown.
Letters: C candidates, A attributes, D width of the encoder, n earlier choices.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from hydra_llm.tasks.base import Embed, Floats
from hydra_llm.text import length, words
from hydra_llm.types import Choice, Record

PLACES = ("place", "first")
ATTRIBUTES = (
    *PLACES,  # log(1 + place from 0), and whether it was shown first
    *("words", "rank", "longest", "shortest"),  # log of the length; its rank, 0 to 1
    *("lower", "upper", "fits"),  # first letter; whether it goes on where the input ends
    *("ends", "commas"),  # it ends a sentence; how many commas
    *("repeated", "repeated_pairs"),  # share of its words, and pairs of them, that the input has
    *("distinct", "letters"),  # share of words that are not repeated; mean length of a word
)
COLUMNS = (
    *(f"choice_{name}" for name in ATTRIBUTES),
    *(f"habit_{name}" for name in ATTRIBUTES),
    *("rejected_nearest", "rejected_mean", "taste"),
)
PRIOR = 20.0  # choices that a habit is drawn to 0 with
_SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’»)\]]*\s*$")
_COMMA = re.compile("[,，、;；]")


@lru_cache(maxsize=4096)
def attributes(input: str, texts: tuple[str, ...], shown: bool) -> Floats:
    """[C, A] of candidates for an input, less their mean; `shown`: in the order of `texts`."""
    place = np.arange(len(texts)) if shown else np.zeros(len(texts))
    first = place == 0 if shown else np.zeros(len(texts))
    lengths = np.log1p([length(text) for text in texts])
    rank = np.argsort(np.argsort(lengths, kind="stable")) / max(1, len(texts) - 1)
    goes_on, known = not _SENTENCE_END.search(input), words(input)
    used, pairs = set(known), set(pairwise(known))
    columns = [
        np.log1p(place),
        first,
        lengths,
        rank,
        lengths == lengths.max(),
        lengths == lengths.min(),
        *np.array([_of_text(text, goes_on, used, pairs) for text in texts]).T,
    ]
    rows = np.stack(columns, 1).astype(np.float64)
    centred: Floats = rows - rows.mean(0)
    return centred


def _of_text(text: str, goes_on: bool, used: set[str], pairs: set[tuple[str, str]]) -> list[float]:
    """The attributes that need no other candidate, in their order."""
    own, letter = words(text), text.lstrip()[:1]
    two = list(pairwise(own))
    lower, upper = letter.islower(), letter.isupper()
    return [
        lower,
        upper,
        (lower or not letter.isalnum()) if goes_on else upper,
        bool(_SENTENCE_END.search(text)),
        len(_COMMA.findall(text)),
        sum(word in used for word in own) / max(1, len(own)),
        sum(pair in pairs for pair in two) / max(1, len(two)),
        len(set(own)) / max(1, len(own)),
        sum(map(len, own)) / max(1, len(own)),
    ]


@dataclass(frozen=True)
class PastChoice:
    """What one earlier choice says."""

    habit: Floats  # [A] of the one that was taken
    rejected: Any  # [C − 1, D] float32 unit rows
    taste: Any  # [D] what was taken less the mean of what was offered


def past_choice(choice: Choice, embed: Embed) -> PastChoice:
    """A recorded choice as numbers."""
    taken = attributes(choice.input, choice.candidates, True)[choice.chosen]
    vectors = embed(choice.candidates)
    others = np.delete(vectors, choice.chosen, axis=0)
    return PastChoice(taken, others, vectors[choice.chosen] - vectors.mean(0))


@dataclass(frozen=True)
class Habits:
    """What a user's earlier choices say together."""

    mean: Floats  # [A] drawn to 0
    rejected: Any  # [m, D] of all that was left
    taste: Any  # [D] drawn to 0


class PastChoices:
    """A user's earlier choices, oldest first, of which the first ones can be asked for."""

    def __init__(self, past: Sequence[PastChoice]):
        self._habits = np.cumsum([own.habit for own in past], axis=0)  # [n, A]
        self._tastes = np.cumsum([own.taste for own in past], axis=0)  # [n, D]
        self._ends = np.cumsum([len(own.rejected) for own in past])  # [n] of the rows below
        self._rejected = np.concatenate([own.rejected for own in past]) if past else None

    def first(self, count: int) -> Habits | None:
        """What the first `count` choices say together; None of none."""
        if not count:
            return None
        assert self._rejected is not None
        weight, last = 1 / (count + PRIOR), count - 1
        rejected = self._rejected[: self._ends[last]]
        return Habits(weight * self._habits[last], rejected, weight * self._tastes[last])


def columns(
    input: str, texts: Sequence[str], *, shown: bool, known: Habits | None, vectors: Any
) -> Floats:
    """[C, E] of `COLUMNS`; `vectors` [C, D] are those of the texts."""
    own = attributes(input, tuple(texts), shown)
    if known is None:
        return np.concatenate([own, np.zeros((len(own), len(COLUMNS) - own.shape[1]))], 1)
    left, taste = vectors @ known.rejected.T, vectors @ known.taste
    far = np.stack([left.max(1), left.mean(1), taste - taste.mean()], 1)
    return np.concatenate([own, own * known.mean, far], 1).astype(np.float64)


def choices_of(records: Sequence[Record]) -> list[Choice]:
    """Those of the records that are choices."""
    return [record for record in records if isinstance(record, Choice)]
