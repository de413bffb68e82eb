"""Figures as text: the cells that tables, findings and plots share."""

import math
from collections.abc import Sequence
from typing import Any

from hydra_llm.bench.metrics import title
from hydra_llm.bench.runner import MethodResult
from hydra_llm.bench.stats import Paired, Relative


def cell(value: float, low: float, high: float) -> str:
    """`0.810 [0.672, 0.935]`; a single user has no interval."""
    if math.isnan(value):
        return "failed"
    return f"{value:.3f}" if math.isnan(low) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def signed(found: Paired) -> str:
    """`+0.069 [-0.026, +0.180]`."""
    interval = "" if math.isnan(found.low) else f" [{found.low:+.3f}, {found.high:+.3f}]"
    return f"{found.difference:+.3f}{interval}"


def difference(found: Paired) -> str:
    """`+0.069 [-0.026, +0.180] p 0.150`."""
    return "failed" if math.isnan(found.difference) else f"{signed(found)} p {found.p:.3f}"


def share(found: Relative | None) -> str:
    """`+3.1% [-2.0%, +8.2%]`."""
    if found is None:
        return ""
    low, high = found.interval()
    return f"{found.change:+.1%}" + ("" if math.isnan(low) else f" [{low:+.1%}, {high:+.1%}]")


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
