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


def _one_of(question: str, labels: tuple[str, ...]) -> str:
    return f"{question} Choose one of: {', '.join(labels)}. Answer with it alone."


def _task(name: str, kind: str, prompt: str, labels: tuple[str, ...] = ()) -> Task:
    data = {"name": name, "like": name, "kind": kind, "labels": labels, "prompt": prompt}
    return Task.from_json(data)


_TASKS = (
    _task(
        "LaMP-1",
        "classification",
        "Which of the two references belongs to this author's paper? Answer with [1] or [2]"
        " alone.\n\n{input}",
        ("[1]", "[2]"),
    ),
    _task(
        "LaMP-2N",
        "classification",
        _one_of("Which category does this article belong to?", _NEWS) + "\n\nArticle: {input}",
        _NEWS,
    ),
    _task(
        "LaMP-2M",
        "classification",
        _one_of("Which tag fits this movie?", _MOVIES) + "\n\nDescription: {input}",
        _MOVIES,
    ),
    _task(
        "LaMP-3",
        "rating",
        "How many stars, from 1 to 5, does this review give? Answer with the number"
        " alone.\n\nReview: {input}",
        ("1", "2", "3", "4", "5"),
    ),
    _task(
        "LaMP-4",
        "generation",
        "Write a headline for this article. Answer with the headline alone.\n\nArticle: {input}",
    ),
    _task(
        "LaMP-5",
        "generation",
        "Write a title for the paper with this abstract. Answer with the title alone.\n\nAbstract:"
        " {input}",
    ),
    _task(
        "LaMP-7",
        "generation",
        "Say this tweet in other words. Answer with the new tweet alone.\n\nTweet: {input}",
    ),
)

LAMP: Mapping[str, Task] = {task.name: task for task in _TASKS}
"""LaMP-1, 2N, 2M, 3, 4, 5 and 7 by name."""
