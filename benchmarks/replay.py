"""Check the committed results without the LLM: train, fit and run again on the recorded answers,
and compare every figure.

    python benchmarks/replay.py DATA [--only NAME] [--jobs N]

DATA is the folder of the data sets (`DATA/movie_rating`, ...), which are not part of this
repository. In each folder of `benchmarks/results`, `commands.json` names the data set and the
options, and `recording.jsonl.gz` has the LLM's answers. A run whose `commands.json` names another
result's recording uses that one; a run without a recording asks no LLM. Everything in `report.json`
must be reproduced to three decimals: metrics and intervals of every method and seed, paired
differences, improvements over the best prompts, findings, and results and costs of training; only
seconds may differ. The same holds for `overall.json` (the results over the tasks that have a run by
folds) and for `reranker_labels.json`, which `benchmarks/reranker_labels.py` measures on the same
recordings. Exits with 1 and names the differences if there are any.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from publish import BASELINE, OVERALL, RECORDING, overall, report

from hydra_llm.cli.main import run

RESULTS = Path(__file__).with_name("results")
LABELS = "reranker_labels.json"
Job = Callable[[], tuple[Any, Any]]
"""What was published and what comes out now."""
TOLERANCE = 0.0005
MEASURED = re.compile(
    r"(.*\.)?(seconds|own_seconds)|learning\.\d+\.(calls|cached|gate|stages\.fit gate)"
)
"""Paths of values that are not compared: seconds and cache hits of training differ between
repetitions, and the gate, on which no other figure depends, is newer than the results.
"""
NEWER = re.compile(
    r"(users_tested|calibration|differences)(\..*)?|comparisons|best_prompts"
    r"|methods\..*\.holm|findings\.\d+|learning\.\d+\.\w+\.(prior|loss_user)_error"
)
"""Paths of values that reports have only had since the results were published: if they are not in
the published report, they are not compared.
"""
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", help="one folder of benchmarks/results")
    parser.add_argument("--work", type=Path, help="where the repeated runs stay; default: nowhere")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once")
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        if args.only:
            sys.exit(
                not compare(args.only, lambda: replay_run(args.only, args.data, work / args.only))
            )
        names = sorted(path.parent.name for path in RESULTS.glob("*/commands.json"))
        if not names:
            sys.exit(f"{RESULTS}: no results to repeat")
        with ThreadPoolExecutor(args.jobs) as pool:
            apart = partial(in_a_process, data=args.data, work=work)
            identical = list(pool.map(apart, sorted(names, key=seconds_of, reverse=True)))
        runs = [work / name / "run" for name in names if counts_overall(name)]
        identical.append(compare(OVERALL, lambda: (read(OVERALL), overall(runs))))
        if (RESULTS / LABELS).exists():
            identical.append(compare(LABELS, partial(replay_labels, args.data)))
    print(f"{len(names)} results in {(time.perf_counter() - start) / 60:.1f} minutes")
    sys.exit(not all(identical))


def in_a_process(name: str, *, data: Path, work: Path) -> bool:
    """Repeat one result in a process of its own, which uses one core; whether it is the same."""
    command = [sys.executable, __file__, str(data), "--only", name, "--work", str(work)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(ended.stdout if ended.stdout else f"{name}: {ended.stderr[-2000:]}", end="", flush=True)
    return ended.returncode == 0


def seconds_of(name: str) -> float:
    """How long learning took when it was published: long ones begin first."""
    learning = read(f"{name}/report.json").get("learning", [])
    stages = [stage for entry in learning for stage in entry.get("stages", {}).items()]
    return sum(own["seconds"] for stage, own in stages if not stage.startswith("label"))


def counts_overall(name: str) -> bool:
    """Whether a result is one of those over which improvements are averaged: runs by folds with a
    recording of their own.
    """
    commands = read(f"{name}/commands.json")
    return asks_prompts(name) and "--folds" in commands["bench run"] and "recording" not in commands


def asks_prompts(name: str) -> bool:
    """Whether a result has prompts to compare with."""
    return "against" not in read(f"{name}/commands.json")


def compare(name: str, job: Job) -> bool:
    """Print the differences of a result and its repetition; whether there are none."""
    job_start = time.perf_counter()
    lines, count = differing(*job())
    line = (
        f"{name}: {'DIFFERS' if lines else 'the same'} in {count} figures"
        f" ({time.perf_counter() - job_start:.0f} s)"
    )
    print("\n".join([line, *(f"  {line}" for line in lines[:50])]), flush=True)
    return not lines


def differing(published: Any, again: Any) -> tuple[list[str], int]:
    """One line for each figure that differs, and the number of those published."""
    first, second = dict(leaves(published)), dict(leaves(again))
    missing = object()
    lines = []
    for key in {**first, **second}:
        before, now = first.get(key, missing), second.get(key, missing)
        if before is missing and NEWER.fullmatch(key):
            continue
        if before is missing or now is missing:
            lines.append(f"{key}: only {'repeated' if before is missing else 'published'}")
        elif not alike(before, now):
            lines.append(f"{key}: {before} published, {now} repeated")
    return lines, len(first)


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def replay_run(name: str, data: Path, out: Path) -> tuple[Any, Any]:
    """The published report of a run and the repeated one. Without a `learn` command, `bench run`
    trains its own bundle.
    """
    commands = read(f"{name}/commands.json")
    folder = data / commands.get("data", name)
    recording = RESULTS / commands.get("recording", name) / RECORDING
    llm = ["--llm", f"replay:{recording}"] if recording.exists() else []
    against = commands.get("against", BASELINE)
    bundle = str(out / "bundle")
    if "learn" in commands:
        run_or_exit(["learn", str(folder), *llm, "--out", bundle, *commands["learn"]])
        run_or_exit(["fit", str(folder), *llm, "--bundle", bundle, *commands["fit"]])
    learned = ["--bundle", bundle] if "learn" in commands else []
    run_or_exit(
        [
            "bench",
            "run",
            str(folder),
            *llm,
            *learned,
            "--out",
            str(out / "run"),
            *commands["bench run"],
        ]
    )
    return by_method(read(f"{name}/report.json")), by_method(report(out / "run", against))


def replay_labels(data: Path) -> tuple[Any, Any]:
    """The published results on reranker labels and the repeated ones."""
    published = read(LABELS)
    return {name: entry["found"] for name, entry in published.items()}, {
        name: labels(data / read(f"{name}/commands.json")["data"], name, entry["arguments"])
        for name, entry in published.items()
    }


def labels(data: Path, name: str, arguments: list[str]) -> dict[str, Any]:
    """The output of `reranker_labels.py` on a recording, without options and machine."""
    script, llm = (RESULTS.with_name("reranker_labels.py"), f"replay:{RESULTS / name / RECORDING}")
    command = [sys.executable, str(script), str(data), "--llm", llm, *arguments, "--json"]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {key: result[key] for key in ("rows", "queries", "correlation")}


def by_method(result: dict[str, Any]) -> dict[str, Any]:
    """The report with methods by name instead of a list, so that differences name the method."""
    return {**result, "methods": {row["method"]: row for row in result["methods"]}}


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of every leaf, such as `methods.rag@4.metrics.mae.0`, except `MEASURED`."""
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    if not isinstance(value, dict | list):
        yield name, value
    for key, entry in entries:
        path = f"{name}.{key}" if name else str(key)
        if not MEASURED.fullmatch(path):
            yield from leaves(entry, path)


def alike(before: Any, now: Any) -> bool:
    """Whether two values are equal, numbers to three decimals; also numbers in sentences, which are
    rounded.
    """
    if isinstance(before, str) and isinstance(now, str):
        numbers = [[float(entry) for entry in NUMBER.findall(text)] for text in (before, now)]
        identical = NUMBER.sub("#", before) == NUMBER.sub("#", now)
        return identical and all(
            abs(a - b) <= 2 * TOLERANCE + 1e-9 for a, b in zip(*numbers, strict=True)
        )
    if isinstance(before, int | float) and isinstance(now, int | float):
        return abs(before - now) <= TOLERANCE
    return bool(before == now)


def run_or_exit(command: list[str]) -> None:
    if code := run(command):
        sys.exit(code)


if __name__ == "__main__":
    main()
