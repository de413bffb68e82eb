"""Shared by the benchmark scripts: interleaved timing, medians with quartiles, limits, one report.

Jobs run alternately within one process, so that load on the machine affects all of them alike and
ratios stay valid.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Limit:
    """A measured value and its limit."""

    name: str
    value: float
    limit: float
    at_least: bool = False
    """True for a minimum; otherwise the limit is a maximum."""

    @property
    def holds(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def milliseconds(job: Callable[[], object]) -> float:
    begin = time.perf_counter()
    job()
    return (time.perf_counter() - begin) * 1000


def in_turn(
    jobs: Mapping[str, Callable[[], object]], runs: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Milliseconds of each run of each job; the jobs run alternately."""
    for job in jobs.values():
        for _ in range(warm_up):
            job()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(runs):
        for name, job in jobs.items():
            times[name].append(milliseconds(job))
    return times


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; for a single value all three are that value."""
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else (values[0],) * 3
    )
    return {"median_ms": median, "quartile_1_ms": low, "quartile_3_ms": high}


def show(name: str, row: Mapping[str, float], more: str = "", digits: int = 1) -> str:
    """A line of the printed report."""
    spread = f"{row['quartile_1_ms']:.{digits}f} to {row['quartile_3_ms']:.{digits}f}"
    return f"{name:<40} {row['median_ms']:9.{digits}f} ms  (quartiles {spread}){more}"


def options(doc: str | None, runs: int) -> argparse.ArgumentParser:
    """The options that every script has."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=runs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser


def finish(
    args: argparse.Namespace,
    result: Mapping[str, Any],
    lines: Sequence[str],
    limits: Sequence[Limit],
) -> None:
    """Print the report and exit, with 1 if a limit is missed."""
    if args.json:
        machine = {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        }
        checked = [{**asdict(limit), "holds": limit.holds} for limit in limits]
        report = {"options": vars(args), "machine": machine, **result, "limits": checked}
        # only the names of paths: the rest depends on the machine
        print(json.dumps(report, indent=2, default=lambda path: path.name))
    else:
        print("\n".join(lines))
    for limit in limits:
        relation = "at least" if limit.at_least else "at most"
        print(
            f"{'holds ' if limit.holds else 'MISSED'} {limit.name}: {limit.value:.3g}, {relation}"
            f" {limit.limit:g}",
            file=sys.stderr,
        )
    sys.exit(not all(limit.holds for limit in limits))
