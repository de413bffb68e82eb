"""What differential privacy of the shared base costs new users, and what membership tests find.

    python benchmarks/shared_base_privacy.py DATA --folder FOLDER [--only NAME ...] [--seeds 3]
        [--audit NAME ...] [--bases 16] [--out FILE] [--plot FILE.svg]

DATA is the folder of the data sets, which are not part of this repository. The adapter is learned
from the training users' records at ε = 1, 3 and 8, without noise, and without differential privacy
(bundles of FOLDER, learned there where there is none). New users' heads are fitted on their
records, and their queries answered without an LLM. Each row: accuracy or MAE with its 95 % interval
over users and log-loss, of own heads and of the shared one. With ε they are means over seeds (of
the noise of base and prior; the private label shares are drawn once for each ε), with the least and
the greatest. Noise is drawn from a seed here, so that figures can be had again; `learn` draws
secret noise.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learned_prior import figures, query_groups

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings, load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import load
from hydra_llm.history import in_order
from hydra_llm.llm.registry import open_llm
from hydra_llm.training import dp
from hydra_llm.training.api import blank_bundle, learn
from hydra_llm.training.audit import audit
from hydra_llm.training.labelling import weak_adapter_groups
from hydra_llm.training.train_scorer import fit_new_heads, training_set
from hydra_llm.training.work import ADAPTER

SETS = ("opinion", "movie_rating")
NONE, QUIET = "no DP", "no noise"
EPSILONS = {"1": 1.0, "3": 3.0, "8": 8.0, QUIET: 8.0}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--audit", nargs="*", default=["opinion"])
    parser.add_argument("--levels", nargs="+", default=[*EPSILONS, NONE])
    parser.add_argument("--bases", type=int, default=16)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    results: dict[str, dict[str, Row]] = {}
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text(encoding="utf-8"))
    for name in args.only:
        for level in args.levels:
            row = results.setdefault(name, {}).setdefault(level, {})
            if "queries" not in row:
                row |= measured(load(args.data / name), level, args, name)
                told(args, results, name, level)
    for name in args.audit:
        for level in (own for own in args.levels if own != QUIET):
            row = results.setdefault(name, {}).setdefault(level, {})
            if "audit" not in row:
                row["audit"] = audited(load(args.data / name), level, args, name)
                told(args, results, name, level)
    if args.plot:
        plot(results, args.plot)


def told(args: argparse.Namespace, results: dict[str, Any], name: str, level: str) -> None:
    print(name, "|", level, "|", json.dumps(results[name][level]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def settings_of(level: str, folder: Path) -> Settings:
    given: Row = {"cache": folder / "cache", "rerank": "never"}
    return load_settings(**given, dp_epsilon=EPSILONS.get(level))


def seeded(seed: int, deviation: float = 1.0) -> dp.Draw:
    draw = torch.Generator().manual_seed(seed)
    return lambda count: deviation * torch.randn(count, generator=draw, dtype=torch.float64)


def without(data: DataSet, folder: Path, name: str) -> Bundle:
    """The bundle without differential privacy."""
    settings, place = settings_of(NONE, folder), folder / f"{name}.bundle"
    if not place.exists():
        learn(data, settings=settings, out=place)
    return Bundle.load(place, here=settings)


def blank(data: DataSet, level: str, folder: Path) -> Bundle:
    """A bundle that has learned private label shares alone."""
    settings, users = settings_of(level, folder), data.users("train")
    records = {user: in_order(data.answered(user)) for user in users}
    bundle = blank_bundle(data.task, open_llm("none", settings), settings, records)
    bundle = replace(bundle, trained_on=tuple(users))
    quiet = 0.0 if level == QUIET else 1.0
    stats = dp.private_stats(bundle, dp.budget_of(bundle), seeded(0, quiet))
    return replace(bundle, population=stats)


def private(bundle: Bundle, groups: Sequence[Any], draw: dp.Draw) -> Bundle:
    names = bundle.featurizer.adapter_names
    scorer, budget = dp.private_scorer(bundle, names), dp.budget_of(bundle)
    table = training_set(bundle, "exact", scorer, groups)
    dp.learn_privately(scorer, table, len(bundle.trained_on), budget, draw)
    return replace(bundle, scorers={ADAPTER: scorer}, report={"privacy": budget.spent()})


def measured(data: DataSet, level: str, args: argparse.Namespace, name: str) -> Row:
    if level == NONE:
        return evaluated(without(data, args.folder, name), data)
    start, quiet = blank(data, level, args.folder), level == QUIET
    groups = [
        group
        for own in start.records.values()
        for group in weak_adapter_groups(start.featurizer, own)
    ]
    noises = [seeded(1 + seed, 0.0 if quiet else 1.0) for seed in range(1 if quiet else args.seeds)]
    bundles = [private(start, groups, draw) for draw in noises]
    rows = [evaluated(bundle, data) for bundle in bundles]
    out: Row = {**rows[0], "seeds": len(rows)}
    for kind in ("own", "shared"):
        out[kind] = {}
        for key in list(rows[0][kind]):
            values = np.array([row[kind][key] for row in rows])
            out[kind][key] = np.round(values.mean(0), 4).tolist()
            if key != "interval":
                out[kind][f"{key}_range"] = [float(values.min()), float(values.max())]
    if not quiet:
        out["privacy"] = bundles[0].report["privacy"]
    return out


def evaluated(bundle: Bundle, data: DataSet) -> Row:
    """New users' queries, with own heads and with the shared one."""
    new, scorer = data.users("test"), bundle.scorers[ADAPTER]
    bundle = replace(bundle, records={user: in_order(data.history(user)) for user in new})
    featurizer = bundle.featurizer
    fresh = [
        group for own in bundle.records.values() for group in weak_adapter_groups(featurizer, own)
    ]
    heads = fit_new_heads(bundle, ADAPTER, fresh, new)
    queries = [group for user in new for group in query_groups(bundle, data, user)]
    asked = training_set(bundle, "exact", scorer, queries)
    row: Row = {"users": len(asked.names()), "queries": len(asked)}
    for kind, chosen in (("own", [heads[user] for user in asked.users]), ("shared", None)):
        scores = scorer.score(asked.groups, chosen or [None] * len(asked))
        row[kind] = figures(bundle, asked.users, scores, asked.target)
    return row


