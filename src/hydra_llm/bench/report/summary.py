"""What a run was, for people: LLM, users, queries, settings that limit it, versions. Knows no
samples' texts and no LLM.
"""

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
"""Setting → how it is told; what is not set is left out."""


def about(run: Run) -> dict[str, str]:
    """What was run, by name."""
    manifest, llm, settings = (
        run.manifest,
        run.manifest.get("llm", {}),
        run.manifest.get("settings", {}),
    )
    seeds = run.seeds
    found = {
        "LLM": ", ".join(str(llm[key]) for key in ("model", "kind", "engine") if llm.get(key)),
        "users": manifest.get("users"),
        "queries": manifest.get("queries"),
        "seeds": ", ".join(map(str, seeds)) if len(seeds) > 1 else settings.get("seed"),
        "task": f"{run.task.kind}, {len(run.task.labels)} labels"
        if run.task.labels
        else run.task.kind,
        "answers are read": settings.get("parsing"),
        "trained on": f"{manifest['trained_on']} users" if "trained_on" in manifest else None,
        "limits": limits(settings),
        "versions": ", ".join(
            f"{name} {manifest[name]}"
            for name in ("hydra_llm", "commit", "python", "torch", "transformers")
            if manifest.get(name)
        ),
        "data": str(manifest.get("data", ""))[:16],
        "weights": ", ".join(
            f"seed {seed}: {digest[:12]}"
            for seed, digest in manifest.get("weights", {}).items()
            if digest
        ),
    }
    return {name: str(value) for name, value in found.items() if value not in (None, "")}


def limits(settings: Mapping[str, Any]) -> str:
    """`M = 5 records to rerank, 8 samples, ...`."""
    return ", ".join(
        told.format(settings[name])
        for name, told in LIMITS.items()
        if settings.get(name) is not None
    )


def sentence(run: Run) -> str:
    """The same in one line, without what only tells whether two runs are the same one."""
    return "; ".join(
        f"{name}: {value}" for name, value in about(run).items() if name not in ("data", "weights")
    )
