"""The latency that the gateway adds to an answer, over a mock upstream of fixed latency on
loopback, beside the LiteLLM proxy if that is installed.

    python benchmarks/gateway.py [--seconds 20] [--features cross] [--soak 300] [--litellm
    VENV/bin/litellm] [--json]

Server, mock and client are one process each on this machine. The client sends at a fixed rate,
whether or not earlier requests have been answered; the added latency is the client's time minus
that of direct requests to the mock in the same run. All questions and answers differ.
    personal   a user with 100 records, 10 retrieved, 8 candidates, tower features
    most       requests a second with 64 in flight
    cold       users that the server has not seen since its start, of 1,000 with 100 records each in
               SQLite; their records' features are cached, as after a fit, or never encoded
    head       an online update of a head with a full window of 64 rated answers, without HTTP and
               database
    feedback   feedback requests one after another over HTTP, each updates the head; the window is
               nearly full at the end
    soak       200 clients, each sends its next request when it has its answer, half of them for
               users; memory is the server's resident set
"""

import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from measure import Limit, finish, milliseconds, options
from simulated_users import HEADLINE, LABELS, simulate_users, words

LATENCY = 0.05
SLOW = 40
"""Requests a second that a slower proxy keeps up with as well: at more than it can do, its latency
is its queue's.
"""
KEPT = 50
"""Users whose records' features are kept, as after a fit."""
HERE = Path(__file__).parent
COMMAND = Path(sys.executable).with_name("hydra-llm")


Series = dict[str, dict[str, float]]
"""By name: latencies in ms and rates."""


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each series")
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--features", choices=("tower", "cross"), default="tower")
    parser.add_argument("--soak", type=float, default=0.0, help="seconds of 200 clients")
    parser.add_argument("--litellm", help="the command of a LiteLLM proxy in its own environment")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(measure(given, Path(folder)))
    given.litellm = given.litellm is not None  # the report names no path
    lines = [
        f"{name:<28} " + "  ".join(f"{key} {value:.2f}" for key, value in row.items())
        for name, row in result.items()
    ]
    finish(given, {"series": result}, lines, limits_of(result, given.features))


def limits_of(result: Series, features: str) -> list[Limit]:
    added, personal = result["passed through"], result["personal"]
    limits = [
        Limit("pass-through at 100/s, added p50 in ms", added["added_p50"], 5),
        Limit("pass-through at 100/s, added p99 in ms", added["added_p99"], 25),
        Limit("moving a head, p50 in ms", result["head"]["p50"], 20),
        Limit("a piece of feedback over HTTP, p50 in ms", result["feedback"]["p50"], 40),
    ]
    if features == "tower":
        worst = result["cold"]["added_max"]
        limits += [
            Limit("personal at 10/s, added p50 in ms", personal["added_p50"], 100),
            Limit("first request of a cold user, added, worst in ms", worst, 250),
        ]
    if "soak" in result:
        failed, ratio = result["soak"]["failed"], result["soak"]["memory_ratio"]
        limits += [
            Limit("200 clients: requests that failed", failed, 0),
            Limit("200 clients: memory at the end over that after a minute", ratio, 1.05),
        ]
    return limits + (beside_litellm(result) if "litellm" in result else [])


def beside_litellm(result: Series) -> list[Limit]:
    def ratio(name: str) -> float:
        ours, theirs = (result[f"{proxy}{name}"] for proxy in ("passed through", "litellm"))
        return ours["added_p50"] / theirs["added_p50"]

    most, theirs = result["passed through, most"]["per_s"], result["litellm, most"]["per_s"]
    return [
        Limit("added p50 beside LiteLLM's", ratio(""), 0.5),
        Limit("the same at a rate that both keep up with", ratio(f", {SLOW} a second"), 0.5),
        Limit("throughput beside LiteLLM's", most / theirs, 2, at_least=True),
    ]


