"""What a black box is: one async method. Its weights and probabilities are never asked for."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from hydra_llm.errors import LLMError
from hydra_llm.types import Generation, Message


class PartlyFailed(LLMError):
    """A call for several texts of which some arrived. They were paid for: the cache keeps them, the
    meter counts them.
    """

    def __init__(self, message: str, made: Generation):
        super().__init__(message)
        self.made = made
        """The first texts, up to the first that is missing, and what the whole call cost: texts
        behind a gap and failures too.
        """


@runtime_checkable
class ChatLLM(Protocol):
    """Anything that continues a conversation (DESIGN: the black box)."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that names this LLM and changes its output: kind, model, file hash, engine version.
        JSON values only.
        """
        ...

    async def generate(
        self,
        messages: Sequence[Message],
        *,
        n: int = 1,
        temperature: float = 0.0,
        max_tokens: int = 128,
        stop: Sequence[str] = (),
        seed: int | None = None,
        choices: Sequence[str] = (),
    ) -> Generation:
        """Return n texts. `choices`, where the engine can, constrains the text to one of them;
        engines that cannot ignore it (`identity["constrains"]` says which).

        Raises:
            LLMRefused: the same call would fail again.
            PartlyFailed: some of the texts arrived.
            LLMError: it failed after its retries.
        """
        ...

    async def aclose(self) -> None:
        """Release connections and memory."""
        ...
