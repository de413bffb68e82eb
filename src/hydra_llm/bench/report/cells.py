"""Figures of reports as text and as JSON values."""

import math
from collections.abc import Mapping, Sequence

from hydra_llm.bench.results import MethodResult, rounded
from hydra_llm.bench.stats import Paired, Relative, title


def cell(
    value: float, low: float, high: float, *, form: str = ".3f", answered: bool = False
) -> str:
    """`0.810 [0.672, 0.935]`; too few users have no interval. Without a value: `none` where there
    are answers, which have no such figure, as a log-loss without probabilities; else `failed`.
    """
    if math.isnan(value):
        return "none" if answered else "failed"
    return f"{value:{form}}" + ("" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]")


def figure(result: MethodResult, figures: Sequence[float]) -> str:
    """The cell of a method's metric."""
    value, low, high = figures
    return cell(value, low, high, answered=any_answer(result.failed, result.metrics))


def any_answer(failed: int, metrics: Mapping[str, Sequence[float]]) -> bool:
    """Whether a method answered a query: no call failed, or some metric has a value."""
    return not failed or any(not math.isnan(figures[0]) for figures in metrics.values())


def signed(change: Paired, answered: bool = False) -> str:
    """`+0.069 [-0.026, +0.180]`; `answered`: both sides have answers."""
    return cell(change.difference, change.low, change.high, form="+.3f", answered=answered)


def difference(change: Paired, answered: bool) -> str:
    """`+0.069 [-0.026, +0.180] p 0.150`."""
    return signed(change, answered) + ("" if math.isnan(change.p) else f" p {p_value(change.p)}")


def p_value(p: float) -> str:
    """`0.150`, or `< 0.001`."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def share(over: Relative | None) -> str:
    """`+3.1% [-2.0%, +8.2%]`."""
    return cell(over.change, *over.interval(), form="+.1%") if over else ""


def axis_title(metric: str, higher: bool) -> str:
    """`MAE (less is better)`."""
    return f"{title(metric)} ({'more' if higher else 'less'} is better)"


def share_json(over: Relative | None) -> list[float | None] | None:
    """Change and the ends of its interval, null where there is none."""
    return None if over is None else rounded((over.change, *over.interval()))


def json_number(value: float) -> float | None:
    """Six decimals; NaN is null."""
    return rounded([value])[0]
