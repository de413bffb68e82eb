"""Figures as text: the cells that tables, findings and plots share."""

import math
from collections.abc import Sequence
from typing import Any

from hydra_llm.bench.results import MethodResult
from hydra_llm.bench.stats import Paired, Relative, title
from hydra_llm.errors import SettingsError


def require() -> None:
    """Raise SettingsError if the libraries of pages and plots (extra `report`) are missing."""
    try:
        import altair  # noqa: F401
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        fix = "pip install 'hydra-llm[report]'"
        raise SettingsError(f"reports and plots need {error.name}: {fix}") from None


def cell(value: float, low: float, high: float, *, form: str = ".3f") -> str:
    """`0.810 [0.672, 0.935]`; a single user has no interval."""
    if math.isnan(value):
        return "failed"
    return f"{value:{form}}" + ("" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]")


def signed(change: Paired) -> str:
    """`+0.069 [-0.026, +0.180]`."""
    return cell(change.difference, change.low, change.high, form="+.3f")


def difference(change: Paired) -> str:
    """`+0.069 [-0.026, +0.180] p 0.150`."""
    return signed(change) + ("" if math.isnan(change.difference) else f" p {change.p:.3f}")


def share(over: Relative | None) -> str:
    """`+3.1% [-2.0%, +8.2%]`."""
    return cell(over.change, *over.interval(), form="+.1%") if over else ""


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
