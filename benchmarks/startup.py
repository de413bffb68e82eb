"""How long `import hydra_llm` and `hydra-llm --help` take, compared with a bare interpreter.

    python benchmarks/startup.py [--runs 15] [--json]

The commands run alternately, so that load on the machine affects all of them alike. Exits with 1 if
a median exceeds its limit.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KINDS: dict[str, tuple[list[str], float | None]] = {
    "python -c pass": ([sys.executable, "-c", "pass"], None),
    "import hydra_llm": ([sys.executable, "-c", "import hydra_llm"], 150.0),
    "hydra-llm --help": ([str(Path(sys.executable).with_name("hydra-llm")), "--help"], 400.0),
}
"""Name → command, and the limit of its median in milliseconds, interpreter included."""


def milliseconds(command: list[str]) -> float:
    """Wall-clock time of one run in its own process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - start) * 1000


def measure(runs: int) -> list[dict[str, Any]]:
    """One row per kind: median, spread, and the ratio of its median to the bare interpreter's."""
    for command, _ in KINDS.values():  # warm-up: bytecode and disk cache
        milliseconds(command)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(runs):
        for kind, (command, _) in KINDS.items():
            times[kind].append(milliseconds(command))
    bare = statistics.median(times["python -c pass"])
    return [summary(kind, limit, times[kind], bare) for kind, (_, limit) in KINDS.items()]


def summary(kind: str, limit: float | None, values: list[float], bare: float) -> dict[str, Any]:
    low, median, high = statistics.quantiles(values, n=4)
    row = {
        "kind": kind,
        "median_ms": median,
        "quartile_1_ms": low,
        "quartile_3_ms": high,
        "ratio_to_python": median / bare,
    }
    return {**row, "limit_ms": limit, "within": limit is None or median <= limit}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = measure(args.runs)
    if args.json:
        print(
            json.dumps(
                {"runs": args.runs, "python": sys.version.split()[0], "rows": rows}, indent=2
            )
        )
    else:
        for row in rows:
            spread = f"{row['quartile_1_ms']:.0f} to {row['quartile_3_ms']:.0f}"
            limit = "" if row["limit_ms"] is None else f"  limit {row['limit_ms']:.0f}"
            print(
                f"{row['kind']:<18} {row['median_ms']:6.0f} ms  (quartiles {spread},"
                f" {row['ratio_to_python']:.1f} × python){limit}"
            )
    sys.exit(not all(row["within"] for row in rows))


if __name__ == "__main__":
    main()
