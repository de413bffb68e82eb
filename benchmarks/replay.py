"""Check the committed results without the LLM: learn, fit and run again on the recorded answers,
and compare every figure.

    python benchmarks/replay.py DATA [--only NAME]

DATA is the folder of the data sets (`DATA/movie_rating`, ...), which are not part of this
repository. For each folder of `benchmarks/results`, `commands.json` names the data set and the
arguments, and `recording.jsonl.gz` holds the LLM's answers. Everything in `report.json` must come
out again to three decimals: metrics and intervals of every method and seed, paired differences,
shares over the best prompts, findings, results and costs of learning; only this machine's seconds
may differ. So must `overall.json`, the results over all tasks, and `reranker_labels.json`, which
`benchmarks/reranker_labels.py` measures on the same recordings. Exits with 1 and names what
differs.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from publish import OVERALL, overall, report

from hydra_llm.cli.main import run

RESULTS = Path(__file__).with_name("results")
LABELS = "reranker_labels.json"
Job = Callable[[], tuple[Any, Any]]
"""What was published and what comes out now."""
TOLERANCE = 0.0005
MEASURED = re.compile(r"(.*\.)?(seconds|own_seconds)|learning\.\d+\.(calls|cached)")
"""Places of what is measured anew: seconds of this machine, and which answers it had kept already.
"""
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", help="one folder of benchmarks/results")
    given = parser.parse_args()
    names = (
        [given.only]
        if given.only
        else sorted(path.parent.name for path in RESULTS.glob("*/commands.json"))
    )
    if not names:
        sys.exit(f"{RESULTS}: no results to repeat")
    whole = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: Path(folder) / name for name in names}
        jobs: dict[str, Job] = {
            name: partial(of_run, name, given.data, out) for name, out in runs.items()
        }
        if not given.only:
            jobs[OVERALL] = lambda: (read(OVERALL), overall([out / "run" for out in runs.values()]))
            if (RESULTS / LABELS).exists():
                jobs[LABELS] = partial(of_labels, given.data)
        same = [compared(name, job) for name, job in jobs.items()]
    print(f"{len(names)} results in {(time.perf_counter() - whole) / 60:.1f} minutes")
    sys.exit(not all(same))


def compared(name: str, job: Job) -> bool:
    """Print how a result and its repetition compare, and whether they are the same."""
    began = time.perf_counter()
    lines, compared = differing(*job())
    line = (
        f"{name}: {'DIFFERS' if lines else 'the same'} in {compared} figures"
        f" ({time.perf_counter() - began:.0f} s)"
    )
    print("\n".join([line, *(f"  {line}" for line in lines[:50])]), flush=True)
    return not lines


def differing(published: Any, again: Any) -> tuple[list[str], int]:
    """One line for each figure that is another one; how many were compared."""
    first, second = dict(leaves(published)), dict(leaves(again))
    missing = object()
    lines = []
    for key in {**first, **second}:
        before, now = first.get(key, missing), second.get(key, missing)
        if before is missing or now is missing:
            lines.append(f"{key}: only {'repeated' if before is missing else 'published'}")
        elif not alike(before, now):
            lines.append(f"{key}: {before} published, {now} repeated")
    return lines, len({**first, **second})


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def of_run(name: str, data: Path, out: Path) -> tuple[Any, Any]:
    """What was published of a run, and what its report says now. Where no `learn` is named, `bench
    run` learns for itself.
    """
    commands = read(f"{name}/commands.json")
    folder, llm = (
        data / commands.get("data", name),
        ["--llm", f"replay:{RESULTS / name / 'recording.jsonl.gz'}"],
    )
    bundle = str(out / "bundle")
    if "learn" in commands:
        must(["learn", str(folder), *llm, "--out", bundle, *commands["learn"]])
        must(["fit", str(folder), *llm, "--bundle", bundle, *commands["fit"]])
    given = ["--bundle", bundle] if "learn" in commands else []
    must(
        [
            "bench",
            "run",
            str(folder),
            *llm,
            *given,
            "--out",
            str(out / "run"),
            *commands["bench run"],
        ]
    )
    return by_method(read(f"{name}/report.json")), by_method(report(out / "run"))


def of_labels(data: Path) -> tuple[Any, Any]:
    """What teaches the reranker best: what was published, and what is measured now."""
    published = read(LABELS)
    return {name: each["found"] for name, each in published.items()}, {
        name: labels(data / read(f"{name}/commands.json")["data"], name, each["arguments"])
        for name, each in published.items()
    }


def labels(data: Path, name: str, arguments: list[str]) -> dict[str, Any]:
    """What `reranker_labels.py` says on a recording, without its options and the machine."""
    script, llm = (
        RESULTS.with_name("reranker_labels.py"),
        f"replay:{RESULTS / name / 'recording.jsonl.gz'}",
    )
    command = [sys.executable, str(script), str(data), "--llm", llm, *arguments, "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {key: found[key] for key in ("rows", "queries", "correlation")}


def by_method(found: dict[str, Any]) -> dict[str, Any]:
    """The report with its list of methods under their names: a line then names the method."""
    return {**found, "methods": {row["method"]: row for row in found["methods"]}}


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in nested values by its place, `methods.rag@4.metrics.mae.0`, but what is measured
    anew.
    """
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    if not isinstance(value, dict | list):
        yield name, value
    for key, each in entries:
        place = f"{name}.{key}" if name else str(key)
        if not MEASURED.fullmatch(place):
            yield from leaves(each, place)


def alike(before: Any, now: Any) -> bool:
    """Numbers to three decimals, also those inside of sentences (which are rounded already)."""
    if isinstance(before, str) and isinstance(now, str):
        numbers = [[float(each) for each in NUMBER.findall(text)] for text in (before, now)]
        same = NUMBER.sub("#", before) == NUMBER.sub("#", now)
        return same and all(
            abs(a - b) <= 2 * TOLERANCE + 1e-9 for a, b in zip(*numbers, strict=True)
        )
    if isinstance(before, int | float) and isinstance(now, int | float):
        return abs(before - now) <= TOLERANCE
    return bool(before == now)


def must(command: list[str]) -> None:
    if code := run(command):
        sys.exit(code)


if __name__ == "__main__":
    main()
