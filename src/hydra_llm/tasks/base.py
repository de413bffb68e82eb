"""A task as a value (`Task`, read from task.json), and what a kind of it defines (`TaskKind`).

Example: Task("films", "rating", "What score would this person give? {input}", ("1", "2", "3"))
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hydra_llm.errors import DataError
from hydra_llm.plugins import Registry
from hydra_llm.tasks.fields import Fields
from hydra_llm.text import without_reasoning
from hydra_llm.types import Candidate, Record
from hydra_llm.word_counts import UserWords

Floats = NDArray[np.float64]
Embed = Callable[[Sequence[str]], NDArray[np.float32]]  # texts [N] → unit rows [N, D]
WordShares = Callable[[Sequence[str]], Floats]  # words [W] → P(in the user's answer) [W]
Statistic = Callable[[Floats], Floats]  # sums [D, S] → values [D]
Parsing = Literal["lenient", "strict"]
Words = Literal["lamp", "unicode"]
WORDS: tuple[Words, ...] = ("lamp", "unicode")
Pairs = Sequence[tuple[str | None, str]]  # parsed answer, gold answer

NOW_ANSWER = "Now answer as this person would."
"""What a block of examples ends with."""
_MARKING = "*_#> \t\r\n"  # Markdown around words
_MARKS = r"[*_#>\s]{0,12}"
SEPARATORS = " \t\n:"  # what may stand between an instruction and the text within it


@dataclass(frozen=True)
class Task:
    """What is asked of the LLM, and how its answers are judged."""

    name: str
    kind: str  # a name registered in `KINDS`
    prompt: str  # the instruction; `{input}` stands where the query's text goes
    labels: tuple[str, ...] = ()  # the closed set of answers; empty where answers are free texts
    metrics: tuple[str, ...] = ()  # names of the kind's metrics to report; empty for all
    like: str = ""  # the LaMP task whose shape this one has, if any
    extra: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Words | None = None  # of ROUGE and BLEU; None: `lamp` like LaMP's, else `unicode`

    @property
    def words(self) -> Words:
        """The words that ROUGE and BLEU compare: LaMP's are ASCII alone, `text.words` of any
        script; on ASCII text they are the same.
        """
        return self.tokenizer or ("lamp" if self.like.startswith("LaMP") else "unicode")

    @cached_property
    def strategy(self) -> "TaskKind":
        """What is particular to the task's kind."""
        return KINDS.load(self.kind)(self)

    @property
    def metric_specs(self) -> "dict[str, MetricSpec]":
        """The metrics to report by name, in order."""
        of_kind = {metric.name: metric for metric in self.strategy.metrics}
        known = of_kind | CHOICE_METRICS
        return {name: known[name] for name in self.metrics or of_kind}

    @property
    def free_history(self) -> bool:
        """Whether the records' outputs are no labels although answers are (LaMP-1)."""
        return bool(self.extra.get("free_history"))

    def is_answer(self, output: str) -> bool:
        """Whether a text can be the task's answer: any text, or one of the labels."""
        return not self.labels or output in self.labels

    def ask(self, text: str) -> str:
        """The instruction with the query's text in it (no format(): a text may hold braces)."""
        return self.prompt.replace("{input}", text)

    def input_of(self, text: str) -> str | None:
        """The query's text in an instruction made by `ask`; None where it was not made by it."""
        head, _, tail = self.prompt.strip().partition("{input}")
        text = text.strip()
        # Without a separator a word could be cut in two: "Class{input}".
        separated = (not head or head[-1] in SEPARATORS) and (not tail or tail[0] in SEPARATORS)
        unique = (head or tail) and "{input}" not in tail
        fits = text.startswith(head) and text.endswith(tail)
        if not unique or not separated or not fits:
            return None
        return text[len(head) : len(text) - len(tail)].strip() or None

    @classmethod
    def from_json(cls, data: Mapping[str, Any], file: str = "task.json") -> "Task":
        """Read and check a task.json. Raises DataError, which names the field at fault."""
        if not isinstance(data, Mapping):
            raise DataError("must hold one JSON object", file=file)
        fields = Fields(data, file)
        name, kind = fields.text("name"), fields.text("kind")
        fields.check_known("kind", [kind], KINDS.names(), f", {KINDS.hint}")
        if "{input}" not in (prompt := fields.text("prompt")):
            raise fields.fault("prompt", "must hold {input} where the query's text goes")
        labels, known = fields.texts("labels"), [spec.name for spec in KINDS.load(kind).metrics]
        metrics = fields.texts("metrics") or tuple(known)
        fields.check_known("metrics", metrics, [*known, *CHOICE_METRICS], f" ({kind})")
        like = fields.text("like") if data.get("like") else ""
        if (tokenizer := data.get("tokenizer")) is not None:
            fields.check_known("tokenizer", [tokenizer], WORDS, "")
        own = {"name", "kind", "prompt", "labels", "metrics", "like", "tokenizer"}
        extra = {key: value for key, value in data.items() if key not in own}
        task = cls(name, kind, prompt, labels, metrics, like, extra, tokenizer)
        if fault := task.strategy.labels_fault():
            raise fields.fault("labels", fault)
        return task

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads back as the same task."""
        names = ("name", "like", "kind", "labels", "prompt", "tokenizer")
        values = {key: getattr(self, key) for key in names}
        values["labels"] = list(self.labels)
        known = {key: value for key, value in values.items() if value}
        return {**known, "metrics": list(self.metric_specs), **self.extra}

    def parse(self, text: str, parsing: Parsing = "lenient") -> str | None:
        """The answer in an LLM's text: a label, a number or the text itself; None if there is none.

        `strict` reads the stripped text, as LaMP's evaluation does; `lenient` also drops quotes,
        markdown, "Title:", a sentence around one label. A number between two labels is its
        canonical text ("3.5"); outside the scale `strict` only reads it. An LLM's reasoning
        (`<think>…</think>`) is never read.
        """
        return self.strategy.parse(without_reasoning(text), parsing)

    def read(self, text: str, parsing: Parsing = "lenient") -> str | None:
        """As `parse`, but a rating between two labels becomes the nearest label."""
        return self.strategy.read(without_reasoning(text), parsing)

    def gain(self, answer: str | None, gold: str) -> float:
        """0 to 1: what a parsed answer is worth against the gold answer; None is worth 0."""
        return 0.0 if answer is None else self.strategy.gain(answer, gold)

    def gain_matrix(self, answers: Sequence[str]) -> Floats:
        """[C, C]: entry i, j is the gain of answer i if answer j were the gold answer."""
        return self.strategy.gain_matrix(answers)


def mean(sums: Floats) -> Floats:
    """[D, 2] of (sum, count) → [D]."""
    total, count = sums.T
    means: Floats = np.divide(total, count, out=np.full(len(sums), np.nan), where=count > 0)
    return means


def with_count(values: Sequence[float]) -> Floats:
    """[N] → [N, 2] rows whose sums `mean` reads."""
    return np.array([values, np.ones(len(values))], dtype=np.float64).T


@dataclass(frozen=True)
class MetricSpec:
    """How a metric follows from the sums of its per-query rows (sufficient statistics)."""

    name: str
    statistic: Statistic = mean
    higher_is_better: bool = True
    resamples: bool = True  # users can be resampled; False for macro-F1: resamples lack labels
    in_improvement: bool = True  # counts in the mean relative improvement, as published
    title: str = ""  # in tables and plots; by default the name
    note: str = ""  # a sentence below tables that show it

    @property
    def sign(self) -> int:
        """1 where higher is better, −1 where lower is."""
        return 1 if self.higher_is_better else -1


CHOICE_METRICS = {
    spec.name: spec
    for spec in (
        MetricSpec("choice_accuracy", title="accuracy of the choice"),
        MetricSpec("mrr", title="mean reciprocal rank"),
        MetricSpec("log_loss", higher_is_better=False, in_improvement=False, title="log-loss"),
    )
}
"""Of recorded choices, whatever the kind: how often a method picks the candidate that was taken;
1 / its place in the method's ranking; −log of the probability that the method gives it, in nats.
"""


class PromptWords(NamedTuple):
    """What a block of examples says around the records."""

    header: str
    input: str
    answer: str

    def stripped(self, text: str) -> str:
        """An answer without words of the block before it, and examples of the LLM's own behind."""
        said = text.lower()
        if not any(words.lower() in said for words in (self.header, NOW_ANSWER, self.answer)):
            return text
        header, now, answer = map(re.escape, (self.header, NOW_ANSWER, self.answer))
        asked = rf"{_MARKS}{re.escape(self.input)}{_MARKS}:[^\n]*\n"
        patterns = (
            rf"(?s)\A{_MARKS}(?:{header}(?:.*{now})?|{now})",
            rf"\A(?:{asked})?(?:{_MARKS}{answer}{_MARKS}:{_MARKS})+",
            rf"(?s)\n{asked}{_MARKS}{answer}{_MARKS}:.*\Z",
        )
        clean = text
        for pattern in patterns:
            clean = re.sub(pattern, "", clean, flags=re.IGNORECASE)
        return text if clean == text else clean.strip()

    def announcement(self, text: str) -> int | None:
        """How many characters of a text announce its answer ("Score: 3"); None: not known yet."""
        said, answer = text.lstrip(_MARKING).lower(), self.answer.lower()
        behind = said.removeprefix(answer).strip(_MARKING)
        if answer.startswith(said) or (said.startswith(answer) and behind in ("", ":")):
            return None
        words = rf"{_MARKS}{re.escape(self.answer)}{_MARKS}:{_MARKS}"
        announced = re.match(words, text, re.IGNORECASE)
        return announced.end() if announced else 0


