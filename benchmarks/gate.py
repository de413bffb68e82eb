"""What the gate lets pass: requests that do not belong to the task, and new users' own queries.

    python benchmarks/gate.py DATA [--only NAME ...] [--requests 200] [--out FOLDER]
    python benchmarks/gate.py DATA --only NAME --llm SPEC
    python benchmarks/gate.py DATA --quality RUNS

DATA is the folder of the data sets (`DATA/news_category`, ...), which are not part of this
repository. For each of them the gate alone is learned from the training users (no LLM is asked).
Rows: the share of the requests in `benchmarks/gate/*.jsonl` that pass, and of new users' own
queries, each as the question alone, without the task's instruction. A request passes if it belongs
to the task and a record of the user that it is asked for passes the floor; the users take turns.
    bundle         the learned gate
    no bundle      the gate that compares words with the user's own records (gate.LexicalGate)
    gateway        the real gateway with the learned gate: requests answered as personal, where
                   the upstream is a fake LLM. --llm adds a row with a real one, such as smollm2
--quality: what the gate changes of the recorded runs in benchmarks/results. The first seed of each
is learned again on its recording, in the folder RUNS, where a repeat continues. With `gate=always`
the gate judges its queries, which belong to the task. A query whose records are all dropped has the
recorded answer without records (zero-shot).
Writes gate.json and gate.md; --only, --llm and --quality keep the other rows. Exits with 1 if more
than 2 % of `off_task` pass a learned gate, or less than 97 % of the own queries.
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
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from hydra_llm.bench.stats import paired
from hydra_llm.bundle import Bundle
from hydra_llm.cli.main import run
from hydra_llm.config import Settings, load_settings
from hydra_llm.context import Context
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import load
from hydra_llm.gate import NOT_RELEVANT, OFF_TASK, Floor, LexicalGate
from hydra_llm.gateway.app import make_app
from hydra_llm.gateway.embedded import open_upstream
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.llm.registry import bare_llm
from hydra_llm.pipeline import Pipeline, UserPipeline
from hydra_llm.retrieve import make_retriever
from hydra_llm.store.store import Store
from hydra_llm.tasks.base import Task
from hydra_llm.training.api import blank_bundle
from hydra_llm.training.gate import fit_gate
from hydra_llm.types import Query, Record

HERE = Path(__file__).parent
MOST_OFF, LEAST_OWN = 0.02, 0.97
MOST_QUERIES = 700
KINDS = ("fresh", "near_task", "off_task", "own")
K = 4
RECORDED = {f"rag@{K}": False, f"hydra@{K},8": True}
"""Methods with K records, and whether each reranks."""
NO_RECORDS, NONE_LEFT = "zero-shot", (OFF_TASK, NOT_RELEVANT)
OTHER_RECORDS = "other records"
FAKE = RuleLLM(lambda messages, index, dice: "none")
Asked = list[tuple[str, str]]
"""User and question."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="+", help="some of the data sets")
    parser.add_argument("--llm", help="only the gateway's row with this LLM as upstream")
    parser.add_argument(
        "--quality", type=Path, metavar="RUNS", help="only the recorded runs, repeated in a folder"
    )
    parser.add_argument("--requests", type=int, default=200, help="of each kind, to the gateway")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    names = args.only or sorted(path.parent.name for path in args.data.glob("*/task.json"))
    if args.quality:
        names = [name for name in names if recorded(name).exists()]
    file = args.out / "gate.json"
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in names:
        folder = args.data / name
        rows = quality(folder, args.quality / name) if args.quality else measure(folder, args)
        print(name, json.dumps(rows), flush=True)
        result = dict(sorted((result | {name: result.get(name, {}) | rows}).items()))
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (args.out / "gate.md").write_text(table(result), encoding="utf-8")
    print(table(result))
    sys.exit(any(missed(entry["bundle"]) for entry in result.values() if "bundle" in entry))


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
    few = {kind: rows[: args.requests] for kind, rows in asked.items()}
    if args.llm:
        some = {kind: few[kind] for kind in ("off_task", "own")}
        row = asyncio.run(through_gateway(bundle, data, some, args.llm))
        return {f"gateway, {args.llm.partition(':')[0]}": row}
    words = Pipeline(
        Task("any", "generation", "{input}"), make_retriever("bm25"), settings, gate=LexicalGate()
    )
    ways = {"bundle": bundle.pipeline(), "no bundle": words}
    out: dict[str, Any] = {
        way: {kind: passed(stages, data, rows) for kind, rows in asked.items()}
        for way, stages in ways.items()
    }
    out["gateway"] = asyncio.run(through_gateway(bundle, data, few, None))
    out["learning"] = dict(bundle.report)
    return out


def recorded(name: str) -> Path:
    """Where the recorded run on a data set is."""
    return HERE / "results" / f"{name}_60"


