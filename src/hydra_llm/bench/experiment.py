"""One run of the benchmark: data set → a bundle for each seed → answers by every method → log.

`bench run` is one of these, a study several with other settings. The bundles of several seeds share
the LLM's labels, and the first one's reranker, so that they share the candidates too: further seeds
of the adapter cost no call. Knows no tables and prints nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra_llm.bench.methods import Method, Parts
from hydra_llm.bench.runlog import RunLog, Sample
from hydra_llm.bench.runner import chosen_queries, run_methods
from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import DataError
from hydra_llm.history import before, in_order
from hydra_llm.llm.cache import CachedLLM
from hydra_llm.llm.concurrency import StageProgress, run_sync
from hydra_llm.training.api import blank_bundle, fit, learn
from hydra_llm.types import Query

Say = Callable[[str], None]


@dataclass(frozen=True)
class Experiment:
    """What is run."""

    data: DataSet
    llm: CachedLLM
    settings: Settings
    methods: Sequence[Method]
    out: Path
    users: int | None = None
    """At most so many new users."""
    limit: int | None = None
    """Each one's first queries."""
    seeds: tuple[int, ...] = ()
    """Of the learned parts; none is the settings' own."""
    fit: bool = True
    """Without it new users have records and no head: the shared heads answer them."""

    @property
    def new_users(self) -> list[str]:
        return self.data.users("test")[: self.users]

    @property
    def learns(self) -> bool:
        """Whether a method shows a part that is learned."""
        return any(method.needs for method in self.methods)


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    log: RunLog
    samples: list[Sample]
    learning: list[dict[str, Any]]
    """One entry per seed: what learning and fitting reached and cost."""


def run_experiment(
    experiment: Experiment, progress: StageProgress, say: Say, bundle: Bundle | None = None
) -> Outcome:
    """Learn what is not there yet, answer what is not answered yet. A given bundle is used as it
    is.

    Raises:
        DataError: no new user has a query with a known answer.
        SettingsError: the folder holds another run.
        LLMError: the budget is spent (a repeat continues), or every call failed.
    """
    log = RunLog(
        experiment.out, manifest(experiment, bundle)
    )  # before anything is learned: a refused command changes nothing
    bundles = {0: bundle} if bundle is not None else learned_bundles(experiment, progress, say)
    parts = [_parts(experiment, seed, each) for seed, each in bundles.items()]
    names = [user for user in experiment.new_users if user in parts[0].bundle.records]
    queries = chosen_queries(experiment.data, names, experiment.limit)
    if not queries:
        raise DataError("no new user with a head has a query: fit them first")
    methods = whole_methods(experiment.methods, list(bundles.values()), say)
    _tell_of_time(parts[0], queries, say)
    log.complete(known_late(parts, queries))
    samples = run_sync(partial(run_methods, methods, parts, queries, log, progress))
    return Outcome(log, samples, [{"seed": seed, **each.report} for seed, each in bundles.items()])


def whole_methods(methods: Sequence[Method], bundles: Sequence[Bundle], say: Say) -> list[Method]:
    """The methods whose parts have been learned; says which are left out.

    Raises:
        DataError: none is left.
    """
    lacking = {
        method.name: [
            part for part in method.shows if any(part not in each.scorers for each in bundles)
        ]
        for method in methods
    }
    why = {
        part: bundles[0].report.get(part, {}).get("skipped", "the bundle has none")
        for parts in lacking.values()
        for part in parts
    }
    for name, parts in lacking.items():
        for part in parts[:1]:
            say(f"left out: {name}, which shows the {part}: {why[part]}")
    left = [method for method in methods if not lacking[method.name]]
    if not left:
        raise DataError(
            "no method is left:"
            f" {', '.join(f'no {part} was learned ({reason})' for part, reason in why.items())}"
        )
    return left


def _parts(experiment: Experiment, seed: int, bundle: Bundle) -> Parts:
    records = {
        **bundle.records,
        **{
            name: experiment.data.history(name)
            for name in experiment.new_users
            if name in bundle.records
        },
    }
    return Parts(bundle, experiment.llm, experiment.settings, records, seed)


# ---- the bundles


