"""Made-up recorded choices: of three random texts one user always takes the longest, another one
the shortest.
"""

import random
from pathlib import Path

from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import save
from hydra_llm.tasks.base import CHOICE_METRICS, Task
from hydra_llm.types import Choice, Query

TASK = Task("next", "generation", "Go on: {input}", metrics=tuple(CHOICE_METRICS))
WORDS = [
    "river",
    "stone",
    "cloud",
    "apple",
    "lamp",
    "chair",
    "green",
    "slow",
    "bright",
    "quiet",
    "table",
    "window",
    "letter",
]


def choices_of(user: str, count: int, *, long: bool) -> list[Choice]:
    """A user's choices, oldest first."""
    dice = random.Random(user)

    def text(length: int) -> str:
        return " ".join(dice.sample(WORDS, length))

    made = []
    for place in range(count):
        lengths = dice.sample(range(2, 10), 3)
        chosen = lengths.index((max if long else min)(lengths))
        candidates = tuple(map(text, lengths))
        fields = (user, f"{user}-{place}", text(6), candidates[chosen], str(1600000000 + place))
        made.append(Choice(*fields, position=place, candidates=candidates, chosen=chosen))
    return made


def choice_data(users: int = 12, history: int = 6, queries: int = 2) -> DataSet:
    """Half of the users are new, half of both take the longest."""
    names = [f"user{place}" for place in range(users)]
    splits = {name: "test" if place % 2 else "train" for place, name in enumerate(names)}
    records, asked = [], []
    for place, name in enumerate(names):
        own = choices_of(name, history + queries, long=place % 4 < 2)
        records += own[:history]
        asked += [
            Query(c.user, c.id, c.input, c.output, c.time, offered=c.candidates)
            for c in own[history:]
        ]
    return DataSet.from_records(TASK, splits, records, asked)  # type: ignore[arg-type]


def write_choices(folder: Path, **sizes: int) -> Path:
    """The same as a native folder."""
    save(choice_data(**sizes), folder)
    return folder
