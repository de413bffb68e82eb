"""Users whose taste changes, and the questions that tell most about a new one.

    python benchmarks/changing_taste.py DATA [--only NAME ...] [--base 300] [--users 100] [--json]

DATA is the folder of the data sets (`DATA/opinion`, ...), which are not part of this repository.
The adapter is learned from `--base` training users without an LLM. Evaluated are users whom it has
not seen: other training users for what is chosen here, and new users (the split `test`).

`questions`: a new user answers 10 questions of those whose answers are known (the user's records),
chosen by `hydra_llm.model.questions`, or by lot (the mean of 3 draws). The gain is that of the
answers to the user's queries over those without a record; its share is that of all records' gain.

`change`: two users glued together: 50 records of one, then 30 of another. Each record is predicted
by a head that is fitted to those before it, 3 records at a time. `excess` is the log-loss less that
of the same records where the second user's own first 20 came before them, by a head without a
discount; the change is made up for where the excess, as the mean of 6 records, is at most a tenth
of that of the first 6 without a discount. `price` is what a way costs users who never change, in
shares of their log-loss. `chosen_rate` is that of the discount with the least log-loss of training
users who never change; no discount is among the choices.

Intervals (95 %) resample users. With a warm cache of features (`--cache`) two minutes of CPU.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import torch
from measure import finish, options

from hydra_llm.bundle import Bundle
from hydra_llm.config import load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import load
from hydra_llm.history import as_query, in_order
from hydra_llm.llm.registry import open_llm
from hydra_llm.model.change import change_of
from hydra_llm.model.forgetting import STAYS, weights
from hydra_llm.model.heads import Head
from hydra_llm.model.newton import losses
from hydra_llm.model.questions import in_turn
from hydra_llm.select import all_labels
from hydra_llm.training import train_scorer as training
from hydra_llm.training.api import blank_bundle
from hydra_llm.training.convex import fit_heads, head_problems, heads_for
from hydra_llm.training.dataset import LabelledGroup, TrainingSet
from hydra_llm.training.discounts import RATES
from hydra_llm.training.labelling import weak_adapter_groups
from hydra_llm.training.strengths import Strengths
from hydra_llm.types import Query, Record

SETS = ("opinion", "movie_rating", "news_category")
ANSWERS, DRAWS = 10, 3
OTHERS, BEFORE, AFTER, BLOCK, SMOOTH, RECENT = 50, 20, 30, 3, 2, 20  # SMOOTH: blocks
FIXED = 0.97
RESAMPLES = 2000
STRENGTHS = Strengths(ridges=(10.0, 100.0), precisions=(3.0, 30.0, 1000.0), bases=(30.0,), steps=2)
Histories = Mapping[str, Sequence[Record]]


def learned(data: DataSet, names: Sequence[str], cache: Path) -> Bundle:
    """The adapter of these training users."""
    settings = load_settings(cache=cache)
    records = {name: in_order(data.history(name)) for name in names}
    bundle = blank_bundle(data.task, open_llm("fake:echo", settings), settings, records)
    groups = [own for each in records.values() for own in weak(bundle, each)]
    side_names = bundle.featurizer.adapter_names
    table = training.LabelledData("adapter", lambda _: groups, side_names, "exact", by_label=True)
    return training.train_scorer(bundle, table, strengths=STRENGTHS)


def weak(bundle: Bundle, records: Sequence[Record]) -> list[LabelledGroup]:
    return weak_adapter_groups(bundle.featurizer, records)


def table_of(bundle: Bundle, groups: Sequence[LabelledGroup]) -> TrainingSet:
    return training.training_set(bundle, "exact", bundle.scorers["adapter"], groups)


def log_losses(bundle: Bundle, late: TrainingSet, heads: Mapping[str, Head]) -> np.ndarray:
    """[G] of the calibrated scores."""
    scores = bundle.scorers["adapter"].score(late.groups, heads_for(late, heads))
    return losses(scores, late.target, late.groups.mask, "listwise").numpy()


def interval(rows: np.ndarray, statistic: Callable[[np.ndarray], Any]) -> list[float]:
    """A statistic of users' rows [U, ...] with its 95 % interval over users."""
    draw = np.random.default_rng(0)
    many = [statistic(rows[draw.integers(0, len(rows), len(rows))]) for _ in range(RESAMPLES)]
    low, high = np.nanpercentile(np.array(many, dtype=float), [2.5, 97.5])
    return [round(float(x), 4) for x in (statistic(rows), low, high)]


# ---- questions


def asked(bundle: Bundle, user: str, queries: Sequence[Query], known: Sequence[Record]) -> Any:
    """The queries as groups that see these records."""
    task, featurizer, candidates = bundle.task, bundle.featurizer, all_labels(bundle.task, [])
    vectors = featurizer.vectorize(known)
    for query in queries:
        gains = [task.gain(own.answer, query.gold or "") for own in candidates]
        side = featurizer.adapter(query, candidates, vectors)
        texts = task.labels
        yield LabelledGroup(user, query.id, query.input, texts, gains, side, len(known))


