"""How many requests a second the gateway answers at most, passed through and personal, with one
worker and with two: beside the mock upstream itself, an earlier version, and the LiteLLM proxy.

    python benchmarks/saturation.py [--before COMMIT] [--litellm VENV/bin/litellm] [--rounds 5]
        [--seconds 10] [--folder FOLDER] [--precision fastest] [--json]

All of them run at the same time in front of one mock upstream (50 ms) and are asked one after the
other, in an order that is drawn anew in each round, with 64 requests in flight. Personal requests
are those of `gateway.py`: users with 100 records each in SQLite, 10 retrieved, 8 candidates,
features `tower`; all questions and answers differ. Processor time is that of the server's
processes together, for a request that was answered: load on the machine changes it less than the
rate. `--folder` keeps the bundle and the users between runs. `--precision` is the server's setting
`encoder_precision` in this version, whose features are encoded anew before the first round.
"""

import asyncio
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
from gateway import CACHED_USERS, PROCESSES, chat, client, mock, prepare, saturate, server
from measure import Limit, finish, options
from pass_through import ROOT, checkout, cpu_ms

USERS = 8
LITELLM_READY = "/health/liveliness"
Row = dict[str, float]


class Target:
    """A server, and the requests that it is asked, in turn."""

    def __init__(self, url: str, *users: str):
        self.url, self.asked = url, 0
        self._asks = [chat(url, user) for user in users or (None,)]

    async def ask(self, http: httpx2.AsyncClient) -> float:
        """Milliseconds of the next request."""
        self.asked += 1
        return await self._asks[self.asked % len(self._asks)](http)


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument("--before", help="a commit")
    parser.add_argument("--litellm", help="the command of a LiteLLM proxy of its own environment")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each series in a round")
    parser.add_argument("--clients", type=int, default=64, help="requests in flight")
    parser.add_argument("--warm", type=float, default=0.0, help="seconds before the first round")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8", "fastest"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = args.folder or Path(name)
        if not (folder / "store.db").exists():
            about = {"features": "tower", "seed": args.seed, "records": 100}
            prepare(SimpleNamespace(users=CACHED_USERS, **about), folder)
        targets = started(stack, args, folder, Path(name))
        rounds = asyncio.run(measure(targets, args))
    series = {key: spread([row[key] for row in rounds]) for key in rounds[0]}
    args.litellm, args.folder = args.litellm is not None, None  # the report names no path
    lines = [
        f"{key:<32} {row['per_s']:8.1f} a second ({row['per_s_least']:.1f} to"
        f" {row['per_s_most']:.1f}), {row['cpu_ms']:7.2f} ms of processor time a request"
        for key, row in series.items()
    ]
    finish(args, {"series": series, "rounds": rounds}, lines, limits_of(series))


def limits_of(series: dict[str, Row]) -> list[Limit]:
    limits = []
    if (before := series.get("personal, before")) and (now := series.get("personal, 1 worker")):
        ratio = before["cpu_ms"] / now["cpu_ms"]
        name = "personal: processor time before over that of now"
        limits.append(Limit(name, ratio, 2, at_least=True))
    if litellm := series.get("passed through, LiteLLM"):
        ratio = series["passed through, 1 worker"]["per_s"] / litellm["per_s"]
        limits.append(Limit("throughput beside LiteLLM's", ratio, 2, at_least=True))
    return limits


def started(stack: ExitStack, args: Any, folder: Path, temporary: Path) -> dict[str, Target]:
    """Series → whom it asks; the servers run until the stack is closed."""
    upstream = stack.enter_context(mock())
    targets, users = {"direct": Target(upstream)}, [f"person{i}" for i in range(USERS)]
    versions = {"1 worker": (ROOT, 1), "2 workers": (ROOT, 2)}
    if args.before:
        versions["before"] = (stack.enter_context(checkout(args.before, temporary)), 1)
    for name, (version, workers) in versions.items():
        url = stack.enter_context(serving(version, workers, upstream, folder, args))
        targets[f"passed through, {name}"] = Target(url)
        targets[f"personal, {name}"] = Target(url, *users)
    if args.litellm:
        for name, workers in (("LiteLLM", 1), ("LiteLLM, 2 workers", 2)):
            url = stack.enter_context(litellm(args.litellm, workers, upstream, temporary))
            targets[f"passed through, {name}"] = Target(url)
    return targets


@contextmanager
def serving(version: Path, workers: int, upstream: str, folder: Path, args: Any) -> Iterator[str]:
    """A gateway of a version, on the store and bundle in a folder; its address."""
    environment = {**os.environ, "OPENAI_API_KEY": "none", "HYDRA_CACHE": str(folder / "cache")}
    environment["PYTHONPATH"] = str(version / "src")
    command = [sys.executable, "-m", "hydra_llm", "serve", "--llm", f"openai:mock@{upstream}/v1"]
    command += ["--store", f"sqlite:///{folder / 'store.db'}", "--bundle", str(folder / "bundle")]
    chosen = ["samples=8", "retrieved=10", "gate=off", f"workers={workers}"]
    if version == ROOT and args.precision:
        chosen.append(f"encoder_precision={args.precision}")
    command += [part for setting in chosen for part in ("--set", setting)]
    with server(command, environment, "/health/readiness") as url:
        yield url


@contextmanager
def litellm(command: str, workers: int, upstream: str, folder: Path) -> Iterator[str]:
    model = f"{{model: openai/mock, api_base: '{upstream}/v1', api_key: none}}"
    config = folder / "litellm.yaml"
    config.write_text(f"model_list: [{{model_name: mock, litellm_params: {model}}}]\n")
    keyless = {**os.environ, "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
    keyless.pop("PYTHONPATH", None)
    flags = ["--config", str(config), "--host", "127.0.0.1", "--num_workers", str(workers)]
    with server([command, *flags], keyless, LITELLM_READY) as url:
        yield url


async def measure(targets: dict[str, Target], args: Any) -> list[dict[str, Row]]:
    rng, rounds = random.Random(args.seed), []
    async with client() as http:
        for target in targets.values():
            for _ in range(2 * USERS):
                await target.ask(http)
    await asyncio.sleep(args.warm)
    for _ in range(args.rounds):
        row, names = dict[str, Row](), list(targets)
        rng.shuffle(names)
        for name in names:
            target = targets[name]
            begin, asked = cpu_of_all(target.url), target.asked
            row[name] = await saturate(target.ask, args.seconds, args.clients)
            spent = cpu_of_all(target.url) - begin
            row[name]["cpu_ms"] = spent / (target.asked - asked)
            print(name, row[name], file=sys.stderr, flush=True)
        rounds.append({name: row[name] for name in targets})
    return rounds


def cpu_of_all(url: str) -> float:
    """Milliseconds of processor time of a server's process and of those that it has started."""
    own, total = [PROCESSES[url]], 0.0
    while own:
        pid = own.pop()
        total += cpu_ms(url, pid)
        own += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return total


def spread(rows: list[Row]) -> Row:
    """Medians over the rounds, and the ends of the rates."""
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    rates = [row["per_s"] for row in rows]
    return {**medians, "per_s_least": min(rates), "per_s_most": max(rates)}


if __name__ == "__main__":
    main()
