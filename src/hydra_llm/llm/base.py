"""What a black box is: one async method. Its weights and probabilities are never asked for."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from hydra_llm.types import Generation, Message


@runtime_checkable
class ChatLLM(Protocol):
    """Anything that continues a conversation (DESIGN: the black box)."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that names this LLM and changes its output: kind, model, file hash, engine version. JSON values only."""
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
        """Return n texts. `choices`, where the engine can, constrains the text to one of them; engines that cannot ignore it
        (`identity["constrains"]` says which).

        Raises:
            LLMRefused: the same call would fail again.
            LLMError: it failed after its retries.
        """
        ...

    async def aclose(self) -> None:
        """Release connections and memory."""
        ...