def learned_bundles(experiment: Experiment, progress: StageProgress, say: Say) -> dict[int, Bundle]:
    """A bundle for each seed, learned and fitted in the run's folder; what is there already stays.
    Without a method that learns, there is nothing to learn and no call to make.
    """
    settings = experiment.settings
    if not experiment.learns:
        records = {user: in_order(experiment.data.history(user)) for user in experiment.new_users}
        return {
            settings.training_seed: blank_bundle(
                experiment.data.task, experiment.llm, settings, records
            )
        }
    found: dict[int, Bundle] = {}
    for seed in experiment.seeds or (settings.training_seed,):
        folder = experiment.out / (f"bundle-{seed}" if experiment.seeds else "bundle")
        seeded = settings.model_copy(update={"fit_seed": seed}) if experiment.seeds else settings
        first = next(iter(found.values()), None)
        found[seed] = learned_bundle(experiment, seeded, folder, progress, say, first)
    return found


def learned_bundle(
    experiment: Experiment,
    settings: Settings,
    folder: Path,
    progress: StageProgress,
    say: Say,
    first: Bundle | None = None,
) -> Bundle:
    """Learn the bundle of these settings in `folder`, and fit the new users whom it lacks. The
    reranker is the first seed's.
    """
    if not (folder / "config.json").exists():
        told = learn(
            experiment.data, experiment.llm, settings, out=folder, progress=progress, first=first
        )
        for line in [*told.notes, *told.failures[:3]]:
            say(line)
    bundle = Bundle.load(folder, here=settings)
    if not experiment.fit:
        records = bundle.records | {
            name: experiment.data.history(name) for name in experiment.new_users
        }
        return replace(bundle.without_heads(), records=records)
    missing = [user for user in experiment.new_users if user not in bundle.records]
    if missing:
        fitted = fit(experiment.data, bundle, experiment.llm, users=missing, progress=progress)
        bundle = fitted.bundle
        bundle.report["fitted"] = {"users": len(missing), "stages": fitted.told()}
        bundle.save(folder)
        bundle = Bundle.load(folder, here=settings)
    return bundle


# ---- what names the run, and what is told of it


def manifest(experiment: Experiment, bundle: Bundle | None = None) -> dict[str, Any]:
    """What names the run before it begins: samples of another one are not mixed with its own.

    Raises:
        DataError: no new user has a query with a known answer.
    """
    queries = chosen_queries(experiment.data, experiment.new_users, experiment.limit)
    if not queries:
        raise DataError(
            "no new user has a query whose answer is known: users.jsonl needs users with split"
            " 'test'"
        )
    return {
        "data": experiment.data.digest,
        "task": experiment.data.task.to_json(),
        "llm": dict(experiment.llm.identity),
        "seeds": list(experiment.seeds),
        "chosen": {"users": len({query.user for query in queries}), "queries": len(queries)},
        "settings": experiment.settings.stored(),
        **({} if experiment.fit else {"fit": False}),
        **({"learns": experiment.learns} if bundle is None else {"weights": {"0": bundle.weights}}),
    }


def known_late(parts: Sequence[Parts], queries: Sequence[Query]) -> dict[str, Any]:
    """What is known of a run once it has learned, and which queries it asks: those of users who
    could be fitted.
    """
    return {
        "weights": {str(part.seed): part.bundle.weights for part in parts},
        "trained_on": len(parts[0].bundle.trained_on),
        "users": len({query.user for query in queries}),
        "queries": len(queries),
    }


def _tell_of_time(parts: Parts, queries: Sequence[Query], say: Say) -> None:
    """Say how many queries their users' own heads may not answer."""
    scorers = [
        scorer for scorer in (parts.bundle.reranker, parts.bundle.adapter) if scorer is not None
    ]
    records: Mapping[str, Sequence[Any]] = parts.records
    seen = [(query.user, len(before(records[query.user], query))) for query in queries]
    amid = sum(
        any(scorer.serving_row(*case) != scorer.row(case[0]) for scorer in scorers) for case in seen
    )
    if amid:
        say(
            f"{amid} of {len(queries)} queries may not see all that their user's head was fitted"
            " on: the shared head answers them"
        )
