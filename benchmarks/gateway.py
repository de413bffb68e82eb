"""The latency that the gateway adds to an answer, beside the LiteLLM proxy if that is installed.

    python benchmarks/gateway.py [--seconds 20] [--features cross] [--soak 300] [--litellm
    VENV/bin/litellm] [--json]

Server, client and a mock upstream of fixed latency are one process each on this machine. The client
sends at a fixed rate, whether or not earlier requests have been answered. The added latency is the
client's time minus the median of direct requests to the mock in the same run. All questions and
answers differ.
    direct     requests to the mock without a gateway
    passed through    requests without a user
    personal   a user with 100 records, 10 retrieved, 8 candidates, tower features
    most       requests a second with 64 in flight
    cold       first requests of users whose history is not in the server's memory, of 1,000 users
               with 100 records each in SQLite; features of their records are cached on disk, as
               after a fit, or never encoded
    head       an online update of a head with a full window of 64 groups, without HTTP and database
    feedback   feedback requests over HTTP, one after another; each updates the head; the window is
               nearly full at the end
    soak       200 clients, each sends its next request after its answer, half of them for users;
               memory is the server's resident set
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
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx2
from measure import Limit, finish, milliseconds, options
from simulated_users import HEADLINE, LABELS, simulate_users, words

LATENCY = 0.05
SLOW_RATE = 40
"""Requests a second that a slower proxy can handle too; above its capacity only its queue is
measured.
"""
CACHED_USERS = 50
"""Users whose records' features are cached, as after a fit."""
HERE = Path(__file__).parent
COMMAND = Path(sys.executable).with_name("hydra-llm")


Series = dict[str, dict[str, float]]
"""Name → latencies in ms, rates, counts."""


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each series")
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--features", choices=("tower", "cross"), default="tower")
    parser.add_argument("--soak", type=float, default=0.0, help="seconds of 200 clients")
    parser.add_argument("--litellm", help="the command of a LiteLLM proxy in its own environment")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(measure(args, Path(folder)))
    args.litellm = args.litellm is not None  # the report names no path
    lines = [
        f"{name:<28} " + "  ".join(f"{key} {value:.2f}" for key, value in row.items())
        for name, row in result.items()
    ]
    finish(args, {"series": result}, lines, limits_of(result, args.features))


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

    our_rate, their_rate = result["passed through, most"]["per_s"], result["litellm, most"]["per_s"]
    return [
        Limit("added p50 beside LiteLLM's", ratio(""), 0.5),
        Limit("the same at a rate that both keep up with", ratio(f", {SLOW_RATE} a second"), 0.5),
        Limit("throughput beside LiteLLM's", our_rate / their_rate, 2, at_least=True),
    ]


async def measure(args: Any, folder: Path) -> Series:
    url = prepare(args, folder)
    online_update = time_online_update(folder / "bundle", folder / "cache")
    environment = {**os.environ, "OPENAI_API_KEY": "none", "HYDRA_CACHE": str(folder / "cache")}
    with mock() as upstream:
        overrides = ["--set", "samples=8", "--set", "retrieved=10", "--set", "gate=off"]
        paths = ["--store", url, "--bundle", str(folder / "bundle")]
        flags = ["--llm", f"openai:mock@{upstream}/v1", *paths, *overrides]
        direct = await at_rate(chat(upstream, None), 100, args.seconds)
        out = PrintedSeries(direct=direct, head=online_update)
        with server([str(COMMAND), "serve", *flags], environment, "/health/readiness") as gateway:
            await measure_gateway(out, gateway, args)
        if args.litellm:
            await measure_litellm(out, upstream, args, folder, environment)
    return dict(out)


async def measure_proxy(out: Series, name: str, url: str, seconds: float) -> None:
    """Requests without a user: at 100 a second, at `SLOW_RATE`, and at the maximum rate."""
    request, direct = chat(url, None), out["direct"]
    out[name] = with_added(await at_rate(request, 100, seconds), direct)
    out[f"{name}, {SLOW_RATE} a second"] = with_added(
        await at_rate(request, SLOW_RATE, seconds), direct
    )
    out[f"{name}, most"] = await saturate(request, seconds)


async def measure_gateway(out: Series, gateway: str, args: Any) -> None:
    await at_rate(chat(gateway, None), 50, 2)
    await measure_proxy(out, "passed through", gateway, args.seconds)
    names = [f"person{i}" for i in range(args.users)]
    requests, direct = [chat(gateway, name) for name in names[: 2 * CACHED_USERS]], out["direct"]
    out["cold"] = with_added(await one_by_one(requests[:CACHED_USERS]), direct)
    await at_rate(requests[0], 5, 3)
    out["personal"] = with_added(await at_rate(requests[0], 10, args.seconds), direct)
    out["personal, most"] = await saturate(requests[0], args.seconds)
    out["feedback"] = await feedback(gateway, names[1], 100)
    if args.soak:
        out["soak"] = await soak(gateway, names[:CACHED_USERS], args.soak)
    # Last, because prefetch then encodes these histories on the same cores.
    out["cold, never encoded"] = with_added(await one_by_one(requests[CACHED_USERS:]), direct)


