"""Cost of a refit after one more record: as an update of the fit before, and from scratch.

    python benchmarks/refit.py [--records 50 200 1000] [--runs 3] [--seed 0] [--json]

One new user of the simulated users of `growth.py`, with labels and with headlines, linear heads on
bi-encoder features, all features kept in the file, no calls of an LLM (the defaults). The fit
before had one record fewer. Figures are CPU milliseconds of all threads, medians; the jobs run
alternately. `apart` is the largest difference of a number of a head between the two: both solvers
stop near the minimum. Exits with 1 if an update of the longest history takes more than a fifth of
a fit from scratch.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from growth import Fixtures, fake_llm, renamed
from measure import Limit, finish, options
from simulated_users import CLASSIFY, HEADLINE

from hydra_llm.datasets.dataset import DataSet
from hydra_llm.tasks.base import Task
from hydra_llm.training.api import fit
from hydra_llm.training.learned import Learned

NEW, MOST_SHARE = "new", 0.2


def main() -> None:
    parser = options(__doc__, runs=3)
    parser.add_argument("--records", type=int, nargs="+", default=[50, 200, 1000])
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Fixtures(Path(folder), args.seed)
        rows = [
            measured(bench, task, count, args)
            for task in (CLASSIFY, HEADLINE)
            for count in args.records
        ]
    lines = [
        f"{row['task']:<10} {row['records']:>6,} records   update {row['update_ms']:8.1f} ms CPU"
        f"   from scratch {row['scratch_ms']:8.1f} ms   ratio {row['ratio']:.3f}"
        f"   kept {row['kept_bytes'] / 1e6:.1f} MB   apart {row['apart']:.1e}"
        for row in rows
    ]
    longest = [row for row in rows if row["records"] == max(args.records)]
    limits = [
        Limit(f"{row['task']}: share of a fit from scratch", row["ratio"], MOST_SHARE)
        for row in longest
    ]
    finish(args, {"rows": rows}, lines, limits)


def measured(bench: Fixtures, task: Task, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """The refit of a user who has `count` records now."""
    bundle, history = bench.bundle(task), bench.user_history(task, count)
    bench.cache_features(task, history)
    now, before = (data_of(task, renamed(own, NEW)) for own in (history, history[:-1]))
    first = fit(before, bundle, fake_llm(task), users=[NEW], kept={})
    times: dict[str, list[float]] = {"update": [], "scratch": []}
    results: dict[str, Learned] = {}
    for _ in range(args.runs + 1):  # the first warms up
        for name in times:
            kept = first.kept if name == "update" else None
            begin = time.process_time()
            results[name] = fit(now, bundle, fake_llm(task), users=[NEW], kept=kept)
            times[name].append((time.process_time() - begin) * 1000)
    heads = {name: done.bundle.heads_of(NEW) for name, done in results.items()}
    apart = max(
        float(np.abs(head.numbers - heads["scratch"][name].numbers).max())
        for name, head in heads["update"].items()
    )
    update, scratch = (statistics.median(values[1:]) for values in times.values())
    return {
        "task": task.name,
        "records": count,
        "update_ms": update,
        "scratch_ms": scratch,
        "ratio": update / scratch,
        "kept_bytes": sum(own.bytes for own in results["update"].kept[NEW].values()),
        "apart": apart,
    }


def data_of(task: Task, records: Any) -> DataSet:
    return DataSet.from_records(task, {NEW: "test"}, records, [])


if __name__ == "__main__":
    main()
