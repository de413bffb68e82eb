"""One run of the benchmark: data set → one bundle per seed (and fold, see `folds.py`) → answers by
every method → log.

`bench run` is one experiment, a sweep several. The bundles of all seeds share the LLM's labels and
the first one's reranker, and with it the candidates: further seeds cost no LLM call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

from hydra_llm.bench.choices import earlier, figures
from hydra_llm.bench.details import details_of
from hydra_llm.bench.folds import deal
from hydra_llm.bench.method import Answerer, Learner, Method, NotAsked, Parts, partners
from hydra_llm.bench.runlog import RunLog, Sample
from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import BudgetExceeded, DataError, LLMError
from hydra_llm.history import in_order
from hydra_llm.llm.cache import CachedLLM
from hydra_llm.llm.concurrency import StageProgress, at_once, map_calls, run_sync
from hydra_llm.training.api import blank_bundle, fit, learn
from hydra_llm.training.choosing import chosen_over
from hydra_llm.training.encode import encode_histories
from hydra_llm.training.labelling import Asked, asked_about, known_queries
from hydra_llm.training.train_scorer import silent
from hydra_llm.types import Answer, Overlaid, Query, Record

P = TypeVar("P", bound=Parts)
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
    folds: int | None = None  # users take turns as new users; None: the split decides
    fold: int | None = None  # which turn this is; `turns` makes one experiment of each
    choices: bool | None = None  # of data with both: ask recorded choices, or what the LLM answers
    history: int | Literal["all"] = "all"  # of each new user, see `DataSet.with_history`
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

    def turns(self) -> "list[Experiment]":
        """One experiment for each fold, whose users alone are new in its data; or one for all. Who
        is new decides what becomes of queries that are not asked, and whose history is cut.
        """
        if self.folds is None:
            asked = self.data if self.choices is None else self.data.asking(choices=self.choices)
            return [replace(self, data=asked.with_history(self.history))]
        options: Any = {"users": self.users, "limit": self.limit, "choices": self.choices}
        dealt = deal(self.data, self.settings, self.folds, **options)
        return [
            replace(
                self,
                data=fold.data.with_history(self.history),
                settings=fold.settings,
                users=None,
                fold=fold.number,
                progress=_of_fold(self.progress, fold.number, self.folds),
            )
            for fold in dealt
        ]

    def parts(self, parts: P) -> P:
        """Parts with what methods may know of the data beside the bundle."""
        users = self.data.users("train")[: self.settings.users]
        training = {user: self.data.answered(user) for user in users}
        others = partners(self.new_users, lambda u: bool(parts.records.get(u)), self.settings.seed)
        known = replace(parts, training=training, partners=others)
        return replace(known, fold=self.fold, asked=self.asked)

    @property
    def asked(self) -> Asked | None:
        """What the LLM labels of a fold's training users; None without folds."""
        if self.fold is None:
            return None
        settings = self.settings
        training = [user for user in self.data.users("train") if self.data.history(user)]
        labelled = training[: settings.users][: settings.labelled_users]
        return asked_about(self.data, settings, labelled)


@dataclass(frozen=True)
class Outcome:
    """The result of an experiment; `learning` has each seed's report of learning and fitting."""

    log: RunLog
    samples: list[Sample]
    learning: list[dict[str, Any]]
    retried: int = 0  # failed samples that the same command may answer: a call failed

    @property
    def failures(self) -> str:
        """A line on the samples that failed, and whether a repeat may help; empty if none did."""
        failed = [sample for sample in self.samples if sample.error]
        if not failed:
            return ""
        first = f"{failed[0].method} on {failed[0].user}'s {failed[0].query}: {failed[0].error}"
        counts = f"{len(failed)} of {len(self.samples)} answers failed, the first {first}"
        some = "them" if self.retried == len(failed) else f"{self.retried} of them"
        return f"{counts}; the same command retries {some}" if self.retried else counts


def _of_fold(progress: StageProgress, fold: int, folds: int) -> StageProgress:
    def report(stage: str, done: int, total: int) -> None:
        progress(f"fold {fold} of {folds}, {stage}", done, total)

    return report


def run_experiment(experiment: Experiment) -> Outcome:
    """Learn and answer what is missing; a repeat continues a run that was stopped.

    Raises DataError: no query with a known answer. SettingsError: the folder holds another run.
    LLMError: the budget is spent, or every call failed.
    """
    # before anything is learned: a refused command changes nothing
    turns = experiment.turns()
    log = RunLog(experiment.out, _manifest(experiment, turns))
    learned = _learned(turns)
    every = [bundle for _, bundles in learned for bundle in bundles.values()]
    methods = usable_methods(experiment.methods, every, experiment.say)
    cases = [_case(turn, bundles) for turn, bundles in learned]
    queries = [query for _, own in cases for query in own]
    if not queries:
        raise DataError("no new user with a head has a query: fit them first")
    _say_shared(experiment, cases)
    trained_on = min(len(bundle.trained_on) for bundle in every)
    named = ((_name(turn, seed), b) for turn, own in learned for seed, b in own.items())
    weights = {name: bundle.weights for name, bundle in named}
    log.complete({"weights": weights, "trained_on": trained_on, **_counts(queries)})
    samples, failed = list[Sample](), list[LLMError]()
    for turn, (parts, own) in zip(turns, cases, strict=True):
        answer = partial(run_methods, methods, parts, own, log, turn.progress, failed)
        samples += run_sync(answer)
    learning = [
        {**({} if turn.fold is None else {"fold": turn.fold}), "seed": seed, **bundle.report}
        for turn, bundles in learned
        for seed, bundle in bundles.items()
    ]
    return Outcome(log, samples, learning, sum(not error.lasting for error in failed))


