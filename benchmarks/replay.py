"""Check the committed results without the LLM: learn, fit and run again on the recorded answers, and compare every figure.

    python benchmarks/replay.py DATA [--only NAME]

DATA is the folder in which the data sets lie (`DATA/movie_rating`, ...); they are not part of this repository. For each folder
of `benchmarks/results` that has one, `commands.json` says of which data set it is and how it was made, and `recording.jsonl.gz` what the
LLM answered. All that `report.json` holds must come out again to three decimals: metrics and intervals of every method and seed, paired
differences, shares over the best prompts, what was found, what learning reached and asked; only the seconds of this machine may differ.
Leaves with 1 and names what does not.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from publish import report

from hydra_llm.cli.main import run

RESULTS = Path(__file__).with_name("results")
TOLERANCE = 0.0005
MEASURED = ("seconds", "own_seconds")
"""Names of what is measured anew: seconds of this machine."""
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", help="one folder of benchmarks/results")
    given = parser.parse_args()
    names = [given.only] if given.only else sorted(path.parent.name for path in RESULTS.glob("*/commands.json"))
    if not names:
        sys.exit(f"{RESULTS}: no results to repeat")
    differ, whole = False, time.perf_counter()
    for name in names:
        began = time.perf_counter()
        lines, compared = checked(name, given.data)
        differ |= bool(lines)
        said = f"{name}: {'DIFFERS' if lines else 'the same'} in {compared} figures ({time.perf_counter() - began:.0f} s)"
        print("\n".join([said, *(f"  {line}" for line in lines[:50])]), flush=True)
    print(f"{len(names)} results in {(time.perf_counter() - whole) / 60:.1f} minutes")
    sys.exit(differ)


def checked(name: str, data: Path) -> tuple[list[str], int]:
    """One line for each figure that is another one; how many were compared."""
    place = RESULTS / name
    published, again = (
        dict(leaves(by_method(found))) for found in (json.loads((place / "report.json").read_text()), repeated(place, data))
    )
    names = {**published, **again}
    missing = object()
    lines = []
    for key in names:
        before, now = published.get(key, missing), again.get(key, missing)
        if before is missing or now is missing:
            lines.append(f"{key}: only {'repeated' if before is missing else 'published'}")
        elif not alike(before, now):
            lines.append(f"{key}: {before} published, {now} repeated")
    return lines, len(names)


def repeated(place: Path, data: Path) -> dict[str, Any]:
    """What the report says now. Where no `learn` is named, `bench run` learns for itself."""
    commands = json.loads((place / "commands.json").read_text())
    data, llm = data / commands.get("data", place.name), ["--llm", f"replay:{place / 'recording.jsonl.gz'}"]
    with tempfile.TemporaryDirectory() as folder:
        bundle, out = f"{folder}/bundle", f"{folder}/run"
        if "learn" in commands:
            must(["learn", str(data), *llm, "--out", bundle, *commands["learn"]])
            must(["fit", str(data), *llm, "--bundle", bundle, *commands["fit"]])
        given = ["--bundle", bundle] if "learn" in commands else []
        must(["bench", "run", str(data), *llm, *given, "--out", out, *commands["bench run"]])
        return report(Path(out))


def by_method(found: dict[str, Any]) -> dict[str, Any]:
    """The report with its list of methods under their names: a line then names the method."""
    return {**found, "methods": {row["method"]: row for row in found["methods"]}}


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in nested values by its place, `methods.rag@4.metrics.mae.0`, but what is measured anew."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not isinstance(value, dict | list):
        yield name, value
    for key, each in entries:
        if key not in MEASURED:
            yield from leaves(each, f"{name}.{key}" if name else str(key))


def alike(before: Any, now: Any) -> bool:
    """Numbers to three decimals, also those inside of sentences (which are rounded already)."""
    if isinstance(before, str) and isinstance(now, str):
        numbers = [[float(each) for each in NUMBER.findall(text)] for text in (before, now)]
        same = NUMBER.sub("#", before) == NUMBER.sub("#", now)
        return same and all(abs(a - b) <= 2 * TOLERANCE + 1e-9 for a, b in zip(*numbers, strict=True))
    if isinstance(before, int | float) and isinstance(now, int | float):
        return abs(before - now) <= TOLERANCE
    return bool(before == now)


def must(command: list[str]) -> None:
    if code := run(command):
        sys.exit(code)


if __name__ == "__main__":
    main()
