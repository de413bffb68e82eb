"""How soon a deletion at one server has left the memory of another one.

    python tools/with_postgres.py --required python benchmarks/deletions.py
        [--deletions 30] [--records 5] [--clients 8] [--json]

Two servers of one PostgreSQL database in front of a mock upstream (50 ms): one is a process of its
own, the other one runs here, so that its memory can be read. Users whom both have just answered are
deleted at the first one, one after the other. Measured is the time from its reply until the second
one holds nothing of the user: no record, head, index or word count, and no vector of a text that
the user alone had; it is looked at every 2 ms. `load`: both servers answer other users meanwhile,
with `--clients` requests in flight at each. Exits with 1 if the longest takes a second.
"""

import asyncio
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import uvicorn
from gateway import chat, client, mock, prepare, server
from measure import Limit, finish, options, show, summary

from hydra_llm.config import load_settings
from hydra_llm.gateway.app import make_app
from hydra_llm.gateway.deployment import Deployment
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.upstream import HttpUpstream
from hydra_llm.gateway.user_cache import texts_of
from hydra_llm.llm.endpoint import Endpoint
from hydra_llm.store.store import Store
from hydra_llm.types import Record

MOST = 1000.0  # milliseconds
LOOK_SECONDS = 0.002
BUSY = 4  # users whom both servers are asked for meanwhile
POSTGRES = "TEST_POSTGRES_URL"


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument("--deletions", type=int, default=30, help="idle, and as many under load")
    parser.add_argument("--records", type=int, default=5, help="of each user")
    parser.add_argument("--clients", type=int, default=8, help="requests in flight at each server")
    args = parser.parse_args()
    if POSTGRES not in os.environ:
        sys.exit("needs PostgreSQL: python tools/with_postgres.py --required python ...")
    with tempfile.TemporaryDirectory() as folder:
        times = measure(args, Path(folder), os.environ[POSTGRES])
    rows = {name: {**summary(own), "worst_ms": max(own)} for name, own in times.items()}
    lines = [show(name, row, f", worst {row['worst_ms']:.0f} ms") for name, row in rows.items()]
    limits = [Limit(f"worst in ms, {name}", row["worst_ms"], MOST) for name, row in rows.items()]
    finish(args, {"series": rows, "times_ms": times}, lines, limits)


def measure(args: Any, folder: Path, url: str) -> dict[str, list[float]]:
    """Milliseconds of each deletion, idle and under load."""
    names, busy = fill(args, folder, url), [f"person{i}" for i in range(BUSY)]
    os.environ |= {"HYDRA_CACHE": str(folder / "cache"), "OPENAI_API_KEY": "none"}
    store, bundle = Store(url), folder / "bundle"
    with ExitStack() as stack:
        upstream = stack.enter_context(mock())
        command = [sys.executable, "-m", "hydra_llm", "serve", "--store", url]
        command += ["--llm", f"openai:mock@{upstream}/v1", "--bundle", str(bundle)]
        for setting in ("samples=8", "retrieved=10", "gate=off"):
            command += ["--set", setting]
        first = stack.enter_context(server(command, dict(os.environ), "/health/readiness"))
        second, deployment = stack.enter_context(served_here(store, upstream, bundle))
        times = {"idle": asyncio.run(series((first, second), deployment, store, names[::2]))}
        with under_load((first, second), busy, args.clients):
            later = series((first, second), deployment, store, names[1::2])
            times["load"] = asyncio.run(later)
    return times


def fill(args: Any, folder: Path, url: str) -> list[str]:
    """Learn a bundle and put users into PostgreSQL; the names of those to be deleted."""
    about = {"users": BUSY + 2 * args.deletions, "records": args.records}
    prepare(SimpleNamespace(features="tower", seed=args.seed, **about), folder)
    store, local = Store(url), Store(f"sqlite:///{folder / 'store.db'}")
    for user in local.users():
        store.add_records(user, local.records(user)[1])
    store.close()
    local.close()
    return [f"person{i}" for i in range(BUSY, about["users"])]


@contextmanager
def served_here(store: Store, upstream: str, bundle: Path) -> Iterator[tuple[str, Deployment]]:
    """A server in a thread of this process; its address, and what it has in memory."""
    endpoint = Endpoint.of("openai:mock", f"{upstream}/v1")
    settings = ServeSettings(samples=8, retrieved=10, gate="off", log="off")
    up = HttpUpstream(endpoint, timeout=60)
    app = make_app(store, up, settings, bundle, here=load_settings())
    own = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=own.run, daemon=True)
    thread.start()
    while not own.started:
        time.sleep(0.1)
    try:
        port = own.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", app.state.gateway.deployment
    finally:
        own.should_exit = True
        thread.join()


@contextmanager
def under_load(urls: tuple[str, str], users: list[str], clients: int) -> Iterator[None]:
    """Both servers answer users, in a thread of this process."""
    ended = threading.Event()

    async def loop(http: httpx2.AsyncClient, url: str, user: str) -> None:
        ask = chat(url, user)
        while not ended.is_set():
            await ask(http)

    async def all_of_them() -> None:
        async with client() as http:
            each = [(url, users[i % len(users)]) for url in urls for i in range(clients)]
            await asyncio.gather(*(loop(http, *which) for which in each))

    thread = threading.Thread(target=asyncio.run, args=(all_of_them(),))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


async def series(
    urls: tuple[str, str], deployment: Deployment, store: Store, names: list[str]
) -> list[float]:
    """Milliseconds from the first server's reply until the second one has no trace of a user."""
    times: list[float] = []
    rng = random.Random(0)
    async with client() as http:
        for name in names:
            records = store.records(name)[1]
            for url in urls:
                await chat(url, name)(http)
            assert traces(deployment, name, records), "the user is not in memory"
            await asyncio.sleep(rng.random() / 2)  # at no fixed time between two looks of a server
            answer = await http.delete(f"{urls[0]}/v1/users/{name}")
            began = time.perf_counter()
            answer.raise_for_status()
            await asyncio.to_thread(wait_for_none, deployment, name, records)
            times.append((time.perf_counter() - began) * 1000)
            print(f"{name}: {times[-1]:.1f} ms", file=sys.stderr, flush=True)
    return times


def wait_for_none(deployment: Deployment, name: str, records: list[Record]) -> None:
    while traces(deployment, name, records):
        time.sleep(LOOK_SECONDS)


def traces(deployment: Deployment, name: str, records: list[Record]) -> bool:
    """Whether anything of a user is in a server's memory."""
    bundle, users = deployment.bundle, deployment.users
    assert bundle is not None
    retriever: Any = deployment.pipeline.retriever
    held: list[Any] = [users._recent, users._encoded, bundle.featurizer._own_words._kept]
    held += [retriever._kept, deployment.prefetching]
    vectors = bundle.features.missing(own := texts_of(records)) < len(set(own))
    return vectors or any(name in kept for kept in held)


if __name__ == "__main__":
    main()
