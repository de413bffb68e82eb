"""What private mode costs: answers where the LLM sees no record, against those where it does.

    python benchmarks/private.py DATA [--sets opinion_300 movie_rating_300 news_category_285]
        [--llm SPEC] [--json] [--out FILE]

Runs the published commands of these sets (`benchmarks/results/NAME/commands.json`) twice on their
recordings, without an LLM:

    as usual   zero-shot, rag@4, hydra@4,8, and hydra-adapter@8: a bundle that was learned as usual
               answers without records in prompts, as `serve --private` does
    private    hydra@4,8 with `private=true`: learning shows the LLM no record either

Printed is the mean gain of an answer (accuracy; 1 − error / 4; mean of ROUGE-1 and ROUGE-L), and
its difference from hydra@4,8 as usual, with 95 % intervals over users. The recordings of free texts
lack the samples without records: with `--llm` they are asked for, and added to the recording.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import finish, options
from publish import RECORDING
from replay import RESULTS, read, run_or_exit

from hydra_llm.bench.stats import interval, paired
from hydra_llm.datasets.native import load

SETS = ("opinion_300", "movie_rating_300", "news_category_285")
USUAL, SERVED, LEARNED = "hydra@4,8", "hydra-adapter@8", "private"
METHODS = ("zero-shot", "rag@4", USUAL, SERVED)
Gains = Mapping[tuple[str, str], float]  # of each user's queries; NaN where a call failed


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="*", default=SETS)
    parser.add_argument("--llm", help="asked for what the recording lacks")
    parser.add_argument("--out", type=Path, help="JSON; sets that are not named stay as they are")
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    for name in args.sets:
        found[name] = costs(name, args.data, args.llm)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    lines = [line for name in args.sets for line in (name, *map(shown, found[name]["rows"]))]
    finish(args, {"sets": found}, lines, [])


def costs(name: str, data: Path, llm: str | None) -> dict[str, Any]:
    """The gains of each way to answer a set's queries, and their differences from the usual one."""
    commands = read(f"{name}/commands.json")
    folder, recording = data / commands["data"], RESULTS / name / RECORDING
    asked = ["--llm", llm, "--record", str(recording)] if llm else ["--llm", f"replay:{recording}"]
    with tempfile.TemporaryDirectory() as out:
        usual, private = Path(out) / "usual", Path(out) / "private"
        plain = without_methods(commands["bench run"])
        command = ["bench", "run", str(folder), *asked, *plain]
        run_or_exit([*command, "--out", str(usual), "--methods", ",".join(METHODS)])
        own = ["--set", "private=true", "--methods", USUAL]
        run_or_exit([*command, "--out", str(private), *own])
        gains = gains_of(usual, folder) | {LEARNED: gains_of(private, folder)[USUAL]}
    rows = [row(way, gains[way], gains[USUAL]) for way in (*METHODS, LEARNED)]
    users = {user for user, _ in gains[USUAL]}
    return {"queries": len(gains[USUAL]), "users": len(users), "rows": rows}


def without_methods(command: Sequence[str]) -> list[str]:
    place = list(command).index("--methods")
    return [*command[:place], *command[place + 2 :]]


def gains_of(run: Path, folder: Path) -> dict[str, Gains]:
    """What each method's answers are worth."""
    task, found = load(folder).task, dict[str, dict[tuple[str, str], float]]()
    for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        own = json.loads(line)
        gain = np.nan if own.get("error") else task.gain(own["answer"], own["gold"])
        found.setdefault(own["method"], {})[own["user"], own["query"]] = gain
    return dict(found)


def row(way: str, gains: Gains, usual: Gains) -> dict[str, Any]:
    keys = list(usual)
    users, own = [user for user, _ in keys], [gains[key] for key in keys]
    against = paired(own, [usual[key] for key in keys], users)
    low, high = interval(own, users)
    return {
        "way": way,
        "gain": [round(value, 4) for value in (float(np.nanmean(own)), low, high)],
        "difference": [round(value, 4) for value in against[:3]],
    }


def shown(own: Mapping[str, Any]) -> str:
    gain, low, high = own["gain"]
    difference, least, most = own["difference"]
    between = f"({low:.3f} to {high:.3f})"
    return (
        f"  {own['way']:<16} {gain:.3f} {between}  {difference:+.3f} ({least:+.3f} to {most:+.3f})"
    )


if __name__ == "__main__":
    main()
