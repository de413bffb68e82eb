"""Add a finished run to the committed results: report, plots and recording, but no texts of the
data.

    python benchmarks/publish.py RUN NAME --data movie_rating --recording FILE --arguments
    "--methods all --seeds 0,1,2" [--beside RUN ...]
    python benchmarks/publish.py RUN suggestion --data suggestion --against random

`--arguments` are the options of `bench run` other than DATA, --llm, --out and --record. A run on
recorded choices asks no LLM and has no recording.

Writes benchmarks/results/NAME: the manifest, `report.json` (the output of `bench show --against
METHOD --json`), `report.md`, plots, the recording, and the commands with which
`benchmarks/replay.py` repeats the run. A recording that is another result's is named there and not
copied. `samples.jsonl` is left out, as it quotes the data. With
`--beside` (the runs of the other results) also writes benchmarks/results/overall.json: the results
over all tasks.
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
RECORDING = "recording.jsonl.gz"
PLOTS = ("score-", "cost-calls", "users")
"""Prefixes of the plots that are committed."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--data", required=True, help="name of the data set's folder")
    parser.add_argument("--recording", type=Path)
    parser.add_argument(
        "--against", default=BASELINE, help="the method that others are compared to"
    )
    parser.add_argument("--arguments", type=shlex.split, default=[])
    parser.add_argument("--learn", type=shlex.split, help="of `learn`, if the run has its --bundle")
    parser.add_argument("--fit", type=shlex.split, default=[], help="of `fit`, likewise")
    parser.add_argument("--beside", type=Path, nargs="+", default=[])
    args = parser.parse_args()
    target = RESULTS / args.name
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.run / "manifest.json", target / "manifest.json")
    shared = args.recording and keep_recording(args.recording, args.name)
    (target / "report.json").write_text(
        json.dumps(report(args.run, args.against), indent=1) + "\n", encoding="utf-8"
    )
    learned = {} if args.learn is None else {"learn": args.learn, "fit": args.fit}
    commands = {"data": args.data, **learned, "bench run": args.arguments}
    if args.against != BASELINE:
        commands["against"] = args.against
    if shared:
        commands["recording"] = shared
    (target / "commands.json").write_text(json.dumps(commands, indent=1) + "\n", encoding="utf-8")
    plots = target / "plots"
    show_options = [
        "--against",
        args.against,
        "--markdown",
        str(target / "report.md"),
        "--plots",
        str(plots),
    ]
    code = run(["bench", "show", str(args.run), *show_options])
    for file in plots.glob("*.svg"):
        if not file.name.startswith(PLOTS):
            file.unlink()
    if args.beside:
        (RESULTS / OVERALL).write_text(
            json.dumps(overall([args.run, *args.beside]), indent=1) + "\n", encoding="utf-8"
        )
    raise SystemExit(code)


def keep_recording(recording: Path, name: str) -> str:
    """Copy a recording into the result of that name. Where it is another result's, return that
    result's name and copy nothing.
    """
    source = recording.resolve()
    if source.parent.parent == RESULTS.resolve():
        return "" if source.parent.name == name else source.parent.name
    shutil.copyfile(source, RESULTS / name / RECORDING)
    return ""


def report(folder: Path, against: str = BASELINE) -> dict[str, Any]:
    """The output of `bench show` for a run, without its path."""
    (run_report,) = bench_show([folder], against)["runs"]
    return {name: value for name, value in run_report.items() if name != "run"}


def overall(folders: Sequence[Path]) -> dict[str, Any]:
    """The results over tasks of several runs, by `bench show`."""
    over_tasks: dict[str, Any] = bench_show(folders)["over_tasks"]
    return over_tasks


def bench_show(folders: Sequence[Path], against: str = BASELINE) -> dict[str, Any]:
    out = io.StringIO()
    with redirect_stdout(out):
        if code := run(["bench", "show", *map(str, folders), "--against", against, "--json"]):
            raise SystemExit(code)
    output: dict[str, Any] = json.loads(out.getvalue())
    return output


if __name__ == "__main__":
    main()
