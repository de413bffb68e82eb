"""Own heads against the shared one where training users and their records are few.

    python benchmarks/few_users.py DATA [--only NAME ...] [--subsets 6] [--users 45] [--records 12]
        [--out FILE]

DATA is the folder of the data sets (`DATA/opinion`, ...), which are not part of this repository.
Each subset is drawn at random: so many training users (at most 2 in 3 of those that there are) with
their first records, 12 in the median. The adapter is learned from them without an LLM. Evaluated
are other training users, of whom nothing was learned: their heads are fitted on their first
records, and up to 5 records after these are asked; choices are made on them alone. And new users
(the split `test`): heads of their last records, and up to 5 of their queries.

Each row: accuracy or MAE, log-loss, probability of the most probable label and how often it is
right, expected calibration error in 10 bins. `own`: each user's own head, whatever the rule
says; `shared`: the shared head, calibrated for all; `scorer`: as learned. Differences are
paired; intervals (95 %) resample subsets, then users.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any, NamedTuple

import numpy as np

from hydra_llm.bundle import Bundle
from hydra_llm.config import load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import load
from hydra_llm.history import as_query, in_order
from hydra_llm.llm.registry import open_llm
from hydra_llm.select import all_labels
from hydra_llm.tasks.base import Task
from hydra_llm.training import train_scorer as training
from hydra_llm.training.api import blank_bundle
from hydra_llm.training.dataset import LabelledGroup
from hydra_llm.training.labelling import weak_adapter_groups
from hydra_llm.training.strengths import SHARED_ONLY, Strengths
from hydra_llm.training.work import ADAPTER
from hydra_llm.types import Query, Record

SETS = ("opinion", "movie_rating", "news_category")
ASKED, EVALUATED, LEAST = 5, 100, 4  # queries of a user, users, records
SPREAD = 0.5  # of the logarithm of the number of records
RESAMPLES = 2000
WAYS = ("own", "shared", "scorer")
Histories = dict[str, list[Record]]


class Evaluated(NamedTuple):
    """Users whom the scorer has not seen, with their records and what they are asked."""

    known: Histories
    queries: dict[str, list[Query]]


def drawn(
    data: DataSet, seed: int, users: int, records: int
) -> tuple[Histories, dict[str, Evaluated]]:
    """A random subset of the training users and of their records, and who is evaluated."""
    draw = np.random.default_rng(seed)

    def cut(names: Sequence[str]) -> Iterator[tuple[str, list[Record], int]]:
        wished = np.exp(np.log(records) + SPREAD * draw.standard_normal(len(names)))
        for name, size in zip(names, wished, strict=True):
            yield name, in_order(data.history(name)), max(LEAST, round(size))

    names = data.users("train")
    order = [names[i] for i in draw.permutation(len(names))]
    count = min(users, len(names) * 2 // 3)
    learned = {name: own[:most] for name, own, most in cut(order[:count])}
    others, new = Evaluated({}, {}), Evaluated({}, {})
    for name, own, size in cut(order[count : count + EVALUATED]):
        most = min(size, len(own) - 1)
        others.known[name] = own[:most]
        others.queries[name] = list(map(as_query, own[most : most + ASKED]))
    names = data.users("test")
    for name, own, most in cut([names[i] for i in draw.permutation(len(names))][:EVALUATED]):
        new.known[name], new.queries[name] = own[-most:], list(data.queries(name)[:ASKED])
    return learned, {"training users": others, "new users": new}


@dataclass(frozen=True)
class Answers:
    """The evaluated queries with each way's distribution over the labels."""

    users: list[str]  # [N]
    gold: np.ndarray  # [N]
    shares: dict[str, np.ndarray]  # [N, L] by way