async def measure(given: Any, folder: Path) -> Series:
    url = prepare(given, folder)
    head = head_alone(folder / "bundle", folder / "cache")
    environment = {**os.environ, "OPENAI_API_KEY": "none", "HYDRA_CACHE": str(folder / "cache")}
    with mock() as upstream:
        asked = ["--set", "candidates=8", "--set", "retrieved=10"]
        places = ["--store", url, "--bundle", str(folder / "bundle")]
        flags = ["--llm", f"openai:mock@{upstream}/v1", *places, *asked]
        direct = await steady(chat(upstream, None), 100, given.seconds)
        out = Told(direct=direct, head=head)
        with server([str(COMMAND), "serve", *flags], environment, "/health/readiness") as gateway:
            await measure_gateway(out, gateway, given)
        if given.litellm:
            await measure_litellm(out, upstream, given, folder, environment)
    return dict(out)


async def proxied(out: Series, name: str, url: str, seconds: float) -> None:
    """Requests without a user: at 100 a second, at few, and as many as go through."""
    ask, direct = chat(url, None), out["direct"]
    out[name] = minus(await steady(ask, 100, seconds), direct)
    out[f"{name}, {SLOW} a second"] = minus(await steady(ask, SLOW, seconds), direct)
    out[f"{name}, most"] = await flat_out(ask, seconds)


async def measure_gateway(out: Series, gateway: str, given: Any) -> None:
    await steady(chat(gateway, None), 50, 2)
    await proxied(out, "passed through", gateway, given.seconds)
    names = [f"person{i}" for i in range(given.users)]
    asks, direct = [chat(gateway, name) for name in names[: 2 * KEPT]], out["direct"]
    out["cold"] = minus(await one_by_one(asks[:KEPT]), direct)
    await steady(asks[0], 5, 3)
    out["personal"] = minus(await steady(asks[0], 10, given.seconds), direct)
    out["personal, most"] = await flat_out(asks[0], given.seconds)
    out["feedback"] = await feedback(gateway, names[1], 100)
    if given.soak:
        out["soak"] = await soak(gateway, names[:KEPT], given.soak)
    # Last: their histories are encoded behind it, on the same cores.
    out["cold, never encoded"] = minus(await one_by_one(asks[KEPT:]), direct)


