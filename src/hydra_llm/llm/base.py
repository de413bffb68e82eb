"""The interface of an LLM: one async method; weights and probabilities are never needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from hydra_llm.errors import LLMError
from hydra_llm.types import Generation, Message

Batch = Literal["wait", "submit"]
"""By the Batch API: wait until batches are done, or submit them and stop."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How texts are drawn. All fields but `n` and `probabilities` are part of the cache key."""

    n: int = 1  # texts per call
    temperature: float = 0.0  # 0 is greedy: all n texts are the same
    max_tokens: int = 128  # limit of each text
    stop: tuple[str, ...] = ()  # a text ends before the first of these
    seed: int | None = None  # text i is drawn with `seed + i` where the engine can
    choices: tuple[str, ...] = ()  # each text is one of these where `identity["constrains"]`
    form: str = ""  # `response_format` as JSON, where the LLM has `takes_form`
    # ask for `Generation.probabilities` of the choices too, where the LLM can tell them (grey box)
    probabilities: bool = False


class PartlyFailed(LLMError):
    """Some of a call's texts arrived; they were paid for, so they are cached and counted: `partial`
    holds those before the first missing one, and the usage of the whole call.
    """

    def __init__(self, message: str, partial: Generation):
        super().__init__(message)
        self.partial = partial

    def __reduce__(self) -> tuple[Any, ...]:
        return PartlyFailed, (str(self), self.partial)


@runtime_checkable
class ChatLLM(Protocol):
    """Anything that continues a conversation."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that names this LLM and changes its output: kind, model, file hash, ... (JSON)."""

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        """Return `sampling.n` texts that continue the conversation. Raises LLMRefused if the same
        call would fail again, PartlyFailed if some of the texts arrived, LLMError after retries.
        """

    async def aclose(self) -> None:
        """Release connections and memory."""
