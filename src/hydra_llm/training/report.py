"""What learning chose, and what it reached on held-out users."""

from dataclasses import asdict, dataclass, field
from typing import Any

NAN = float("nan")


@dataclass
class FitReport:
    """Figures of one scorer, on later groups of users whom the base has not seen."""

    users: int = 0
    groups: int = 0
    ridge: float = 3.0
    evidence_ridge: float = 1.0
    precision: float = 10.0
    held_out_groups: int = 0
    loss_uniform: float = NAN
    """Of equal shares: what knowing nothing costs."""
    loss_shared: float = NAN
    """With the shared head alone."""
    loss_user: float = NAN
    """With each user's own head."""
    loss_calibrated: float = NAN
    """With β and the votes, on the groups (voted ones, if any) that both were fitted on."""
    loss_with_votes: float = NAN
    """On the same groups, each user's with a β and weights of votes fitted on the others."""
    loss_without_votes: float = NAN
    """Likewise with a β alone: what the LLM's votes add to the scorer is the difference."""
    gain_first: float = NAN
    """Mean gain of those groups' first candidates: first retrieved, greedy text, first label."""
    gain_pick: float = NAN
    """Of those that the users' own heads score highest."""
    gain_best: float = NAN
    """Of the best there are: no scorer can do more."""
    scale: float = 1.0
    vote_weight: dict[str, float] = field(default_factory=dict)

    def to_json(self, *, convex: bool = True) -> dict[str, Any]:
        """Everything; the strengths only where they were used."""
        unused = set() if convex else {"ridge", "evidence_ridge", "precision"}
        return {name: value for name, value in asdict(self).items() if name not in unused}
