"""What a run cost, beside its scores: per query and method, and once for learning. Knows no LLM."""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra_llm.bench.report import Line, Run
from hydra_llm.llm.meter import FREE, Prices
from hydra_llm.types import Usage

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


def as_learning(run: Run, prices: Prices = FREE) -> list[dict[str, Any]]:
    """A row per stage of learning: label, train, fit the new users. What asks the LLM is the same for all seeds and stands there once;
    methods that learn as they answer (BBox-Adapter) come last.
    """
    rows, shared = [], set()
    for told in run.learning:
        fitted = {f"{stage}, new users": spent for stage, spent in told.get("fitted", {}).get("stages", {}).items()}
        for stage, spent in {**told.get("stages", {}), **fitted}.items():
            if not spent["calls"]:
                rows.append(_row(told.get("seed"), stage, spent, prices))
            elif stage not in shared:
                shared.add(stage)
                rows.append(_row("all" if len(run.learning) > 1 else told.get("seed"), stage, spent, prices))
    return [*rows, *(_row(seed, stage, spent, prices) for (seed, stage), spent in _while_answering(run).items())]


def _while_answering(run: Run) -> dict[tuple[int, str], dict[str, float]]:
    """(seed, method) → what it spent for all; (seed, "method, new users") → for each of them, added up."""
    spent = {(s.seed, s.method, user): each for s in run.samples for user, each in s.learned.items()}  # a run that went on learned again
    out: dict[tuple[int, str], dict[str, float]] = {}
    for (seed, method, user), each in sorted(spent.items()):
        sums = out.setdefault((seed, f"{method}, new users" if user else method), dict.fromkeys(each, 0.0))
        for name, value in each.items():
            sums[name] += value
    return out


def _row(seed: int | str | None, stage: str, spent: Mapping[str, float], prices: Prices) -> dict[str, Any]:
    users, usage = int(spent["users"]), Usage(prompt_tokens=int(spent["prompt_tokens"]), completion_tokens=int(spent["completion_tokens"]))
    cells: dict[str, Any] = {"seed": seed, "stage": stage, "users": users, "LLM calls": int(spent["calls"])}
    cells |= {"tokens": usage.prompt_tokens + usage.completion_tokens, "money": float(f"{prices.cost(usage):.3g}")}
    return cells | {"seconds": round(spent["seconds"], 2), "s per user": round(spent["seconds"] / users, 3) if users else None}
