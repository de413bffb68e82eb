"""Rating: the answer is a number on a scale (LaMP-3)."""

import math
import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from hydra_llm.errors import DataError
from hydra_llm.tasks.base import Floats, MetricSpec, Pairs, Parsing, PromptWords, mean, with_count
from hydra_llm.tasks.classification import LabelKind

CODE_DEGREES = 4  # of the polynomials that code the labels


def number_of(text: str) -> float:
    """The number that a rating's text stands for. Raises DataError: it is not a number."""
    if (number := _number(text)) is None:
        raise DataError(f"'{text}' is not a number, so it cannot be a rating")
    return number


def plain_number(text: str) -> float | None:
    """A number of digits alone, as tables hold it; None for all else."""
    return _number(text) if re.fullmatch(r"[+-]?\d+(\.\d+)?", text) else None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _short(number: float) -> str:
    """`4` for 4.0, `0.5` for 0.50; -0.0 is 0."""
    return repr(number + 0.0).removesuffix(".0")


def _root_mean(sums: Floats) -> Floats:
    return np.sqrt(mean(sums))


class Rating(LabelKind):
    """A number on a scale; the labels are the points of the scale."""

    most_labels = 101  # 0 to 100
    metrics = (
        MetricSpec("mae", higher_is_better=False, title="MAE"),
        MetricSpec("rmse", _root_mean, higher_is_better=False, title="RMSE"),
    )

    def labels_fault(self) -> str:
        numbers = [_number(label) for label in self.task.labels]
        different = None not in numbers and len(set(numbers)) == len(numbers)
        fault = "" if different else "a rating task's labels must be different numbers"
        return super().labels_fault() or fault

    @cached_property
    def _by_number(self) -> dict[float, str]:
        return {float(label): label for label in self.task.labels}

    @cached_property
    def scale(self) -> tuple[float, float]:
        """The least and the greatest label."""
        return min(self._by_number), max(self._by_number)

    def parse(self, text: str, parsing: Parsing) -> str | None:
        """The text as a number. Lenient: or its first number but the scale itself ("1 to 5"); None
        where that lies outside the scale.
        """
        number, (low, high) = _number(text.strip()), self.scale
        if number is None and parsing == "lenient":
            scale, first_number = self._patterns
            match = first_number.search(scale.sub(" ", text))
            number = _number(match[0]) if match else None
        if number is None or (parsing == "lenient" and not low <= number <= high):
            return None
        return self._canonical(number)

    def _canonical(self, number: float) -> str:
        return self._by_number.get(number) or _short(number)

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """The scale itself, and a number."""
        low, high = map(re.escape, map(self._canonical, self.scale))
        between = r"\s*(?:to|and|through|-|–|—)\s*"
        scale = re.compile(rf"(?<!\d){low}{between}{high}(?![\d.]*\d)", re.IGNORECASE)
        # On a scale from 0 a dash before a number is a bullet.
        sign = r"(?:(?<!\w)-)?" if self.scale[0] < 0 else ""
        return scale, re.compile(rf"{sign}\d+(?:\.\d+)?")

    def read(self, text: str, parsing: Parsing) -> str | None:
        """The label nearest to the answer; the lower one of two equally near ones."""
        answer = self.parse(text, parsing)
        if answer is None or answer in self.task.labels:
            return answer
        value = float(answer)
        return self._by_number[min(self._by_number, key=lambda n: (abs(n - value), n))]

    def gain(self, answer: str, gold: str) -> float:
        low, high = self.scale
        return max(0.0, 1.0 - abs(number_of(answer) - number_of(gold)) / (high - low))

    def typical(self, outputs: Sequence[str]) -> str:
        """The lower median; without outputs the middle label."""
        if not outputs:
            return super().typical(outputs)
        return sorted(outputs, key=float)[(len(outputs) - 1) // 2]

    def metric_rows(self, metric: str, pairs: Pairs) -> Floats:
        """[N, 2] distances, squared for RMSE; an unparsable answer has the largest possible one."""
        low, high = self.scale
        errors = []
        for answer, gold in ((answer, number_of(gold)) for answer, gold in pairs):
            worst = max(gold - low, high - gold)
            errors.append(worst if answer is None else abs(number_of(answer) - gold))
        return with_count([error**2 for error in errors] if metric == "rmse" else errors)

    def prompt_words(self) -> PromptWords:
        low, high = self.scale
        header = f"Here is how this person rated earlier items on a scale of {low:g} to {high:g}."
        return PromptWords(header, "Item", "Score")

    @cached_property
    def _unit(self) -> Floats:
        """[L] the labels as numbers from 0 to 1."""
        values = np.array([float(label) for label in self.task.labels])
        return np.asarray((values - values.min()) / max(float(np.ptp(values)), 1e-9))

    def label_codes(self) -> Floats:
        """[L, J] orthonormal polynomials of the label's value, up to degree 4, each half of the one
        before: a score that is a smooth function of the value (adjacent-category logits).
        """
        degrees = min(len(self.task.labels) - 1, CODE_DEGREES)
        powers = (2 * self._unit[:, None] - 1) ** np.arange(degrees + 1)
        orthonormal, triangle = np.linalg.qr(powers)
        signs = np.sign(triangle.diagonal())
        return np.asarray((orthonormal * signs)[:, 1:] * 0.5 ** np.arange(degrees))

    def closeness(self, weights: Floats, total: float = 1.0) -> list[Floats]:
        return [-np.abs(self._unit - weights @ self._unit / total)]

    @property
    def candidate_columns(self) -> tuple[str, ...]:
        *shares, votes, greedy = super().candidate_columns
        near = [name.replace("share", "near") for name in shares]
        return (*shares, *near, votes, greedy, "llm_near")

    @classmethod
    def output_fault(cls, output: str) -> str:
        fault = f"'{output[:60]}' is no number, and this is a rating"
        return fault if plain_number(output) is None else ""

    @classmethod
    def tidy(cls, output: str) -> str:
        number = plain_number(output)
        return output if number is None else _short(number)

    @classmethod
    def labels_of(cls, outputs: set[str]) -> list[str]:
        """Every whole number of the range, or the numbers that there are."""
        numbers = sorted(n for output in outputs if (n := plain_number(output)) is not None)
        whole = numbers and all(number.is_integer() for number in numbers)
        if whole and numbers[-1] - numbers[0] < cls.most_labels:
            return [str(value) for value in range(int(numbers[0]), int(numbers[-1]) + 1)]
        return list(map(_short, numbers))

    @classmethod
    def default_prompt(cls, labels: Sequence[str]) -> str:
        if not labels:
            return super().default_prompt(labels)
        question = f"What score would this person give, from {labels[0]} to {labels[-1]}?"
        return question + " Answer with the number alone.\n\n{input}"
