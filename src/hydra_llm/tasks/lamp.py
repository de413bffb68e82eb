"""The LaMP tasks: kind, labels and a default instruction (Salemi et al. 2024, arXiv 2304.11406).

In the official files each `input` carries LaMP's own instruction, which replaces the one here.
LaMP-6 is missing: its e-mails are not public. `datasets/lamp.py` reads the files.
"""

from collections.abc import Mapping

from hydra_llm.tasks.base import Task

_NEWS = (
    "women, religion, politics, style & beauty, entertainment, culture & arts, sports, "
    "science & technology, travel, business, crime, education, healthy living, parents, "
    "food & drink"
)
_MOVIES = (
    "sci-fi, based on a book, comedy, action, twist ending, dystopia, dark comedy, classic, "
    "psychology, fantasy, romance, thought-provoking, social commentary, violence, true story"
)


def _task(number: str, kind: str, question: str, answer: str, field: str, *labels: str) -> Task:
    name, prompt = f"LaMP-{number}", f"{question} Answer with {answer} alone.\n\n{field}{{input}}"
    values = {"name": name, "like": name, "kind": kind, "prompt": prompt, "labels": labels}
    return Task.from_json(values)


_CATEGORY = f"Which category does this article belong to? Choose one of: {_NEWS}."
_TAG = f"Which tag fits this movie? Choose one of: {_MOVIES}."
_PAPER = "Which of the two references belongs to this author's paper?"
_ABSTRACT = "the paper with this abstract"
_STARS = "How many stars, from 1 to 5, does this review give?"
_TASKS = (
    _task("1", "classification", _PAPER, "[1] or [2]", "", "[1]", "[2]"),
    _task("2N", "classification", _CATEGORY, "it", "Article: ", *_NEWS.split(", ")),
    _task("2M", "classification", _TAG, "it", "Description: ", *_MOVIES.split(", ")),
    _task("3", "rating", _STARS, "the number", "Review: ", *"12345"),
    _task("4", "generation", "Write a headline for this article.", "the headline", "Article: "),
    _task("5", "generation", f"Write a title for {_ABSTRACT}.", "the title", "Abstract: "),
    _task("7", "generation", "Say this tweet in other words.", "the new tweet", "Tweet: "),
)
LAMP: Mapping[str, Task] = {task.name: task for task in _TASKS}
"""LaMP-1, 2N, 2M, 3, 4, 5 and 7 by name."""
