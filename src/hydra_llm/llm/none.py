"""No LLM: where recorded choices, or labels, are all that is learned from and asked."""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra_llm.config import Settings
from hydra_llm.errors import LLMRefused
from hydra_llm.llm.base import ChatLLM, Sampling
from hydra_llm.types import Generation, Message

NONE = "none"  # the spec


class NoLLM:
    """Refuses every call."""

    identity: Mapping[str, Any] = {"kind": NONE}

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        raise LLMRefused("there is no LLM to ask: name one with --llm SPEC")

    async def aclose(self) -> None:
        """Nothing to release."""


def from_spec(rest: str, settings: Settings) -> ChatLLM:
    """The LLM of the spec `none`."""
    return NoLLM()


def is_none(llm: ChatLLM) -> bool:
    """Whether there is no LLM."""
    return llm.identity.get("kind") == NONE