def quality(folder: Path, out: Path) -> dict[str, Any]:
    """The queries of a recorded run whose prompt `gate=always` changes, and each method's gain."""
    source, data = recorded(folder.name), load(folder)
    options = json.loads((source / "commands.json").read_text(encoding="utf-8"))["bench run"]
    llm, methods = f"replay:{source / 'recording.jsonl.gz'}", ",".join([NO_RECORDS, *RECORDED])
    command = ["bench", "run", str(folder), "--llm", llm, "--out", str(out), *options]
    if code := run([*command, "--methods", methods, "--seeds", "0"]):
        sys.exit(code)
    bundle = Bundle.load(out / "bundle-0")
    lines = (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = {(row["method"], row["user"], row["query"]): row for row in map(json.loads, lines)}
    asked = [(user, query) for method, user, query in samples if method == NO_RECORDS]
    users = {user for user, _ in asked}
    queries = {(query.user, query.id): query for user in users for query in data.queries(user)}
    gain = {key: bundle.task.gain(row["answer"], row["gold"]) for key, row in samples.items()}
    report: dict[str, Any] = {"queries": len(asked), "floor": bundle.gate.floor != Floor()}
    for method, reranks in RECORDED.items():
        stages = bundle.personalizer(FAKE, rerank=reranks)
        changes = {key: changed(stages, queries[key]) for key in asked}
        known = [key for key in asked if changes[key] != OTHER_RECORDS]
        ways = {key: NO_RECORDS if changes[key] in NONE_LEFT else method for key in known}
        auto = np.array([gain[method, *key] for key in known])
        always = np.array([gain[ways[key], *key] for key in known])
        report[method] = {
            "changed": dict(Counter(filter(None, changes.values()))),
            "gain": [float(auto.mean()), float(always.mean())],
            "difference": list(paired(always, auto, [user for user, _ in known])[:3]),
        }
    return {"quality": report}


def changed(stages: UserPipeline, query: Query) -> str:
    """How the gate changes a query's prompt of `K` records; empty if it does not."""
    context = stages.context_of(query)
    if not stages.belongs(context, in_task_words=False):
        return OFF_TASK
    ranked = stages.rerank(context, stages.retrieve(context))
    kept = stages.relevant(context, ranked, in_task_words=False)
    if ranked and not kept:
        return NOT_RELEVANT
    return OTHER_RECORDS if kept[:K] != ranked[:K] else ""


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
    few = {user: records[user][:10] for user in list(records)[:20]}  # for statistics not used here
    blank = blank_bundle(data.task, FAKE, settings, few)
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
    settings = load_settings()
    model = bare_llm(spec, settings) if spec else FAKE
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
            "personalization": {"k": 1},  # decided alike, and a shorter prompt for a real LLM
        }
        answer = await http.post("/v1/chat/completions", json=body, timeout=600)
        answer.raise_for_status()
        count += answer.headers["x-hydra-personalized"] == "true"
    return [count, len(asked)]


def table(result: dict[str, Any]) -> str:
    """Shares with Wilson intervals, as Markdown."""
    lines = [
        "# What the gate lets pass",
        "",
        "Written by `benchmarks/gate.py`. Percent of requests that see records, with 95 % Wilson"
        " intervals; `own` are new users' queries without the task's instruction.",
        "",
        f"| data set | gate | {' | '.join(KINDS)} |",
        f"|---|---|{'---|' * len(KINDS)}",
    ]
    for name, entry in result.items():
        for way in filter(lambda way: way not in ("learning", "quality"), entry):
            cells = " | ".join(cell(*entry[way].get(kind, (0, 0))) for kind in KINDS)
            lines.append(f"| {name} | {way} | {cells} |")
    if any("quality" in entry for entry in result.values()):
        lines += ["", *quality_table(result)]
    return "\n".join(lines) + "\n"


def quality_table(result: dict[str, Any]) -> list[str]:
    """What `gate=always` changes of the recorded runs, as lines of Markdown."""
    lines = [
        "## Quality with `gate=always`",
        "",
        "Recorded queries of new users, all of the task: how many prompts the gate changes, and"
        " the mean gain (0 to 1) with `gate=auto` and with `gate=always`. Without any record the"
        " answer is the recorded one of zero-shot. The answers to other records are not recorded:"
        " these queries are left out of the gains, so gains compare within a row only. Differences"
        " have 95 % intervals over users. By default, with `auto`, no prompt of these runs changes:"
        " the task's own instruction asks.",
        "",
        "| data set | method | queries | off-task | not relevant | other records | auto | always |"
        " difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in result.items():
        found = entry.get("quality", {})
        for method in filter(found.__contains__, RECORDED):
            row = found[method]
            counts = [row["changed"].get(way, 0) for way in (*NONE_LEFT, OTHER_RECORDS)]
            gains = [f"{gain:.3f}" for gain in row["gain"]]
            value, low, high = row["difference"]
            told = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" if any(counts) else "none"
            cells = [name, method, found["queries"], *counts, *gains, told]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def cell(count: int, total: int) -> str:
    if not total:
        return ""
    share, z = count / total, 1.96
    middle = (share + z * z / 2 / total) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + (z / 2 / total) ** 2) / (1 + z * z / total)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f}), {count} of {total}"


if __name__ == "__main__":
    main()
