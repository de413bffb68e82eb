"""The first personal request of users whose history was never encoded, beside an earlier version.

    python benchmarks/cold_requests.py --before COMMIT [--users 60] [--parts 3] [--records 100]
        [--precision fastest] [--json]

Both versions serve copies of the same bundle and store in front of one mock upstream (50 ms), one
version at a time, so that neither works beside the other. In each part, in an order that is drawn
anew, a third of the users ask each version once, one after the other, with a direct request to the
mock beside them; the histories of users who have asked are being encoded meanwhile, as in use. The
added latency is a version's median minus the mock's. A server's processor time is told too: it
includes what was encoded until the last answer. `--precision` is the server's setting
`encoder_precision` in this version.
"""

import asyncio
import os
import random
import shutil
import statistics
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
    parser.add_argument("--parts", type=int, default=3)
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8", "fastest"))
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
    """Milliseconds of each user's first request, and processor time a user by version."""
    rng, times = random.Random(args.seed), Times({name: [] for name in (DIRECT, BEFORE, NOW)})
    cpu = dict.fromkeys(versions, 0.0)
    with mock() as upstream:
        for part in range(args.parts):
            users = range(part, args.users, args.parts)
            for name in rng.sample(list(versions), len(versions)):
                precision = args.precision if name == NOW else None
                with serving(versions[name], upstream, folder, name, precision) as url:
                    async with client() as http:
                        await chat(url, None)(http)  # passed through: what it has to load at first
                        begin = cpu_ms(url)
                        for user in users:
                            asks: dict[str, Ask] = {DIRECT: chat(upstream, None)}
                            asks[name] = chat(url, f"person{user}")
                            for asked in rng.sample(list(asks), 2):
                                started = time.perf_counter()
                                await asks[asked](http)
                                times[asked].append((time.perf_counter() - started) * 1000)
                        cpu[name] += (cpu_ms(url) - begin) / args.users
                asked = {key: own for key, own in times.items() if own}
                medians = {key: round(statistics.median(own), 1) for key, own in asked.items()}
                print(f"part {part + 1} of {args.parts}: {medians}", file=sys.stderr, flush=True)
    return times, cpu


@contextmanager
def serving(
    version: Path, upstream: str, folder: Path, name: str, precision: str | None
) -> Iterator[str]:
    """A gateway of a version, with a copy of store and cache."""
    own = folder / name
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(folder / "cache", own / "cache")
    shutil.copy(folder / "store.db", own / "store.db")
    environment = {**os.environ, "OPENAI_API_KEY": "none", "PYTHONPATH": str(version / "src")}
    hydra, store = [sys.executable, "-m", "hydra_llm"], f"sqlite:///{own / 'store.db'}"
    subprocess.run([*hydra, "store", "migrate", "--store", store], env=environment, check=True)
    command = [*hydra, "serve", "--llm", f"openai:mock@{upstream}/v1"]
    command += ["--store", store, "--bundle", str(folder / "bundle")]
    command += ["--set", "samples=8", "--set", "retrieved=10", "--set", "gate=off"]
    command += ["--set", f"encoder_precision={precision}"] if precision else []
    with server(
        command, {**environment, "HYDRA_CACHE": str(own / "cache")}, "/health/readiness"
    ) as url:
        yield url


if __name__ == "__main__":
    main()
