"""Cost by the number of users: learn, fit, ask and delete from 100 to 100,000 users, and a store of
heads to 1,000,000; fits the slopes and says which series are flat.

    make bench-scale [UP_TO=100000]
    python benchmarks/scale.py [--up-to 10000] [--store-up-to 1000000] [--minutes 25] [--runs 3]
        [--kinds lowrank] [--out FILE.json] [--plot FILE.svg] [--folder FOLDER]

No LLM. For each size a data set is generated (simulated_users.py: a task with two labels), a bundle
is learned from these users (`hydra-llm learn`), heads of as many new users are fitted
(`hydra-llm fit`), and from the bundle random users are answered and deleted. A store is a bundle of
random heads alone. Each step is a process of its own: its CPU seconds (of all threads; torch has
one), wall seconds and peak of resident memory are the kernel's. Sizes of at most 1,000 users are
learned `--runs` times.

The figures of a size are in `--out` as soon as it is done, and the next run goes on behind them. A
size that would not be done within `--minutes` is left for the next run, unless it is the first to
be done: 100,000 users take longer.

A slope is that of log(figure) over log(users), by least squares, with a 95 % interval (t) from the
scatter of all runs; 0 is flat, 1 is linear. What all users share is learned from a sample of at
most `--base-users`, which below 1,000 users is most of learning: slopes of learn and fit, and of
writing, are those from 1,000 users up, where there are three such sizes. Memory of learn and fit is
counted without the heads themselves. Encoding is left out: vectors of texts are cheap stand-ins
(hashed words, 20,000 texts), and so is the LLM. Exits with 1 if a series grows more than it may.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STEPS = HERE / "scale_steps.py"
SIZES = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
STORE_SIZES = (*(10**e for e in range(2, 7)),)
REPEATED = 1_000  # users; more are learned once
SMALLEST = 1_000  # users; below, the choice of strengths on few groups is most of learning
TOLERANCE = 0.1  # of a slope: measured times scatter
FLAT, LINEAR = 0.0, 1.0
# Of each figure: what it is called, and the slope that it may have.
SERIES: Mapping[str, tuple[str, float]] = {
    "learn cpu s": ("learn, CPU s", LINEAR),
    "learn peak MB": ("learn, peak MB without heads", FLAT),
    "fit cpu s": ("fit of as many new users, CPU s", LINEAR),
    "fit peak MB": ("fit of as many, peak MB without heads", FLAT),
    "ask cpu ms": ("ask, a user's first question, CPU ms", FLAT),
    "ask again cpu ms": ("ask, a later question, CPU ms", FLAT),
    "ask peak MB": ("ask, peak MB", FLAT),
    "delete cpu ms": ("delete, CPU ms", FLAT),
    "delete peak MB": ("delete, peak MB", FLAT),
}
STORE_SERIES: Mapping[str, tuple[str, float]] = {
    "write cpu s": ("store of heads: write all, CPU s", LINEAR),
    "open cpu ms": ("store of heads: open, CPU ms", FLAT),
    "score cpu ms": ("store of heads: score 20 candidates, CPU ms", FLAT),
    "add cpu ms": ("store of heads: add a user, CPU ms", FLAT),
    "delete cpu ms": ("store of heads: delete a user, CPU ms", FLAT),
    "read peak MB": ("store of heads: peak MB", FLAT),
}
Point = dict[str, Any]


@dataclass(frozen=True)
class Slope:
    """Of log(figure) over log(users), with its 95 % interval."""

    value: float
    low: float
    high: float

    def verdict(self, expected: float) -> str:
        """Whether a series grows no more than it may, as far as its interval tells."""
        named = "flat" if expected == FLAT else "at most linear"
        if self.high <= expected + TOLERANCE:
            return named
        return f"NOT {named}" if self.low > expected + TOLERANCE else f"not shown to be {named}"


def slope(sizes: Sequence[float], repeats: Sequence[Sequence[float]]) -> Slope:
    """Through the repeats at each size; two values have an infinite interval."""
    from scipy.stats import t

    pairs = [
        (math.log(size), math.log(max(value, 1e-9)))
        for size, values in zip(sizes, repeats, strict=True)
        for value in values
    ]
    x_mean, y_mean = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    spread = sum((x - x_mean) ** 2 for x, _ in pairs)
    rise = sum((x - x_mean) * (y - y_mean) for x, y in pairs) / spread
    rest = sum((y - y_mean - rise * (x - x_mean)) ** 2 for x, y in pairs)
    degrees = len(pairs) - 2
    error = math.sqrt(rest / degrees / spread) if degrees > 0 else math.inf
    wide = float(t.ppf(0.975, degrees)) * error if degrees > 0 else math.inf
    return Slope(rise, rise - wide, rise + wide)


# ---- running


class Run:
    """The steps of a run, within its minutes; what each took is told and kept."""

    def __init__(self, args: argparse.Namespace, work: Path):
        self.args, self.work, self.begun = args, work, time.monotonic()
        self.points: dict[str, Point] = stored(args)
        self.guessed, self.spent = 1.0, 1.0  # seconds: of the steps done, by guess and by the clock
        self.left = 0.0  # guessed seconds of all that is to do

    def remaining(self, seconds: float) -> float:
        """What guessed seconds will be on this machine."""
        return seconds * self.spent / self.guessed

    def fits(self, seconds: float) -> bool:
        return time.monotonic() - self.begun + self.remaining(seconds) <= 60 * self.args.minutes

    def step(self, label: str, command: Sequence[str], seconds: float) -> Point:
        """Run a process: its own figures, CPU and wall seconds, and its peak in MB. `seconds` is a
        guess of how long it takes.
        """
        environment = {**os.environ, "HYDRA_CACHE": str(self.work), "OMP_NUM_THREADS": "1"}
        log, begin = self.work / "out", time.perf_counter()
        with log.open("w") as out:
            child = subprocess.Popen([sys.executable, *command], stdout=out, env=environment)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        wall, cpu = time.perf_counter() - begin, usage.ru_utime + usage.ru_stime
        if child.returncode:
            sys.exit(f"{label}: exit code {child.returncode}")
        self.guessed, self.spent = self.guessed + seconds, self.spent + wall
        self.left -= seconds
        minutes = math.ceil(self.remaining(max(self.left, 0)) / 60)
        peak = usage.ru_maxrss * 1024 / 1e6
        costs = f"{cpu:.1f} CPU s in {wall:.1f} s, {peak:.0f} MB; about {minutes} min left"
        print(f"{label}: {costs}", file=sys.stderr, flush=True)
        told = json.loads(log.read_text(encoding="utf-8"))
        return {"cpu s": cpu, "s": wall, "peak MB": peak, "told": told}

    def own(self, label: str, name: str, folder: Path, seconds: float, *more: str) -> Point:
        """A step of scale_steps.py."""
        args = [str(STEPS), name, str(folder), "--records", str(self.args.records)]
        args += ["--texts", str(self.args.texts), "--seed", str(self.args.seed), *more]
        return self.step(f"{label}, {name}", args, seconds)

    def keep(self, name: str, point: Point) -> None:
        self.points[name] = point
        save(self.args, self.points)


def users_seconds(users: int) -> dict[str, float]:
    """A guess of the seconds of each step of a size, on an idle machine of 2026."""
    return {
        "data": 3 + users / 1000,
        "learn": 20 + users / 100,
        "fit": 8 + users / 100,
        "ask": 8,
        "delete": 5,
    }


def store_seconds(users: int) -> dict[str, float]:
    return {"store": 5 + users / 8_000, "read": 6, "change": 6}


def runs_of(users: int, args: argparse.Namespace) -> int:
    return int(args.runs) if users <= REPEATED else 1


def guess_of(users: int, args: argparse.Namespace) -> float:
    one, runs = users_seconds(users), runs_of(users, args)
    return sum(one.values()) + (runs - 1) * (one["learn"] + one["fit"])


def measure_users(run: Run, users: int) -> Point:
    """Learn from so many users, fit as many new ones, answer and delete some."""
    args, label, guess = run.args, f"{users:,} users", users_seconds(users)
    data, bundle = run.work / "data", run.work / "bundle"
    point: Point = {"users": users}
    run.own(label, "data", data, guess["data"], "--users", str(users), "--new", str(users))
    for _ in range(runs_of(users, args)):
        shutil.rmtree(bundle, ignore_errors=True)
        base = ["--set", f"research.base_users={args.base_users}"]
        for name, more in (("learn", ["--out", str(bundle), *base]), ("fit", ["--bundle", bundle])):
            command = ["-m", "hydra_llm", name, str(data), *map(str, more), "--json"]
            costs = run.step(f"{label}, {name}", command, guess[name])
            costs.pop("told")
            for figure, value in costs.items():
                point.setdefault(f"{name} {figure}", []).append(value)
    calls = ("--users", str(users), "--calls", str(args.calls))
    for name in ("ask", "delete"):
        point |= run.own(label, name, bundle, guess[name], *calls)["told"]
    heads = point.pop("bytes of a user's heads") / 1e6
    point["heads MB"] = {"learn": heads * users, "fit": heads * users}
    shutil.rmtree(data)
    shutil.rmtree(bundle)
    return point


def measure_store(run: Run, users: int, kind: str) -> Point:
    """Write, read and change a bundle of so many users' heads."""
    label, guess = f"store of {users:,} {kind} heads", store_seconds(users)
    folder = run.work / "store"
    more = ("--users", str(users), "--kind", kind, "--calls", str(run.args.calls))
    written = run.own(label, "store", folder, guess["store"], *more)
    point: Point = {"users": users, "kind": kind, **written["told"]}
    for name in ("read", "change"):
        point |= run.own(label, name, folder, guess[name], *more)["told"]
    shutil.rmtree(folder)
    return point