def _learned(turns: Sequence[Experiment]) -> list[tuple[Experiment, dict[int, Bundle]]]:
    """Each turn's bundles, which share an encoder in memory if it is the same one."""
    learned: list[tuple[Experiment, dict[int, Bundle]]] = []
    for turn in turns:
        bundles = learned_bundles(turn)
        first = next(iter((learned[0][1] if learned else bundles).values())).features
        for seed, own in bundles.items():
            if own.features.encoder.digest == first.encoder.digest:
                bundles[seed] = replace(own, features=first)
        learned.append((turn, bundles))
    return learned


def _case(turn: Experiment, bundles: Mapping[int, Bundle]) -> tuple[list[Parts], list[Query]]:
    """What a turn's methods are built from, one entry per seed, and the queries they answer."""
    first = next(iter(bundles.values()))
    own = {user: turn.data.history(user) for user in turn.new_users if user in first.records}
    queries = chosen_queries(turn.data, list(own), turn.limit)
    parts = [
        turn.parts(
            Parts(bundle, turn.llm, _settings(turn, bundle), Overlaid(own, bundle.records), seed)
        )
        for seed, bundle in bundles.items()
    ]
    return parts, queries


def _settings(turn: Experiment, bundle: Bundle) -> Settings:
    """The run's, with what learning has chosen by training users."""
    by_users = turn.bundle is None and turn.settings.choose == "auto"
    return chosen_over(turn.settings, bundle.settings) if by_users else turn.settings


def _say_shared(experiment: Experiment, cases: Sequence[tuple[list[Parts], list[Query]]]) -> None:
    """Say for how many queries the shared head answers, as the user's own knows too much."""
    notes = [parts[0].personalizer().context_of(q).notes for parts, own in cases for q in own]
    if shared := sum(map(bool, notes)):
        early = f"{shared} of {len(notes)} queries precede records that their user's head"
        experiment.say(f"{early} was fitted on: the shared head answers them")


def _name(turn: Experiment, seed: int) -> str:
    """`0` of a seed, `2-0` of a seed in the second fold."""
    return str(seed) if turn.fold is None else f"{turn.fold}-{seed}"


def chosen_queries(dataset: DataSet, users: Sequence[str], limit: int | None) -> list[Query]:
    """Each user's first `limit` queries whose gold answer is known."""
    return [query for user in users for query in known_queries(dataset, user, limit)]


async def run_methods(
    methods: Sequence[Method],
    parts: Parts | Sequence[Parts],
    queries: Sequence[Query],
    log: RunLog | None = None,
    progress: StageProgress | None = None,
    failed: list[LLMError] | None = None,
) -> list[Sample]:
    """Answer every query by every method, unless the log has the sample; a failed call is a failed
    sample, LLMError only if all fail or the budget is spent. `parts` has one entry per seed; the
    errors of calls are added to `failed`.

    All methods answer a query before the next one, ordered by the number of records in their
    prompts: an embedded engine then still holds the prompts that they share.
    """
    seeds = [parts] if isinstance(parts, Parts) else list(parts)
    instances = [(method, own) for method in methods for own in method.instances(seeds)]
    answerers = {(method.name, own.seed): method.build(own) for method, own in instances}
    order = [(method.name, own.seed) for method, own in sorted(instances, key=_records_shown)]
    done = {} if log is None else dict(log.samples)
    blanks = {q: _blank(q, seeds[0].fold, seeds[0].records.get(q.user, ())) for q in queries}
    every = ((replace(blanks[q], method=m, seed=s), q) for q in queries for m, s in order)
    todo = [case for case in every if case[0].key not in done]
    faults: list[LLMError] = []

    async def one(case: tuple[Sample, Query]) -> None:
        blank, query = case
        own = answerers[blank.method, blank.seed]
        sample, answer = await _sample(blank, query, own, faults)
        done[sample.key] = sample
        if log is not None:
            log.add(sample, details_of(query, answer))

    report = None if progress is None else partial(progress, "answer")
    await map_calls(one, todo, at_once(seeds[0].llm, seeds[0].settings.concurrency), report)
    if failed is not None:
        failed += faults
    if faults and not any(sample.calls for sample in done.values()):
        raise faults[0]  # a wrong key or a dead endpoint, which a table would hide
    return [done[name, query.user, query.id, seed] for name, seed in answerers for query in queries]


