"""What learning or fitting gives back: the bundle, and what was done for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hydra_llm.bundle import Bundle
from hydra_llm.model.head import Head
from hydra_llm.types import Overlaid, StageCost, Usage

if TYPE_CHECKING:
    from hydra_llm.training.refit import KeptFit


@dataclass
class Learned:
    """What learning or fitting did, beside the bundle."""

    bundle: Bundle
    users: tuple[str, ...]
    failures: list[str] = field(default_factory=list)  # one line each; the call's pair is left out
    notes: list[str] = field(default_factory=list)  # a line for each thing left out or changed
    stages: dict[str, StageCost] = field(default_factory=dict)
    solved: dict[str, float] = field(default_factory=dict)
    """Seconds of a stage of fitting that went into the convex problems alone: loading and encoding
    are left out.
    """
    kept: "dict[str, KeptFit]" = field(default_factory=dict)
    """By user: what the next fit of the user goes on from, where that was asked for."""

    changed: Mapping[str, int] = field(default_factory=dict)
    """How many of a user's records came before a change of taste: they count less in a fit."""

    @property
    def usage(self) -> Usage:
        """Of all stages."""
        return sum((cost.usage for cost in self.stages.values()), Usage())

    @property
    def seconds(self) -> dict[str, float]:
        """Of each stage."""
        return {stage: cost.seconds for stage, cost in self.stages.items()}

    def stages_json(self) -> dict[str, dict[str, float | None]]:
        """The stages as JSON values."""
        return {stage: cost.to_json() for stage, cost in self.stages.items()}

    def add_heads(
        self, name: str, heads: Mapping[str, Head], seconds: float, solved: float
    ) -> None:
        """Heads of a scorer by user, and how long their fit took, and the convex problems alone."""
        stage, own = f"fit {name}", self.bundle.heads
        before = self.stages.get(stage, StageCost(0, 0.0))
        counts = before.users + len(heads), before.seconds + seconds
        self.stages[stage] = StageCost(*counts, before.usage)
        self.solved[stage] = self.solved.get(stage, 0.0) + solved
        known = Overlaid(heads, own.get(name, {}))
        self.bundle = replace(self.bundle, heads={**own, name: known})

    def report(self, **entries: Any) -> None:
        """Add entries to the bundle's report."""
        self.bundle = replace(self.bundle, report={**self.bundle.report, **entries})
