"""An LLM's answers to one prompt against answers to several, at the same number of answers.

    python benchmarks/candidate_prompts.py DATA --llm replay:FILE [--new 12] [--limit 6] [--set
    NAME=VALUE] [--json]

For the labelled queries of training users, by which choices are made, and for new users' queries:
the prompt's greedy answer and samples, or greedy answers of other prompts in place of some samples.
Printed are the mean gain of an answer, the expected best of 1, 2, 4 and 8 answers, and the gain of
three picks: by expected ROUGE of the word model, by that with agreement (0.5 and 0.1, once the
adapter's prior), and by minimum Bayes risk; each with its difference from samples alone (95 %
bootstrap intervals over users). Then picks by the expected gain less so many of its deviations,
over word models or by the words' probabilities. Of training users the other prompts are those with
one retrieved record alone, which a run with `reranker_check=llm` asked. Queries that lack an answer
are left out.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from measure import finish, options

from hydra_llm.bench.method import Parts, find_methods
from hydra_llm.bench.methods import GREEDY
from hydra_llm.cli.options import GivenSettings
from hydra_llm.config import Settings, load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import load
from hydra_llm.errors import LLMError
from hydra_llm.history import in_order
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.cache import CachedLLM
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.llm.registry import open_llm
from hydra_llm.select import first_best
from hydra_llm.side_features import Featurizer
from hydra_llm.tasks.base import Floats, Task
from hydra_llm.text import words
from hydra_llm.training.api import fit, learn
from hydra_llm.training.labelling import training_queries
from hydra_llm.training.word_model import learn_word_model
from hydra_llm.types import Candidate, Query

WORD_MODELS = 3  # of other folds and seeds
SUBSETS, DRAWS, COUNTS = 8, 2000, (1, 2, 4, 8)
NAMES = ("zero-shot", "rag@1", "recent@4", "icl-random@1", "rag-dense@4", "icl-random@4")
NAMES += ("recent@1",)
RECORDS = tuple(f"record {place}" for place in range(1, 6))
MIXTURES: Mapping[str, Sequence[Sequence[str]]] = {
    "training": [(), *(RECORDS[:n] for n in (1, 2, 3, 5)), RECORDS[1:2]],
    "new": [(), *((name,) for name in NAMES[:3]), *(NAMES[:n] for n in (2, 3, 4, 5, 7))],
}
LEAST = (-1.0, -0.5, 0.25, 0.5, 1.0, 2.0)  # deviations taken off
Pick = Callable[["Case", Sequence[str]], str]


@dataclass(frozen=True)
class Case:
    """A query: what was answered, and what each answer is worth."""

    user: str
    greedy: Mapping[str, str]  # by prompt; the empty name is the one that was sampled
    samples: Sequence[str]
    gains: Mapping[str, float]  # of each answer
    expected: Mapping[str, Sequence[float]]  # by each word model
    spread: Mapping[str, float]  # deviation of the gain by the words' probabilities
    task: Task


def main() -> None:
    parser = options(__doc__, runs=1)
    parser.add_argument("data", type=Path)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--new", type=int, default=12, help="new users")
    parser.add_argument("--limit", type=int, default=6, help="queries of each, the first")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE")
    args = parser.parse_args()
    settings = load_settings(**GivenSettings(set_=args.set).given(seed=args.seed))
    data = load(args.data)
    llm = open_llm(args.llm, settings)
    parts = learned(args, data, llm, settings)
    models = [
        learn_word_model({user: data.history(user) for user in data.users("train")}, seed)
        for seed in range(WORD_MODELS)
    ]
    bundle = parts.bundle
    known = (bundle.task, bundle.features, bundle.population)
    featurizers = [Featurizer(*known, own.model, own.without) for own in models if own]
    found = {}
    for whose, queries in asked(args, data, parts).items():
        everything = run_sync(partial(collected, parts, featurizers, queries, llm))
        needed = {name for mixture in MIXTURES[whose] for name in mixture}
        cases = [case for case in everything if needed <= case.greedy.keys()]
        found[whose] = {"queries": len(cases), "left_out": len(queries) - len(cases)}
        found[whose] |= {"mixtures": mixtures(cases, MIXTURES[whose])}
        found[whose] |= {"lower_bounds": lower_bounds(cases)}
    finish(args, found, lines_of(found), [])


def learned(args: argparse.Namespace, data: DataSet, llm: CachedLLM, settings: Settings) -> Parts:
    """The reranker as older recordings have it, without a word model, and new users' heads."""
    plain = learn(data, llm, settings.model_copy(update={"word_model": False})).bundle
    scorers = {name: own for name, own in plain.scorers.items() if name == "reranker"}
    new = data.users("test")[: args.new]
    bundle = fit(data, replace(plain, scorers=scorers), llm, users=new).bundle
    records = {user: in_order(data.answered(user)) for user in bundle.trained_on}
    return Parts(bundle, llm, settings, records | {u: in_order(data.history(u)) for u in new})