async def measure_litellm(
    out: Series, upstream: str, given: Any, folder: Path, environment: dict[str, str]
) -> None:
    config = folder / "litellm.yaml"
    model = {"model": "openai/mock", "api_base": f"{upstream}/v1", "api_key": "none"}
    models = [{"model_name": "mock", "litellm_params": model}]
    config.write_text(json.dumps({"model_list": models}))
    # no keys here, as there
    keyless = {**environment, "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
    command = [str(given.litellm), "--config", str(config), "--host", "127.0.0.1"]
    with server(command, keyless, "/health/liveliness") as proxy:
        await steady(chat(proxy, None), 20, 3)
        await proxied(out, "litellm", proxy, given.seconds)


class Told(dict[str, dict[str, float]]):
    """Series that are told as soon as they are there: the whole takes minutes, and a later one may
    fail.
    """

    def __setitem__(self, name: str, row: dict[str, float]) -> None:
        super().__setitem__(name, row)
        print(f"{name}: {json.dumps(row)}", file=sys.stderr, flush=True)


# ---- what is served


def prepare(given: Any, folder: Path) -> str:
    """A bundle of simulated users, and a store of others with their records; every record's
    features are kept, as after a fit.
    """
    from hydra_llm.config import load_settings
    from hydra_llm.datasets.dataset import DataSet
    from hydra_llm.llm.fake import RuleLLM
    from hydra_llm.store.store import Store
    from hydra_llm.training.api import learn
    from hydra_llm.types import Record

    settings = load_settings(
        cache=folder / "cache", features=given.features, samples=4, retrieved=4, queries_per_user=1
    )
    teachers = simulate_users(6, given.seed)
    dice = random.Random(given.seed)

    def records(name: str, count: int) -> list[Record]:
        return [
            Record(name, f"r{i}", words(LABELS[:3], 12, dice), words(LABELS[:2], 8, dice))
            for i in range(count)
        ]

    train = {person.name: "train" for person in teachers}
    data = DataSet.from_records(
        HEADLINE, train, [r for name in train for r in records(name, 12)], []
    )  # type: ignore[arg-type]
    said = RuleLLM(lambda messages, index, rng: words(LABELS[:3], 8, rng))
    bundle = learn(data, said, settings, out=folder / "bundle").bundle
    store = Store(f"sqlite:///{folder / 'store.db'}")
    for i in range(given.users):
        own = records(f"person{i}", given.records)
        store.add_records(f"person{i}", own)
        if i < KEPT and given.features == "tower":
            bundle.store.texts(
                [text for r in own for text in (r.input, r.output, f"{r.input} → {r.output}")]
            )
    store.close()
    return f"sqlite:///{folder / 'store.db'}"


def head_alone(folder: Path, cache: Path) -> dict[str, float]:
    """Milliseconds of `heads_after` for a user whose window is full."""
    from hydra_llm.bundle import Bundle
    from hydra_llm.gateway.feedback import heads_after
    from hydra_llm.model.scorer import FEEDBACK_WINDOW
    from hydra_llm.store.values import StoredFeedback

    bundle, dice, judged = Bundle.load(folder, cache=cache), random.Random(1), []
    for place in range(FEEDBACK_WINDOW):
        rights = [words(LABELS[:3], 8, dice) for _ in range(8)]
        evidence = [[dice.random() for _ in bundle.featurizer.adapter_names] for _ in rights]
        group = {
            "left": words(LABELS[:3], 8, dice),
            "rights": rights,
            "gains": [dice.random() for _ in rights],
            "evidence": evidence,
        }
        judged.append(
            StoredFeedback(
                f"request{place}", float(place), {"bundle": bundle.weights, "group": group}
            )
        )
    heads_after(bundle, "person0", {}, judged)
    return spread(
        [milliseconds(lambda: heads_after(bundle, "person0", {}, judged)) for _ in range(100)]
    )


# ---- processes

PROCESSES: dict[str, int] = {}
"""Of each server's URL."""


def resident(url: str) -> float:
    """Megabytes of a server's memory."""
    pages = int(Path(f"/proc/{PROCESSES[url]}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def mock() -> Iterator[str]:
    with server(
        [sys.executable, str(HERE / "mock_upstream.py"), "--latency", str(LATENCY)],
        dict(os.environ),
        "/v1/models",
    ) as url:
        yield url


@contextmanager
def server(command: list[str], environment: dict[str, str], ready: str) -> Iterator[str]:
    """A server process at a free port, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    PROCESSES[url] = process.pid
    try:
        ends = time.monotonic() + 120
        while True:
            try:
                if httpx2.get(url + ready, timeout=2).status_code == 200:
                    break
            except httpx2.HTTPError:
                pass
            if process.poll() is not None or time.monotonic() > ends:
                raise SystemExit(f"{command[0]} does not come up")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


# ---- the client

Ask = Callable[[httpx2.AsyncClient], Awaitable[float]]


def chat(url: str, user: str | None) -> Ask:
    """One request; its milliseconds."""
    body: dict[str, Any] = {"model": "mock", **({} if user is None else {"user": user})}
    dice = random.Random(0)

    async def ask(client: httpx2.AsyncClient) -> float:
        body["messages"] = [{"role": "user", "content": f"what of {words(LABELS[:3], 8, dice)}?"}]
        begin = time.perf_counter()
        answer = await client.post(
            f"{url}/v1/chat/completions", json=body, headers={"authorization": "Bearer any"}
        )
        answer.raise_for_status()
        if user is not None:
            assert answer.headers["x-hydra-personalized"] == "true", (
                answer.headers
            )  # another path than the one that is measured
        return (time.perf_counter() - begin) * 1000

    return ask


def client() -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        timeout=60, limits=httpx2.Limits(max_connections=500, max_keepalive_connections=500)
    )


async def steady(ask: Ask, per_second: float, seconds: float) -> dict[str, float]:
    """At a fixed rate, whatever is still under way."""
    async with client() as http:
        await ask(http)
        tasks, begin = [], time.perf_counter()
        for i in range(int(per_second * seconds)):
            await asyncio.sleep(max(0.0, begin + i / per_second - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(http)))
        return spread(await asyncio.gather(*tasks))


async def feedback(gateway: str, name: str, count: int) -> dict[str, float]:
    """Milliseconds of each piece of feedback, of the last half: by then the window is full or
    nearly so.
    """
    times = []
    async with client() as http:
        for i in range(count):
            body = {
                "model": "mock",
                "user": name,
                "messages": [
                    {
                        "role": "user",
                        "content": f"what of {i} and {words(LABELS[:3], 6, random.Random(i))}?",
                    }
                ],
            }
            made = (await http.post(f"{gateway}/v1/chat/completions", json=body)).json()
            said = {
                "request_id": made["personalization"]["request_id"],
                "chosen": made["personalization"]["candidates"] - 1,
            }
            begin = time.perf_counter()
            answer = await http.post(f"{gateway}/v1/feedback", json=said)
            times.append((time.perf_counter() - begin) * 1000)
            assert answer.json()["head_moved"], answer.text
    return spread(times[count // 2 :])


async def soak(
    gateway: str, names: list[str], seconds: float, at_once: int = 200
) -> dict[str, float]:
    """Clients that never rest, and what the server's memory does meanwhile."""
    counts, memory, ends = {"answered": 0, "failed": 0}, [], time.perf_counter() + seconds

    async def on_and_on(http: httpx2.AsyncClient, ask: Ask) -> None:
        while time.perf_counter() < ends:
            try:
                await ask(http)
                counts["answered"] += 1
            except httpx2.HTTPError as error:
                counts["failed"] += 1
                told = error.response.text if isinstance(error, httpx2.HTTPStatusError) else ""
                print(f"failed: {error!r} {told}", file=sys.stderr, flush=True)

    async def look() -> None:
        while time.perf_counter() < ends:
            memory.append(resident(gateway))
            await asyncio.sleep(min(10.0, seconds / 6))

    async with client() as http:
        asks = [chat(gateway, names[i % len(names)] if i % 2 else None) for i in range(at_once)]
        await asyncio.gather(look(), *(on_and_on(http, ask) for ask in asks))
    after = memory[min(6, len(memory) - 1)]
    return {
        **{name: float(value) for name, value in counts.items()},
        "memory_mb": memory[-1],
        "memory_ratio": memory[-1] / after,
    }


async def one_by_one(asks: list[Ask]) -> dict[str, float]:
    async with client() as http:
        return spread([await ask(http) for ask in asks])


async def flat_out(ask: Ask, seconds: float, at_once: int = 64) -> dict[str, float]:
    """As many as go through."""
    times: list[float] = []

    async def on_and_on(http: httpx2.AsyncClient, ends: float) -> None:
        while time.perf_counter() < ends:
            times.append(await ask(http))

    async with client() as http:
        begin = time.perf_counter()
        await asyncio.gather(*(on_and_on(http, begin + seconds) for _ in range(at_once)))
        return {"per_s": len(times) / (time.perf_counter() - begin), **spread(times)}


def spread(times: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98], "max": max(times)}


def minus(row: dict[str, float], direct: dict[str, float]) -> dict[str, float]:
    """With what was added to the mock's own median."""
    return {**row, **{f"added_{name}": value - direct["p50"] for name, value in row.items()}}


if __name__ == "__main__":
    main()
