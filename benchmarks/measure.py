"""What the scripts here share: jobs timed in turn, medians with quartiles, limits, one report.

Jobs are run in turn within one process, so that load on the machine slows all of them alike; their
ratio counts.
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
    """One thing that must hold."""

    name: str
    value: float
    limit: float
    at_least: bool = False
    """Whether the limit is a floor; it is a ceiling otherwise."""

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
    """Milliseconds of each run of each job, the jobs taking turns."""
    for job in jobs.values():
        for _ in range(warm_up):
            job()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(runs):
        for name, job in jobs.items():
            times[name].append(milliseconds(job))
    return times


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; of a single value thrice the same."""
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
    given: argparse.Namespace,
    result: Mapping[str, Any],
    lines: Sequence[str],
    limits: Sequence[Limit],
) -> None:
    """Print the report and leave: with 1, and a line for each limit that is missed."""
    if given.json:
        machine = {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        }
        checked = [{**asdict(limit), "holds": limit.holds} for limit in limits]
        found = {"options": vars(given), "machine": machine, **result, "limits": checked}
        print(
            json.dumps(found, indent=2, default=lambda path: path.name)
        )  # where data lie is this machine's business
    else:
        print("\n".join(lines))
    for limit in limits:
        word = "at least" if limit.at_least else "at most"
        print(
            f"{'holds ' if limit.holds else 'MISSED'} {limit.name}: {limit.value:.3g}, {word}"
            f" {limit.limit:g}",
            file=sys.stderr,
        )
    sys.exit(not all(limit.holds for limit in limits))
