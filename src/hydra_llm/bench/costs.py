"""What a run cost, beside its scores: per query and method, and once for learning. Knows no LLM."""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra_llm.bench.report import Line, Run

STAGES = ("retrieve", "rerank", "prompt", "llm", "adapt")
"""Stages of an answer, in the data's order."""


def as_costs(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """A row per method: calls, tokens, money and seconds of the LLM per query as they were when it was asked, then this run's own
    milliseconds per stage (without the LLM's).
    """
    rows = []
    for line in lines:
        row = line.row
        cells: dict[str, Any] = {"method": row.method, "LLM calls": round(row.calls, 2), "tokens": round(row.tokens)}
        cells |= {"money": float(f"{row.cost:.3g}"), "LLM s": round(row.llm_seconds, 2)}
        own = [stage for stage in STAGES if stage != "llm"]
        rows.append(cells | {f"{stage} ms": round(1000 * row.seconds.get(stage, 0.0), 2) for stage in own})
    return rows


def as_learning(run: Run) -> list[dict[str, Any]]:
    """A row per seed and stage of learning: label, train, fit the new users."""
    return [row for told in run.learning for row in _of_seed(told)]


def _of_seed(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    fitted = told.get("fitted", {})
    rows = []
    for stage, seconds in told.get("seconds", {}).items():
        rows.append({"seed": told.get("seed"), "stage": stage, "users": told.get("users"), "seconds": round(seconds, 2)})
    for stage, seconds in fitted.get("seconds", {}).items():
        rows.append({"seed": told.get("seed"), "stage": f"{stage}, new users", "users": fitted["users"], "seconds": round(seconds, 2)})
    return [{**row, "s per user": round(row["seconds"] / row["users"], 3) if row["users"] else None} for row in rows]