def questions(bundle: Bundle, data: DataSet, names: Sequence[str]) -> dict[str, Any]:
    """Log-loss and gain by way of choosing the records that are known."""
    scorer, rows = bundle.scorers["adapter"], []
    for number, user in enumerate(names):
        records = [own for own in in_order(data.history(user)) if own.output in data.task.labels]
        queries = [own for own in data.queries(user) if own.gold in data.task.labels]
        pool = table_of(bundle, list(asked(bundle, user, list(map(as_query, records)), [])))
        order = [place for place, _ in islice(in_turn(scorer, pool.groups), ANSWERS)]
        draw = np.random.default_rng(number)
        lots = [draw.permutation(len(records))[:ANSWERS] for _ in range(DRAWS)]
        ways = [[], range(len(records)), order, *lots]
        rows.append([outcome(bundle, user, queries, [records[i] for i in way]) for way in ways])
    table = np.array(rows)  # [U, ways, 2]
    table = np.concatenate([table[:, :3], table[:, 3:].mean(1, keepdims=True)], 1)
    return {
        "users": len(names),
        **{
            name: shares(table[:, :, column] * sign)
            for column, (name, sign) in enumerate((("log_loss", -1.0), ("gain", 1.0)))
        },
    }


def outcome(
    bundle: Bundle, user: str, queries: Sequence[Query], known: Sequence[Record]
) -> tuple[float, float]:
    """Mean log-loss and mean gain of a user's queries where these records are known."""
    scorer = bundle.scorers["adapter"]
    heads = fit_heads(scorer, table_of(bundle, weak(bundle, in_order(known))), [user])
    late = table_of(bundle, list(asked(bundle, user, queries, known)))
    scores = scorer.score(late.groups, heads_for(late, heads))
    p = scores.softmax(-1)
    labels = bundle.task.labels
    gain = torch.tensor([[bundle.task.gain(a, b) for b in labels] for a in labels]).float()
    pick = (p @ gain.T).argmax(-1)  # the greatest expected gain
    own = losses(scores, late.target, late.groups.mask, "listwise").mean()
    return float(own), float(late.gains.gather(1, pick[:, None]).mean())


def shares(worth: np.ndarray) -> dict[str, Any]:
    """Of the worth [U, (none, all, chosen, by lot)]: means, and shares of what all records add."""

    def share(column: int) -> Callable[[np.ndarray], float]:
        def of(rows: np.ndarray) -> float:
            none, every, own = rows[:, 0].mean(), rows[:, 1].mean(), rows[:, column].mean()
            return float((own - none) / (every - none))

        return of

    names = ("none", "all", "chosen", "lot")
    return {
        **{name: interval(worth[:, i], np.mean) for i, name in enumerate(names)},
        "share_chosen": interval(worth, share(2)),
        "share_lot": interval(worth, share(3)),
        "chosen_less_lot": interval(worth[:, 2] - worth[:, 3], np.mean),
    }


# ---- change


@dataclass(frozen=True)
class Way:
    """What counts less: by age, before a change that is detected or `told`, or all but the latest
    records.
    """

    rate: float | None = None
    detects: bool = False
    told: bool = False
    recent: int | None = None
    stays: float = STAYS
    delta: float | None = None


def histories(data: DataSet, names: Sequence[str]) -> tuple[Histories, Histories]:
    """Glued: the first records of the user before, then the later ones of each; and the same
    later records after the user's own.
    """
    full = {name: in_order(data.history(name)) for name in names}
    full = {name: own for name, own in full.items() if len(own) >= max(OTHERS, BEFORE + AFTER)}
    glued, alike, order = {}, {}, list(full)
    for before, name in zip([order[-1], *order], order, strict=False):
        later = full[name][BEFORE : BEFORE + AFTER]
        glued[name] = dated(name, [*full[before][:OTHERS], *later])
        alike[name] = dated(name, [*full[name][:BEFORE], *later])
    return glued, alike


def dated(user: str, records: Sequence[Record]) -> list[Record]:
    """The records as one user's, a day after each other."""
    days = np.datetime64("2020-01-01") + np.arange(len(records))
    return [
        Record(user, f"{place}", own.input, own.output, str(day))
        for place, (own, day) in enumerate(zip(records, days, strict=True))
    ]


