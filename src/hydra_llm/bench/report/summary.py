"""What a run was (LLM, users, queries, limiting settings, versions), and what it cost: per query
and method, and once for learning. Knows no LLM and no texts.
"""

from collections.abc import Iterator, Mapping
from math import isnan
from typing import Any

from hydra_llm.bench.multiple import ALPHA
from hydra_llm.bench.report import best_prompt
from hydra_llm.bench.report.tables import Report, Run
from hydra_llm.bench.runlog import by_method
from hydra_llm.bench.stats import title
from hydra_llm.tasks.base import Task
from hydra_llm.types import Usage

LIMITS = {
    "retrieved": "M = {} records to rerank",
    "samples": "{} samples",
    "candidate_prompts": "one of them each by {}",
    "temperature": "temperature {}",
    "queries_per_user": "at most {} labelled queries a training user",
    "asked_users": "the LLM was asked about {} training users",
}
"""Setting → its text; a setting without a value is left out."""
VERSIONS = ("hydra_llm", "commit", "python", "torch", "transformers")
STAGES = ("retrieve", "rerank", "prompt", "adapt")  # of this library, in the data's order


def run_summary(run: Run) -> dict[str, str]:
    """What was run, by name; what is not known is left out."""
    manifest, task, seeds = run.manifest, run.task, run.seeds
    llm, settings = manifest.get("llm", {}), manifest.get("settings", {})
    weights = {seed: digest for seed, digest in manifest.get("weights", {}).items() if digest}
    limits = {name: settings[name] for name in LIMITS if settings.get(name) not in (None, "")}
    summary = {
        "LLM": ", ".join(str(llm[key]) for key in ("model", "kind", "engine") if llm.get(key)),
        "users": manifest.get("users"),
        "queries": manifest.get("queries"),
        "folds": len(manifest.get("folds", ())) or None,
        "seeds": ", ".join(map(str, seeds)) if len(seeds) > 1 else settings.get("seed"),
        "task": f"{task.kind}, {len(task.labels)} labels" if task.labels else task.kind,
        "answers are read": settings.get("parsing"),
        "trained on": f"{manifest['trained_on']} users" if "trained_on" in manifest else None,
        "limits": ", ".join(LIMITS[name].format(value) for name, value in limits.items()),
        "ROUGE and BLEU": compared_words(task),
        "versions": ", ".join(f"{key} {manifest[key]}" for key in VERSIONS if manifest.get(key)),
        "data": str(manifest.get("data", ""))[:16],
        "weights": ", ".join(
            f"{'fold-seed' if '-' in seed else 'seed'} {seed}: {digest[:12]}"
            for seed, digest in weights.items()
        ),
    }
    return {name: str(value) for name, value in summary.items() if value not in (None, "")}


def compared_words(task: Task) -> str:
    """Which words the metrics of texts compare; empty if the task has none of them."""
    of_texts = {"rouge1", "rougeL", "bleu"} & task.metric_specs.keys()
    what = {"lamp": "ASCII words as in LaMP (lamp)", "unicode": "words of any script (unicode)"}
    return what[task.words] if of_texts else ""


def summary_line(run: Run) -> str:
    """The summary in one line, without the digests of data and weights."""
    summary = {**run_summary(run), "data": "", "weights": ""}
    return "; ".join(f"{name}: {value}" for name, value in summary.items() if value)


def cost_rows(report: Report) -> list[dict[str, Any]]:
    """A row per method: the LLM's cost per query, this run's milliseconds per stage."""
    return [
        {
            "method": result.method,
            "LLM calls": round(result.calls, 2),
            "tokens": None if isnan(result.tokens) else round(result.tokens),
            "money": float(f"{result.cost:.3g}"),
            "LLM s": round(result.llm_seconds, 2),
            **{f"{name} ms": round(1000 * result.seconds.get(name, 0.0), 2) for name in STAGES},
        }
        for result in (row.result for row in report.rows)
    ]