async def measure_litellm(
    out: Series, upstream: str, args: Any, folder: Path, environment: dict[str, str]
) -> None:
    config = folder / "litellm.yaml"
    model = {"model": "openai/mock", "api_base": f"{upstream}/v1", "api_key": "none"}
    models = [{"model_name": "mock", "litellm_params": model}]
    config.write_text(json.dumps({"model_list": models}))
    # without keys, like the gateway here
    keyless = {**environment, "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
    command = [str(args.litellm), "--config", str(config), "--host", "127.0.0.1"]
    with server(command, keyless, "/health/liveliness") as proxy:
        await at_rate(chat(proxy, None), 20, 3)
        await measure_proxy(out, "litellm", proxy, args.seconds)


class PrintedSeries(dict[str, dict[str, float]]):
    """Prints each series once it is measured: a run takes minutes, and a later one may fail."""

    def __setitem__(self, name: str, row: dict[str, float]) -> None:
        super().__setitem__(name, row)
        print(f"{name}: {json.dumps(row)}", file=sys.stderr, flush=True)


# ---- bundle and store


def prepare(args: Any, folder: Path) -> str:
    """Train a bundle on simulated users, and fill a store with other users. Features of the first
    `CACHED_USERS` are cached, as after a fit. Returns the store's URL.
    """
    from hydra_llm.config import load_settings
    from hydra_llm.datasets.dataset import DataSet, Split
    from hydra_llm.llm.fake import RuleLLM
    from hydra_llm.store.store import Store
    from hydra_llm.training.api import learn
    from hydra_llm.types import Record

    settings = load_settings(
        cache=folder / "cache", features=args.features, samples=4, retrieved=4, queries_per_user=1
    )
    train_users = simulate_users(6, args.seed)
    rng = random.Random(args.seed)

    def records(name: str, count: int) -> list[Record]:
        return [
            Record(name, f"r{i}", words(LABELS[:3], 12, rng), words(LABELS[:2], 8, rng))
            for i in range(count)
        ]

    splits: dict[str, Split] = {user.name: "train" for user in train_users}
    data = DataSet.from_records(
        HEADLINE, splits, [r for name in splits for r in records(name, 12)], []
    )
    llm = RuleLLM(lambda messages, index, rng: words(LABELS[:3], 8, rng))
    bundle = learn(data, llm, settings, out=folder / "bundle").bundle
    store = Store(f"sqlite:///{folder / 'store.db'}")
    for i in range(args.users):
        own = records(f"person{i}", args.records)
        store.add_records(f"person{i}", own)
        if i < CACHED_USERS and args.features == "tower":
            bundle.features.texts(
                [text for r in own for text in (r.input, r.output, f"{r.input} → {r.output}")]
            )
    store.close()
    return f"sqlite:///{folder / 'store.db'}"


def time_online_update(folder: Path, cache: Path) -> dict[str, float]:
    """Milliseconds of `heads_after` for a user with a full window of feedback."""
    from hydra_llm.bundle import Bundle
    from hydra_llm.gateway.feedback import heads_after
    from hydra_llm.model.scorer import FEEDBACK_WINDOW
    from hydra_llm.store.values import StoredFeedback

    bundle, rng, feedbacks = Bundle.load(folder, cache=cache), random.Random(1), []
    for number in range(FEEDBACK_WINDOW):
        rights = [words(LABELS[:3], 8, rng) for _ in range(8)]
        side_features = [[rng.random() for _ in bundle.featurizer.adapter_names] for _ in rights]
        group = {
            "left": words(LABELS[:3], 8, rng),
            "rights": rights,
            "gains": [rng.random() for _ in rights],
            "evidence": side_features,
        }
        feedbacks.append(
            StoredFeedback(
                f"request{number}", float(number), {"bundle": bundle.weights, "group": group}
            )
        )
    heads_after(bundle, "person0", {}, feedbacks)
    return percentiles(
        [milliseconds(lambda: heads_after(bundle, "person0", {}, feedbacks)) for _ in range(100)]
    )


# ---- processes

PROCESSES: dict[str, int] = {}
"""URL of a server → process id."""


def resident(url: str) -> float:
    """Resident memory of a server in MB."""
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
    """Start a server on a free port; yields its URL when it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        yield from _running(command, environment, ready, port, log)


def _running(
    command: list[str], environment: dict[str, str], ready: str, port: int, log: IO[bytes]
) -> Iterator[str]:
    process = subprocess.Popen(
        [*command, "--port", str(port)], env=environment, stdout=subprocess.DEVNULL, stderr=log
    )
    url = f"http://127.0.0.1:{port}"
    PROCESSES[url] = process.pid
    try:
        deadline = time.monotonic() + 600  # on a busy machine torch alone takes a minute
        while True:
            try:
                if httpx2.get(url + ready, timeout=2).status_code == 200:
                    break
            except httpx2.HTTPError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                last = log.read().decode(errors="replace").splitlines()[-1:]
                raise SystemExit(f"{' '.join(command[:4])} did not start: {''.join(last)}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(300)


# ---- the client

Ask = Callable[[httpx2.AsyncClient], Coroutine[Any, Any, float]]


def chat(url: str, user: str | None) -> Ask:
    """A function that sends one request and returns its milliseconds."""
    body: dict[str, Any] = {"model": "mock", **({} if user is None else {"user": user})}
    rng = random.Random(0)

    async def request(client: httpx2.AsyncClient) -> float:
        body["messages"] = [{"role": "user", "content": f"what of {words(LABELS[:3], 8, rng)}?"}]
        begin = time.perf_counter()
        answer = await client.post(
            f"{url}/v1/chat/completions", json=body, headers={"authorization": "Bearer any"}
        )
        answer.raise_for_status()
        if user is not None:
            # else another path would be measured
            assert answer.headers["x-hydra-personalized"] == "true", answer.headers
        return (time.perf_counter() - begin) * 1000

    return request


def client() -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        timeout=60, limits=httpx2.Limits(max_connections=500, max_keepalive_connections=500)
    )


async def at_rate(request: Ask, per_second: float, seconds: float) -> dict[str, float]:
    """Send at a fixed rate, however many requests are in flight."""
    async with client() as http:
        await request(http)
        tasks: list[asyncio.Task[float]] = []
        begin = time.perf_counter()
        for i in range(int(per_second * seconds)):
            await asyncio.sleep(max(0.0, begin + i / per_second - time.perf_counter()))
            tasks.append(asyncio.create_task(request(http)))
        return percentiles(await asyncio.gather(*tasks))


async def feedback(gateway: str, name: str, count: int) -> dict[str, float]:
    """Milliseconds of the last half of the feedback requests, when the window is nearly full."""
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
            reply = (await http.post(f"{gateway}/v1/chat/completions", json=body)).json()
            feedback_body = {
                "request_id": reply["personalization"]["request_id"],
                "chosen": reply["personalization"]["candidates"] - 1,
            }
            begin = time.perf_counter()
            answer = await http.post(f"{gateway}/v1/feedback", json=feedback_body)
            times.append((time.perf_counter() - begin) * 1000)
            assert answer.json()["head_moved"], answer.text
    return percentiles(times[count // 2 :])


async def soak(
    gateway: str, names: list[str], seconds: float, clients: int = 200
) -> dict[str, float]:
    """Closed-loop clients for some time; answered and failed requests, and the server's memory."""
    counts, memory, deadline = {"answered": 0, "failed": 0}, [], time.perf_counter() + seconds

    async def client_loop(http: httpx2.AsyncClient, request: Ask) -> None:
        while time.perf_counter() < deadline:
            try:
                await request(http)
                counts["answered"] += 1
            except httpx2.HTTPError as error:
                counts["failed"] += 1
                detail = error.response.text if isinstance(error, httpx2.HTTPStatusError) else ""
                print(f"failed: {error!r} {detail}", file=sys.stderr, flush=True)

    async def watch_memory() -> None:
        while time.perf_counter() < deadline:
            memory.append(resident(gateway))
            await asyncio.sleep(min(10.0, seconds / 6))

    async with client() as http:
        requests = [chat(gateway, names[i % len(names)] if i % 2 else None) for i in range(clients)]
        await asyncio.gather(watch_memory(), *(client_loop(http, request) for request in requests))
    after = memory[min(6, len(memory) - 1)]
    return {
        **{name: float(value) for name, value in counts.items()},
        "memory_mb": memory[-1],
        "memory_ratio": memory[-1] / after,
    }


async def one_by_one(requests: list[Ask]) -> dict[str, float]:
    async with client() as http:
        return percentiles([await request(http) for request in requests])


async def saturate(request: Ask, seconds: float, clients: int = 64) -> dict[str, float]:
    """The maximum rate with a fixed number of clients, and the latencies."""
    times: list[float] = []

    async def client_loop(http: httpx2.AsyncClient, deadline: float) -> None:
        while time.perf_counter() < deadline:
            times.append(await request(http))

    async with client() as http:
        begin = time.perf_counter()
        await asyncio.gather(*(client_loop(http, begin + seconds) for _ in range(clients)))
        return {"per_s": len(times) / (time.perf_counter() - begin), **percentiles(times)}


def percentiles(times: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98], "max": max(times)}


def with_added(row: dict[str, float], direct: dict[str, float]) -> dict[str, float]:
    """The row with the latencies minus the median of direct requests."""
    return {**row, **{f"added_{name}": value - direct["p50"] for name, value in row.items()}}


if __name__ == "__main__":
    main()