def course(bundle: Bundle, table: TrainingSet, way: Way) -> np.ndarray:
    """[U, AFTER] the log-loss of each of the later records, by a head of those before it."""
    total = int(table.positions.max()) + 1
    scorer, names = bundle.scorers["adapter"], table.names()
    found: dict[str, list[float]] = {name: [] for name in names}
    rises: dict[str, list[float]] = {name: [] for name in names}  # less those of the shared head
    for start in range((total - AFTER) % BLOCK or BLOCK, total, BLOCK):
        early = table.take((table.positions < start).nonzero()[:, 0])
        late = (table.positions >= start) & (table.positions < start + BLOCK)
        late_ones = table.take(late.nonzero()[:, 0])
        changed = {name: changed_at(way, rises[name], start, total - AFTER) for name in names}
        heads: dict[str, Head] = {}
        for problem in head_problems(scorer, early, names):
            known, places = problem.mask.any(-1), torch.arange(problem.mask.shape[1])
            places = places.expand(known.shape)
            weight = weights(places, known, way.rate)
            since = torch.tensor([changed[user] for user in problem.users])[:, None]
            weight = weight.where(places >= since, way.stays * weight)
            if way.recent is not None:
                weight = weight * (places >= start - way.recent)
            weighed = replace(problem, target=problem.target * weight[..., None])
            fits = zip(weighed.users, scorer.head.fit(weighed), strict=True)
            heads |= {user: Head.of(numbers) for user, numbers in fits}
        own, shared = log_losses(bundle, late_ones, heads), log_losses(bundle, late_ones, {})
        for user, loss, rise in zip(late_ones.users, own, own - shared, strict=True):
            found[user].append(float(loss))
            rises[user].append(float(rise))
    return np.array([found[name] for name in names])[:, -AFTER:]


def changed_at(way: Way, found: Sequence[float], start: int, change: int) -> int:
    """The first position after the change, as far as it is known; 0 without one."""
    if way.told and start > change:
        return change
    if not way.detects:
        return 0
    at = change_of(found) if way.delta is None else change_of(found, way.delta)
    return 0 if at is None else at + start - len(found)


def change(bundle: Bundle, data: DataSet, names: Sequence[str], ways: Any) -> dict[str, Any]:
    """Each way's course after the change, and its price without one."""
    glued, alike = (
        table_of(bundle, [own for each in part.values() for own in weak(bundle, each)])
        for part in histories(data, names)
    )
    plain = course(bundle, alike, Way())
    first = course(bundle, glued, Way()) - plain
    level = 0.1 * first[:, : BLOCK * SMOOTH].mean()
    out: dict[str, Any] = {"users": len(plain), "log_loss": round(float(plain.mean()), 4)}
    for name, way in ways.items():
        after = course(bundle, glued, way) - plain
        still = course(bundle, alike, way)
        both = np.stack([still.mean(1), plain.mean(1)], 1)
        blocks = after.reshape(len(after), -1, BLOCK).mean(-1)
        out[name] = {
            "excess": [round(float(x), 4) for x in blocks.mean(0)],
            "mean_excess": interval(after.mean(1), np.mean),
            "recovered_after": recovered(blocks.mean(0), level),
            "price": interval(both, lambda rows: rows[:, 0].mean() / rows[:, 1].mean() - 1),
        }
    return out


def recovered(blocks: np.ndarray, level: float) -> float | None:
    """Records until the mean of SMOOTH blocks is at most the level; None: not within them."""
    smooth = np.convolve(blocks, np.ones(SMOOTH) / SMOOTH, "valid")
    places = (smooth <= level).nonzero()[0]
    return float(places[0] * BLOCK) if len(places) else None


def chosen_rate(bundle: Bundle, data: DataSet, names: Sequence[str]) -> float | None:
    """By the log-loss of training users who never change."""
    _, alike = histories(data, names)
    table = table_of(bundle, [own for each in alike.values() for own in weak(bundle, each)])
    found = {rate: course(bundle, table, Way(rate)).mean() for rate in (None, *RATES[2:])}
    return min(found, key=lambda rate: found[rate])


# ---- all


def measured(data: DataSet, args: argparse.Namespace) -> dict[str, Any]:
    names, new = data.users("train"), data.users("test")
    base = names[: min(args.base, len(names) * 2 // 3)]
    others = names[len(base) : len(base) + args.users]
    bundle = learned(data, base, args.cache)
    rate = chosen_rate(bundle, data, others)
    ways = {
        "no discount": Way(),
        "recent records": Way(recent=RECENT),
        f"discount {FIXED}": Way(FIXED),
        "told": Way(told=True),
        "detector": Way(detects=True),
        "detector and discount": Way(FIXED, detects=True),
    }
    row = {"base": len(base), "chosen_rate": rate}
    row["change"] = change(bundle, data, new[: args.users], ways)
    if data.task.name in SETS[:2]:
        row["questions"] = questions(bundle, data, new[: args.users])
    return row


def lines_of(name: str, row: Mapping[str, Any]) -> list[str]:
    out = [f"{name}: {row['base']} users of the base, chosen rate {row['chosen_rate'] or 'none'}"]
    for way, own in row["change"].items():
        if isinstance(own, dict):
            figures = (f"{key} {own[key]}" for key in ("recovered_after", "mean_excess", "price"))
            out.append(f"  {way:<22} {'; '.join(figures)}")
    for figure, own in row.get("questions", {}).items():
        if isinstance(own, dict):
            out.append(f"  10 answers, {figure}: " + "; ".join(f"{k} {v}" for k, v in own.items()))
    return out


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="+", default=list(SETS))
    parser.add_argument("--base", type=int, default=300)
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--cache", type=Path, default=Path(gettempdir()) / "changing_taste")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: measured(load(args.data / name), args) for name in args.only}
    lines = [line for name, row in rows.items() for line in lines_of(name, row)]
    finish(args, {"rows": rows}, lines, [])


if __name__ == "__main__":
    main()