def run_all(args: argparse.Namespace) -> Run:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run = Run(args, Path(folder))
        todo: list[tuple[str, float, Any]] = [
            (f"users {n}", guess_of(n, args), lambda n=n: measure_users(run, n))
            for n in SIZES
            if n <= args.up_to
        ]
        todo += [
            (
                f"store {kind} {n}",
                sum(store_seconds(n).values()),
                lambda k=kind, n=n: measure_store(run, n, k),
            )
            for kind in args.kinds
            for n in STORE_SIZES
            if n <= args.store_up_to
        ]
        todo = sorted((job for job in todo if job[0] not in run.points), key=lambda job: job[1])
        run.left = sum(seconds for _, seconds, _ in todo)
        if any(name.startswith("users") for name, _, _ in todo):
            run.own("features", "pool", run.work, 10.0)
        for place, (name, seconds, job) in enumerate(todo):
            if place == 0 or run.fits(seconds):  # one at least: a large one may need longer
                run.keep(name, job())
                continue
            minutes = run.remaining(sum(later for _, later, _ in todo[place:])) / 60
            left = ", ".join(left for left, _, _ in todo[place:])
            print(f"left for the next run, {minutes:.0f} min: {left}", file=sys.stderr)
            break
        return run


# ---- the file of results


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """What all points of a file have in common."""
    names = ("records", "texts", "base_users", "calls", "runs", "seed")
    return {name: getattr(args, name) for name in names}