def _blank(query: Query, fold: int | None, records: Sequence[Record]) -> Sample:
    """The sample of a query before a method answers it."""
    known = earlier(records, query)
    return Sample("", query.user, query.id, query.gold or "", None, fold=fold, choice=known)


def _records_shown(instance: tuple[Method, Parts]) -> int:
    method, own = instance
    default = own.settings.k if "reranker" in method.uses or "k" in method.takes else 0
    return method.given.get("k", default)


async def _sample(
    blank: Sample, query: Query, answerer: Answerer, faults: list[LLMError]
) -> tuple[Sample, Answer | None]:
    """The sample of a query with its answer or error; `faults` collects those of calls."""
    try:
        answer = await answerer.aanswer(query)
    except BudgetExceeded:
        raise
    except LLMError as error:
        if not isinstance(error, NotAsked):
            faults.append(error)
        return replace(blank, error=str(error)), None
    spent = answerer.pop_spent() if isinstance(answerer, Learner) else {}
    usage, pick = answer.usage, answer.candidates[answer.chosen]
    votes = [candidate.votes for candidate in answer.candidates]
    sample = replace(
        blank,
        answer=pick.answer,
        calls=usage.calls + usage.cached,
        tokens=None if usage.untold else usage.prompt_tokens + usage.completion_tokens,
        completion_tokens=usage.tokens[1],
        llm_seconds=usage.seconds,
        seconds=dict(answer.seconds),
        notes=answer.proposal.notes,
        probability=pick.probability,
        choice={**blank.choice, **figures(answer)} if blank.choice else {},
        agreement=max(votes) / sum(votes) if sum(votes) > 1 else None,
        learned={user: cost.to_json() for user, cost in spent.items()},
    )
    return sample, answer


def usable_methods(methods: Sequence[Method], bundles: Sequence[Bundle], say: Say) -> list[Method]:
    """The methods whose required parts have been learned, DataError if none; reports the others."""
    usable, reasons = [], {}
    for method in methods:
        missing = [part for part in method.requires if any(part not in b.parts for b in bundles)]
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
    if (given := experiment.bundle) is not None:
        if any(method.uses for method in experiment.methods):
            known = (data.history(user) for user in experiment.new_users if user in given.records)
            ranks = given.reranker is not None
            encode_histories(given, list(chain(*known)), experiment.progress, ranks=ranks)
        return {0: given}
    if not experiment.learns:
        records = {user: in_order(data.history(user)) for user in experiment.new_users}
        blank = blank_bundle(data.task, experiment.llm, settings, records, experiment.progress)
        blank.features.progress = None
        return {settings.training_seed: blank}
    out, bundles = experiment.out, dict[int, Bundle]()
    base = "bundle" if experiment.fold is None else f"bundle-{experiment.fold}"
    seeded = {s: (settings.model_copy(update={"fit_seed": s}), out / f"{base}-{s}") for s in seeds}
    places = seeded or {settings.training_seed: (settings, out / base)}
    for seed, (chosen, folder) in places.items():
        first = next(iter(bundles.values()), None)
        bundles[seed] = learned_bundle(experiment, chosen, folder, first)
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
        return replace(bundle.without_heads(), records=Overlaid(own, bundle.records))
    if missing := [user for user in experiment.new_users if user not in bundle.records]:
        fitted = fit(data, bundle, llm, users=missing, progress=progress)
        fitted.report(fitted={"users": len(missing), "stages": fitted.stages_json()})
        fitted.bundle.save(folder)
        bundle = Bundle.load(folder, here=settings)
    return bundle


def _manifest(experiment: Experiment, turns: Sequence[Experiment]) -> dict[str, Any]:
    """What identifies the run before it begins, so that samples of two runs are not mixed."""
    data, given = experiment.data, experiment.bundle
    of_turns = evaluated_queries(turns)
    queries = [query for own in of_turns for query in own]
    cut = {} if experiment.history == "all" else {"history": experiment.history}
    return {
        "data": (data if experiment.folds else turns[0].data).digest,
        "task": data.task.to_json(),
        "llm": dict(experiment.llm.identity),
        "seeds": list(experiment.seeds),
        "chosen": _counts(queries),
        "settings": experiment.settings.stored(),
        **({"folds": list(map(_counts, of_turns)), **cut} if experiment.folds else {}),
        **({} if experiment.fit else {"fit": False}),
        **({"weights": {"0": given.weights}} if given else {"learns": experiment.learns}),
    }


def evaluated_queries(turns: Sequence[Experiment]) -> list[list[Query]]:
    """The queries of each turn. DataError: there is none in any."""
    of_turns = [chosen_queries(turn.data, turn.new_users, turn.limit) for turn in turns]
    if not any(of_turns):
        fix = "users.jsonl needs users with split 'test'"
        raise DataError(f"no new user has a query whose answer is known: {fix}")
    return of_turns


def _counts(queries: Sequence[Query]) -> dict[str, int]:
    return {"users": len({query.user for query in queries}), "queries": len(queries)}