def answers(
    data: DataSet, learned: Histories, evaluated: Mapping[str, Evaluated]
) -> tuple[dict[str, Answers], dict[str, Any]]:
    """Learn from the subset in each way and answer the evaluated users' queries; the report."""
    settings = load_settings(cache=Path(gettempdir()) / "few_users")
    bundle = blank_bundle(data.task, open_llm("fake:echo", settings), settings, learned)
    groups, names = list(_weak(bundle, learned)), bundle.featurizer.adapter_names
    labelled = training.LabelledData(ADAPTER, lambda _: groups, names, "exact", by_label=True)
    plain = training.train_scorer(bundle, labelled)
    parts: dict[str, Answers] = {}
    for way in WAYS:
        strengths, own = _strengths(way, plain.report[ADAPTER]), plain
        if strengths is not None:
            own = training.train_scorer(bundle, labelled, strengths=strengths)
        for who, part in evaluated.items():
            found = _answered(own, part)
            found.shares[way] = found.shares.pop("")
            parts.setdefault(who, found).shares.update(found.shares)
    return parts, plain.report[ADAPTER]


def _answered(bundle: Bundle, part: Evaluated) -> Answers:
    """The users' queries by their own heads, or the shared one."""
    fresh = list(_weak(bundle, part.known))
    heads = training.fit_new_heads(bundle, ADAPTER, fresh, list(part.known))
    scorer = bundle.scorers[ADAPTER]
    rows = training.training_set(bundle, "exact", scorer, list(_asked(bundle, part)))
    scores = scorer.score(rows.groups, [heads[user] for user in rows.users])
    shares = {"": scores.softmax(-1).double().numpy()}
    return Answers(list(rows.users), rows.target.argmax(-1).numpy(), shares)


def _strengths(way: str, report: Mapping[str, Any]) -> Strengths | None:
    """With the ridges that were chosen; None where the scorer as learned is that way already."""
    refused = report["precision"] == SHARED_ONLY and not report["prior_steps"]
    if way == "scorer" or refused == (way == "shared"):
        return None
    ridges = {"ridges": (report["ridge"],), "side_ridges": (report["evidence_ridge"],)}
    if way == "own":
        return Strengths(**ridges, margin=-math.inf)
    return Strengths(**ridges, precisions=(SHARED_ONLY,), bases=())


def _weak(bundle: Bundle, histories: Histories) -> Iterator[LabelledGroup]:
    for records in histories.values():
        yield from weak_adapter_groups(bundle.featurizer, records)


def _asked(bundle: Bundle, part: Evaluated) -> Iterator[LabelledGroup]:
    """The queries, which see all known records of the user."""
    task, featurizer = bundle.task, bundle.featurizer
    candidates = all_labels(task, [])
    for user, queries in part.queries.items():
        known = part.known[user]
        vectors = featurizer.vectorize(known)
        for place, query in enumerate(queries, len(known)):
            if query.gold in task.labels:
                gains = [task.gain(own.answer, query.gold) for own in candidates]
                side = featurizer.adapter(query, candidates, vectors)
                yield LabelledGroup(user, query.id, query.input, task.labels, gains, side, place)


def values_of(task: Task, found: Answers) -> dict[str, np.ndarray]:
    """[ways, N] what each query counts in each figure."""
    gold, rows = found.gold, np.arange(len(found.gold))
    shares = np.stack([found.shares[way] for way in WAYS])  # [W, N, L]
    top, mode = shares.max(-1), shares.argmax(-1)
    values = {
        "log_loss": -np.log(np.maximum(shares[:, rows, gold], 1e-12)),
        "probability": top,
        "right": (mode == gold).astype(float),
    }
    if task.kind == "rating":  # the median has the least expected distance
        scale = np.array([float(label) for label in task.labels])
        median = (shares.cumsum(-1) < 0.5).sum(-1).clip(max=len(scale) - 1)
        values["mae"] = np.abs(scale[median] - scale[gold])
    return values


