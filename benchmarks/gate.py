"""What the gate lets pass: requests that do not belong to the task, and new users' own queries.

    python benchmarks/gate.py DATA [--only NAME ...] [--llm SPEC] [--requests 200] [--out FOLDER]

DATA is the folder of the data sets (`DATA/news_category`, ...), which are not part of this
repository. For each of them the gate alone is learned from the training users (no LLM is asked).
Rows: the share of the requests in `benchmarks/gate/*.jsonl` that pass, and of new users' own
queries, each as the question alone, without the task's instruction. A request passes if it belongs
to the task and a record of the user that it is asked for passes the floor; the users take turns.
    bundle         the learned gate
    no bundle      the gate that compares words with the user's own records (gate.LexicalGate)
    gateway        the real gateway with the learned gate: requests answered as personal. The
                   upstream is a fake LLM, or with --llm a real one, such as gguf:MODEL
Writes gate.json and gate.md; --only replaces the rows of these sets. Exits with 1 if more than 2 %
of `off_task` pass a learned gate, or less than 97 % of the own queries.
"""

import argparse
import asyncio
import gzip
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx2

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings, load_settings
from hydra_llm.context import Context
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import load
from hydra_llm.gate import LexicalGate
from hydra_llm.gateway.app import make_app
from hydra_llm.gateway.embedded import open_upstream
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.llm.registry import bare_llm
from hydra_llm.pipeline import Pipeline
from hydra_llm.retrieve import make_retriever
from hydra_llm.store.store import Store
from hydra_llm.tasks.base import Task
from hydra_llm.training.api import blank_bundle
from hydra_llm.training.gate import fit_gate
from hydra_llm.types import Query, Record

HERE = Path(__file__).parent
MOST_OFF, LEAST_OWN = 0.02, 0.97
MOST_QUERIES = 700
Asked = list[tuple[str, str]]
"""User and question."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="+", help="some of the data sets")
    parser.add_argument("--llm", help="the gateway's upstream; default: a fake")
    parser.add_argument("--requests", type=int, default=200, help="of each kind, to the gateway")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    names = args.only or sorted(path.parent.name for path in args.data.glob("*/task.json"))
    kept = args.out / "gate.json"
    result = json.loads(kept.read_text(encoding="utf-8")) if args.only and kept.exists() else {}
    result |= {name: measure(args.data / name, args) for name in names}
    (args.out / "gate.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (args.out / "gate.md").write_text(table(result), encoding="utf-8")
    print(table(result))
    sys.exit(any(missed(entry["bundle"]) for entry in result.values()))


def missed(rows: dict[str, list[int]]) -> bool:
    """Whether the learned gate misses a limit."""
    off, own = rows["off_task"], rows["own"]
    return off[0] > MOST_OFF * off[1] or own[0] < LEAST_OWN * own[1]


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Passed and asked, by way and kind of request."""
    data, settings = opened(folder), load_settings()
    bundle = learned(data, settings)
    users = [user for user in data.users("test") if data.history(user)]
    turns = cycle(users)
    asked: dict[str, Asked] = {
        path.stem: [(next(turns), text) for text in last_questions(path)]
        for path in sorted((HERE / "gate").glob("*.jsonl"))
    }
    own = [(user, query.input) for user in users for query in data.queries(user)]
    random.Random(0).shuffle(own)
    asked["own"] = own[:MOST_QUERIES]
    words = Pipeline(
        Task("any", "generation", "{input}"), make_retriever("bm25"), settings, gate=LexicalGate()
    )
    ways = {"bundle": bundle.pipeline(), "no bundle": words}
    out: dict[str, Any] = {
        way: {kind: passed(stages, data, rows) for kind, rows in asked.items()}
        for way, stages in ways.items()
    }
    few = {kind: rows[: args.requests] for kind, rows in asked.items()}
    out["gateway"] = asyncio.run(through_gateway(bundle, data, few, args.llm))
    out["learning"] = dict(bundle.report)
    print(folder.name, json.dumps(out), flush=True)
    return out