def audited(data: DataSet, level: str, args: argparse.Namespace, name: str) -> Row:
    """The membership test, of bases with new secret noise."""
    if level == NONE:
        bundle = without(data, args.folder, name)
    else:
        bundle = blank(data, level, args.folder)
        scorer = dp.private_scorer(bundle, bundle.featurizer.adapter_names)
        bundle = replace(bundle, scorers={ADAPTER: scorer})
    started = time.process_time()
    found = audit(bundle, data, bases=args.bases).to_json()
    del found["seconds"], found["notes"]
    return {**found, "cpu_seconds": round(time.process_time() - started, 1)}


def plot(results: dict[str, dict[str, Row]], file: Path) -> None:
    """Quality of new users' answers, and the attackers' AUC, by ε."""
    import altair as alt

    rows = []
    for name, levels in results.items():
        for level, row in levels.items():
            for kind in ("own", "shared") if "own" in row else ():
                metric = "mae" if "mae" in row[kind] else "accuracy"
                low, high = row[kind]["interval"]
                heads = f"{kind} heads" if kind == "own" else "shared head"
                value = {"value": row[kind][metric], "low": low, "high": high, "of": heads}
                rows.append({"panel": f"{name}: {metric}", "ε": level, **value})
            for attack, own in row.get("audit", {}).get("attacks", {}).items():
                value = {**own["auc"], "of": f"attack: {attack}"}
                rows.append({"panel": f"{name}: AUC of attacks", "ε": level, **value})
    order = [*EPSILONS, NONE]
    panels = []
    for panel in dict.fromkeys(row["panel"] for row in rows):
        base = alt.Chart(alt.Data(values=[row for row in rows if row["panel"] == panel])).encode(
            x=alt.X("ε:N", sort=order, axis=alt.Axis(labelAngle=0)),
            xOffset="of:N",
            color=alt.Color("of:N", title=None),
        )
        axis = alt.Scale(zero=False)
        bars = base.mark_rule().encode(y=alt.Y("low:Q", scale=axis, title=None), y2="high:Q")
        points = base.mark_point(filled=True, size=50).encode(y=alt.Y("value:Q", scale=axis))
        panels.append((bars + points).properties(width=260, height=220, title=panel))
    alt.hconcat(*panels).resolve_scale(color="independent").save(file)


if __name__ == "__main__":
    main()