@dataclass(frozen=True)
class CohortStats:
    """Statistics of the training users: the fallback where a user's history is short."""

    label_shares: tuple[float, ...] = ()  # [L] in the task's order of labels
    reference: float = 0.45  # usual cosine between a query and the nearest records of its user
    words: float = 10.0  # median length of an answer (free texts)
    choices: int = 0  # recorded choices among texts; with any, candidates have their columns


@dataclass(frozen=True)
class HistoryVectors:
    """A user's visible records as numbers, oldest first; each row is of one record alone."""

    inputs: NDArray[np.float32]  # [n, D] unit rows
    answers: NDArray[np.float32]  # [n, D] unit rows; [n, 0] for tasks with labels
    labels: NDArray[np.int64]  # [n] index of each record's label; empty for free texts
    words: Floats = field(default_factory=lambda: np.zeros(0))  # [n] length of each free text
    counts: UserWords | None = None  # of words in the records; None without a word model
    habits: Any = None  # `tasks.choices.Habits` of earlier choices, where there are some
    places: NDArray[np.int64] | None = None  # [n] which records have a row; None: all

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def rows(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
        """The arrays with a row for each record."""
        return self.inputs, self.answers, self.labels, self.words

    def first(self, count: int) -> "HistoryVectors":
        """Views of the rows of the first `count` records, without counts and habits."""
        n = count if self.places is None else int(np.searchsorted(self.places, count))
        inputs, answers, labels, words = self.rows
        return HistoryVectors(inputs[:n], answers[:n], labels[:n], words[:n])


@dataclass(frozen=True)
class FeatureContext:
    """What side features of one query are computed from."""

    query: NDArray[np.float32]  # [D] the query's text as a unit vector
    history: HistoryVectors
    stats: CohortStats
    embed: Embed
    word_shares: WordShares | None = None  # of the word model, if there is one


class TaskKind(ABC):
    """What is particular to one kind of task; an instance belongs to one task.

    A new kind is an entry point of `KINDS.group` that extends `classification.LabelKind` (a closed
    set of answers) or `generation.Generation` (free texts).
    Letters: C candidates, M records, n visible records, E columns.
    """

    metrics: ClassVar[tuple[MetricSpec, ...]]
    closed: ClassVar[bool] = False  # every answer is one of the task's labels
    prompt_style: ClassVar[Literal["block", "turns"]] = "block"  # of `prompt_style = "auto"`
    target_rule: ClassVar[str] = ""  # gains to the adapter's targets; "": setting `label_rule`
    zero_one_gain: ClassVar[bool] = False  # then the mode has the highest expected gain

    def __init__(self, task: Task):
        self.task = task

    def labels_fault(self) -> str:
        """What is wrong with the task's labels; empty if nothing is."""
        kind, given = self.task.kind, self.task.labels
        return f"must be left out: a {kind} task has no labels" if given else ""

    @abstractmethod
    def parse(self, text: str, parsing: Parsing) -> str | None:
        """As `Task.parse`."""

    def read(self, text: str, parsing: Parsing) -> str | None:
        """As `Task.read`."""
        return self.parse(text, parsing)

    @abstractmethod
    def gain(self, answer: str, gold: str) -> float:
        """0 to 1, symmetric, 1 for equal answers."""

    def gain_matrix(self, answers: Sequence[str]) -> Floats:
        """[C, C] of `gain`."""
        matrix = np.ones((len(answers), len(answers)))
        for i, answer in enumerate(answers):
            for j in range(i):
                matrix[i, j] = matrix[j, i] = self.gain(answer, answers[j])
        return matrix

    @abstractmethod
    def typical(self, outputs: Sequence[str]) -> str:
        """What the user answers most typically, from the outputs of the records, oldest first."""

    @abstractmethod
    def metric_rows(self, metric: str, pairs: Pairs) -> Floats:
        """[N, S] sufficient statistics of each pair for the metric of this name."""

    @abstractmethod
    def prompt_words(self) -> PromptWords: ...

    @abstractmethod
    def vectorize(self, records: Sequence[Record], embed: Embed) -> HistoryVectors:
        """Visible records as numbers."""

    @abstractmethod
    def cohort_stats(self, outputs: Sequence[str], reference: float) -> CohortStats:
        """Statistics of the training users' outputs; `reference` is passed on."""

    @property
    @abstractmethod
    def candidate_columns(self) -> tuple[str, ...]:
        """[E] names of the columns; `llm_` marks those that need the LLM's samples."""

    @abstractmethod
    def candidate_features(
        self, context: FeatureContext, candidates: Sequence[Candidate]
    ) -> Floats:
        """[C, E]; for tasks with labels a candidate without an answer gets each column's lowest."""

    word_columns: ClassVar[tuple[str, ...]] = ()  # [E] names of a word model's columns, if any
    gain_columns: ClassVar[tuple[str, ...]] = ()
    """Those of them that estimate the gain, and are believed before there are labels: the better
    the word model, the more (`training.train_scorer.belief`).
    """

    def word_features(self, context: FeatureContext, candidates: Sequence[Candidate]) -> Floats:
        """[C, E] of a context with `word_shares`."""
        return np.zeros((len(candidates), 0))

    record_word_columns: ClassVar[tuple[str, ...]] = ()  # [E] the same of retrieved records

    def record_word_features(self, context: FeatureContext, records: Sequence[Record]) -> Floats:
        """[M, E] of a context with `word_shares`."""
        return np.zeros((len(records), 0))

    record_columns: ClassVar[tuple[str, ...]]  # [E] names, after those that all kinds have

    @abstractmethod
    def record_features(self, context: FeatureContext, records: Sequence[Record]) -> Floats:
        """[M, E] of retrieved records."""

    # A task from a table of outputs

    @classmethod
    def output_fault(cls, output: str) -> str:
        """What is wrong with an output of this kind; empty if nothing is."""
        return ""

    @classmethod
    def tidy(cls, output: str) -> str:
        """An output in its canonical form."""
        return output

    @classmethod
    def labels_of(cls, outputs: set[str]) -> list[str]:
        """The labels of a task with these tidy outputs."""
        return []

    @classmethod
    def default_prompt(cls, labels: Sequence[str]) -> str:
        """The instruction where none is given."""
        return "Answer as this person would.\n\n{input}"


BUILTIN = ("classification", "rating", "generation")
KINDS: Registry[type[TaskKind]] = Registry(
    "hydra_llm.task_kinds",
    {name: f"hydra_llm.tasks.{name}:{name.capitalize()}" for name in BUILTIN},
    kind="kind",
    needs=("metrics", "parse", "gain", "prompt_words"),
)