def asked(args: argparse.Namespace, data: DataSet, parts: Parts) -> Mapping[str, list[Query]]:
    labelled = parts.bundle.trained_on[: parts.settings.labelled_users]
    most, task = parts.settings.queries_per_user, data.task
    return {
        "training": [q for u in labelled for q in training_queries(task, parts.records[u], most)],
        "new": [q for u in data.users("test")[: args.new] for q in data.queries(u)[: args.limit]],
    }


async def collected(
    parts: Parts, featurizers: Sequence[Featurizer], queries: Sequence[Query], llm: CachedLLM
) -> list[Case]:
    """The queries whose samples are recorded, each with the prompts that are."""
    methods = [(own.name, own.build(parts)) for own in find_methods(NAMES, parts.bundle.task.kind)]
    hydra, once = parts.personalizer(rerank=True), parts.personalizer(rerank=True, **GREEDY)
    task, settings, cases = parts.bundle.task, parts.settings, list[Case]()
    for query in queries:
        try:
            proposal = await hydra.apropose(query)
        except LLMError:
            continue
        drawn = Sampling(settings.samples - 1, settings.temperature, settings.max_tokens)
        drawn = replace(drawn, seed=settings.seed)
        texts = (await llm.generate(proposal.messages, drawn)).texts
        samples = [task.read(text, settings.parsing) or "" for text in texts]
        greedy = {"": next(own.answer or "" for own in proposal.candidates if own.greedy)}
        for name, build in methods:
            try:
                greedy[name] = (await build.aanswer(query)).text
            except LLMError:
                continue
        for name, item in zip(RECORDS, proposal.retrieved, strict=False):
            try:
                alone = await once.sample(llm, once.render(query, [item]))
            except LLMError:
                break
            greedy[name] = alone.candidates[0].answer or ""
        cases.append(valued(parts, featurizers, query, greedy, samples))
    return cases


def valued(
    parts: Parts,
    featurizers: Sequence[Featurizer],
    query: Query,
    greedy: Mapping[str, str],
    samples: Sequence[str],
) -> Case:
    task, answers = parts.bundle.task, sorted({*greedy.values(), *samples})
    offered, columns, spread = [Candidate(own, own, 1) for own in answers], [], {}
    for featurizer in featurizers:
        context = replace(parts.personalizer().context_of(query), vectorize=featurizer.vectorize)
        features = featurizer.adapter(query, offered, context.vectors)
        columns.append(features[:, featurizer.adapter_names.index("expected_rouge")])
        if not spread:
            share = featurizer.word_shares(query, context.vectors)
            assert share is not None
            usual = float(np.mean(context.vectors.words)) if context.visible else 0.0
            for own in answers:
                chances = share(sorted(set(words(own))))
                variance = float((chances * (1 - chances)).sum())
                spread[own] = 1.5 * variance**0.5 / max(1.0, len(words(own)) + 0.5 * usual)
    expected = dict(zip(answers, np.transpose(columns).tolist(), strict=True))
    gains = {own: task.gain(own or None, query.gold or "") for own in answers}
    return Case(query.user, greedy, samples, gains, expected, spread, task)


# ---- what a set of answers is worth


def expected_best(base: float, values: Sequence[float], count: int) -> float:
    """The expected largest of `base` and `count` of the values, drawn without replacement."""
    ordered, total = np.sort(values), len(values)
    if not count:
        return base
    shares = np.array([comb(place, count - 1) / comb(total, count) for place in range(total)])
    return float(shares @ np.maximum(ordered, base))


def drawn_sets(case: Case, beside: Sequence[str], count: int) -> Iterable[list[str]]:
    """Sets of `count` answers: greedy ones first, and some of the samples."""
    first = [case.greedy[name] for name in ("", *beside)][:count]
    rest, rng = count - len(first), np.random.default_rng(0)
    for _ in range(1 if rest in (0, len(case.samples)) else SUBSETS):
        chosen = rng.choice(len(case.samples), rest, replace=False)
        yield first + [case.samples[place] for place in sorted(chosen.tolist())]


def distinct(answers: Sequence[str]) -> list[str]:
    """The answers that say something, each once."""
    return [own for own in dict.fromkeys(answers) if own] or [""]


def by_words(case: Case, answers: Sequence[str]) -> str:
    kept = distinct(answers)
    return kept[first_best(np.array([case.expected[own][0] for own in kept]))]


