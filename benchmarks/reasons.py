"""How often a set of records is found without which another answer is picked, and what it costs.

    python benchmarks/reasons.py DATA [--sets opinion suggestion news_headline] [--queries 60]
    [--draws 20] [--bundles FOLDER] [--json]

DATA is the folder of the data sets. Each set's bundle is learned from its training users, and each
new user is asked the first query. `suggestion` and `opinion` need no LLM; `news_headline` answers
from the recording in `benchmarks/results`. A bundle in `--bundles` (by the set's name) is used as
it is, else learned there, or nowhere. `refit` fits the user's head again without the records,
`kept` leaves it as it was fitted with them; headlines have no head that could be fitted again.

    found      share of the queries for which a set was found, with its 95 % interval
    size       records of the set: median and quartiles; share: of the user's records
    flips      share of the sets whose removal changes the pick: asked again of a pipeline that has
               never seen the records, with a head that `fit` makes of the others (`refit`)
    by lot     the same for `--draws` random sets of that size of the same user
    apart      largest difference between the sum of the parts and the lead
    CPU        milliseconds of a `why`, all threads

Exits with 1 if a set does not flip its pick, parts do not add up, or half of the random sets flip.
"""

import argparse
import random
import statistics
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measure import Limit, finish, options

from hydra_llm.bench.stats import interval
from hydra_llm.bundle import Bundle
from hydra_llm.config import load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import load
from hydra_llm.llm.base import ChatLLM
from hydra_llm.llm.registry import open_llm
from hydra_llm.reasons import Reasons, Refit, why
from hydra_llm.training.api import fit, learn
from hydra_llm.training.leave_out import refit_of
from hydra_llm.types import Answer

RECORDING = Path(__file__).with_name("results") / "news_headline_292" / "recording.jsonl.gz"
USERS = 150  # training users
OF_SET: dict[str, dict[str, object]] = {
    "news_headline": {
        "queries_per_user": 5,
        "max_tokens": 32,
        "retrieved": 5,
        "label_queries": "queries",
    }
}


@dataclass(frozen=True)
class Case:
    """A set's bundle and the answers of its new users."""

    data: DataSet
    bundle: Bundle
    llm: ChatLLM
    answers: Sequence[Answer]


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", default=["opinion", "suggestion", "news_headline"])
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--bundles", type=Path, help="where learned bundles are, or are written")
    args = parser.parse_args()
    rows = []
    for name in args.sets:
        case = opened(name, args)
        refit = refit_of(case.bundle)
        ways: dict[str, Refit | None] = {"kept": None} | ({"refit": refit} if refit else {})
        rows += [{"set": name, "head": how} | measured(case, ways[how], args) for how in ways]
    limits = []
    for row in rows:
        named = f"{row['set']}, {row['head']}"
        limits.append(Limit(f"{named}: parts and lead apart", row["apart"], 1e-3))
        if row["sets"]:
            limits.append(Limit(f"{named}: sets that flip", row["flips"], 1.0, at_least=True))
            limits.append(Limit(f"{named}: random sets that flip", row["by_lot"], 0.5))
    finish(args, {"rows": rows}, [line(row) for row in rows], limits)


def opened(name: str, args: argparse.Namespace) -> Case:
    settings = load_settings(None, None, rerank="never", users=USERS, **OF_SET.get(name, {}))
    data, place = load(args.data / name), args.bundles and args.bundles / name
    llm = open_llm(f"replay:{RECORDING}" if name in OF_SET else "none", settings)
    if place and place.exists():
        bundle = Bundle.load(place)
    else:
        bundle = learn(data, llm, settings, out=place).bundle
    users = [user for user in data.users("test") if data.queries(user)][: args.queries]
    bundle = fit(data, bundle, users=users).bundle
    personalizer = bundle.personalizer(llm)
    return Case(data, bundle, llm, [personalizer.answer(data.queries(user)[0]) for user in users])


def measured(case: Case, refit: Refit | None, args: argparse.Namespace) -> dict[str, Any]:
    personalizer, dice = case.bundle.personalizer(case.llm), random.Random(args.seed)
    found: list[tuple[Answer, Reasons]] = []
    milliseconds, asked = list[float](), 0
    flips, by_lot, apart = list[bool](), list[float](), 0.0
    has, users = list[float](), list[str]()
    for answer in case.answers:
        begin = time.process_time()
        reasons = why(personalizer, answer, refit)
        took = (time.process_time() - begin) * 1000
        if reasons is None:
            continue
        asked += 1
        milliseconds.append(took)
        apart = max(apart, abs(sum(reasons.parts.values()) - lead(reasons)))
        has.append(float(bool(reasons.needed)))
        users.append(answer.proposal.query.user)
        if reasons.needed:
            found.append((answer, reasons))
    for answer, reasons in found:
        ids = [weight.record.id for weight in reasons.records]
        gone = {record.id for record in reasons.needed}
        flips.append(is_flipped(case, answer, gone, refit))
        drawn = [set(dice.sample(ids, len(gone))) for _ in range(args.draws)]
        by_lot.append(statistics.mean(is_flipped(case, answer, own, refit) for own in drawn))
    sizes = sorted(len(reasons.needed) for _, reasons in found)
    shares = [len(reasons.needed) / len(reasons.records) for _, reasons in found]
    low, high = interval(has, users)
    return {
        "queries": asked,
        "sets": len(found),
        "found": statistics.mean(has),
        "found_interval": [round(low, 4), round(high, 4)],
        "size": statistics.quantiles(sizes, n=4, method="inclusive") if len(sizes) > 1 else sizes,
        "share": statistics.median(shares) if shares else None,
        "flips": statistics.mean(flips) if flips else None,
        "by_lot": statistics.mean(by_lot) if by_lot else None,
        "apart": apart,
        "cpu_ms": statistics.quantiles(milliseconds, n=4, method="inclusive"),
    }


def lead(reasons: Reasons) -> float:
    assert reasons.pick.score is not None
    assert reasons.runner_up.score is not None
    return reasons.pick.score - reasons.runner_up.score


def is_flipped(case: Case, answer: Answer, gone: Collection[str], refit: Refit | None) -> bool:
    """Whether a user without these records is given another of the same candidates."""
    query, bundle = answer.proposal.query, case.bundle
    kept = [own for own in case.data.history(query.user) if own.id not in gone]
    poorer = DataSet.from_records(case.data.task, {query.user: "test"}, kept, [])
    heads = bundle.heads_of(query.user)
    if refit is not None:
        heads = fit(poorer, bundle, users=[query.user]).bundle.heads_of(query.user)
    pipeline = replace(bundle.personalizer(case.llm), records={query.user: kept})
    context = replace(pipeline.context_of(query), heads=heads)
    candidates = tuple(replace(own, score=None, probability=None) for own in answer.candidates)
    return pipeline.decide(context, replace(answer.proposal, candidates=candidates)).text != (
        answer.text
    )


def line(row: dict[str, Any]) -> str:
    start = f"{row['set']:<14} {row['head']:<6} {row['queries']:>4} queries"
    low, high = row["found_interval"]
    start += f"   found {row['found']:.2f} [{low:.2f}, {high:.2f}]"
    end = f"   apart {row['apart']:.1e}   {row['cpu_ms'][1]:.0f} ms CPU"
    if not row["sets"]:
        return start + end
    sizes = " / ".join(f"{size:g}" for size in row["size"])
    told = f"   size {sizes} ({row['share']:.0%} of the records)"
    return start + f"{told}   flips {row['flips']:.3f}   by lot {row['by_lot']:.3f}" + end


if __name__ == "__main__":
    main()