def learning_rows(report: Report) -> list[dict[str, Any]]:
    """A row per stage of learning: label, train, fit the new users; then of methods that learn
    while they answer (BBox-Adapter): they share HYDRA's calls for labelled queries.
    """
    rows = []
    for seed, stage, spent in _stages(report.run):
        users, prompt, completion, calls = (
            int(spent[name] or 0)
            for name in ("users", "prompt_tokens", "completion_tokens", "calls")
        )
        untold = int(spent["prompt_tokens"] is None)
        cost = report.prices.cost(Usage(1, 0, 0, prompt, completion, untold=untold))
        row = {
            "seed": seed,
            "stage": stage,
            "users": users,
            "LLM calls": calls,
            "tokens": None if untold else prompt + completion,
            "money": float(f"{cost:.3g}"),
            "seconds": round(seconds := spent["seconds"] or 0.0, 2),
            "s per user": round(seconds / users, 3) if users else None,
        }
        rows.append(row)
    return rows


def _spent(learned: Mapping[str, Any]) -> dict[str, Mapping[str, float | None]]:
    """Stage → its costs, of one report of learning."""
    fitted = learned.get("fitted", {}).get("stages", {})
    return {
        **learned.get("stages", {}),
        **{f"{stage}, new users": spent for stage, spent in fitted.items()},
    }


def _stages_of_folds(run: Run) -> Iterator[tuple[str, str, Mapping[str, float | None]]]:
    """All folds together. A user's labels are collected once, and used in all folds but one."""
    folds, first = {learned["fold"] for learned in run.learning}, min(run.seeds, default=0)
    sums: dict[str, dict[str, float | None]] = {}
    for learned in run.learning:
        for stage, spent in _spent(learned).items():
            if spent["calls"] and learned.get("seed") not in (first, None) and len(run.seeds) > 1:
                continue
            shared = stage in learned.get("stages", {}) and stage.startswith("label")
            share = 1 / (len(folds) - 1) if shared and len(folds) > 1 else 1.0
            total = sums.setdefault(stage, dict.fromkeys(spent, 0.0))
            for name, value in spent.items():
                known = total[name]
                total[name] = None if known is None or value is None else known + share * value
    for stage, total in sums.items():
        yield (
            "all",
            stage,
            {n: v if n == "seconds" or v is None else round(v) for n, v in total.items()},
        )


def _stages(run: Run) -> Iterator[tuple[int | str | None, str, Mapping[str, float | None]]]:
    """Seed, stage and its costs. Seeds make the same LLM calls, which count once."""
    shared = set()
    if any("fold" in learned for learned in run.learning):
        yield from _stages_of_folds(run)
    for learned in run.learning:
        if "fold" in learned:
            continue
        seed = learned.get("seed")
        for stage, spent in _spent(learned).items():
            if not spent["calls"]:
                yield seed, stage, spent
            elif stage not in shared:
                shared.add(stage)
                yield "all" if len(run.learning) > 1 else seed, stage, spent
    first = min(run.seeds, default=0)
    seed = "all" if len(run.seeds) > 1 else first
    learners = (sample for sample in run.samples if sample.seed == first and sample.learned)
    for method, samples in by_method(learners).items():
        # a run that was continued learned again: the same users and histories count once
        costs = {key: cost for sample in samples for key, cost in sample.learned.items()}
        if of_all := costs.pop("", None):
            yield seed, method, of_all
        if costs:
            names = next(iter(costs.values()))
            columns = {name: [cost[name] for cost in costs.values()] for name in names}
            known = {name: [v for v in values if v is not None] for name, values in columns.items()}
            sums = {n: sum(v) if len(v) == len(costs) else None for n, v in known.items()}
            users = len({key.partition(":")[2] for key in costs})
            yield seed, f"{method}, new users", {**sums, "users": users}


def family_line(report: Report) -> str:
    """How many comparisons the table makes, and how many of them survive Holm's correction; how the
    best prompts were chosen.
    """
    known = {method: p for method, p in report.holm.items() if not isnan(p)}
    left = [method for method, p in known.items() if p < ALPHA]
    names = f" ({', '.join(left)})" if 0 < len(left) <= 3 else ""
    survive = f"{len(known)} comparisons in {title(report.metrics[0])}, of which {len(left)}{names}"
    lines = [f"{survive} survive Holm's correction at 5 % (*)."] if known else []
    if report.honest:
        chosen = f"'over best prompts' compares with the row '{best_prompt.NAME}'"
        lines.append(f"{chosen}, 'over hindsight' with the prompts that are best on these queries.")
    elif any(row.group == "prompt" for row in report.rows):
        lines.append("The best prompts are chosen with hindsight: --folds chooses on other users.")
    return " ".join(lines)