def by_prior(case: Case, answers: Sequence[str]) -> str:
    """Weights 0.5 and 0.1, the prior of version 2026-11-30."""
    kept = distinct(answers)
    agreement = (case.task.gain_matrix(kept).sum(1) - 1) / max(1, len(kept) - 1)
    expected = np.array([case.expected[own][0] for own in kept])
    return kept[first_best(0.5 * expected + 0.1 * agreement)]


def by_votes(case: Case, answers: Sequence[str]) -> str:
    kept = distinct(answers)
    votes = np.array([float(answers.count(own)) for own in kept])
    return kept[first_best(case.task.gain_matrix(kept) @ votes)]


PICKS: Mapping[str, Pick] = {"expected": by_words, "prior": by_prior, "mbr": by_votes}


def less_deviation(times: float, *, over_models: bool) -> Pick:
    def pick(case: Case, answers: Sequence[str]) -> str:
        kept = distinct(answers)
        expected = np.array([np.mean(case.expected[own]) for own in kept])
        spread = [np.std(case.expected[own]) if over_models else case.spread[own] for own in kept]
        return kept[first_best(expected - times * np.array(spread))]

    return pick


def picked(cases: Sequence[Case], pick: Pick, beside: Sequence[str] = ()) -> Floats:
    """[N] mean gain of the pick over sets of answers."""
    most = len(cases[0].samples) + 1
    sets = [list(drawn_sets(case, beside, most)) for case in cases]
    return np.array(
        [
            np.mean([case.gains[pick(case, own)] for own in several])
            for case, several in zip(cases, sets, strict=True)
        ]
    )


def best(cases: Sequence[Case], beside: Sequence[str], count: int) -> Floats:
    """[N] expected gain of the best of `count` answers."""
    values = []
    for case in cases:
        first = [case.gains[case.greedy[name]] for name in ("", *beside)][:count]
        samples = [case.gains[own] for own in case.samples]
        values.append(expected_best(max(first), samples, count - len(first)))
    return np.array(values)


def mixtures(cases: Sequence[Case], tried: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    most, rows, plain = len(cases[0].samples) + 1, [], dict[str, Floats]()
    for beside in tried:
        named = {f"best of {count}": best(cases, beside, count) for count in COUNTS}
        named |= {name: picked(cases, pick, beside) for name, pick in PICKS.items()}
        named["mean"] = np.array(
            [
                np.mean(
                    [[case.gains[own] for own in set_] for set_ in drawn_sets(case, beside, most)]
                )
                for case in cases
            ]
        )
        plain = plain or named
        row: dict[str, Any] = {"beside": list(beside)}
        for name, values in named.items():
            row[name] = round(float(values.mean()), 4)
            if beside:
                row[f"{name}, difference"] = difference(cases, values - plain[name])
        rows.append(row)
    return rows


def lower_bounds(cases: Sequence[Case]) -> list[dict[str, Any]]:
    rows = []
    for over_models in (True, False):
        plain = picked(cases, less_deviation(0.0, over_models=over_models))
        for times in (0.0, *LEAST):
            gains = picked(cases, less_deviation(times, over_models=over_models))
            found = {"deviation": "models" if over_models else "words", "times": times}
            change = difference(cases, gains - plain)
            rows.append({**found, "gain": round(float(gains.mean()), 4), "difference": change})
    return rows


def difference(cases: Sequence[Case], values: Floats) -> list[float]:
    """The mean, and its 95 % interval over users."""
    users = np.unique([case.user for case in cases], return_inverse=True)[1]
    sums, counts = np.bincount(users, values), np.bincount(users)
    drawn = np.random.default_rng(0).integers(0, len(counts), (DRAWS, len(counts)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    ends = np.percentile(means, [2.5, 97.5]).tolist()
    return [round(float(own), 4) for own in (values.mean(), *ends)]


def lines_of(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for whose, own in found.items():
        lines.append(f"{whose} users: {own['queries']} queries, {own['left_out']} left out")
        for row in own["mixtures"]:
            lines.append(f"  samples and {', '.join(row['beside']) or 'nothing else'}")
            for name, value in row.items():
                if isinstance(value, float):
                    change = row.get(f"{name}, difference")
                    lines.append(f"    {name:<10} {value:.4f} {shown(change) if change else ''}")
        for row in own["lower_bounds"]:
            name = f"  expected - {row['times']:g} deviations ({row['deviation']})"
            lines.append(f"{name:<44} {row['gain']:.4f} {shown(row['difference'])}")
    return lines


def shown(change: Sequence[float]) -> str:
    mean, low, high = change
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


if __name__ == "__main__":
    main()
