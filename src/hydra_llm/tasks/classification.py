"""Classification: the answer is one label of a closed set (LaMP-1, LaMP-2). `LabelKind` is what all
kinds with labels share. Letters: n records, C candidates, L labels, D width.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from hydra_llm.errors import DataError
from hydra_llm.tasks import base
from hydra_llm.tasks.base import Floats, HistoryVectors, Pairs, Parsing, PromptWords
from hydra_llm.text import UNSPACED, caseless, fold, marks
from hydra_llm.types import Candidate, Record

BANDWIDTHS = (0.05, 0.15, 0.5)  # τ of exp(cos / τ): from the nearest record to nearly all alike
LEAST_PROBABILITY = 1e-3  # added to those that the LLM tells, so that none rules a label out
PSEUDO_COUNT = 2.0  # how many records the training users' label shares count for


class LabelKind(base.TaskKind):
    """A kind whose answers are the task's labels."""

    closed = True
    most_labels: ClassVar[int] = 1000  # every label is a candidate
    prompt_style = "turns"  # small models repeat a list of scores (benchmarks/prompt_style.py)
    target_rule = "exact"
    record_columns = ("answer_share", "answer_near")

    def labels_fault(self) -> str:
        kind, count = self.task.kind, len(self.task.labels)
        if count > self.most_labels:
            most = f"a {kind} task has at most {self.most_labels:,} labels, not {count:,}"
            return f"{most}: if the answers are texts or amounts, take the kind generation"
        return f"a {kind} task needs at least two labels" if count < 2 else ""

    def typical(self, outputs: Sequence[str]) -> str:
        """The most frequent label, the latest of equals; without outputs the middle label."""
        if outputs:
            return max(reversed(outputs), key=list(outputs).count)
        return self.task.labels[len(self.task.labels) // 2] if self.task.labels else ""

    @cached_property
    def index(self) -> dict[str, int]:
        """Label → its place."""
        return {label: i for i, label in enumerate(self.task.labels)}

    def vectorize(self, records: Sequence[Record], embed: base.Embed) -> HistoryVectors:
        inputs, places = embed([record.input for record in records]), None
        if self.task.free_history:
            labelled = [i for i, record in enumerate(records) if record.output in self.index]
            records, inputs = [records[i] for i in labelled], inputs[labelled]
            places = np.array(labelled, dtype=np.int64)
        return HistoryVectors(inputs, inputs[:, :0], self._indices(records), places=places)

    def _indices(self, records: Sequence[Record]) -> NDArray[np.int64]:
        try:
            return np.array([self.index[record.output] for record in records], dtype=np.int64)
        except KeyError as error:
            labels = f"the labels of task '{self.task.name}'"
            raise DataError(f"a record's output {error} is none of {labels}") from None

    def cohort_stats(self, outputs: Sequence[str], reference: float) -> base.CohortStats:
        counts = np.array([outputs.count(label) for label in self.task.labels]) + 1.0
        return base.CohortStats(tuple((counts / counts.sum()).tolist()), reference)

    def label_shares(self, context: base.FeatureContext) -> list[Floats]:
        """For each bandwidth, and none: [L] label shares of similar records, shrunk to the cohort.

        They are the prior mean of a user's score: they personalize before any head is fitted.
        """
        history, stats, count = context.history, context.stats, len(self.task.labels)
        prior = np.asarray(stats.label_shares or [1 / count] * count, dtype=np.float64)
        onehot = np.eye(count)[history.labels]
        similarity = history.inputs @ context.query - stats.reference
        weights = [np.exp(similarity / bandwidth) for bandwidth in BANDWIDTHS]
        weights.append(np.ones(len(history)))
        return [(w @ onehot + PSEUDO_COUNT * prior) / (w.sum() + PSEUDO_COUNT) for w in weights]

    def label_codes(self) -> Floats:
        """[L, J] columns in which a model may give weights to labels: orthonormal contrasts, which
        leave out what is added to all labels alike (Helmert).
        """
        count = len(self.task.labels)
        codes = np.zeros((count, count - 1))
        for j in range(1, count):
            codes[:j, j - 1], codes[j, j - 1] = 1.0, -j
        return np.asarray(codes / np.linalg.norm(codes, axis=0))

    def closeness(self, weights: Floats, total: float = 1.0) -> list[Floats]:
        """A column [L]: how near each label is to the weighted mean; none for unordered labels."""
        return []

    @property
    def candidate_columns(self) -> tuple[str, ...]:
        shares = (*(f"share_{bandwidth}" for bandwidth in BANDWIDTHS), "share_all")
        return (*shares, "llm_votes", "llm_greedy")

    def candidate_features(
        self, context: base.FeatureContext, candidates: Sequence[Candidate]
    ) -> Floats:
        shares = self.label_shares(context)
        columns = [np.log(share + 1e-4) for share in shares]
        columns += [column for share in shares for column in self.closeness(share)]
        votes, greedy = np.zeros(len(self.task.labels)), np.zeros(len(self.task.labels))
        places = [self.index.get(candidate.answer or "") for candidate in candidates]
        for i, candidate in zip(places, candidates, strict=True):
            if i is not None:
                votes[i], greedy[i] = candidate.votes, float(candidate.greedy)
        if (told := self._told(candidates)) is not None:
            columns += [np.log(told + LEAST_PROBABILITY) + np.log(len(told)), greedy]
            columns += self.closeness(told, float(told.sum()))
        elif total := votes.sum():
            logs = np.log((votes + 0.5) / (total + 0.5 * len(votes)) * len(votes))
            columns += [logs, greedy, *self.closeness(votes, total)]
        else:  # zeros without any sample
            columns += [votes, greedy, *(votes for _ in self.closeness(votes))]
        table = np.stack(columns, 1)
        worst = table.min(0)
        return np.stack([worst if i is None else table[i] for i in places])

    def _told(self, candidates: Sequence[Candidate]) -> Floats | None:
        """[L] the LLM's own probabilities of the labels; None where it told none."""
        told = {c.answer: c.llm_probability for c in candidates if c.llm_probability is not None}
        if not told:
            return None
        return np.array([told.get(label, 0.0) for label in self.task.labels])

    def record_features(self, context: base.FeatureContext, records: Sequence[Record]) -> Floats:
        """How likely each record's own answer is the right one, by the user's similar records."""
        if self.task.free_history:
            return np.zeros((len(records), 2))
        share = self.label_shares(context)[1]
        (near,) = self.closeness(share) or [share - share.max()]
        index = self._indices(records)
        return np.stack([np.log(share + 1e-4)[index], near[index]], 1)


def _macro_f1(sums: Floats) -> Floats:
    """Mean F1 over all labels; one neither answered nor gold counts 0, as in scikit-learn."""
    right, given, gold = np.moveaxis(sums.reshape(len(sums), 3, -1), 1, 0)
    both = given + gold
    f1: Floats = np.divide(2 * right, both, out=np.zeros_like(right), where=both > 0)
    return np.asarray(f1.mean(axis=1))


class Classification(LabelKind):
    """One label of a closed set."""

    metrics = (
        base.MetricSpec("accuracy"),
        base.MetricSpec(
            "macro_f1",
            _macro_f1,
            resamples=False,
            note="With few users and many labels macro-F1's interval holds the truth less often"
            " than it says (docs/benchmark.md).",
        ),
    )
    zero_one_gain = True

    def gain(self, answer: str, gold: str) -> float:
        return float(answer == gold)

    def prompt_words(self) -> PromptWords:
        return PromptWords("Here is how this person labelled earlier texts.", "Text", "Label")

    def metric_rows(self, metric: str, pairs: Pairs) -> Floats:
        """[N, 2], or for macro-F1 [N, 3 L]: for each label, whether it is right, answered, gold."""
        if metric == "accuracy":
            return base.with_count([float(answer == gold) for answer, gold in pairs])
        rows = np.zeros((len(pairs), 3, len(self.index)))
        for row, (answer, gold) in zip(rows, pairs, strict=True):
            for part, label in enumerate((answer if answer == gold else None, answer, gold)):
                if label in self.index:
                    row[part, self.index[label]] = 1
        return rows.reshape(len(pairs), 3 * len(self.index))

    @classmethod
    def tidy(cls, output: str) -> str:
        return unicodedata.normalize("NFC", output)

    @classmethod
    def labels_of(cls, outputs: set[str]) -> list[str]:
        return sorted(outputs)

    @classmethod
    def default_prompt(cls, labels: Sequence[str]) -> str:
        question = f"Which of these would this person choose: {', '.join(labels)}?"
        return question + " Answer with it alone.\n\n{input}"

    def parse(self, text: str, parsing: Parsing) -> str | None:
        """The label that the text is. Lenient: or the only one that occurs in it as words; of
        several the only one before the first cut.
        """
        if text.strip() in self.index:
            return text.strip()
        for matcher in self._matchers if parsing == "lenient" else ():
            matches, before_cut = matcher.find(text.strip())
            for labels in (matches, before_cut):
                if len(labels) == 1:
                    return labels.pop()
            if matches:
                return None
        return None

    @cached_property
    def _matchers(self) -> "list[_Matcher]":
        """Strictest first: in any case; "&" as "and", hyphens as blanks; "[1]" as "1"."""
        folds = ((caseless, caseless), (_loose, _loose), (_bare, _loose))
        return [_Matcher(self.task.labels, *functions) for functions in folds]


_CUT = re.compile(r"[,!\]\n]")  # where HYDRA cuts an answer, and the end of a line
_SPELLINGS = str.maketrans({"&": " and ", "-": " ", "_": " "})
_Normalize = Callable[[str], str]


class _Matcher:
    """Finds labels as words; a normalized name that two labels share is left out."""

    def __init__(self, labels: Sequence[str], of_label: _Normalize, of_text: _Normalize):
        names = [fold(of_label(label)) for label in labels]
        pairs = zip(names, labels, strict=True)
        self.labels = {name: label for name, label in pairs if name and names.count(name) == 1}
        self.of_text = of_text
        longest_first = sorted(self.labels, key=len, reverse=True)
        either = "|".join(map(_as_word, longest_first))
        self.pattern = re.compile(either or "(?!)")

    def find(self, text: str) -> tuple[set[str], set[str]]:
        """The labels in a text, and those before the first cut."""
        text = self.of_text(text)
        cut, matches = _CUT.search(text), list(self.pattern.finditer(text))
        early = (match for match in matches if cut and match.start() <= cut.start())
        whole = {self.labels[fold(match[0])] for match in matches}
        before_cut = {self.labels[fold(match[0])] for match in early}
        return whole, before_cut


def _as_word(name: str) -> str:
    """A pattern of the name between other words; blanks separate none in scripts without them."""
    unspaced = re.compile(f"[{UNSPACED}]")
    before = "" if unspaced.match(name[0]) else r"(?<![^\W_])"
    after = "" if unspaced.match(name[-1]) else r"(?![^\W_])"
    after += "" if name.isascii() else f"(?![{marks()}])"
    return before + r"\s+".join(map(re.escape, name.split())) + after


def _loose(text: str) -> str:
    return caseless(text).translate(_SPELLINGS)


def _bare(label: str) -> str:
    return re.sub(r"^\W+|\W+$", "", _loose(label))
