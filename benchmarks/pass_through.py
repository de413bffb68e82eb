"""What passing a request through costs in this version, beside an earlier one.

    python benchmarks/pass_through.py --before COMMIT [--runs 10] [--seconds 15] [--rate 60]

Both versions serve at the same time, without a bundle, in front of the same mock upstream. Chat
requests without a user go at a fixed rate to the mock, the earlier version and this one, in an
order that is drawn anew for each three, so that load on the machine meets all alike. The added
latency of a version is the median of its requests in a run minus that of the mock's. Throughput
(64 in flight) is measured of each version alone, in turn. The processor time of a request is that
of the server's process, which other load on the machine hardly changes. The ratios are of one run
each; the report has all of them. With this version's own commit as COMMIT they show the noise.
"""

import asyncio
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gateway import PROCESSES, Ask, chat, client, mock, percentiles, saturate, server
from measure import Limit, finish, options

ROOT = Path(__file__).parents[1]
MOST = 1.1
BEFORE, NOW, DIRECT = "before", "now", "direct"
RATIOS = ("added_ratio", "rate_ratio", "cpu_ratio")
Row = dict[str, float]


def main() -> None:
    parser = options(__doc__, runs=10)
    parser.add_argument("--before", required=True, help="a commit")
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="of a run, and half of it for throughput"
    )
    parser.add_argument("--rate", type=float, default=60.0, help="requests a second, a third each")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, checkout(args.before, Path(name)) as earlier:
        runs = asyncio.run(measure(args, Path(name), {BEFORE: earlier, NOW: ROOT}))
    ratios = {key: spread([run[key] for run in runs]) for key in RATIOS}
    lines = [" ".join(f"{key} {value:.3f}" for key, value in run.items()) for run in runs]
    limits = [
        Limit(
            "added p50, this version over the earlier one", ratios["added_ratio"]["median"], MOST
        ),
        Limit(
            "requests a second, the same", ratios["rate_ratio"]["median"], 1 / MOST, at_least=True
        ),
    ]
    limits.append(Limit("processor time, the same", ratios["cpu_ratio"]["median"], MOST))
    finish(args, {"ratios": ratios, "runs": runs}, [*lines, str(ratios)], limits)


def needed(version: Path) -> set[str]:
    """The packages that a version requires, without their versions."""
    project = tomllib.loads((version / "pyproject.toml").read_text())["project"]
    return {re.split(r"[^\w.-]", line)[0] for line in project["dependencies"]}


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """The earlier version's files, and beside its sources the packages that it alone needs."""
    place, git = folder / "earlier", ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", place, commit], check=True)
    try:
        if missing := needed(place) - needed(ROOT):
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *missing]
            subprocess.run([*pip, "--target", str(place / "src")], check=True)
        yield place
    finally:
        subprocess.run([*git, "remove", "--force", place], check=True)


async def measure(args: Any, folder: Path, versions: dict[str, Path]) -> list[Row]:
    rng = random.Random(args.seed)
    with (
        mock() as upstream,
        serving(versions[BEFORE], upstream, folder / "before.db") as before,
        serving(versions[NOW], upstream, folder / "now.db") as now,
    ):
        urls = {DIRECT: upstream, BEFORE: before, NOW: now}
        asks = {name: chat(url, None) for name, url in urls.items()}
        await in_turn(asks, args.rate, 3, rng)  # warm up
        runs = []
        for number in range(args.runs):
            row = await one_run(asks, urls, args, rng, number % 2 == 1)
            print(row, file=sys.stderr, flush=True)
            runs.append(row)
        return runs


@contextmanager
def serving(version: Path, upstream: str, store: Path) -> Iterator[str]:
    """A gateway of a version; its address."""
    environment = {**os.environ, "OPENAI_API_KEY": "none", "PYTHONPATH": str(version / "src")}
    command = [sys.executable, "-m", "hydra_llm", "serve", "--llm", f"openai:mock@{upstream}/v1"]
    where = "import hydra_llm; print(hydra_llm.__file__)"
    found = subprocess.check_output([sys.executable, "-c", where], env=environment, text=True)
    if not Path(found.strip()).is_relative_to(version):
        raise SystemExit(f"another version would run: {found}")
    flags = ["--store", f"sqlite:///{store}"]
    with server([*command, *flags], environment, "/health/readiness") as url:
        yield url


async def one_run(
    asks: dict[str, Ask], urls: dict[str, str], args: Any, rng: random.Random, swapped: bool
) -> Row:
    """Added medians, processor time of a request (both in ms) and rates of both versions, and
    their ratios.
    """
    begin = {name: cpu_ms(urls[name]) for name in (BEFORE, NOW)}
    times = await in_turn(asks, args.rate, args.seconds, rng)
    count = args.rate * args.seconds / len(asks)
    direct = times[DIRECT]["p50"]
    row = {f"added_{name}": times[name]["p50"] - direct for name in (BEFORE, NOW)}
    row |= {f"cpu_{name}": (cpu_ms(urls[name]) - begin[name]) / count for name in begin}
    row |= {f"added_p99_{name}": times[name]["p99"] - direct for name in (BEFORE, NOW)}
    for name in (NOW, BEFORE) if swapped else (BEFORE, NOW):
        row[f"rate_{name}"] = (await saturate(asks[name], args.seconds / 4))["per_s"]
    for what in ("added", "rate", "cpu"):
        row[f"{what}_ratio"] = row[f"{what}_{NOW}"] / row[f"{what}_{BEFORE}"]
    return row


async def in_turn(
    asks: dict[str, Ask], rate: float, seconds: float, rng: random.Random
) -> dict[str, Row]:
    """Percentiles in ms of each target; requests go out at the rate, whether or not earlier ones
    have been answered.
    """
    tasks: dict[str, list[asyncio.Task[float]]] = {name: [] for name in asks}
    names, sent, begin = list(asks), 0, time.perf_counter()
    async with client() as http:
        while sent < rate * seconds:
            rng.shuffle(names)
            for name in names:
                await asyncio.sleep(max(0.0, begin + sent / rate - time.perf_counter()))
                tasks[name].append(asyncio.create_task(asks[name](http)))
                sent += 1
        return {name: percentiles(await asyncio.gather(*own)) for name, own in tasks.items()}


def cpu_ms(url: str, pid: int | None = None) -> float:
    """Milliseconds of processor time that a server's process, or another, has used; in steps of
    10 ms.
    """
    fields = Path(f"/proc/{pid or PROCESSES[url]}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf("SC_CLK_TCK")


def spread(values: list[float]) -> Row:
    """The median, the quartiles and the ends."""
    cuts = statistics.quantiles(values, n=4, method="inclusive")
    ends = {"least": min(values), "most": max(values)}
    return {"median": cuts[1], "quartile_1": cuts[0], "quartile_3": cuts[2], **ends}


if __name__ == "__main__":
    main()
