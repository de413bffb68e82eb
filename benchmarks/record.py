"""Record the LLM's answers that a run by folds needs, before anything is learned.

    python benchmarks/record.py DATA/news_category --llm openvino:MODEL,threads=1
        --record benchmarks/results/news_category_285/recording.jsonl.gz [--users 100 --limit 3]
        [--prompts zero-shot,rag@1,rag@4] [--mismatched 5] [--together 3] [--backwards]
        [--also FILE ...]

The users are those whom `bench run --folds` evaluates. Asked are the prompts without records, with
one (retrieved, random) and with four (retrieved, latest), or those of `--prompts`, at temperature
0, and HYDRA's 8 samples with the four retrieved ones; of tasks with labels also the label's
probabilities without records and with four retrieved ones. `--mismatched FOLDS` asks what the
control `mismatched@4,8` of a run by so many folds needs, and nothing else.

Answers that the recording has are not asked again. The file is written every 20 queries, so that a
stopped recording continues. With `--together N` the calls of N queries run at once, for engines
that write several calls together (`openvino:MODEL,threads=1,batch=12`). Two processes share the
work when one of them goes `--backwards` with a file of its own; `--also` then reads that file into
the other.

The run that uses it needs `--set rerank=never --set retrieved=5 --set samples=8`, for labels
`max_tokens=4 constrain=true label_probabilities=true`, for texts `max_tokens=32`.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from hydra_llm.bench.controls import as_another
from hydra_llm.bench.experiment import chosen_queries, run_methods
from hydra_llm.bench.folds import deal, evaluated_users
from hydra_llm.bench.method import Parts, find_methods, partners
from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import load
from hydra_llm.llm.cache import merge_recording, write_recording
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.llm.registry import open_llm
from hydra_llm.training.api import blank_bundle
from hydra_llm.types import Query

TOLD = ("zero-shot", "rag@4")  # with probabilities of labels
PROMPTS = (*TOLD, "rag@1", "icl-random@1", "recent@4")
SAMPLES = "self-consistency@8"
EVERY = 20  # queries after which the file is written


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--users", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--prompts", default=",".join(PROMPTS))
    parser.add_argument("--mismatched", type=int, metavar="FOLDS")
    parser.add_argument("--together", type=int, default=1)
    parser.add_argument("--backwards", action="store_true", help="from the last query to the first")
    parser.add_argument("--also", type=Path, action="append", default=[])
    args = parser.parse_args()
    data = load(args.data)
    labels = bool(data.task.labels)
    most = {"max_tokens": 4 if labels else 32, "constrain": labels}
    at_once = 1 if args.together == 1 else args.together * len(PROMPTS)
    settings = Settings(retrieved=5, samples=8, rerank="never", concurrency=at_once, **most)
    told = settings.model_copy(update={"label_probabilities": labels})
    llm = open_llm(args.llm, settings)
    for recording in (args.record, *args.also):
        if recording.exists() or recording in args.also:
            merge_recording(recording, llm)
    users = evaluated_users(data, args.users)
    records = {user: data.history(user) for user in users}
    bundle = blank_bundle(data.task, llm, settings, records)
    if args.mismatched:
        queries = as_others_ask(data, settings, args)
        prompts, plain = (["rag@4"], []) if labels else ([], [SAMPLES])
    else:
        queries, prompts = chosen_queries(data, users, args.limit), args.prompts.split(",")
        plain = [*(name for name in prompts if name not in TOLD), SAMPLES]
    queries = queries[:: -1 if args.backwards else 1]
    kinds = (([name for name in prompts if name in TOLD], told), (plain, settings))
    methods = [(find_methods(names, data.task.kind), own) for names, own in kinds if names]
    start = time.monotonic()
    try:
        for number in range(0, len(queries), args.together):
            block = queries[number : number + args.together]
            for chosen, own in methods:
                parts = Parts(bundle, llm, own, records)
                samples = run_sync(partial(run_methods, chosen, parts, block))
                for sample in samples:
                    if sample.error:
                        print(f"query {sample.query}: {sample.error}", file=sys.stderr)
            done = number + len(block)
            left = (time.monotonic() - start) / done * (len(queries) - done) / 60
            print(f"{done} of {len(queries)} queries, {left:.0f} min left", flush=True)
            if done % EVERY < args.together:
                write_recording(args.record, llm)
    finally:
        write_recording(args.record, llm)


def as_others_ask(data: DataSet, settings: Settings, args: argparse.Namespace) -> list[Query]:
    """The queries of a run by folds, each with the name of the other user of its `mismatched`."""
    asked: list[Query] = []
    for fold in deal(data, settings, args.mismatched, users=args.users, limit=args.limit):
        users = fold.data.users("test")
        known = {user for user in users if fold.data.history(user)}
        other = partners(users, known.__contains__, settings.seed)
        queries = chosen_queries(fold.data, users, args.limit)
        asked += [as_another(query, other[query.user]) for query in queries if query.user in other]
    return asked


if __name__ == "__main__":
    main()