def opened(folder: Path) -> DataSet:
    """A data set; recorded choices are records whose answer was chosen."""
    if not (choices := folder / "choices.jsonl.gz").exists():
        return load(folder)
    task = Task.from_json(json.loads((folder / "task.json").read_text()) | {"metrics": []})
    users = map(json.loads, (folder / "users.jsonl").read_text().splitlines())
    splits = {row["user"]: row["split"] for row in users}
    earlier: list[Record] = []
    queries: list[Query] = []
    with gzip.open(choices, "rt", encoding="utf-8") as lines:
        for position, row in enumerate(map(json.loads, lines)):
            user, answer = row["user"], row["candidates"][row["chosen"]]
            if row["part"] == "query":
                queries.append(Query(user, row["id"], row["input"], answer))
            else:
                record = Record(user, row["id"], row["input"], answer, position=position)
                earlier.append(record)
    return DataSet.from_records(task, splits, earlier, queries)


def learned(data: DataSet, settings: Settings) -> Bundle:
    """A bundle that has learned nothing but its gate."""
    users = data.users("train")
    records = {user: data.answered(user) for user in users if data.history(user)}
    llm = RuleLLM(lambda messages, index, dice: "none")
    few = {user: records[user][:10] for user in list(records)[:20]}  # for statistics not used here
    blank = blank_bundle(data.task, llm, settings, few)
    bundle = replace(blank, records=records, trained_on=tuple(records))
    fit_gate(bundle)  # encodes: the second one is timed
    started = time.process_time()
    gate, report = fit_gate(bundle)
    report["cpu_seconds"] = round(time.process_time() - started, 2)
    return replace(bundle, gate=gate, report=report)


def last_questions(path: Path) -> Iterator[str]:
    """The last user message of each conversation."""
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["messages"][-1]["content"]


def passed(stages: Pipeline, data: DataSet, asked: Asked) -> list[int]:
    """How many requests would see records, and how many there are."""
    count = 0
    for user, text in asked:
        context: Context = stages.context(Query(user, "asked", text), data.history(user))
        if stages.belongs(context, in_task_words=False):
            ranked = stages.rerank(context, stages.retrieve(context))
            count += bool(stages.relevant(context, ranked, in_task_words=False))
    return [count, len(asked)]


async def through_gateway(
    bundle: Bundle, data: DataSet, asked: dict[str, Asked], spec: str | None
) -> dict[str, list[int]]:
    """Requests that the gateway answered as personal, and all of them."""
    settings, llm = load_settings(), RuleLLM(lambda messages, index, dice: "none")
    model = bare_llm(spec, settings) if spec else llm
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        store = Store(f"sqlite:///{folder}/users.db")
        for user in {user for rows in asked.values() for user, _ in rows}:
            store.add_records(user, data.history(user))
        saved = bundle.without_people(str).save(Path(folder) / "bundle")
        upstream = open_upstream(spec or "fake:echo", model, timeout=600)
        app = make_app(store, upstream, ServeSettings(), bundle=saved, llm=model, here=settings)
        transport = httpx2.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http,
        ):
            out = {kind: await personal(http, rows) for kind, rows in asked.items()}
        store.close()
    return out


async def personal(http: httpx2.AsyncClient, asked: Sequence[tuple[str, str]]) -> list[int]:
    count, model = 0, (await http.get("/v1/models")).json()["data"][0]["id"]
    for user, text in asked:
        body = {
            "model": model,
            "user": user,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 8,
        }
        answer = await http.post("/v1/chat/completions", json=body, timeout=600)
        answer.raise_for_status()
        count += answer.headers["x-hydra-personalized"] == "true"
    return [count, len(asked)]


def table(result: dict[str, Any]) -> str:
    """Shares with Wilson intervals, as Markdown."""
    kinds = list(dict.fromkeys(kind for entry in result.values() for kind in entry["bundle"]))
    lines = [
        "# What the gate lets pass",
        "",
        "Written by `benchmarks/gate.py`. Percent of requests that see records, with 95 % Wilson"
        " intervals; `own` are new users' queries without the task's instruction.",
        "",
        f"| data set | gate | {' | '.join(kinds)} |",
        f"|---|---|{'---|' * len(kinds)}",
    ]
    for name, entry in result.items():
        for way in ("bundle", "no bundle", "gateway"):
            cells = " | ".join(cell(*entry[way][kind]) for kind in kinds)
            lines.append(f"| {name} | {way} | {cells} |")
    return "\n".join(lines) + "\n"


def cell(count: int, total: int) -> str:
    share, z = count / total, 1.96
    middle = (share + z * z / 2 / total) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + (z / 2 / total) ** 2) / (1 + z * z / total)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f}), {count} of {total}"


if __name__ == "__main__":
    main()
