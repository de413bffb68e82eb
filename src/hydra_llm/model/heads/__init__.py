"""One small head per user on top of a shared one; each kind is a module of its own.

A kind is an entry point of the group `hydra_llm.heads`, built-in ones too.
"""

from hydra_llm.extras import require

require("learn", "a head")

from hydra_llm.model.head import Head, latest_time
from hydra_llm.model.heads.base import HeadKind, HeadProblem, SGDConfig
from hydra_llm.model.interactions import Interaction
from hydra_llm.plugins import HEADS

__all__ = ["Head", "HeadKind", "HeadProblem", "SGDConfig", "latest_time", "make_head"]


def make_head(kind: str, interaction: Interaction, *, rank: int = 16) -> HeadKind:
    """An unfitted head of a registered kind; SettingsError if unknown, or for other features."""
    head: HeadKind = HEADS.load(kind).create(interaction, rank)
    return head
