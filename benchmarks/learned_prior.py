"""What the learned prior of heads is worth for new users, against an isotropic one.

    python benchmarks/learned_prior.py DATA [--only NAME ...] [--out FILE] [--variants NAME ...]

DATA is the folder of the data sets (`DATA/opinion`, ...), which are not part of this repository.
The adapter is learned from the training users' records, heads are fitted on the new users' records,
and their queries are answered without an LLM: as the method `scorer-only` does. Each row: accuracy
or MAE, log-loss and expected calibration error of new users' queries, with 95 % intervals over
users, for own heads and for the shared one; what was chosen on held-out training users; CPU time.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import torch

from hydra_llm.bundle import Bundle
from hydra_llm.config import load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import load
from hydra_llm.history import in_order
from hydra_llm.llm.registry import open_llm
from hydra_llm.select import all_labels, select
from hydra_llm.training import train_scorer as training
from hydra_llm.training.api import blank_bundle
from hydra_llm.training.dataset import LabelledGroup
from hydra_llm.training.labelling import weak_adapter_groups
from hydra_llm.training.work import ADAPTER

SETS = ("opinion", "movie_rating", "news_category")
VARIANTS: dict[str, dict[str, Any]] = {
    "isotropic, 64 directions": {"head_prior": "isotropic"},
    "isotropic, full width": {"head_prior": "isotropic", "label_rank": 384},
    "learned": {},
    "learned, no text effects": {"texts": False},
    "low-rank, K = 8": {"head": "lowrank", "rank": 8},
    "low-rank, K = 16": {"head": "lowrank", "rank": 16},
    "low-rank, K = 32": {"head": "lowrank", "rank": 32},
}
RESAMPLES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="+", default=list(SETS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text(encoding="utf-8"))
    for name in args.only:
        for variant in args.variants:
            row = measure(load(args.data / name), dict(VARIANTS[variant]))
            results.setdefault(name, {})[variant] = row
            print(name, "|", variant, "|", json.dumps(row), flush=True)
            if args.out:
                args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure(data: DataSet, options: dict[str, Any]) -> dict[str, Any]:
    """Learn, fit new users' heads, and answer their queries."""
    texts = options.pop("texts", True)
    settings = load_settings(cache=Path(gettempdir()) / "learned_prior", **options)
    users, new = data.users("train"), data.users("test")
    records = {user: in_order(data.history(user)) for user in [*users, *new]}
    own = {user: records[user] for user in users}
    bundle = blank_bundle(data.task, open_llm("fake:echo", settings), settings, own)
    groups = [
        group for user in users for group in weak_adapter_groups(bundle.featurizer, records[user])
    ]
    least = training.LEAST_USERS
    started = time.process_time()
    try:
        training.LEAST_USERS = least if texts else 10**9
        labelled = training.LabelledData(
            ADAPTER, lambda _: groups, bundle.featurizer.adapter_names, "exact", by_label=True
        )
        bundle = training.train_scorer(bundle, labelled)
    finally:
        training.LEAST_USERS = least
    seconds = time.process_time() - started
    fresh = [
        group for user in new for group in weak_adapter_groups(bundle.featurizer, records[user])
    ]
    heads = training.fit_new_heads(bundle, ADAPTER, fresh, new)
    queries = [group for user in new for group in query_groups(bundle, data, user)]
    scorer, report = bundle.scorers[ADAPTER], bundle.report[ADAPTER]
    asked = training.training_set(bundle, "exact", scorer, queries)
    row: dict[str, Any] = {"users": len(asked.names()), "queries": len(asked)}
    for name, chosen in (("own", [heads[user] for user in asked.users]), ("shared", None)):
        scores = scorer.score(asked.groups, chosen or [None] * len(asked))
        row[name] = figures(bundle, asked.users, scores, asked.target)
    keys = ("prior", "prior_ridge", "prior_steps", "precision", "ridge")
    chosen_strengths = {key: report[key] for key in keys if key in report}
    return row | {"chosen": chosen_strengths, "cpu_seconds": round(seconds, 1)}


def query_groups(bundle: Bundle, data: DataSet, user: str) -> list[LabelledGroup]:
    """The user's queries, which see all records of the user."""
    task, history = data.task, in_order(data.history(user))
    candidates, vectors = all_labels(task, []), bundle.featurizer.vectorize(history)
    groups = []
    for query in data.queries(user):
        if query.gold in task.labels:
            gains = [task.gain(candidate.answer, query.gold or "") for candidate in candidates]
            side = bundle.featurizer.adapter(query, candidates, vectors)
            place = len(history) + len(groups)
            groups.append(
                LabelledGroup(user, query.id, query.input, task.labels, gains, side, place)
            )
    return groups


def figures(
    bundle: Bundle, users: Sequence[str], scores: torch.Tensor, target: torch.Tensor
) -> dict[str, Any]:
    """Accuracy or MAE with its interval, log-loss, and expected calibration error in 10 bins."""
    task, shares, gold = bundle.task, scores.softmax(-1).numpy(), target.argmax(-1).numpy()
    candidates = all_labels(task, [])
    rating = task.kind == "rating"
    values = np.array([float(label) for label in task.labels]) if rating else np.array([])
    picks = np.array(
        [
            select(task, candidates, row, share, "expected-gain")
            for row, share in zip(scores.numpy(), shares, strict=True)
        ]
    )
    each = np.abs(values[picks] - values[gold]) if rating else (picks == gold).astype(float)
    loss = -np.log(np.maximum(shares[np.arange(len(gold)), gold], 1e-12))
    top, right = shares.max(1), (shares.argmax(1) == gold).astype(float)
    bins = np.minimum((top * 10).astype(int), 9)
    gaps = [abs((top[bins == b] - right[bins == b]).sum()) for b in range(10)]
    return {
        "mae" if rating else "accuracy": round(float(each.mean()), 4),
        "interval": interval(users, each),
        "log_loss": round(float(loss.mean()), 4),
        "ece": round(float(sum(gaps) / len(gold)), 4),
    }


def interval(users: Sequence[str], values: np.ndarray) -> list[float]:
    """95 % by a bootstrap over users."""
    _, index = np.unique(np.array(users), return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    draw: Callable[..., np.ndarray] = np.random.default_rng(0).integers
    rows = draw(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[rows].sum(1) / counts[rows].sum(1)
    return [round(float(x), 4) for x in np.percentile(means, [2.5, 97.5])]


if __name__ == "__main__":
    main()