def stored(args: argparse.Namespace) -> dict[str, Point]:
    """The points of an earlier run."""
    if args.out is None or not args.out.exists():
        return {}
    kept = json.loads(args.out.read_text(encoding="utf-8"))
    if kept["options"] != options_of(args):
        sys.exit(f"{args.out.name} was measured with {kept['options']}: name another --out")
    return dict(kept["points"])


def save(args: argparse.Namespace, points: Mapping[str, Point]) -> None:
    if args.out is None:
        return
    machine = {"python": sys.version.split()[0], "cores": os.cpu_count()}
    kept = {"options": options_of(args), "machine": machine, "points": points}
    new = args.out.with_name(f"{args.out.name}.new")
    series = [{**row, "slope": asdict(row["slope"])} for row in rows_of(points)]
    new.write_text(json.dumps({**kept, "series": series}, indent=1) + "\n", encoding="utf-8")
    new.replace(args.out)


# ---- report


def values_of(point: Point, figure: str) -> list[float]:
    """The runs of a figure; memory without the heads themselves."""
    value = point[figure]
    heads = point.get("heads MB", {}).get(figure.partition(" ")[0], 0.0) if "MB" in figure else 0.0
    return [one - heads for one in (value if isinstance(value, list) else [value])]


def rows_of(points: Mapping[str, Point]) -> list[dict[str, Any]]:
    """Each series of at least two sizes, with its slope and verdict."""
    groups: dict[str, list[Point]] = {}
    for point in sorted(points.values(), key=lambda point: point["users"]):
        groups.setdefault(point.get("kind", ""), []).append(point)
    rows = []
    for kind, measured in groups.items():
        for figure, (name, expected) in (STORE_SERIES if kind else SERIES).items():
            large = [point for point in measured if point["users"] >= SMALLEST]
            learns = figure.startswith(("learn", "fit", "write"))
            counted = large if learns and len(large) > 2 else measured
            if len(counted) < 2:
                continue
            sizes = [point["users"] for point in counted]
            law = slope(sizes, [values_of(point, figure) for point in counted])
            shown = [{"users": p["users"], "values": values_of(p, figure)} for p in measured]
            name = f"{name} ({kind})" if kind else name
            row = {"series": name, "expected": expected, "verdict": law.verdict(expected)}
            rows.append({**row, "slope": law, "from": sizes[0], "points": shown})
    return rows


