"""A task as a value: kind, labels, instruction, how answers are read, and what an answer is worth.

One class serves every task; what differs between kinds is data here, so that no other module asks `if kind == ...`
for more than its own stage. Knows no LLM and no model. DESIGN 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
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

    @classmethod
    def from_json(cls, data: Mapping[str, Any], file: str = "task.json") -> "Task":
        """Read and check the content of a task.json.

        Raises:
            DataError: names the field that is missing or wrong.
        """
        raise DataError("to be written", file=file)

    def to_json(self) -> dict[str, Any]:
        raise NotImplementedError

    def parse(self, text: str, parsing: Parsing = "lenient") -> str | None:
        """The answer in an LLM's text: a label, or the text itself for generation; None if there is none."""
        raise NotImplementedError

    def gain(self, answer: str | None, gold: str) -> float:
        """0 to 1: what a parsed answer is worth against the gold answer (DESIGN 3); None is worth 0."""
        raise NotImplementedError

    def gain_matrix(self, answers: list[str]) -> list[list[float]]:
        """[C, C]: entry i, j is the gain of answer i if answer j were the gold one (for expected-gain choosing)."""
        raise NotImplementedError
