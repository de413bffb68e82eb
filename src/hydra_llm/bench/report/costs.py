"""What a run cost, beside its scores: per query and method, and once for learning. Knows no LLM."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra_llm.bench.report.tables import Line, Run
from hydra_llm.llm.meter import FREE, Prices
from hydra_llm.types import Usage

STAGES = ("retrieve", "rerank", "prompt", "llm", "adapt")
"""Stages of an answer, in the data's order."""


def as_costs(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """A row per method: calls, tokens, money and seconds of the LLM per query as they were when it
    was asked, then this run's own milliseconds per stage (without the LLM's).
    """
    rows = []
    for line in lines:
        row = line.row
        cells: dict[str, Any] = {
            "method": row.method,
            "LLM calls": round(row.calls, 2),
            "tokens": round(row.tokens),
        }
        cells |= {"money": float(f"{row.cost:.3g}"), "LLM s": round(row.llm_seconds, 2)}
        own = [stage for stage in STAGES if stage != "llm"]
        rows.append(
            cells | {f"{stage} ms": round(1000 * row.seconds.get(stage, 0.0), 2) for stage in own}
        )
    return rows


def as_learning(run: Run, prices: Prices = FREE) -> list[dict[str, Any]]:
    """A row per stage of learning: label, train, fit the new users. What asks the LLM is the same
    for all seeds and stands there once; methods that learn as they answer (BBox-Adapter) come
    last: on labelled queries they share HYDRA's calls.
    """
    rows, shared = [], set()
    for told in run.learning:
        fitted = {
            f"{stage}, new users": spent
            for stage, spent in told.get("fitted", {}).get("stages", {}).items()
        }
        for stage, spent in {**told.get("stages", {}), **fitted}.items():
            if not spent["calls"]:
                rows.append(_row(told.get("seed"), stage, spent, prices))
            elif stage not in shared:
                shared.add(stage)
                rows.append(
                    _row("all" if len(run.learning) > 1 else told.get("seed"), stage, spent, prices)
                )
    return [
        *rows,
        *(
            _row("all" if len(run.seeds) > 1 else seed, stage, spent, prices)
            for seed, stage, spent in _while_answering(run)
        ),
    ]


def _while_answering(run: Run) -> Iterator[tuple[int, str, dict[str, float]]]:
    """What methods spent on learning as they answered, for all and for the new users. Seeds ask the
    LLM the same: the first one's.

    A run that went on learned again: what it told of the same users and histories twice counts
    once.
    """
    seed = min(run.seeds, default=0)
    spent = {
        (s.method, key): each
        for s in run.samples
        if s.seed == seed
        for key, each in s.learned.items()
    }
    for method in dict.fromkeys(method for method, _ in spent):
        for stage, new in ((method, False), (f"{method}, new users", True)):
            own = {
                key: each
                for (name, key), each in spent.items()
                if name == method and bool(key) == new
            }
            if own:
                sums = {
                    name: sum(each[name] for each in own.values())
                    for name in next(iter(own.values()))
                }
                users = len({key.partition(":")[2] for key in own}) if new else sums["users"]
                yield seed, stage, {**sums, "users": users}


def _row(
    seed: int | str | None, stage: str, spent: Mapping[str, float], prices: Prices
) -> dict[str, Any]:
    users, usage = (
        int(spent["users"]),
        Usage(
            prompt_tokens=int(spent["prompt_tokens"]),
            completion_tokens=int(spent["completion_tokens"]),
        ),
    )
    cells: dict[str, Any] = {
        "seed": seed,
        "stage": stage,
        "users": users,
        "LLM calls": int(spent["calls"]),
    }
    cells |= {
        "tokens": usage.prompt_tokens + usage.completion_tokens,
        "money": float(f"{prices.cost(usage):.3g}"),
    }
    return cells | {
        "seconds": round(spent["seconds"], 2),
        "s per user": round(spent["seconds"] / users, 3) if users else None,
    }
