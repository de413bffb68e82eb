"""How fast embedded engines read prompts and write samples, side by side.

    python benchmarks/engines.py DATA gguf:MODEL openvino:MODEL[,threads=1] [--sets opinion]
        [--labelling]

DATA is the folder of the data sets. Prompts hold 4 records of new users, one a user. After a
warm-up each engine gets the same prompts, one call after the other: the answer at temperature 0,
then 8 samples at 0.5 of the same prompt. Medians over the prompts with the least and the greatest,
and the ratio of medians to the first engine.

`--labelling`: prompts with one record each, as the reranker's labels ask, of one training user: in
the order of the queries, and sorted, so that those with the same record follow each other; then 8
samples of one prompt by a request with n = 8, and by eight requests. Each order has an engine of
its own, which has read nothing yet.
"""

import argparse
import json
import time
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

from hydra_llm.config import Settings
from hydra_llm.datasets.native import load
from hydra_llm.history import as_query, before
from hydra_llm.llm.base import ChatLLM, Sampling
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.llm.registry import bare_llm
from hydra_llm.pipeline import Pipeline
from hydra_llm.retrieve import make_retriever
from hydra_llm.types import Message

SETS = "opinion,movie_rating,news_headline"


def prompts_of(folder: Path, count: int) -> tuple[list[tuple[Message, ...]], tuple[str, ...]]:
    """Prompts with 4 records, one for each of the first new users, and the task's labels."""
    data = load(folder)
    pipeline, found = Pipeline(data.task, make_retriever("bm25")), list[tuple[Message, ...]]()
    for user in data.users("test")[: count + 1]:
        query = data.queries(user)[0]
        context = pipeline.context(query, before(data.history(user), query))
        found.append(pipeline.render(query, pipeline.retrieve(context)[:4]).messages)
    return found, data.task.labels


async def measured(llm: ChatLLM, sets: dict[str, Any]) -> dict[str, Any]:
    """Of each set seconds and prompt tokens; the first prompt of a set is the warm-up."""
    rows: dict[str, Any] = {}
    async with aclosing(llm):
        for name, (prompts, labels) in sets.items():
            most = 4 if labels else 32
            greedy = Sampling(max_tokens=most, choices=labels)
            drawn = Sampling(n=8, temperature=0.5, max_tokens=most, choices=labels, seed=0)
            times: dict[str, list[float]] = {"greedy": [], "samples": []}
            tokens = []
            for prompt in prompts:
                for stage, sampling in (("greedy", greedy), ("samples", drawn)):
                    start = time.perf_counter()
                    answer = await llm.generate(prompt, sampling)
                    times[stage].append(time.perf_counter() - start)
                tokens.append(answer.usage.prompt_tokens)
            rows[name] = {"tokens": median(tokens[1:])}
            for stage, seconds in times.items():
                own = sorted(seconds[1:])
                rows[name][stage] = [round(x, 2) for x in (median(own), own[0], own[-1])]
    return rows


def labelling_prompts(
    folder: Path, count: int
) -> tuple[list[tuple[Message, ...]], tuple[str, ...]]:
    """Of one training user: the latest queries with each of their retrieved records."""
    data = load(folder)
    pipeline = Pipeline(data.task, make_retriever("bm25"))
    records = data.answered(data.users("train")[0])
    found = list[tuple[Message, ...]]()
    for record in records[-2:]:
        query = as_query(record)
        context = pipeline.context(query, before(records, record))
        items = pipeline.retrieve(context)[: count // 2]
        found += [pipeline.render(query, [item]).messages for item in items]
    return found, data.task.labels


def now(since: tuple[float, float] = (0.0, 0.0)) -> tuple[float, float]:
    """Seconds of the CPU and by the clock; the engines run in this process."""
    return time.process_time() - since[0], time.perf_counter() - since[1]


def tokens_read(llm: Any) -> list[int]:
    """Grows by the tokens of each prompt that llama.cpp had not kept; other engines tell none."""
    found = list[int]()
    if server := getattr(getattr(llm, "engine", None), "_server", None):

        def chat(body: Any, read: Any) -> Any:
            def told(chunk: Any) -> Any:
                found.extend([chunk["timings"]["prompt_n"]] if chunk.get("timings") else [])
                return read(chunk)

            return server.handle_chat_completions(body, told)

        llm.engine._server = SimpleNamespace(handle_chat_completions=chat)
    return found


async def labelled(
    spec: str, prompts: list[tuple[Message, ...]], labels: tuple[str, ...]
) -> dict[str, Any]:
    """Of both orders seconds, prompts and prompt tokens a second; seconds of 8 samples."""
    row: dict[str, Any] = {}
    most = 4 if labels else 32
    greedy = Sampling(max_tokens=most, choices=labels)
    orders = {"by query": prompts, "sorted": sorted(prompts, key=lambda own: own[-1]["content"])}
    for name, ordered in orders.items():
        async with aclosing(bare_llm(spec, Settings())) as llm:
            await llm.generate([{"role": "user", "content": "Hello"}], greedy)  # it is loaded
            read = tokens_read(llm)
            start, tokens, texts = now(), 0, dict[str, str]()
            for prompt in ordered:
                answer = await llm.generate(prompt, greedy)
                tokens += answer.usage.prompt_tokens
                texts[str(prompt)] = answer.texts[0]
            cpu, wall = now(start)
            row[name] = {"cpu_s": cpu, "s": wall, "prompts/s": len(prompts) / wall}
            row[name] |= {"tokens/s": tokens / wall, "answers": texts}
            row[name] |= {"tokens": tokens, "tokens_read": sum(read) or None}
            if name == "by query":
                continue
            drawn = Sampling(temperature=0.5, max_tokens=most, choices=labels, seed=0)
            start = now()
            await llm.generate(ordered[0], replace(drawn, n=8))
            row["n = 8"], start = now(start), now()
            for seed in range(8):
                await llm.generate(ordered[1], replace(drawn, seed=seed))
            row["eight requests"] = now(start)
    one, other = (row[name].pop("answers") for name in orders)
    row["equal answers"] = f"{sum(one[key] == other[key] for key in one)} of {len(one)}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("engines", nargs="+")
    parser.add_argument("--sets", default=SETS)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--labelling", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.labelling:
        for name in args.sets.split(","):
            asked = labelling_prompts(args.data / name, args.prompts)
            for spec in args.engines:
                row = run_sync(partial(labelled, spec, *asked))
                told = {"set": name, "engine": spec.partition(":")[0], "prompts": len(asked[0])}
                print(json.dumps(told | row), flush=True)
        return
    sets = {name: prompts_of(args.data / name, args.prompts) for name in args.sets.split(",")}
    results = {
        spec: run_sync(partial(measured, bare_llm(spec, Settings()), sets)) for spec in args.engines
    }
    if args.json:
        print(json.dumps(results, indent=1))
        return
    first = results[args.engines[0]]
    for name in sets:
        for spec, rows in results.items():
            row = rows[name]
            parts = []
            for stage in ("greedy", "samples"):
                middle, least, most = row[stage]
                ratio = first[name][stage][0] / middle
                parts.append(
                    f"{stage} {middle:.2f} s ({least:.2f} to {most:.2f}, {ratio:.1f} times)"
                )
            print(f"{name} ({row['tokens']:.0f} tokens) {spec}: {', '.join(parts)}")


if __name__ == "__main__":
    main()
