"""The first personal request of users whose history was never encoded, beside an earlier version.

    python benchmarks/cold_requests.py --before COMMIT [--users 60] [--records 100] [--json]

Both versions serve the same bundle and the same store at the same time, in front of one mock
upstream (50 ms). Each user asks both once, one after the other in an order that is drawn anew, with
a direct request to the mock beside them; the histories of users who have asked are being encoded
meanwhile, as in use. The added latency is a version's median minus the mock's. A server's processor
time is told too: it includes the encoding.
"""

import asyncio
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gateway import Ask, chat, client, mock, server
from measure import Limit, finish, options
from pass_through import BEFORE, DIRECT, NOW, ROOT, checkout, cpu_ms, spread

MOST = 0.5
Times = dict[str, list[float]]


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument("--before", required=True, help="a commit")
    parser.add_argument("--users", type=int, default=60)
    parser.add_argument("--records", type=int, default=100)
    args = parser.parse_args()
    args.features = "tower"
    with tempfile.TemporaryDirectory() as name, checkout(args.before, Path(name)) as earlier:
        prepared_by(earlier, args, Path(name))
        times, cpu = asyncio.run(measure(args, Path(name), {BEFORE: earlier, NOW: ROOT}))
    direct = spread(times[DIRECT])
    added = {
        version: {key: value - direct["median"] for key, value in spread(times[version]).items()}
        for version in (BEFORE, NOW)
    }
    ratio = added[NOW]["median"] / added[BEFORE]["median"]
    result = {"direct": direct, "added": added, "cpu_ms_a_user": cpu, "ratio": ratio}
    limit = Limit("first request, never encoded: added p50, now over before", ratio, MOST)
    finish(args, result, [f"{name}: {row}" for name, row in result.items()], [limit])


def prepared_by(version: Path, args: Any, folder: Path) -> None:
    """Bundle and store of the earlier version, which the later one reads too."""
    code = (
        "import argparse, gateway, pathlib; gateway.CACHED_USERS = 0;"
        f" args = argparse.Namespace(**{vars(args)!r});"
        f" gateway.prepare(args, pathlib.Path({str(folder)!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(version / "src")}
    where = version / "benchmarks"
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=where, check=True)


async def measure(
    args: Any, folder: Path, versions: dict[str, Path]
) -> tuple[Times, dict[str, float]]:
    """Milliseconds of each user's first request, and processor time by version."""
    rng, times = random.Random(args.seed), Times({name: [] for name in (DIRECT, BEFORE, NOW)})
    with (
        mock() as upstream,
        serving(versions[BEFORE], upstream, folder, BEFORE) as before,
        serving(versions[NOW], upstream, folder, NOW) as now,
    ):
        urls = {BEFORE: before, NOW: now}
        async with client() as http:
            for url in urls.values():  # passed through: what both have to load at first
                await chat(url, None)(http)
            begin = {name: cpu_ms(url) for name, url in urls.items()}
            for number in range(args.users):
                asks: dict[str, Ask] = {DIRECT: chat(upstream, None)}
                asks |= {name: chat(url, f"person{number}") for name, url in urls.items()}
                for name in rng.sample(list(asks), len(asks)):
                    started = time.perf_counter()
                    await asks[name](http)
                    times[name].append((time.perf_counter() - started) * 1000)
                latest = {name: round(own[-1], 1) for name, own in times.items()}
                print(f"user {number}: {latest}", file=sys.stderr, flush=True)
            cpu = {name: (cpu_ms(url) - begin[name]) / args.users for name, url in urls.items()}
    return times, cpu


@contextmanager
def serving(version: Path, upstream: str, folder: Path, name: str) -> Iterator[str]:
    """A gateway of a version, with a copy of store and cache."""
    own = folder / name
    shutil.copytree(folder / "cache", own / "cache")
    shutil.copy(folder / "store.db", own / "store.db")
    environment = {**os.environ, "OPENAI_API_KEY": "none", "PYTHONPATH": str(version / "src")}
    command = [sys.executable, "-m", "hydra_llm", "serve", "--llm", f"openai:mock@{upstream}/v1"]
    command += ["--store", f"sqlite:///{own / 'store.db'}", "--bundle", str(folder / "bundle")]
    command += ["--set", "samples=8", "--set", "retrieved=10", "--set", "gate=off"]
    with server(
        command, {**environment, "HYDRA_CACHE": str(own / "cache")}, "/health/readiness"
    ) as url:
        yield url


if __name__ == "__main__":
    main()
