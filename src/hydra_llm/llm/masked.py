"""An LLM that gets placeholders in place of personal data; its answers have the data again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra_llm.llm.base import ChatLLM, PartlyFailed, Sampling
from hydra_llm.masking import Mask, detectors
from hydra_llm.types import Generation, Message


def masked(llm: ChatLLM, names: str) -> ChatLLM:
    """The LLM behind the detectors of these names (the setting `mask`); itself where none is."""
    return MaskedLLM(llm, names) if detectors(names) else llm


@dataclass(frozen=True)
class MaskedLLM:
    """It stands before cache and recording, which so hold placeholders alone."""

    inner: ChatLLM
    names: str

    @property
    def identity(self) -> Mapping[str, Any]:
        return self.inner.identity

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        mask = Mask(detectors(self.names), messages)

        def shown(generation: Generation) -> Generation:
            texts = (mask.show(text, in_json=bool(sampling.form)) for text in generation.texts)
            return replace(generation, texts=type(generation.texts)(texts))

        try:
            return shown(await self.inner.generate(mask.hide_in(messages), sampling))
        except PartlyFailed as error:
            raise PartlyFailed(str(error), shown(error.partial)) from None

    async def aclose(self) -> None:
        await self.inner.aclose()