@dataclass(frozen=True)
class Pooled:
    """All subsets' queries."""

    subset: np.ndarray  # [N]
    user: np.ndarray  # [N] numbers within a subset
    values: dict[str, np.ndarray]  # [W, N] by figure

    @classmethod
    def of(cls, task: Task, parts: Sequence[Answers]) -> "Pooled":
        """The subsets' answers after each other."""
        rows = [values_of(task, part) for part in parts]
        users = [np.unique(np.array(part.users), return_inverse=True)[1] for part in parts]
        subset = np.repeat(np.arange(len(parts)), [len(own) for own in users])
        values = {name: np.concatenate([row[name] for row in rows], 1) for name in rows[0]}
        return cls(subset, np.concatenate(users), values)

    def weights(self, draw: np.random.Generator) -> np.ndarray:
        """[N] how often each query counts in a sample of the subsets and of their users."""
        out = np.zeros(len(self.user))
        count = int(self.subset.max()) + 1
        for part, times in enumerate(np.bincount(draw.integers(0, count, count), minlength=count)):
            own = self.subset == part
            users = int(self.user[own].max()) + 1
            for _ in range(times):
                sample = np.bincount(draw.integers(0, users, users), minlength=users)
                out[own] += sample[self.user[own]]
        return out


def figures(pooled: Pooled, weights: np.ndarray) -> dict[str, np.ndarray]:
    """[W] each figure of a weighted sample, with the calibration error in 10 bins."""
    total = weights.sum()
    out = {name: rows @ weights / total for name, rows in pooled.values.items()}
    top, right = pooled.values["probability"], pooled.values["right"]
    place = np.minimum((top * 10).astype(int), 9)
    gaps = [np.where(place == b, top - right, 0.0) @ weights for b in range(10)]
    out["overconfidence"] = out["probability"] - out["right"]
    out["ece"] = np.abs(np.stack(gaps)).sum(0) / total
    return out


def summary(pooled: Pooled) -> dict[str, Any]:
    """Figures by way, and the differences of the others from the shared head."""
    draw = np.random.default_rng(0)
    samples = [figures(pooled, pooled.weights(draw)) for _ in range(RESAMPLES)]
    exact = figures(pooled, np.ones(len(pooled.user)))
    out: dict[str, Any] = {}
    shared = list(WAYS).index("shared")
    for number, way in enumerate(WAYS):
        out[way] = {}
        for name, value in exact.items():
            many = np.stack([sample[name] for sample in samples])
            out[way][name] = _with_interval(value[number], many[:, number])
            if way != "shared":
                less, each = value[number] - value[shared], many[:, number] - many[:, shared]
                out[way][f"{name}, less shared"] = _with_interval(less, each)
    return out


def _with_interval(value: float, samples: np.ndarray) -> list[float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return [round(float(x), 4) for x in (value, low, high)]


def measure(data: DataSet, args: argparse.Namespace) -> dict[str, Any]:
    """All subsets of a data set, by who is evaluated."""
    parts: dict[str, list[Answers]] = {}
    chosen: list[dict[str, Any]] = []
    keys = ("prior", "prior_ridge", "prior_steps", "precision", "ridge", "evidence_ridge", "scale")
    for seed in range(args.subsets):
        found, report = answers(data, *drawn(data, seed, args.users, args.records))
        own = {who: summary_of_one(data.task, part) for who, part in found.items()}
        chosen.append({key: report.get(key) for key in keys} | own)
        print(seed, json.dumps(chosen[-1]), flush=True)
        for who, part in found.items():
            parts.setdefault(who, []).append(part)
    pooled = {who: Pooled.of(data.task, many) for who, many in parts.items()}
    rows = {who: {"queries": len(own.user), **summary(own)} for who, own in pooled.items()}
    return {**rows, "subsets": chosen}


def summary_of_one(task: Task, part: Answers) -> dict[str, Any]:
    """Each way's figures on one subset, without intervals."""
    pooled = Pooled.of(task, [part])
    row = figures(pooled, np.ones(len(part.users)))
    names = [name for name in ("right", "mae", "log_loss", "ece") if name in row]
    return {way: {n: round(float(row[n][i]), 4) for n in names} for i, way in enumerate(WAYS)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="+", default=list(SETS))
    parser.add_argument("--subsets", type=int, default=6)
    parser.add_argument("--users", type=int, default=45)
    parser.add_argument("--records", type=int, default=12)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text(encoding="utf-8"))
    for name in args.only:
        row = measure(load(args.data / name), args)
        results[name] = row
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
