"""Figures as text: the cells that tables, findings and plots share."""

import math
from collections.abc import Sequence
from typing import Any

from hydra_llm.bench.metrics import title
from hydra_llm.bench.runner import MethodResult
from hydra_llm.bench.stats import Paired, Relative
from hydra_llm.errors import SettingsError


def require() -> None:
    """Raise SettingsError if the libraries of pages and plots (extra `report`) are missing."""
    try:
        import altair  # noqa: F401
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            f"reports and plots need {error.name}: pip install 'hydra-llm[report]'"
        ) from None


def cell(value: float, low: float, high: float) -> str:
    """`0.810 [0.672, 0.935]`; a single user has no interval."""
    if math.isnan(value):
        return "failed"
    return f"{value:.3f}" if math.isnan(low) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def signed(change: Paired) -> str:
    """`+0.069 [-0.026, +0.180]`."""
    interval = "" if math.isnan(change.low) else f" [{change.low:+.3f}, {change.high:+.3f}]"
    return f"{change.difference:+.3f}{interval}"


def difference(change: Paired) -> str:
    """`+0.069 [-0.026, +0.180] p 0.150`."""
    return "failed" if math.isnan(change.difference) else f"{signed(change)} p {change.p:.3f}"


def share(over: Relative | None) -> str:
    """`+3.1% [-2.0%, +8.2%]`."""
    if over is None:
        return ""
    low, high = over.interval()
    return f"{over.change:+.1%}" + ("" if math.isnan(low) else f" [{low:+.1%}, {high:+.1%}]")


def axis_title(metric: str, higher: bool) -> str:
    """`MAE (less is better)`."""
    return f"{title(metric)} ({'more' if higher else 'less'} is better)"


def results_table(results: Sequence[MethodResult]) -> list[dict[str, Any]]:
    """A row per method: metrics with their intervals, calls, failures."""
    return [
        {
            "method": result.method,
            **{title(name): cell(*figures) for name, figures in result.metrics.items()},
            "queries": result.queries,
            "LLM calls": round(result.calls, 1),
            "LLM s": round(result.llm_seconds, 2),
            "failed": result.failed,
            "unparsable": result.unparsable,
        }
        for result in results
    ]
