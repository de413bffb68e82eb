"""Put a finished run among the committed results: figures, report and plots, and the recording that repeats it; no text of the data.

    python benchmarks/publish.py RUN NAME --data movie_rating --recording FILE --arguments "--methods all --seeds 0,1,2"

`--arguments` are those of `bench run` beside DATA, --llm, --out and --record.

Writes benchmarks/results/NAME, which `benchmarks/replay.py` then repeats. `samples.jsonl` stays behind: it quotes the data.
"""

import argparse
import json
import shlex
import shutil
from pathlib import Path

from hydra_llm.cli.main import run

RESULTS = Path(__file__).with_name("results")
TAKEN = ("manifest.json", "results.json", "learning.json")
PLOTS = ("score-", "cost-calls", "users")
"""How the names of the plots begin that are committed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--data", required=True, help="the data set's folder among the others")
    parser.add_argument("--recording", type=Path, required=True)
    parser.add_argument("--arguments", type=shlex.split, default=[])
    given = parser.parse_args()
    place = RESULTS / given.name
    place.mkdir(parents=True, exist_ok=True)
    for name in TAKEN:
        if (given.run / name).exists():
            shutil.copyfile(given.run / name, place / name)
    shutil.copyfile(given.recording, place / "recording.jsonl.gz")
    commands = {"data": given.data, "bench run": given.arguments}
    (place / "commands.json").write_text(json.dumps(commands, indent=1) + "\n", encoding="utf-8")
    plots = place / "plots"
    code = run(["bench", "show", str(given.run), "--markdown", str(place / "report.md"), "--plots", str(plots)])
    for file in plots.glob("*.svg"):
        if not file.name.startswith(PLOTS):
            file.unlink()
    raise SystemExit(code)


if __name__ == "__main__":
    main()