def line(row: Mapping[str, Any]) -> str:
    law, ends = row["slope"], (row["points"][0], row["points"][-1])
    values = " → ".join(f"{sorted(p['values'])[len(p['values']) // 2]:.3g}" for p in ends)
    sizes = " → ".join(f"{p['users']:,}" for p in ends)
    text = f"{row['series']:<54} {values:>18}  ({sizes} users)"
    return f"{text}  slope {law.value:.2f} [{law.low:.2f}, {law.high:.2f}]: {row['verdict']}"


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A log-log panel for each series: runs as points, the slope as a line."""
    import altair as alt

    charts = []
    for row in rows:
        law, points = row["slope"], row["points"]
        shown = [(p["users"], value) for p in points for value in p["values"]]
        logs = [(math.log(n), math.log(max(v, 1e-9))) for n, v in shown if n >= row["from"]]
        x, y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
        ends = [
            {"users": n, "value": math.exp(y + law.value * (math.log(n) - x))}
            for n in (row["from"], points[-1]["users"])
        ]
        values = [{"users": users, "value": value} for users, value in shown]
        domain = [min(v for _, v in shown) / 2, max(v for _, v in shown) * 2]
        scale = alt.Scale(type="log", domain=domain, nice=False)
        axes = {
            "x": alt.X("users:Q").scale(type="log").axis(format="~s").title("users"),
            "y": alt.Y("value:Q").scale(scale).axis(format="~g", tickCount=4).title(None),
        }
        dots = alt.Chart(alt.Data(values=values)).mark_point(filled=True, size=40).encode(**axes)
        fitted = alt.Chart(alt.Data(values=ends)).mark_line().encode(**axes)
        interval = f"slope {law.value:.2f} [{law.low:.2f}, {law.high:.2f}]: {row['verdict']}"
        title = alt.TitleParams(row["series"], subtitle=interval, fontSize=11, subtitleFontSize=10)
        charts.append((dots + fitted).properties(title=title, width=230, height=150))
    alt.concat(*charts, columns=3).resolve_scale(x="independent", y="independent").save(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--up-to", type=int, default=10_000, help="users to learn from")
    parser.add_argument("--store-up-to", type=int, default=1_000_000, help="users, heads only")
    parser.add_argument("--kinds", nargs="+", default=["lowrank"], help="of heads in the store")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--runs", type=int, default=3, help="of sizes of at most 1,000 users")
    parser.add_argument("--calls", type=int, default=90, help="users who are asked, or scored")
    parser.add_argument("--records", type=int, default=50, help="of each user")
    parser.add_argument("--texts", type=int, default=20_000, help="that users share")
    parser.add_argument("--base-users", type=int, default=500, help="research.base_users")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="for data and bundles; default: a temporary one"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "scale.json")
    parser.add_argument("--plot", type=Path, default=HERE / "results" / "scale.svg")
    args = parser.parse_args()
    run = run_all(args)
    rows = rows_of(run.points)
    print("\n".join(map(line, rows)))
    if rows:
        plot(rows, args.plot)
    sys.exit(any(row["verdict"].startswith("NOT") for row in rows))


if __name__ == "__main__":
    main()
