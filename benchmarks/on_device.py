"""The adapter on a device (`bundles export --onnx`) beside the full one: size, order of candidates,
time and memory.

    python benchmarks/on_device.py DATA --bundles FOLDER [--llm SPEC] [--users 20] [--queries 5]

FOLDER/NAME is a bundle learned from DATA/NAME. Of each user, the latest queries that have a gold
answer are scored by both, with the same candidates: every label, or the answers of `--llm` (such as
`replay:RECORDING`), which are asked for as `ask` does.

order    Spearman's correlation of all scores, with an interval over users (bootstrap), its mean
         within a query, and the share of queries with the same pick.
process  each in a process of its own, in turn, on one thread: seconds of processor time until it is
         ready (imports, graphs), for the first request, which encodes the user's records, and
         milliseconds for each later one; resident memory (VmRSS, and its peak) after these.

Exits with 1 if a correlation is below 0.98.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("torch", "onnx")
LEAST = 0.98
RESAMPLES = 1000
Row = dict[str, Any]


def main() -> None:
    if "--process" in sys.argv:
        measure_here(*sys.argv[2:])
        return
    from measure import Limit, finish, options

    parser = options(__doc__, runs=3)
    parser.add_argument("data", type=Path)
    parser.add_argument("--bundles", type=Path, required=True)
    parser.add_argument("--llm", default="", help="for free texts")
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--queries", type=int, default=5)
    args = parser.parse_args()
    places = sorted(path for path in args.bundles.iterdir() if (path / "config.json").exists())
    rows = [compare(place, args) for place in places]
    lines = [f"{name} {value}" for row in rows for name, value in row.items()]
    limits = [
        Limit(f"Spearman, {row['data']}", row["order"]["spearman"], LEAST, True) for row in rows
    ]
    finish(args, {"rows": rows}, lines, limits)


def compare(place: Path, args: argparse.Namespace) -> Row:
    """All figures of a bundle."""
    from hydra_llm.bundle import Bundle
    from hydra_llm.datasets.native import load
    from hydra_llm.export import export_onnx

    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle.load(place, cache=Path(folder))
        dataset, phone = load(args.data / place.name), Path(folder) / "phone"
        new = [user for user in bundle.records if user not in bundle.trained_on]
        asked = {user: list(dataset.queries(user))[: args.queries] for user in new}
        asked = {user: own for user, own in asked.items() if own and bundle.heads_of(user)}
        users = sorted(asked)[: args.users]
        requests = {user: with_candidates(bundle, asked[user], args.llm) for user in users}
        sizes = export_onnx(bundle, phone, users[0])
        pairs = {user: scores_of(bundle, phone, user, requests[user]) for user in users}
        bundle.features.close()
        user = max(users, key=lambda own: len(bundle.records[own]))
        export_onnx(bundle, phone, user)
        file = Path(folder) / "requests.json"
        file.write_text(json.dumps(requests[user]))
        return {
            "data": place.name,
            "interaction": bundle.scorers["adapter"].interaction.kind,
            "head": bundle.settings.head,
            "head_numbers": bundle.scorers["adapter"].head.numbers_per_user,
            "bytes": sizes["files"],
            "order": order(pairs, args.seed),
            "records": len(bundle.records[user]),
            "candidates": statistics.mean(len(own["candidates"]) for own in requests[user]),
            "process": in_processes(place, phone, file, args.runs),
        }


def with_candidates(bundle: Any, queries: Sequence[Any], spec: str) -> list[Row]:
    """Queries with the candidates that both score."""
    from hydra_llm.llm.registry import open_llm
    from hydra_llm.select import all_labels

    if bundle.task.labels:
        found = [all_labels(bundle.task, []) for _ in queries]
    else:
        pipeline = bundle.personalizer(open_llm(spec, bundle.settings))
        found = [list(pipeline.propose(query).candidates) for query in queries]
    return [
        {"query": asdict(query), "candidates": [asdict(own) for own in candidates]}
        for query, candidates in zip(queries, found, strict=True)
    ]


def scores_of(bundle: Any, phone: Path, user: str, requests: Sequence[Row]) -> list[Row]:
    """Scores of each request by both, and whether they pick the same."""
    from hydra_llm.device import Device
    from hydra_llm.export import export_onnx

    export_onnx(bundle, phone, user)
    full, device = bundle.personalizer(None), Device.load(phone)
    rows = []
    for request in requests:
        query, candidates = read(request)
        chosen = full.select(full.context_of(query), candidates), device.choose(query, candidates)
        scores = [
            [own.score for own in each.candidates if own.score is not None] for each in chosen
        ]
        rows.append({"scores": scores, "same": chosen[0].chosen == chosen[1].chosen})
    return rows


def read(request: Row) -> tuple[Any, Any]:
    from hydra_llm.types import Candidate, Query

    given = request["query"]
    query = Query(**{**given, "span": tuple(given["span"]), "offered": tuple(given["offered"])})
    return query, [Candidate(**own) for own in request["candidates"]]


def order(pairs: dict[str, list[Row]], seed: int) -> Row:
    """Correlations of the two scores, and the share of equal picks."""
    from scipy.stats import spearmanr

    def pooled(users: Sequence[str]) -> float:
        rows = [row["scores"] for user in users for row in pairs[user]]
        both = [np.concatenate([row[side] for row in rows]) for side in (0, 1)]
        return float(spearmanr(*both)[0])

    rows = [row for own in pairs.values() for row in own]
    within = [spearmanr(*row["scores"])[0] for row in rows if len(row["scores"][0]) > 2]
    dice, names = np.random.default_rng(seed), list(pairs)
    drawn = [pooled(dice.choice(names, len(names)).tolist()) for _ in range(RESAMPLES)]
    return {
        "users": len(pairs),
        "queries": len(rows),
        "spearman": pooled(names),
        "interval": np.quantile(drawn, [0.025, 0.975]).tolist(),
        "within_query": float(np.nanmean(within)) if within else None,
        "same_pick": statistics.mean(row["same"] for row in rows),
    }


def in_processes(bundle: Path, phone: Path, requests: Path, runs: int) -> dict[str, Row]:
    """Medians of each kind's processes, which run alternately."""
    found: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    for _ in range(runs):
        for kind, place in zip(KINDS, (bundle, phone), strict=True):
            command = [sys.executable, __file__, "--process", kind, str(place), str(requests)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[kind].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        kind: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for kind, rows in found.items()
    }


