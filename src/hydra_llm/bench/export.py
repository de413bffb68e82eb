"""A run as others read it: eval logs of inspect_ai (JSON, version 2), and LaMP's answers; a file
for each method. Both quote the data set. Knows no LLM and not inspect_ai itself.
"""

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra_llm.bench.details import Details, read_details, shortened
from hydra_llm.bench.method import per_sample
from hydra_llm.bench.report.tables import Run
from hydra_llm.bench.results import MethodResult, tabulate, worth
from hydra_llm.bench.runlog import Sample, lamp_answers, query_ids
from hydra_llm.errors import SettingsError
from hydra_llm.text import repair

VERSION = 2  # of inspect_ai's log
Json = dict[str, Any]
Ids = Mapping[tuple[str, str], str]  # user and query → its id


def write_lamp(run: Run, folder: Path) -> list[Path]:
    """Write the answers of each method as `runlog.lamp_answers`; bounds by lot have none."""
    methods = {name: own for name, own in run.by_method.items() if not per_sample(name)}
    like = run.task.like or run.task.name
    return _write(folder, {name: lamp_answers(like, own) for name, own in methods.items()})


def write_inspect(run: Run, folder: Path) -> list[Path]:
    """Write an eval log for each method, which `inspect_ai.log.read_eval_log` reads: samples with
    prompt, answer, gain and candidates; the metrics with their intervals; a seed is an epoch. Files
    are named as inspect_ai's own: others are not listed by `inspect view`.
    """
    begin = f"{_time(run).replace(':', '-')}_{run.task.name.replace('_', '-')}"
    results = {result.method: result for result in tabulate(run.task, run.samples)}
    details = read_details(run.folder)
    ids = query_ids(run.samples)
    return _write(
        folder,
        {
            f"{begin}_{name}": {
                "version": VERSION,
                "status": "success",
                "eval": _eval(run, name, own, ids),
                "plan": {"name": name, "steps": [{"solver": name, "params": {}}]},
                "results": _results(results[name], own),
                "stats": {"started_at": _time(run), "completed_at": _time(run)},
                "samples": [_sample(run, s, details.get(s.key, {}), ids) for s in own],
            }
            for name, own in run.by_method.items()
        },
    )


def _write(folder: Path, contents: Mapping[str, Json]) -> list[Path]:
    if not contents:
        raise SettingsError(f"{folder}: the run has no method to export")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        fault = "is a file, or lies in one: name a folder with --out"
        raise SettingsError(f"{folder}: {fault}") from None
    files = []
    for name, content in contents.items():
        files.append(folder / f"{name}.json")
        # Other readers refuse half of a surrogate pair, escaped or not.
        files[-1].write_text(repair(json.dumps(content, ensure_ascii=False)), encoding="utf-8")
    return files


def _eval(run: Run, method: str, samples: Sequence[Sample], ids: Ids) -> Json:
    """What was run: inspect_ai's `EvalSpec`."""
    manifest, own = run.manifest, [ids[s.user, s.query] for s in samples]
    versions = {"hydra_llm": manifest.get("hydra_llm"), "torch": manifest.get("torch")}
    return {
        "created": _time(run),
        "task": run.task.name,
        "task_id": f"{run.task.name}-{method}",
        "solver": method,
        "dataset": {
            "name": str(manifest.get("data", ""))[:16],
            "samples": len(set(own)),
            "sample_ids": list(dict.fromkeys(own)),
        },
        "model": _model(run),
        "config": {"epochs": len({sample.seed for sample in samples})},
        "packages": {name: version for name, version in versions.items() if version},
        "metadata": shortened(
            {
                "method": method,
                "settings": manifest.get("settings", {}),
                "llm": manifest.get("llm"),
            },
            lambda text: text,
        ),
    }


def _model(run: Run) -> str:
    """`kind/model` of the LLM, the last part of a path alone."""
    llm = run.manifest.get("llm") or {}
    return f"{llm.get('kind', 'none')}/{Path(str(llm.get('model') or 'none')).name}"


def _time(run: Run) -> str:
    """When the last sample was written."""
    written = (run.folder / "samples.jsonl").stat().st_mtime
    return datetime.fromtimestamp(written, UTC).isoformat(timespec="seconds")


def _results(result: MethodResult, samples: Sequence[Sample]) -> Json:
    """The metrics, with the ends of their 95 % intervals over users as metadata."""
    metrics = {
        name: {"name": name, "value": value, "metadata": shortened({"low": low, "high": high}, str)}
        for name, (value, low, high) in result.metrics.items()
        if not math.isnan(value)
    }
    answered = sum(not sample.error for sample in samples)
    counts = {"scored_samples": answered, "unscored_samples": len(samples) - answered}
    score = {"name": "gain", "scorer": "gain", "metrics": metrics, **counts}
    return {"total_samples": len(samples), "completed_samples": answered, "scores": [score]}


def _sample(run: Run, sample: Sample, details: Details, ids: Ids) -> Json:
    """Inspect_ai's `EvalSample`; a failed call is an error, and has no score."""
    messages = [dict(message) for message in details.get("messages", ())]
    candidates = details.get("candidates", ())
    given: Json = {
        "id": ids[sample.user, sample.query],
        "epoch": sample.seed + 1,
        "input": details.get("input", ""),
        "target": sample.gold,
        "messages": messages,
        "metadata": {
            "user": sample.user,
            "fold": sample.fold,
            "notes": list(sample.notes),
            "records": details.get("records", []),
            "candidates": list(candidates),
        },
        "total_time": round(sample.llm_seconds + sum(sample.seconds.values()), 6),
    }
    if sample.error:
        fault = {"message": sample.error, "traceback": "", "traceback_ansi": ""}
        return given | {"error": fault}
    text = candidates[details["chosen"]]["text"] if candidates else sample.answer or ""
    reply = {"role": "assistant", "content": text, "source": "generate", "model": _model(run)}
    output: Json = {"model": _model(run), "choices": [{"message": reply, "stop_reason": "stop"}]}
    if sample.tokens is not None and sample.completion_tokens is not None:
        asked = sample.tokens - sample.completion_tokens
        output["usage"] = {"input_tokens": asked, "output_tokens": sample.completion_tokens}
        output["usage"]["total_tokens"] = sample.tokens
    unread = "" if sample.answer is not None else "the answer could not be read"
    known = {"probability": sample.probability, "agreement": sample.agreement}
    score = {"value": worth(run.task, sample), "answer": sample.answer, "explanation": unread}
    return given | {
        "messages": [*messages, reply],
        "output": output,
        "scores": {"gain": score | {"metadata": known}},
    }
