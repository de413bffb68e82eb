"""Check the committed results without the LLM: learn, fit and run again on the recorded answers, and compare every figure.

    python benchmarks/replay.py DATA [--only NAME]

DATA is the folder in which the data sets lie (`DATA/movie_rating`, ...); they are not part of this repository. For each folder
of `benchmarks/results` that has one, `commands.json` says of which data set it is and how it was made, and `recording.jsonl.gz` what the
LLM answered. Every metric, interval, seed's figure and count must agree to three decimals; leaves with 1 and names those that do not.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra_llm.cli.main import run

RESULTS = Path(__file__).with_name("results")
DECIMALS = 3
COMPARED = ("metrics", "seeds", "queries", "failed", "unparsable", "calls", "tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", help="one folder of benchmarks/results")
    given = parser.parse_args()
    names = [given.only] if given.only else sorted(path.parent.name for path in RESULTS.glob("*/commands.json"))
    differ = False
    for name in names:
        began = time.perf_counter()
        lines = list(different(name, given.data))
        differ |= bool(lines)
        said = f"{name}: {'DIFFERS' if lines else 'the same'} ({time.perf_counter() - began:.0f} s)"
        print("\n".join([said, *(f"  {line}" for line in lines)]), flush=True)
    sys.exit(differ)


def different(name: str, data: Path) -> Iterator[str]:
    """One line for each figure that is another one."""
    place = RESULTS / name
    published = {row["method"]: row for row in json.loads((place / "results.json").read_text())}
    again = {row["method"]: row for row in repeated(place, data)}
    for method in {**published, **again}:
        if method not in published or method not in again:
            yield f"{method}: only {'published' if method in published else 'repeated'}"
            continue
        for field in COMPARED:
            before, now = rounded(published[method].get(field, {})), rounded(again[method][field])
            if before != now:
                yield f"{method}, {field}: {before} published, {now} repeated"


def repeated(place: Path, data: Path) -> list[dict[str, Any]]:
    """The rows that come out now. Where no `learn` is named, `bench run` learns for itself."""
    commands = json.loads((place / "commands.json").read_text())
    data, llm = data / commands.get("data", place.name), ["--llm", f"replay:{place / 'recording.jsonl.gz'}"]
    with tempfile.TemporaryDirectory() as folder:
        bundle, out = f"{folder}/bundle", f"{folder}/run"
        if "learn" in commands:
            must(["learn", str(data), *llm, "--out", bundle, *commands["learn"]])
            must(["fit", str(data), *llm, "--bundle", bundle, *commands["fit"]])
        given = ["--bundle", bundle] if "learn" in commands else []
        must(["bench", "run", str(data), *llm, *given, "--out", out, *commands["bench run"]])
        rows: list[dict[str, Any]] = json.loads((Path(out) / "results.json").read_text())
        return rows


def must(command: list[str]) -> None:
    if code := run(command):
        sys.exit(code)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, DECIMALS) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
