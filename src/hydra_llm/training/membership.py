"""How well an attacker tells from a learned base who was among its training users.

Each of B bases was learned from a random half of the users; statistics of every audited user, such
as the loss of the user's own records, are taken under each. Two attackers guess from them:

    loss    one threshold for all users (Yeom et al., CSF 2018)
    ratio   knows what bases of other halves say with and without the user, as Gaussians, and
            takes the ratio of their densities (LiRA: Carlini et al., S&P 2022)

Half of the bases are the attacker's and half are attacked, then they change places: no base is
judged by itself. Letters: B bases, U audited users, S statistics. Knows no texts and no models.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
FALSE_POSITIVES = 0.01  # the rate at which true positives are told
RESAMPLES = 1000


@dataclass(frozen=True)
class Figure:
    """A figure with its 95 % interval, by a bootstrap over users."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Attack:
    """How well one attacker does: 0.5 is a guess by lot."""

    auc: Figure
    true_positives: Figure
    """Share of members that are found where `FALSE_POSITIVES` of the others are taken for some."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def draw_members(users: int, bases: int, seed: int) -> Bools:
    """[B, U] who is in which base: about half of the users of each, and each user in exactly half
    of the first half of the bases and of the second; `bases` is a multiple of 4.
    """
    draw = np.random.default_rng(seed)
    halves = []
    for _ in range(2):
        order = draw.random((bases // 2, users)).argsort(0)
        halves.append(order < bases // 4)
    return np.concatenate(halves)


def attacks(statistics: Floats, members: Bools, seed: int = 0) -> dict[str, Attack]:
    """Both attackers by what they reach, from statistics [B, U, S] of which the first is the loss,
    and members [B, U].
    """
    half = len(members) // 2
    first, second = slice(None, half), slice(half, None)
    ratios = [
        log_ratios(statistics[known], members[known], statistics[attacked])
        for known, attacked in ((second, first), (first, second))
    ]
    guesses = {"loss": -statistics[..., 0], "ratio": np.concatenate(ratios)}
    return {name: judged(own, members, seed) for name, own in guesses.items()}


def log_ratios(known: Floats, members: Bools, attacked: Floats) -> Floats:
    """[A, U] log of the density of statistics [A, U, S] among bases with the user over that among
    bases without, where both are Gaussians with a common covariance, by the known bases [B, U, S].
    """
    inside = members[..., None].astype(float)
    means = [(known * own).sum(0) / own.sum(0) for own in (inside, 1 - inside)]
    left = known - np.where(members[..., None], *means)
    covariance = np.einsum("bus,but->ust", left, left) / (len(known) - 2)
    spread = covariance.trace(axis1=1, axis2=2)[:, None, None] + 1e-12
    precision = np.linalg.inv(covariance + 1e-6 * spread * np.eye(known.shape[-1]))
    inner, outer = (
        np.einsum("aus,ust,aut->au", attacked - mean, precision, attacked - mean) for mean in means
    )
    ratios: Floats = (outer - inner) / 2
    return ratios


def judged(guesses: Floats, members: Bools, seed: int = 0) -> Attack:
    """What guesses [B, U], the higher the likelier a member, reach over all bases and users."""
    draw = np.random.default_rng(seed)
    samples = draw.integers(0, guesses.shape[1], (RESAMPLES, guesses.shape[1]))

    def figure(of: Callable[[Floats, Bools], float]) -> Figure:
        resampled = [of(guesses[:, own], members[:, own]) for own in samples]
        return Figure(of(guesses, members), *np.percentile(resampled, [2.5, 97.5]).tolist())

    return Attack(figure(auc), figure(true_positives))


def auc(guesses: Floats, members: Bools) -> float:
    """The share of pairs of a member and another in which the member has the higher guess."""
    others, own = np.sort(guesses[~members]), guesses[members]
    below = [np.searchsorted(others, own, side) for side in ("left", "right")]
    return float(np.mean(below) / len(others))


def true_positives(guesses: Floats, members: Bools) -> float:
    """The share of members above a threshold that `FALSE_POSITIVES` of the others exceed."""
    threshold = np.quantile(guesses[~members], 1 - FALSE_POSITIVES, method="higher")
    return float((guesses[members] > threshold).mean())
