"""Check the committed results without the LLM: learn, fit and run again on the recorded answers, and compare every figure.

    python benchmarks/replay.py DATA [--only NAME]

DATA is the folder in which the data sets lie (`DATA/movie_rating`, ...); they are not part of this repository. For each folder
of `benchmarks/results`, `commands.json` says how it was made and `recording.jsonl.gz` what the LLM answered. Every metric, interval
and count must agree to three decimals; leaves with 1 and names those that do not.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra_llm.cli.main import run

RESULTS = Path(__file__).with_name("results")
DECIMALS = 3
COMPARED = ("metrics", "queries", "failed", "unparsable", "calls", "tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", help="one folder of benchmarks/results")
    given = parser.parse_args()
    names = [given.only] if given.only else sorted(path.parent.name for path in RESULTS.glob("*/commands.json"))
    differences = {name: list(different(name, given.data / name)) for name in names}
    for name, lines in differences.items():
        print("\n".join([f"{name}: {'DIFFERS' if lines else 'the same'}", *(f"  {line}" for line in lines)]))
    sys.exit(any(differences.values()))


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
            before, now = rounded(published[method][field]), rounded(again[method][field])
            if before != now:
                yield f"{method}, {field}: {before} published, {now} repeated"


def repeated(place: Path, data: Path) -> list[dict[str, Any]]:
    commands = json.loads((place / "commands.json").read_text())
    llm = ["--llm", f"replay:{place / 'recording.jsonl.gz'}"]
    with tempfile.TemporaryDirectory() as folder:
        bundle, out = f"{folder}/bundle", f"{folder}/run"
        must(["learn", str(data), *llm, "--out", bundle, *commands["learn"]])
        must(["fit", str(data), *llm, "--bundle", bundle, *commands["fit"]])
        must(["bench", "run", str(data), *llm, "--bundle", bundle, "--out", out, *commands["bench run"]])
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
