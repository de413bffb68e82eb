"""Add a finished run to the committed results: figures, report and plots, and the recording that
repeats it; no text of the data.

    python benchmarks/publish.py RUN NAME --data movie_rating --recording FILE --arguments
    "--methods all --seeds 0,1,2" [--beside RUN ...]

`--arguments` are those of `bench run` beside DATA, --llm, --out and --record.

Writes benchmarks/results/NAME: the manifest, `report.json` (the output of `bench show --against
rag@4 --json`), `report.md`, plots, the recording, and the commands with which
`benchmarks/replay.py` repeats them. `samples.jsonl` is left out, as it quotes the data. With the
runs of the other results `--beside` it, also benchmarks/results/overall.json: the results over all
tasks.
"""

import argparse
import io
import json
import shlex
import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from hydra_llm.cli.main import run

RESULTS = Path(__file__).with_name("results")
BASELINE = "rag@4"
OVERALL = "overall.json"
PLOTS = ("score-", "cost-calls", "users")
"""How the names of the plots begin that are committed."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--data", required=True, help="the data set's folder among the others")
    parser.add_argument("--recording", type=Path, required=True)
    parser.add_argument("--arguments", type=shlex.split, default=[])
    parser.add_argument("--beside", type=Path, nargs="+", default=[])
    given = parser.parse_args()
    place = RESULTS / given.name
    place.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(given.run / "manifest.json", place / "manifest.json")
    shutil.copyfile(given.recording, place / "recording.jsonl.gz")
    (place / "report.json").write_text(
        json.dumps(report(given.run), indent=1) + "\n", encoding="utf-8"
    )
    commands = {"data": given.data, "bench run": given.arguments}
    (place / "commands.json").write_text(json.dumps(commands, indent=1) + "\n", encoding="utf-8")
    plots = place / "plots"
    shown = ["--against", BASELINE, "--markdown", str(place / "report.md"), "--plots", str(plots)]
    code = run(["bench", "show", str(given.run), *shown])
    for file in plots.glob("*.svg"):
        if not file.name.startswith(PLOTS):
            file.unlink()
    if given.beside:
        (RESULTS / OVERALL).write_text(
            json.dumps(overall([given.run, *given.beside]), indent=1) + "\n", encoding="utf-8"
        )
    raise SystemExit(code)


def report(folder: Path) -> dict[str, Any]:
    """What `bench show` says of a run, without the place where it lies."""
    (found,) = shown_of([folder])["runs"]
    return {name: value for name, value in found.items() if name != "run"}


def overall(folders: Sequence[Path]) -> dict[str, Any]:
    """What `bench show` says of several runs together."""
    found: dict[str, Any] = shown_of(folders)["over_tasks"]
    return found


def shown_of(folders: Sequence[Path]) -> dict[str, Any]:
    out = io.StringIO()
    with redirect_stdout(out):
        if code := run(["bench", "show", *map(str, folders), "--against", BASELINE, "--json"]):
            raise SystemExit(code)
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


if __name__ == "__main__":
    main()
