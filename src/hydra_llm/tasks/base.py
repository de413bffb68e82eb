"""A task as a value: kind, labels, instruction, how answers are read, and what an answer is worth.

One class serves every task; what differs between kinds is data here, so that no other module asks
`if kind == ...` for more than its own stage. Knows no LLM and no model. DESIGN 3.

A real one (movie_rating, shaped like LaMP-3):
    Task("movie_rating", "rating", "What score, 1 to 5, would this person give this film? {input}",
    ("1", "2", "3", "4", "5"))
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from hydra_llm.errors import DataError

Kind = Literal["classification", "rating", "generation"]
Parsing = Literal["lenient", "strict"]
KINDS: tuple[Kind, ...] = ("classification", "rating", "generation")
METRICS: Mapping[str, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1"),
    "rating": ("mae", "rmse"),
    "generation": ("rouge1", "rougeL", "bleu"),
}


APART = " \t\n:"
"""Characters that may stand between an instruction and the text within it."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked of the LLM, and how its answers are judged."""

    name: str
    kind: Kind
    prompt: str
    """The instruction; `{input}` stands where the query's text goes."""
    labels: tuple[str, ...] = ()
    """Every possible answer; empty for generation."""
    metrics: tuple[str, ...] = ()
    like: str = ""
    """The LaMP task whose shape this one has, if any."""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def ask(self, text: str) -> str:
        """The instruction with the query's text in it (no format(): a text may hold braces)."""
        return self.prompt.replace("{input}", text)

    def input_of(self, text: str) -> str | None:
        """The query's text in an instruction that `ask` made; None where it made none."""
        head, _, tail = self.prompt.strip().partition("{input}")
        text = text.strip()
        apart = (not head or head[-1] in APART) and (
            not tail or tail[0] in APART
        )  # else a word might be torn: "Class{input}"
        if (
            not (head or tail)
            or not apart
            or "{input}" in tail
            or not (text.startswith(head) and text.endswith(tail))
        ):
            return None
        return text[len(head) : len(text) - len(tail)].strip() or None

    @classmethod
    def from_json(cls, data: Mapping[str, Any], file: str = "task.json") -> "Task":
        """Read and check the content of a task.json.

        Raises:
            DataError: names the field that is missing or wrong.
        """
        if not isinstance(data, Mapping):
            raise DataError("must hold one JSON object", file=file)
        kind = _kind(data, file)
        known = {"name", "kind", "prompt", "labels", "metrics", "like"}
        return cls(
            name=_text(data, "name", file),
            kind=kind,
            prompt=_prompt(data, file),
            labels=_labels(data, kind, file),
            metrics=_metrics(data, kind, file),
            like=_text(data, "like", file) if data.get("like") else "",
            extra={key: value for key, value in data.items() if key not in known},
        )

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads back as the same task."""
        fields = {
            "name": self.name,
            "like": self.like,
            "kind": self.kind,
            "labels": list(self.labels),
            "prompt": self.prompt,
        }
        return {key: value for key, value in fields.items() if value} | {
            "metrics": list(self.metrics or METRICS[self.kind]),
            **self.extra,
        }

    def parse(self, text: str, parsing: Parsing = "lenient") -> str | None:
        """The answer in an LLM's text: a label, or the text itself for generation; None if there is
        none.

        `strict` reads as LaMP's evaluation does: the stripped text is a label, or a number as it
        stands, or the text.
        `lenient` also reads what surrounds an answer: quotes, markdown, "Title:", a sentence with
        one label in it. A number between two labels is its canonical text ("3.5"); outside the
        scale it is an answer for `strict` only.
        """
        return _PARSERS[self.kind, parsing](text, self.labels)

    def gain(self, answer: str | None, gold: str) -> float:
        """0 to 1: what a parsed answer is worth against the gold answer (DESIGN 3); None is worth
        0.
        """
        return 0.0 if answer is None else _GAINS[self.kind](answer, gold, self.labels)

    def gain_matrix(self, answers: Sequence[str]) -> list[list[float]]:
        """[C, C]: entry i, j is the gain of answer i if answer j were the gold one (for
        expected-gain choosing).
        """
        matrix = [[1.0] * len(answers) for _ in answers]
        for i, answer in enumerate(answers):
            for j in range(i):  # every gain is symmetric
                matrix[i][j] = matrix[j][i] = self.gain(answer, answers[j])
        return matrix


# ---- task.json


def _text(data: Mapping[str, Any], name: str, file: str) -> str:
    value = data.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            "must be a text that is not empty" if name in data else "is missing",
            file=file,
            field=name,
        )
    return value


def _kind(data: Mapping[str, Any], file: str) -> Kind:
    value = _text(data, "kind", file)
    for kind in KINDS:
        if value == kind:
            return kind
    raise DataError(f"'{value}' is not one of {', '.join(KINDS)}", file=file, field="kind")


def _prompt(data: Mapping[str, Any], file: str) -> str:
    prompt = _text(data, "prompt", file)
    if "{input}" not in prompt:
        raise DataError("must hold {input} where the query's text goes", file=file, field="prompt")
    return prompt


def _labels(data: Mapping[str, Any], kind: Kind, file: str) -> tuple[str, ...]:
    labels = _texts(data, "labels", file)
    if kind == "generation":
        if labels:
            raise DataError(
                "must be left out: a generation task has no labels", file=file, field="labels"
            )
        return ()
    if len(labels) < 2:
        raise DataError(f"a {kind} task needs at least two labels", file=file, field="labels")
    if kind == "rating":
        numbers = [_number(label) for label in labels]
        if None in numbers or len(set(numbers)) < len(numbers):
            raise DataError(
                "a rating task's labels must be different numbers", file=file, field="labels"
            )
    return labels


def _texts(data: Mapping[str, Any], name: str, file: str) -> tuple[str, ...]:
    values = data.get(name) or ()
    if not isinstance(values, list | tuple):
        raise DataError("must be a list of texts", file=file, field=name)
    for value in values:
        if not isinstance(value, str) or not value or value != value.strip():
            raise DataError(
                f"{value!r} is not a text without blanks around it", file=file, field=name
            )
        if values.count(value) > 1:
            raise DataError(f"'{value}' stands twice", file=file, field=name)
    return tuple(values)


def _metrics(data: Mapping[str, Any], kind: Kind, file: str) -> tuple[str, ...]:
    metrics = _texts(data, "metrics", file) or METRICS[kind]
    for metric in metrics:
        if metric not in METRICS[kind]:
            raise DataError(
                f"'{metric}' is not one of {', '.join(METRICS[kind])} ({kind})",
                file=file,
                field="metrics",
            )
    return metrics


# ---- numbers and the scale of a rating task


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


@lru_cache(maxsize=256)
def scale(labels: tuple[str, ...]) -> tuple[float, float]:
    """The least and the greatest label of a rating task."""
    numbers = [float(label) for label in labels]
    return min(numbers), max(numbers)


@lru_cache(maxsize=256)
def _by_number(labels: tuple[str, ...]) -> dict[float, str]:
    return {float(label): label for label in labels}


def _canonical(number: float, labels: tuple[str, ...]) -> str:
    return _by_number(labels).get(number) or repr(number + 0.0).removesuffix(
        ".0"
    )  # + 0.0 turns -0.0 into 0.0


# ---- parsers: (text, labels) → the answer or None


def _strict_label(text: str, labels: tuple[str, ...]) -> str | None:
    return text.strip() if text.strip() in labels else None


def _strict_rating(text: str, labels: tuple[str, ...]) -> str | None:
    number = _number(text.strip())
    return None if number is None else _canonical(number, labels)


def _strict_text(text: str, labels: tuple[str, ...]) -> str | None:
    return text.strip() or None


def _lenient_label(text: str, labels: tuple[str, ...]) -> str | None:
    """The label that the text is, or the only one that occurs in it as words; of several the only
    one before the first cut.
    """
    exact = _strict_label(text, labels)
    if exact is not None:
        return exact
    for fold, names, words in _readings(labels):
        folded = fold(text.strip())
        found = [
            (match.start(), names[" ".join(match[0].split())]) for match in words.finditer(folded)
        ]
        cut = _CUT.search(folded)
        early = [label for place, label in found if cut and place <= cut.start()]
        for group in ([label for _, label in found], early):
            if len(set(group)) == 1:
                return group[0]
        if found:
            return None
    return None


_CUT = re.compile(r"[,!\]\n]")
"""Where HYDRA cuts an answer, and the end of a line."""
_LOOSE = str.maketrans({"&": " and ", "-": " ", "_": " "})

_Reading = tuple[Callable[[str], str], Mapping[str, str], re.Pattern[str]]


def _loosely(text: str) -> str:
    return text.casefold().translate(_LOOSE)


def _barely(label: str) -> str:
    return re.sub(r"^\W+|\W+$", "", _loosely(label))


@lru_cache(maxsize=256)
def _readings(labels: tuple[str, ...]) -> tuple[_Reading, ...]:
    """Three ways to find labels in a text, strictest first: in any case; "&" as "and", hyphens as
    blanks; "[1]" as "1".
    """
    return (
        _reading(labels, str.casefold, str.casefold),
        _reading(labels, _loosely, _loosely),
        _reading(labels, _barely, _loosely),
    )


def _reading(
    labels: tuple[str, ...], fold_label: Callable[[str], str], fold_text: Callable[[str], str]
) -> _Reading:
    """How to fold a text, folded name → label (names that two labels share are left out), and a
    pattern of the names as words.
    """
    folded = [" ".join(fold_label(label).split()) for label in labels]
    names = {
        name: label
        for name, label in zip(folded, labels, strict=True)
        if name and folded.count(name) == 1
    }
    longest_first = sorted(names, key=len, reverse=True)
    either = (
        "|".join(r"\s+".join(map(re.escape, name.split())) for name in longest_first) or r"(?!)"
    )
    return fold_text, names, re.compile(rf"(?<![^\W_])(?:{either})(?![^\W_])")


def _lenient_rating(text: str, labels: tuple[str, ...]) -> str | None:
    """The first number that is not the scale itself ("on a scale of 1 to 5"); None if it lies
    outside the scale.
    """
    low, high = scale(labels)
    number = _number(text.strip())
    if number is None:
        match = _first_number(labels).search(_the_scale(labels).sub(" ", text))
        number = None if match is None else _number(match[0])
    return None if number is None or not low <= number <= high else _canonical(number, labels)


@lru_cache(maxsize=256)
def _the_scale(labels: tuple[str, ...]) -> re.Pattern[str]:
    low, high = map(re.escape, (_canonical(end, labels) for end in scale(labels)))
    return re.compile(
        rf"(?<!\d){low}\s*(?:to|and|through|-|–|—)\s*{high}(?![\d.]*\d)", re.IGNORECASE
    )


@lru_cache(maxsize=256)
def _first_number(labels: tuple[str, ...]) -> re.Pattern[str]:
    sign = (
        r"(?:(?<!\w)-)?" if scale(labels)[0] < 0 else ""
    )  # elsewhere a dash before a number is a bullet
    return re.compile(rf"{sign}\d+(?:\.\d+)?")


def _lenient_text(text: str, labels: tuple[str, ...]) -> str | None:
    """The first line that says something, without quotes, markdown and a leading "Title:"."""
    lines = [line for line in map(_plain, text.splitlines()) if line]
    answers = [
        line for line in lines if not line.endswith(":")
    ]  # "Here is a headline:" announces the next line
    return next(iter(answers or lines), None)


_PREFIX = re.compile(
    r"^(?:(?:the|a|an|your|my|here(?:['’]s|"
    r" is)|suggested|possible|new|generated|paraphrased|paper|article|news|email)\s+)*"
    r"(?:title|headline|subject(?: line)?|tweet|paraphrase|answer|output|response)\s*:\s*",
    re.IGNORECASE,
)
_HEADING = re.compile(r"^#+\s+")
_QUOTES = ('""', "''", "“”", "‘’", "«»", "„“", "``", "__")


def _plain(line: str) -> str:
    before = None
    while line != before:
        before = line
        line = _HEADING.sub("", line.replace("**", "").strip())
        line = _unquoted(_PREFIX.sub("", line))
    return line


def _unquoted(line: str) -> str:
    ends, inner = line[:1] + line[-1:], line[1:-1]
    return inner.strip() if ends in _QUOTES and not set(ends) & set(inner) else line


_PARSERS: Mapping[tuple[str, str], Callable[[str, tuple[str, ...]], str | None]] = {
    ("classification", "strict"): _strict_label,
    ("classification", "lenient"): _lenient_label,
    ("rating", "strict"): _strict_rating,
    ("rating", "lenient"): _lenient_rating,
    ("generation", "strict"): _strict_text,
    ("generation", "lenient"): _lenient_text,
}


# ---- gains: (answer, gold, labels) → 0 to 1


def _equal(answer: str, gold: str, labels: tuple[str, ...]) -> float:
    return float(answer == gold)


def _closeness(answer: str, gold: str, labels: tuple[str, ...]) -> float:
    low, high = scale(labels)
    return max(0.0, 1.0 - abs(rating(answer) - rating(gold)) / (high - low))


def rating(text: str) -> float:
    """The number that a rating's text stands for.

    Raises:
        DataError: it is not a number.
    """
    number = _number(text)
    if number is None:
        raise DataError(f"'{text}' is not a number, so it cannot be a rating")
    return number


def overlap(answer: str, gold: str, labels: tuple[str, ...] = ()) -> float:
    """(ROUGE-1 + ROUGE-L) / 2, F-measures without stemmer, as rouge_score counts them.

    Where a text has no ASCII word, rouge_score sees nothing; then both texts are read as words of
    any script.
    """
    if answer == gold:
        return 1.0
    ours, theirs = _ascii_words(answer), _ascii_words(gold)
    if not ours or not theirs:
        ours, theirs = _any_words(answer), _any_words(gold)
    if not ours or not theirs:
        return 0.0
    common = sum((Counter(ours) & Counter(theirs)).values())
    return (
        _f_measure(common, len(ours), len(theirs))
        + _f_measure(_common_subsequence(ours, theirs), len(ours), len(theirs))
    ) / 2


@lru_cache(maxsize=16384)
def _ascii_words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z0-9]+", text.lower()))


def _any_words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


def _f_measure(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs)


def _common_subsequence(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Length of the longest common subsequence; one row of the table as the bits of a number (Hyyrö
    2004).
    """
    places: dict[str, int] = {}
    for place, word in enumerate(ours):
        places[word] = places.get(word, 0) | 1 << place
    row = full = (1 << len(ours)) - 1
    for word in theirs:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & full
    return len(ours) - row.bit_count()


_GAINS: Mapping[str, Callable[[str, str, tuple[str, ...]], float]] = {
    "classification": _equal,
    "rating": _closeness,
    "generation": overlap,
}
