"""The LaMP tasks as values: kind, labels and a default instruction (Salemi et al. 2024, arXiv
2304.11406).

The labels are facts of the data. In the official files each `input` carries LaMP's own instruction,
which then replaces the default one here. LaMP-6 is missing: its e-mails are not public. Knows no
files (`datasets/lamp.py` does).
"""

from collections.abc import Mapping

from hydra_llm.tasks.base import Task


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(", "))


_NEWS = _names(
    "women, religion, politics, style & beauty, entertainment, culture & arts, sports, "
    "science & technology, travel, business, crime, education, healthy living, parents, "
    "food & drink"
)
_MOVIES = _names(
    "sci-fi, based on a book, comedy, action, twist ending, dystopia, dark comedy, classic, "
    "psychology, fantasy, romance, thought-provoking, social commentary, violence, true story"
)


def _task(
    name: str, kind: str, question: str, answer: str, shown: str, labels: tuple[str, ...] = ()
) -> Task:
    prompt = f"{question} Answer with {answer} alone.\n\n{shown}{{input}}"
    return Task.from_json(
        {"name": name, "like": name, "kind": kind, "prompt": prompt, "labels": labels}
    )


def _choice(name: str, question: str, shown: str, labels: tuple[str, ...]) -> Task:
    question = f"{question} Choose one of: {', '.join(labels)}."
    return _task(name, "classification", question, "it", shown, labels)


_PAPER = "Which of the two references belongs to this author's paper?"
_STARS = "How many stars, from 1 to 5, does this review give?"
_TASKS = (
    _task("LaMP-1", "classification", _PAPER, "[1] or [2]", "", ("[1]", "[2]")),
    _choice("LaMP-2N", "Which category does this article belong to?", "Article: ", _NEWS),
    _choice("LaMP-2M", "Which tag fits this movie?", "Description: ", _MOVIES),
    _task("LaMP-3", "rating", _STARS, "the number", "Review: ", ("1", "2", "3", "4", "5")),
    _task(
        "LaMP-4", "generation", "Write a headline for this article.", "the headline", "Article: "
    ),
    _task(
        "LaMP-5",
        "generation",
        "Write a title for the paper with this abstract.",
        "the title",
        "Abstract: ",
    ),
    _task("LaMP-7", "generation", "Say this tweet in other words.", "the new tweet", "Tweet: "),
)
LAMP: Mapping[str, Task] = {task.name: task for task in _TASKS}
"""LaMP-1, 2N, 2M, 3, 4, 5 and 7 by name."""
