"""What counts less in a head: records discounted by age, and what came before a change of taste.

    weight of a group = γⁿ · (STAYS if it came before the change, else 1)

n is how many of the user's records came after it. Age is counted in records, not in time: many data
sets have no times, and a rate then means the same for a user of a record a day and of one a month.
Letters: U users, G groups.
"""

from torch import Tensor

STAYS = 0.1  # what a group counts that came before a change of taste


def weights(
    positions: Tensor, known: Tensor, rate: float | None, changed: int | None = None
) -> Tensor:
    """[U, G] what each group counts. `positions` [U, G]: of their queries in the user's order;
    `known` [U, G]: False for padding; `changed`: the first position after a change of taste.
    """
    newest = positions.masked_fill(~known, -1).amax(1, keepdim=True)
    weight: Tensor = (rate or 1.0) ** (newest - positions).clamp_min(0).float()
    return weight if not changed else weight.where(positions >= changed, STAYS * weight)


def counted(records: int, rate: float | None) -> float:
    """How many groups without a discount a head of so many records counts as: Σ γⁿ, at most
    1 / (1 − γ). None: no discount.
    """
    return float(records) if rate is None else (1 - rate**records) / (1 - rate)
