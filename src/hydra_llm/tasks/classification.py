"""Classification: the answer is one label of a closed set (LaMP-1, LaMP-2)."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from hydra_llm.tasks.base import Floats, MetricSpec, Pairs, Parsing, PromptWords, with_count
from hydra_llm.tasks.labels import LabelKind


def _macro_f1(sums: Floats) -> Floats:
    """Mean F1 over the task's labels; a label neither answered nor gold counts 0, as in
    scikit-learn and LaMP.
    """
    right, given, gold = np.moveaxis(sums.reshape(len(sums), 3, -1), 1, 0)
    macro: Floats = np.divide(
        2 * right, given + gold, out=np.zeros_like(right), where=given + gold > 0
    ).mean(axis=1)
    return macro


_MACRO_F1_NOTE = (
    "With few users and many labels macro-F1's interval holds the truth less often than it says"
    " (docs/benchmark.md)."
)


class Classification(LabelKind):
    """One label of a closed set."""

    metrics = (
        MetricSpec("accuracy"),
        MetricSpec("macro_f1", _macro_f1, resamples=False, note=_MACRO_F1_NOTE),
    )
    zero_one_gain = True

    def gain(self, answer: str, gold: str) -> float:
        return float(answer == gold)

    def prompt_words(self) -> PromptWords:
        return PromptWords("Here is how this person labelled earlier texts.", "Text", "Label")

    def metric_rows(self, metric: str, pairs: Pairs) -> Floats:
        """[N, 2], or for macro-F1 [N, 3 L]: for each label, whether it is right, answered, gold."""
        if metric == "accuracy":
            return with_count([float(answer == gold) for answer, gold in pairs])
        rows = np.zeros((len(pairs), 3, len(self.index)))
        for row, (answer, gold) in zip(rows, pairs, strict=True):
            for part, label in enumerate((answer if answer == gold else None, answer, gold)):
                if label in self.index:
                    row[part, self.index[label]] = 1
        return rows.reshape(len(pairs), 3 * len(self.index))

    @classmethod
    def labels_of(cls, outputs: set[str]) -> list[str]:
        return sorted(outputs)

    @classmethod
    def default_prompt(cls, labels: Sequence[str]) -> str:
        return (
            f"Which of these would this person choose: {', '.join(labels)}? Answer with it"
            " alone.\n\n{input}"
        )

    # ---- parsing

    def parse(self, text: str, parsing: Parsing) -> str | None:
        """The label that the text is. Lenient: or the only one that occurs in it as words; of
        several the only one before the first cut.
        """
        if text.strip() in self.index:
            return text.strip()
        for matcher in self._matchers if parsing == "lenient" else ():
            folded = matcher.fold(text.strip())
            found = [
                (match.start(), matcher.names[" ".join(match[0].split())])
                for match in matcher.pattern.finditer(folded)
            ]
            cut = _CUT.search(folded)
            early = [label for start, label in found if cut and start <= cut.start()]
            for group in ([label for _, label in found], early):
                if len(set(group)) == 1:
                    return group[0]
            if found:
                return None
        return None

    @cached_property
    def _matchers(self) -> "tuple[_Matcher, ...]":
        """Three ways to find labels in a text, strictest first: in any case; "&" as "and", hyphens
        as blanks; "[1]" as "1".
        """
        folds = ((str.casefold, str.casefold), (_loose, _loose), (_bare, _loose))
        return tuple(_matcher(self.task.labels, *each) for each in folds)


_CUT = re.compile(r"[,!\]\n]")
"""Where HYDRA cuts an answer, and the end of a line."""
_SPELLINGS = str.maketrans({"&": " and ", "-": " ", "_": " "})


class _Matcher(NamedTuple):
    fold: Callable[[str], str]
    """Of a text, before the pattern is searched in it."""
    names: Mapping[str, str]
    """Folded name → label; names that two labels share are left out."""
    pattern: re.Pattern[str]
    """The names as words."""


def _matcher(
    labels: tuple[str, ...], fold_label: Callable[[str], str], fold_text: Callable[[str], str]
) -> _Matcher:
    folded = [" ".join(fold_label(label).split()) for label in labels]
    names = {
        name: label
        for name, label in zip(folded, labels, strict=True)
        if name and folded.count(name) == 1
    }
    longest_first = sorted(names, key=len, reverse=True)
    either = "|".join(r"\s+".join(map(re.escape, name.split())) for name in longest_first)
    pattern = re.compile(rf"(?<![^\W_])(?:{either or '(?!)'})(?![^\W_])")
    return _Matcher(fold_text, names, pattern)


def _loose(text: str) -> str:
    return text.casefold().translate(_SPELLINGS)


def _bare(label: str) -> str:
    return re.sub(r"^\W+|\W+$", "", _loose(label))
