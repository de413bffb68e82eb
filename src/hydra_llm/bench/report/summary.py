"""What a run was: LLM, users, queries, settings that limit it, versions. Knows no texts."""

from collections.abc import Mapping
from typing import Any

from hydra_llm.bench.report.tables import Run

LIMITS = {
    "retrieved": "M = {} records to rerank",
    "samples": "{} samples",
    "temperature": "temperature {}",
    "queries_per_user": "at most {} labelled queries a training user",
    "asked_users": "the LLM was asked about {} training users",
}
"""Setting → its text; a setting without a value is left out."""
VERSIONS = ("hydra_llm", "commit", "python", "torch", "transformers")


def run_summary(run: Run) -> dict[str, str]:
    """What was run, by name; what is not known is left out."""
    manifest, task, seeds = run.manifest, run.task, run.seeds
    llm, settings = manifest.get("llm", {}), manifest.get("settings", {})
    weights = {seed: digest for seed, digest in manifest.get("weights", {}).items() if digest}
    summary = {
        "LLM": ", ".join(str(llm[key]) for key in ("model", "kind", "engine") if llm.get(key)),
        "users": manifest.get("users"),
        "queries": manifest.get("queries"),
        "seeds": ", ".join(map(str, seeds)) if len(seeds) > 1 else settings.get("seed"),
        "task": f"{task.kind}, {len(task.labels)} labels" if task.labels else task.kind,
        "answers are read": settings.get("parsing"),
        "trained on": f"{manifest['trained_on']} users" if "trained_on" in manifest else None,
        "limits": limits(settings),
        "versions": ", ".join(f"{key} {manifest[key]}" for key in VERSIONS if manifest.get(key)),
        "data": str(manifest.get("data", ""))[:16],
        "weights": ", ".join(f"seed {seed}: {digest[:12]}" for seed, digest in weights.items()),
    }
    return {name: str(value) for name, value in summary.items() if value not in (None, "")}


def limits(settings: Mapping[str, Any]) -> str:
    """`M = 5 records to rerank, 8 samples, ...`."""
    known = {name: text for name, text in LIMITS.items() if settings.get(name) is not None}
    return ", ".join(text.format(settings[name]) for name, text in known.items())


def summary_line(run: Run) -> str:
    """The summary in one line, without the digests of data and weights."""
    summary = {**run_summary(run), "data": "", "weights": ""}
    return "; ".join(f"{name}: {value}" for name, value in summary.items() if value)