def measure_here(kind: str, place: str, file: str) -> None:
    """What one process takes, as JSON."""
    start = time.process_time()
    requests = [read(request) for request in json.loads(Path(file).read_text())]
    if kind == "torch":
        import torch

        from hydra_llm.bundle import Bundle
        from hydra_llm.config import load_settings

        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as cache:
            here = load_settings(cache=Path(cache))
            full = Bundle.load(place, cache=Path(cache), here=here).personalizer(None)
        jobs = [lambda q=q, c=c: full.select(full.context_of(q), c) for q, c in requests]
    else:
        from hydra_llm.device import Device

        device = Device.load(place)
        jobs = [lambda q=q, c=c: device.choose(q, c) for q, c in requests]
    times = [time.process_time()]
    for job in jobs:
        job()
        times.append(time.process_time())
    later = [1000 * (b - a) for a, b in pairwise(times[1:])]
    status = Path("/proc/self/status").read_text()
    memory = dict(re.findall(r"^(Vm(?:RSS|HWM)):\s+(\d+)", status, re.MULTILINE))  # kB
    print(
        json.dumps(
            {
                "ready_s": times[0] - start,
                "first_request_s": times[1] - times[0],
                "request_ms": statistics.median(later),
                "resident_mb": int(memory["VmRSS"]) / 1024,
                "peak_mb": int(memory["VmHWM"]) / 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
