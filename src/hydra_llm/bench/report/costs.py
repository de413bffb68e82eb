"""What a run cost: per query and method, and once for learning. Knows no LLM."""

from collections.abc import Iterator, Mapping
from typing import Any

from hydra_llm.bench.report.tables import Report, Run
from hydra_llm.bench.runlog import by_method
from hydra_llm.llm.meter import Prices
from hydra_llm.types import Usage

STAGES = ("retrieve", "rerank", "prompt", "adapt")  # of this library, in the data's order


def cost_rows(report: Report) -> list[dict[str, Any]]:
    """A row per method: the LLM's cost per query, this run's milliseconds per stage."""
    return [
        {
            "method": result.method,
            "LLM calls": round(result.calls, 2),
            "tokens": round(result.tokens),
            "money": float(f"{result.cost:.3g}"),
            "LLM s": round(result.llm_seconds, 2),
            **{f"{name} ms": round(1000 * result.seconds.get(name, 0.0), 2) for name in STAGES},
        }
        for result in (row.result for row in report.rows)
    ]


def learning_rows(report: Report) -> list[dict[str, Any]]:
    """A row per stage of learning: label, train, fit the new users. All seeds share the stages that
    call the LLM, which are listed once; methods that learn while they answer (BBox-Adapter) come
    last: they share HYDRA's calls for labelled queries.
    """
    run, shared = report.run, set()
    rows: list[tuple[int | str | None, str, Mapping[str, float]]] = []
    for learned in run.learning:
        seed, fitted = learned.get("seed"), learned.get("fitted", {}).get("stages", {})
        new = {f"{stage}, new users": spent for stage, spent in fitted.items()}
        for stage, spent in {**learned.get("stages", {}), **new}.items():
            if not spent["calls"]:
                rows.append((seed, stage, spent))
            elif stage not in shared:
                shared.add(stage)
                rows.append(("all" if len(run.learning) > 1 else seed, stage, spent))
    seed = "all" if len(run.seeds) > 1 else min(run.seeds, default=0)
    rows += [(seed, *row) for row in _while_answering(run)]
    return [_row(*row, report.prices) for row in rows]


def _while_answering(run: Run) -> Iterator[tuple[str, dict[str, float]]]:
    """What methods spent on learning while they answered, for all users and for the new ones. Seeds
    make the same LLM calls: the first one's are taken. A run that was continued learned again: the
    same users and histories count once.
    """
    first = [sample for sample in run.samples if sample.seed == min(run.seeds, default=0)]
    for method, samples in by_method(sample for sample in first if sample.learned).items():
        spent = {key: cost for sample in samples for key, cost in sample.learned.items()}
        if shared := spent.pop("", None):
            yield method, dict(shared)
        if spent:
            names = next(iter(spent.values()))
            sums = {name: sum(cost[name] for cost in spent.values()) for name in names}
            users = len({key.partition(":")[2] for key in spent})
            yield f"{method}, new users", {**sums, "users": users}


def _row(
    seed: int | str | None, stage: str, spent: Mapping[str, float], prices: Prices
) -> dict[str, Any]:
    users = int(spent["users"])
    prompt, completion = int(spent["prompt_tokens"]), int(spent["completion_tokens"])
    cost = prices.cost(Usage(prompt_tokens=prompt, completion_tokens=completion))
    return {
        "seed": seed,
        "stage": stage,
        "users": users,
        "LLM calls": int(spent["calls"]),
        "tokens": prompt + completion,
        "money": float(f"{cost:.3g}"),
        "seconds": round(spent["seconds"], 2),
        "s per user": round(spent["seconds"] / users, 3) if users else None,
    }
