"""Calls at once: found by the endpoint's answers (`concurrency = auto`), beside a fixed 8.

    python benchmarks/calls_at_once.py [--calls 3000] [--seeds 5] [--json]

Endpoints are simulated in an event loop whose clock jumps to the next event; `map_calls` and the
limiter are the real ones. An answer takes a second on average (lognormal, sigma 0.5).

    refuses   answers 429 with `Retry-After: 1` to what is beyond its capacity, after 50 ms
    queues    what is beyond its capacity waits for a place
    shares    a server with continuous batching: an answer takes (1 + n/32) times as long with n

    fixed     8 at once; a 429 is sent again after its wait, three times (as the SDK alone did)
    auto      the limiter

`share` is of what the endpoint can do: calls / capacity seconds (shares: 32 calls a second). `lost`
calls are those that failed. Figures depend on the seed alone. Exits with 1 if a limit is missed.
"""

import argparse
import asyncio
import random
import statistics
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio
from measure import Limit, finish

from hydra_llm.errors import LLMError
from hydra_llm.llm import limiter as limits
from hydra_llm.llm.concurrency import PARALLEL, map_calls
from hydra_llm.llm.limiter import Limiter

RETRIES, WAIT, REFUSAL, SIGMA = 3, 1.0, 0.05, 0.5
CASES = [("refuses", c) for c in (2, 4, 8, 20, 64, 150)]
CASES += [("queues", c) for c in (1, 2, 8, 20, 64)]
CASES += [("shares", 32)]
Send = Callable[[int], Awaitable[int]]


class JumpingLoop(asyncio.SelectorEventLoop):
    """Its clock jumps to the next event: hours pass in no time."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        own: Any = self
        if not own._ready and own._scheduled:
            self.now = max(self.now, own._scheduled[0]._when)
        own_super: Any = super()
        own_super._run_once()


class Endpoint:
    """Answers a call with a status, after simulated seconds."""

    def __init__(self, kind: str, capacity: int, seed: int):
        self.kind, self.capacity, self.random = kind, capacity, random.Random(seed)
        self.inside = self.most = self.refused = 0
        self.places = anyio.Semaphore(capacity)

    async def send(self, call: int) -> int:
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            seconds = self.random.lognormvariate(-(SIGMA**2) / 2, SIGMA)
            if self.kind == "refuses" and self.inside > self.capacity:
                self.refused += 1
                await anyio.sleep(REFUSAL)
                return 429
            if self.kind == "queues":
                async with self.places:
                    await anyio.sleep(seconds)
            else:
                load = self.inside / self.capacity if self.kind == "shares" else 0.0
                await anyio.sleep(seconds * (1 + load))
            return 200
        finally:
            self.inside -= 1


async def fixed(endpoint: Endpoint, call: int) -> int:
    for _ in range(RETRIES + 1):
        if await endpoint.send(call) == 200:
            return call
        await anyio.sleep(WAIT)
    raise LLMError("HTTP 429")


async def limited(endpoint: Endpoint, limiter: Limiter, call: int) -> int:
    again, attempts = False, 0
    while attempts <= RETRIES:
        async with limiter.request(again=again) as sent:
            status = await endpoint.send(call)
        if status == 200:
            limiter.saw(sent, 200, {})
            return call
        if not (again := limiter.saw(sent, status, {"retry-after": str(WAIT)})):
            attempts += 1
    raise LLMError("HTTP 429")


async def run(how: str, kind: str, capacity: int, calls: int, seed: int) -> dict[str, float]:
    """One run's figures."""
    loop = asyncio.get_running_loop()
    endpoint, limiter, seen = Endpoint(kind, capacity, seed), Limiter(), list[int]()
    one: Send = partial(fixed, endpoint)
    at_once: Any = PARALLEL
    if how == "auto":
        one = partial(limited, endpoint, limiter)
        at_once = lambda: max(PARALLEL, limiter.limit)  # noqa: E731

    def progress(done: int, total: int) -> None:
        if how == "auto" and done > total // 3:
            seen.append(limiter.limit)

    results = await map_calls(one, range(calls), at_once, progress)
    lost = sum(isinstance(result, LLMError) for result in results)
    assert all(r == n for n, r in enumerate(results) if not isinstance(r, LLMError)), "order"
    seconds = loop.time()
    return {
        "seconds": seconds,
        "share": (calls - lost) / capacity / seconds,
        "refused": endpoint.refused,
        "lost": lost,
        "at_once": statistics.mean(seen) if seen else PARALLEL,
        "most": endpoint.most,
    }


def simulated(how: str, kind: str, capacity: int, calls: int, seed: int) -> dict[str, float]:
    loop = JumpingLoop()
    limits.clock = loop.time  # type: ignore[assignment]
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(run(how, kind, capacity, calls, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows, checked = [], []
    for kind, capacity in CASES:
        row: dict[str, Any] = {"endpoint": kind, "capacity": capacity}
        for how in ("fixed", "auto"):
            own = [simulated(how, kind, capacity, options.calls, s) for s in range(options.seeds)]
            for name in own[0]:
                values = [one[name] for one in own]
                row[f"{how}_{name}"] = round(statistics.median(values), 3)
                if name == "share":
                    row[f"{how}_{name}_range"] = [round(min(values), 3), round(max(values), 3)]
        row["speedup"] = round(row["fixed_seconds"] / row["auto_seconds"], 2)
        rows.append(row)
        checked.append(Limit(f"{kind} {capacity}: lost", row["auto_lost"], 0))
        if capacity > PARALLEL:
            checked.append(Limit(f"{kind} {capacity}: speedup", row["speedup"], 1.0, at_least=True))
    finish(options, {"rows": rows}, lines(rows), checked)


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The printed table."""
    head = "endpoint  capacity   share fixed, auto   429s fixed, auto   lost   at once, most"
    return [head] + [
        f"{row['endpoint']:<9} {row['capacity']:>8}"
        f"   {row['fixed_share']:>11.2f} {row['auto_share']:>6.2f}"
        f"   {row['fixed_refused']:>10.0f} {row['auto_refused']:>6.0f}   {row['fixed_lost']:>4.0f}"
        f" {row['auto_at_once']:>9.1f} {row['auto_most']:>5.0f}"
        for row in rows
    ]


if __name__ == "__main__":
    main()
