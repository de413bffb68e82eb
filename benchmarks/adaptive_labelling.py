"""How many labels of the LLM learning needs: all, as many as `labelling=adaptive` asks for, a
random part, and a part of the most uncertain queries.

    python benchmarks/adaptive_labelling.py DATA [--sets news_category_285 news_headline_292]
        [--records news_category_60 movie_rating_60] [--repeats 4] [--folds 5] [--out FILE]
        [--plot FILE]

Replays the recordings of `benchmarks/results`: no LLM call. The users of a run by folds are dealt
anew in each repeat. Of every fold the adapter learns from labels of the other users' queries, and
its picks for the fold's queries are measured: log-loss and gain (accuracy; 1 − error / 4; ROUGE-1).
The policy sees training users alone. Intervals are over users, of each query's mean over repeats.

Texts: word models of other users (learned once, without an LLM), shared heads, as new users get.
Labels and ratings: base and heads come from histories (learned once; every user's scores by a base
and a head that have not seen the queries); the LLM's labels calibrate, and weigh its votes.

`uncertain` are the queries whose pick is least certain before the LLM is asked (labels: 1 − the
highest probability), for texts those whose candidates the word model tells apart most: this knows
the candidates, which a policy could not, and so is the most that such an order can give.

`--records`: labels of single records, as `reranker_labels=llm` asks for, against one call for all
records of a query that have the same answer (`labelling=adaptive`), and as many calls for records
at random. The gain of the LLM's answer with the first record, by rerankers of these labels, in
cross-validation over users.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reranker_labels import Case, first_gains

from hydra_llm.bench.folds import evaluated_users
from hydra_llm.bench.stats import interval, paired
from hydra_llm.bundle import Bundle
from hydra_llm.cli.options import GivenSettings
from hydra_llm.config import Settings, load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import load
from hydra_llm.llm.cache import CachedLLM, open_recording
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.model.scorer import Scorer
from hydra_llm.select import TIE
from hydra_llm.training.adaptive import Judge, Rounds, in_turns, judge_by_refit, judge_of_votes
from hydra_llm.training.api import blank_bundle
from hydra_llm.training.calibration import FitReport, HeldOut, calibrate, group_losses
from hydra_llm.training.dataset import LabelledGroup, TrainingSet, folds, in_set_order
from hydra_llm.training.labelling import (
    Collected,
    adapter_groups,
    known_queries,
    offers_all,
    reads_labels,
    reranker_groups,
    training_queries,
    unasked_groups,
    weak_adapter_groups,
)
from hydra_llm.training.strengths import Strengths
from hydra_llm.training.train_scorer import LabelledData, target_rule, train_scorer, training_set
from hydra_llm.training.word_model import learn_word_model
from hydra_llm.types import Query

RESULTS = Path(__file__).with_name("results")
SETS = ("news_category_285", "news_headline_292")
SIZES = (8, 16, 32, 64, 128)
OF_TEXTS = Strengths(
    ridges=(10.0, 300.0, 3000.0), side_ridges=(10.0, 100.0, 1000.0), precisions=(1000.0,)
)
OF_LABELS = Strengths(
    ridges=(3.0, 30.0, 300.0), side_ridges=(1.0, 10.0), precisions=(1.0, 10.0, 100.0), bases=(30.0,)
)
ADAPTER = "adapter"
Key = tuple[str, str]
Rows = Mapping[Key, tuple[float, float]]
"""Loss and gain of the pick for each evaluated query."""


@dataclass(frozen=True)
class Study:
    """A set whose labelled groups are all known."""

    queries: Sequence[Query]
    groups: Mapping[Key, LabelledGroup]
    calls: float  # of one query
    judge: Callable[[set[str]], Judge]  # of these training users
    evaluate: Callable[[Sequence[Key], set[str]], Rows]
    """The queries of these new users, by what the labels of these queries teach."""
    certainty: Mapping[Key, float]

    def label(self, queries: Sequence[Query]) -> Collected:
        """What the LLM said of these queries."""
        own = [self.groups[key(query)] for query in queries if key(query) in self.groups]
        return Collected(lambda featurizer: own, calls=len(queries))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="*", default=SETS)
    parser.add_argument("--records", nargs="*", default=())
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--out", type=Path, help="JSON; sets that it has and that are not named stay"
    )
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    for name in args.sets:
        study = study_of(name, args.data, args.set)
        found[name] = measured(study, args.repeats, args.folds)
        print("\n".join(lines_of(name, found[name])), flush=True)
        keep(args.out, found)
    for name in args.records:
        found[name] = of_records(name, args.data, args.set, args.repeats)
        print(json.dumps({name: found[name]}, indent=1), flush=True)
        keep(args.out, found)
    if args.plot:
        plot(found, args.plot)


def keep(path: Path | None, found: Mapping[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")


def recorded(
    name: str, folder: Path, more: Sequence[str]
) -> tuple[Settings, DataSet, CachedLLM, dict[str, int | None]]:
    """The settings, data and LLM of a committed run, and its numbers of users and queries."""
    commands = json.loads((RESULTS / name / "commands.json").read_text())
    options = commands["bench run"]
    given = [options[i + 1] for i, option in enumerate(options) if option == "--set"]
    numbers = {
        flag: int(options[options.index(flag) + 1]) if flag in options else None
        for flag in ("--users", "--limit")
    }
    settings = load_settings(**GivenSettings(set_=[*given, *more]).given())
    llm = open_recording(RESULTS / commands.get("recording", name) / "recording.jsonl.gz")
    return settings, load(folder / commands.get("data", name)), llm, numbers


def of_records(name: str, folder: Path, more: Sequence[str], repeats: int) -> dict[str, Any]:
    """Calls for labels of single records, and what rerankers of these labels are worth."""
    settings, data, llm, _ = recorded(name, folder, more)
    users = [user for user in data.users("train")[: settings.users] if data.history(user)]
    users = users[: settings.labelled_users]
    records = {user: data.answered(user) for user in users}
    bundle = blank_bundle(data.task, llm, settings, records)
    plain, most = bundle.personalizer(llm, rerank=False), settings.queries_per_user
    queries = [q for user in users for q in training_queries(data.task, records[user], most)]
    groups, calls = {}, {}
    for way in ("all", "adaptive"):
        chosen = settings.model_copy(update={"labelling": way})
        collected = run_sync(partial(reranker_groups, replace(plain, settings=chosen), queries))
        groups[way] = in_set_order(collected.groups(bundle.featurizer))
        calls[way] = collected.calls
    cases = [Case(group, ()) for group in groups["all"]]
    owners = [case.group.user for case in cases]
    gains: dict[str, list[np.ndarray]] = defaultdict(list)
    for seed in range(repeats):
        draw = np.random.default_rng(seed)
        share = calls["adaptive"] / calls["all"]
        groups["random"] = [part(group, share, draw) for group in groups["all"]]
        for way, own in groups.items():
            options = argparse.Namespace(folds=5, seed=seed)
            gains[way].append(first_gains(bundle, cases, own, options))
    calls["random"] = sum(len(group.gains) for group in groups["random"])
    values = {way: np.mean(own, axis=0) for way, own in gains.items()}
    values["retriever"] = np.array([case.group.gains[0] for case in cases])
    alike = [
        first == second
        for one, other in zip(groups["all"], groups["adaptive"], strict=True)
        for first, second in zip(one.gains, other.gains, strict=True)
    ]
    found: dict[str, Any] = {"queries": len(cases), "equal_labels": float(np.mean(alike))}
    for way, own in values.items():
        against = paired(own, values["all"], owners)
        found[way] = {
            "calls": calls.get(way, 0),
            "gain": [float(own.mean()), *interval(own, owners)],
            "gain_less_all": [against.difference, against.low, against.high],
        }
    return found


def part(group: LabelledGroup, share: float, draw: np.random.Generator) -> LabelledGroup:
    """The group with this share of its records, at least two, at random."""
    size = max(2, round(share * len(group.gains)))
    places = sorted(draw.permutation(len(group.gains))[:size])
    return replace(
        group,
        rights=[group.rights[i] for i in places],
        gains=[group.gains[i] for i in places],
        side_features=group.side_features[places],
    )


def study_of(name: str, folder: Path, more: Sequence[str]) -> Study:
    """The users and queries of a committed run by folds, labelled by its recording."""
    settings, data, llm, numbers = recorded(name, folder, more)
    users = evaluated_users(data, numbers["--users"])
    records = {user: data.history(user) for user in users}
    bundle = blank_bundle(data.task, llm, settings, records)
    bundle = replace(bundle, trained_on=tuple(users))
    if not data.task.labels and (models := learn_word_model(records, settings.seed)) is not None:
        bundle = replace(bundle, word_model=models.model, word_models=models.without)
    queries = [q for user in users for q in known_queries(data, user)[: numbers["--limit"]]]
    plain = bundle.personalizer(llm, rerank=False, adapt=False)
    collected = run_sync(partial(adapter_groups, plain, queries))
    groups = {(own.user, own.query): own for own in collected.groups(bundle.featurizer)}
    per_query = (collected.usage.calls + collected.usage.cached) / len(queries)
    if offers_all(data.task, settings):
        weak = [
            own for user in users for own in weak_adapter_groups(bundle.featurizer, records[user])
        ]
        unasked = unasked_groups(plain, bundle.featurizer, queries)
        return of_labels(bundle, queries, groups, per_query, [*unasked, *weak])
    return of_texts(bundle, queries, groups, per_query)


def of_texts(
    bundle: Bundle, queries: Sequence[Query], groups: Mapping[Key, LabelledGroup], calls: float
) -> Study:
    featurizer = bundle.featurizer
    rule, names = target_rule(bundle, ADAPTER), featurizer.adapter_names

    def data_of(collected: Collected) -> LabelledData:
        return LabelledData(ADAPTER, collected.groups, names, rule)

    def evaluate(labelled: Sequence[Key], new: set[str]) -> Rows:
        own = [groups[one] for one in labelled if one in groups]
        data = LabelledData(ADAPTER, lambda made: own, names, rule)
        scorer = train_scorer(bundle, data, strengths=OF_TEXTS).scorers[ADAPTER]
        tested = in_set_order([group for group in groups.values() if group.user in new])
        known = training_set(bundle, rule, scorer, tested)
        with torch.no_grad():
            return rows(scorer, known, scorer.core(known.groups), list(map(key, tested)))

    column = names.index("expected_rouge")
    spread = {one: float(np.var(own.side_features[:, column])) for one, own in groups.items()}
    return Study(
        queries,
        groups,
        calls,
        judge=lambda training: judge_by_refit(bundle, data_of, OF_TEXTS),
        evaluate=evaluate,
        certainty={one: -value for one, value in spread.items()},
    )


def of_labels(
    bundle: Bundle,
    queries: Sequence[Query],
    groups: Mapping[Key, LabelledGroup],
    calls: float,
    histories: Sequence[LabelledGroup],
) -> Study:
    parts: list[HeldOut] = []
    names, by_label = bundle.featurizer.adapter_names, reads_labels(bundle.task, bundle.settings)
    data = LabelledData(
        ADAPTER, lambda made: list(histories), names, target_rule(bundle, ADAPTER), by_label
    )
    trained = train_scorer(bundle, data, strengths=OF_LABELS, keep=parts.extend)
    scorer = trained.scorers[ADAPTER]
    # every user's groups in the set's order: the keys of the parts' rows
    of_user: dict[str, list[Key]] = defaultdict(list)
    for group in in_set_order([own for own in histories if own.voted]):
        of_user[group.user].append(key(group))
    keys = []
    for part in parts:
        seen: dict[str, int] = defaultdict(int)
        for user in part.late.users:
            keys.append(of_user[user][seen[user]])
            seen[user] += 1
    late = joined(parts)
    place = {one: number for number, one in enumerate(keys)}

    def some(wanted: Sequence[Key]) -> HeldOut:
        places = [place[one] for one in wanted if one in groups]
        known = late.late.take(places)
        side = known.groups.side_features.clone()
        for row, one in enumerate(keys[number] for number in places):
            side[row] = torch.from_numpy(groups[one].side_features).float()
        known = replace(known, groups=replace(known.groups, side_features=side))
        return HeldOut(known, late.shared[places], late.own[places])

    def of_users(users: set[str]) -> list[Key]:
        return [one for one in keys if one[0] in users]

    def judge(training: set[str]) -> Judge:
        own = of_users(training)
        places = [place[one] for one in own]
        held_out = HeldOut(late.late.take(places), late.shared[places], late.own[places])
        voted = [group for group in histories if group.voted and group.user in training]
        return judge_of_votes(scorer, [held_out], voted, bundle.featurizer)

    def evaluate(labelled: Sequence[Key], new: set[str]) -> Rows:
        calibrate(scorer, [some(labelled)], FitReport())
        tested = [one for one in of_users(new) if one in groups]
        part = some(tested)
        if not scorer.hears_llm:  # it is not asked then
            part = HeldOut(late.late.take([place[one] for one in tested]), part.shared, part.own)
        return rows(scorer, part.late, part.own, tested)

    top = late.own.masked_fill(~late.late.groups.mask, -torch.inf).softmax(-1).amax(-1).tolist()
    return Study(queries, groups, calls, judge, evaluate, dict(zip(keys, top, strict=True)))


def joined(parts: Sequence[HeldOut]) -> HeldOut:
    """Parts with groups of the same width as one."""
    sets = [part.late for part in parts]
    groups = sets[0].groups
    names = [name for name, value in vars_of(groups).items() if isinstance(value, torch.Tensor)]
    merged = {name: torch.cat([getattr(own.groups, name) for own in sets]) for name in names}
    users = tuple(user for own in sets for user in own.users)
    late = TrainingSet(
        replace(groups, **merged),
        users,
        torch.cat([own.positions for own in sets]),
        torch.cat([own.voted for own in sets]),
        torch.cat([own.gains for own in sets]),
    )
    return HeldOut(
        late, torch.cat([part.shared for part in parts]), torch.cat([part.own for part in parts])
    )


def vars_of(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


@torch.no_grad()
def rows(scorer: Scorer, data: TrainingSet, core: torch.Tensor, keys: Sequence[Key]) -> Rows:
    """Loss and gain of the pick: the first of the highest scores."""
    scores = scorer.calibrated(core, data.groups)
    losses = group_losses(scorer, data, scores.masked_fill(~data.groups.mask, -1e30)).tolist()
    tops = scores >= scores.max(-1, keepdim=True).values - TIE
    gains = data.gains.gather(1, tops.int().argmax(-1)[:, None])[:, 0].tolist()
    return dict(zip(keys, zip(losses, gains, strict=True), strict=True))


def key(of: Query | LabelledGroup) -> Key:
    return (of.user, of.id) if isinstance(of, Query) else (of.user, of.query)


def measured(study: Study, repeats: int, count: int) -> dict[str, Any]:
    """Every way to choose what is labelled, on the same folds."""
    per_query: dict[str, dict[Key, list[tuple[float, float]]]] = {}
    asked: dict[str, list[int]] = defaultdict(list)
    users = sorted({query.user for query in study.queries})
    told = []
    for repeat in range(repeats):
        for part in folds(users, count, repeat):
            new = set(part)
            own = [query for query in study.queries if query.user not in new]
            rounds = Rounds(study.judge(set(users) - new), repeat)
            label = partial(rounds.label, partial(_answered, study))
            run_sync(partial(label, None, own))
            told.append(rounds.report)
            adaptive = rounds.report["queries"]
            other = in_turns(own, 1000 + repeat)
            sure = sorted(own, key=lambda query: study.certainty.get(key(query), 0.0))
            ways = {"all": own, "adaptive": in_turns(own, repeat)[:adaptive]}
            ways |= {"a third, random": other[: len(own) // 3]}
            ways |= {"a third, uncertain": sure[: len(own) // 3]}
            ways |= {f"random {n}": other[:n] for n in SIZES if n < len(own)}
            ways |= {f"uncertain {n}": sure[:n] for n in SIZES if n < len(own)}
            for way, labelled in ways.items():
                asked[way].append(len(labelled))
                found = study.evaluate(list(map(key, labelled)), new)
                for one, row in found.items():
                    per_query.setdefault(way, {}).setdefault(one, []).append(row)
    every = per_query["all"]
    owners = [one[0] for one in every]
    values = {
        way: np.array([np.mean(own[k], axis=0) for k in every]) for way, own in per_query.items()
    }
    base = values["all"]
    summed = {}
    for way, seen in values.items():
        entry: dict[str, Any] = {"queries": float(np.mean(asked[way]))}
        entry["calls"] = entry["queries"] * study.calls
        for column, what in enumerate(("loss", "gain")):
            entry[what] = [float(seen[:, column].mean()), *interval(seen[:, column], owners)]
            against = paired(seen[:, column], base[:, column], owners)
            entry[f"{what}_less_all"] = [against.difference, against.low, against.high]
        summed[way] = entry
    return {
        "users": len(users),
        "queries": len(every),
        "calls_per_query": study.calls,
        "stopped_at": sorted(entry["queries"] for entry in told),
        "ways": summed,
    }


async def _answered(
    study: Study, pipeline: Any, queries: Sequence[Query], progress: Any
) -> Collected:
    return study.label(queries)


def lines_of(name: str, found: Mapping[str, Any]) -> list[str]:
    lines = [f"{name}: {found['queries']} queries of {found['users']} users"]
    for way, own in found["ways"].items():
        figures = "   ".join(
            f"{what} {own[what][0]:.4f} ({own[f'{what}_less_all'][0]:+.4f}"
            f" [{own[f'{what}_less_all'][1]:+.4f}, {own[f'{what}_less_all'][2]:+.4f}])"
            for what in ("loss", "gain")
        )
        lines.append(
            f"  {way:<20} {own['queries']:6.1f} queries {own['calls']:6.1f} calls   {figures}"
        )
    return lines


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Held-out quality against calls, less that of all labels."""
    import altair as alt

    points = [
        {
            "set": name,
            "labelled": way.split()[0],
            "calls": own["calls"],
            **dict(zip(("loss", "low", "high"), own["loss_less_all"], strict=True)),
        }
        for name, entry in found.items()
        for way, own in entry.get("ways", {}).items()
        if not way.startswith("a third")
    ]
    calls = alt.X("calls:Q", scale=alt.Scale(type="log"), title="LLM calls")
    base = alt.Chart().encode(x=calls, color="labelled:N")
    title = "log-loss less that of all labels"
    marks = base.mark_line(point=True).encode(y=alt.Y("loss:Q", title=title))
    spans = base.mark_rule(opacity=0.4).encode(y="low:Q", y2="high:Q")
    data = {"values": points}
    layered = alt.layer(marks, spans, data=data)
    chart = layered.properties(width=220, height=180).facet(column="set:N")
    chart.resolve_scale(x="independent", y="independent").save(str(path))


if __name__ == "__main__":
    main()
