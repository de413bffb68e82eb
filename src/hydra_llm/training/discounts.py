"""The discount by age (model/forgetting.py), chosen by the later groups of users whom the base has
not seen, with heads of their earlier ones. No discount is a choice, and the first one.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hydra_llm.config import Settings
from hydra_llm.model.scorer import Scorer
from hydra_llm.training.calibration import FitReport, error_by_users

Rate = float | None
RATES = (0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)  # half-lives of 3 to 140 records


def rates_of(settings: Settings) -> tuple[Rate, ...]:
    """Those that a setting lets learning choose among."""
    if settings.discount == "none":
        return (None,)
    return (None, *RATES) if settings.discount == "auto" else (float(settings.discount),)


def set_discount(scorer: Scorer, rate: Rate) -> None:
    """Of every fit of heads from here on."""
    scorer.discount = None if rate is None else torch.tensor(rate)


def choose_discount(
    scorer: Scorer,
    rates: Sequence[Rate],
    report: FitReport,
    later: Callable[[], tuple[Tensor, list[str]]],
) -> None:
    """Set the rate with the least loss, if that is less than without a discount by more than a
    standard error over users; `later` gives the losses [G] at the scorer's rate, and whose each is.
    """
    losses: dict[Rate, Tensor] = {}
    owners: list[str] = []
    for rate in rates if len(rates) > 1 else ():
        set_discount(scorer, rate)
        losses[rate], owners = later()
    best = min(losses, key=lambda rate: float(losses[rate].sum()), default=rates[0])
    if best is not None and None in losses:
        less = losses[None] - losses[best]
        alone = len(set(owners)) < 2  # of one user there is no error: it would be 0
        best = best if not alone and less.mean() > error_by_users(less, owners) else None
    set_discount(scorer, best)
    report.discount = best
    report.discounts = {str(rate or "none"): float(own.mean()) for rate, own in losses.items()}
