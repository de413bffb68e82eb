"""One run of the benchmark: data set → one bundle per seed → answers by every method → log.

`bench run` is one experiment, a sweep is several with other settings. The bundles of all seeds
share the LLM's labels and the first one's reranker, and with it the candidates, so that further
seeds of the adapter cost no LLM call. Knows no tables and prints nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra_llm.bench.method import Method, Parts
from hydra_llm.bench.runlog import RunLog, Sample
from hydra_llm.bench.runner import chosen_queries, run_methods
from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import DataError
from hydra_llm.history import in_order
from hydra_llm.llm.cache import CachedLLM
from hydra_llm.llm.concurrency import StageProgress, run_sync
from hydra_llm.training.api import blank_bundle, fit, learn
from hydra_llm.training.train_scorer import silent
from hydra_llm.types import Query

Say = Callable[[str], None]


@dataclass(frozen=True)
class Experiment:
    """What is run, and who is told how it goes."""

    data: DataSet
    llm: CachedLLM
    settings: Settings
    methods: Sequence[Method]
    out: Path
    users: int | None = None  # at most so many new users
    limit: int | None = None  # each one's first queries
    seeds: tuple[int, ...] = ()  # of the learned parts; the settings' own if empty
    fit: bool = True  # without it the shared heads answer for new users, with their records
    bundle: Bundle | None = None  # used as it is; None: bundles are learned
    progress: StageProgress = silent
    say: Say = print  # a line for people

    @property
    def new_users(self) -> list[str]:
        return self.data.users("test")[: self.users]

    @property
    def learns(self) -> bool:
        """Whether bundles are learned, as some method uses a learned part."""
        return self.bundle is None and any(method.uses for method in self.methods)


@dataclass(frozen=True)
class Outcome:
    """The result of an experiment; `learning` has each seed's report of learning and fitting."""

    log: RunLog
    samples: list[Sample]
    learning: list[dict[str, Any]]


def run_experiment(experiment: Experiment) -> Outcome:
    """Learn and answer what is missing.

    Raises:
        DataError: no new user has a query with a known answer.
        SettingsError: the folder holds another run.
        LLMError: the budget is spent (a repeat continues), or every call failed.
    """
    # before anything is learned: a refused command changes nothing
    log = RunLog(experiment.out, _manifest(experiment))
    bundles = learned_bundles(experiment)
    first = next(iter(bundles.values()))
    own = {u: experiment.data.history(u) for u in experiment.new_users if u in first.records}
    queries = chosen_queries(experiment.data, list(own), experiment.limit)
    if not queries:
        raise DataError("no new user with a head has a query: fit them first")
    parts = [
        Parts(bundle, experiment.llm, experiment.settings, {**bundle.records, **own}, seed)
        for seed, bundle in bundles.items()
    ]
    methods = usable_methods(experiment.methods, list(bundles.values()), experiment.say)
    context_of = parts[0].personalizer().context_of
    if shared := sum(bool(context_of(query).notes) for query in queries):
        early = f"{shared} of {len(queries)} queries precede records that their user's head"
        experiment.say(f"{early} was fitted on: the shared head answers them")
    weights = {str(seed): bundle.weights for seed, bundle in bundles.items()}
    log.complete({"weights": weights, "trained_on": len(first.trained_on), **_counts(queries)})
    samples = run_sync(partial(run_methods, methods, parts, queries, log, experiment.progress))
    learning = [{"seed": seed, **bundle.report} for seed, bundle in bundles.items()]
    return Outcome(log, samples, learning)


def usable_methods(methods: Sequence[Method], bundles: Sequence[Bundle], say: Say) -> list[Method]:
    """The methods whose required parts have been learned, DataError if none; reports the others."""
    usable, reasons = [], {}
    for method in methods:
        missing = [part for part in method.requires if any(part not in b.scorers for b in bundles)]
        for part in missing:
            reasons[part] = bundles[0].report.get(part, {}).get("skipped", "the bundle has none")
        if missing:
            part = missing[0]
            say(f"left out: {method.name}, which requires the {part}: {reasons[part]}")
        else:
            usable.append(method)
    if not usable:
        why = ", ".join(f"no {part} was learned ({reason})" for part, reason in reasons.items())
        raise DataError(f"no method is left: {why}")
    return usable


def learned_bundles(experiment: Experiment) -> dict[int, Bundle]:
    """The given bundle, or one per seed, learned and fitted in the run's folder unless it is there
    already; no call is made if no method uses a learned part.
    """
    settings, data, seeds = experiment.settings, experiment.data, experiment.seeds
    if experiment.bundle is not None:
        return {0: experiment.bundle}
    if not experiment.learns:
        records = {user: in_order(data.history(user)) for user in experiment.new_users}
        blank = blank_bundle(data.task, experiment.llm, settings, records)
        return {settings.training_seed: blank}
    if not seeds:
        own = learned_bundle(experiment, settings, experiment.out / "bundle")
        return {settings.training_seed: own}
    bundles: dict[int, Bundle] = {}
    for seed in seeds:
        seeded = settings.model_copy(update={"fit_seed": seed})
        folder, first = experiment.out / f"bundle-{seed}", bundles.get(seeds[0])
        bundles[seed] = learned_bundle(experiment, seeded, folder, first)
    return bundles


def learned_bundle(
    experiment: Experiment, settings: Settings, folder: Path, first: Bundle | None = None
) -> Bundle:
    """Learn a bundle with the reranker of `first`, and fit the new users that it lacks."""
    data, llm, progress = experiment.data, experiment.llm, experiment.progress
    if not (folder / "config.json").exists():
        learned = learn(data, llm, settings, out=folder, progress=progress, first=first)
        for line in [*learned.notes, *learned.failures[:3]]:
            experiment.say(line)
    bundle = Bundle.load(folder, here=settings)
    if not experiment.fit:
        own = {user: data.history(user) for user in experiment.new_users}
        return replace(bundle.without_heads(), records={**bundle.records, **own})
    if missing := [user for user in experiment.new_users if user not in bundle.records]:
        fitted = fit(data, bundle, llm, users=missing, progress=progress)
        stages = {"users": len(missing), "stages": fitted.stages_json()}
        report = {**fitted.bundle.report, "fitted": stages}
        replace(fitted.bundle, report=report).save(folder)
        bundle = Bundle.load(folder, here=settings)
    return bundle


def _manifest(experiment: Experiment) -> dict[str, Any]:
    """What identifies the run before it begins, so that samples of two runs are not mixed."""
    queries = chosen_queries(experiment.data, experiment.new_users, experiment.limit)
    if not queries:
        fix = "users.jsonl needs users with split 'test'"
        raise DataError(f"no new user has a query whose answer is known: {fix}")
    given = experiment.bundle
    return {
        "data": experiment.data.digest,
        "task": experiment.data.task.to_json(),
        "llm": dict(experiment.llm.identity),
        "seeds": list(experiment.seeds),
        "chosen": _counts(queries),
        "settings": experiment.settings.stored(),
        **({} if experiment.fit else {"fit": False}),
        **({"weights": {"0": given.weights}} if given else {"learns": experiment.learns}),
    }


def _counts(queries: Sequence[Query]) -> dict[str, int]:
    return {"users": len({query.user for query in queries}), "queries": len(queries)}
