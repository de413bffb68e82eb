"""Learn a bundle from training users; fit the heads of new users (paper, section 3).

    alearn   training users → labelled groups → shared weights and heads → Bundle
    afit     new users' histories → labelled groups → heads → Bundle with the same shared weights

Both change none of their arguments. LLM calls go through the cache: a stopped run continues where
it was. `learn` and `fit` are the same from sync code.
"""

from collections import ChainMap
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any, ParamSpec, TypeVar

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings, as_learned, load_settings
from hydra_llm.datasets.dataset import DataSet, offered
from hydra_llm.datasets.native import load
from hydra_llm.datasets.verdicts import doubts
from hydra_llm.errors import DataError, LLMError, SettingsError, UnknownUser
from hydra_llm.history import in_order
from hydra_llm.llm.base import ChatLLM
from hydra_llm.llm.concurrency import Progress, StageProgress, run_sync
from hydra_llm.llm.none import NONE, is_none
from hydra_llm.llm.registry import open_llm
from hydra_llm.model.encoder import open_encoder
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.persistence import check_place
from hydra_llm.model.upgrade import reranker_helps
from hydra_llm.pipeline import UserPipeline
from hydra_llm.rerank import record_text
from hydra_llm.side_features import Featurizer, fit_stats
from hydra_llm.tasks.base import Task
from hydra_llm.training.convex import Strengths
from hydra_llm.training.dataset import LabelledGroup
from hydra_llm.training.gate import fit_gate
from hydra_llm.training.labelling import (
    Asked,
    Collected,
    adapter_groups,
    asked_about,
    asks_of_records,
    choice_groups,
    offers_all,
    reads_labels,
    reranker_groups,
    training_queries,
    weak_adapter_groups,
    weak_reranker_groups,
)
from hydra_llm.training.train_scorer import (
    LabelledData,
    fit_new_heads,
    silent,
    target_rule,
    train_scorer,
)
from hydra_llm.training.word_model import TOO_FEW, WordModels, learn_word_model
from hydra_llm.types import Record, StageCost, Usage

T = TypeVar("T")
P = ParamSpec("P")


@dataclass
class Learned:
    """What learning or fitting did, beside the bundle."""

    bundle: Bundle
    users: tuple[str, ...]
    failures: list[str] = field(default_factory=list)  # one line each; the call's pair is left out
    notes: list[str] = field(default_factory=list)  # a line for each thing left out or changed
    stages: dict[str, StageCost] = field(default_factory=dict)

    @property
    def usage(self) -> Usage:
        """Of all stages."""
        return sum((cost.usage for cost in self.stages.values()), Usage())

    @property
    def seconds(self) -> dict[str, float]:
        """Of each stage."""
        return {stage: cost.seconds for stage, cost in self.stages.items()}

    def stages_json(self) -> dict[str, dict[str, float | None]]:
        """The stages as JSON values."""
        return {stage: cost.to_json() for stage, cost in self.stages.items()}

    def report(self, **entries: Any) -> None:
        """Add entries to the bundle's report."""
        self.bundle = replace(self.bundle, report={**self.bundle.report, **entries})


RERANKER, ADAPTER = "reranker", "adapter"
STAGES = {RERANKER: "label records", ADAPTER: "label candidates"}
WORD_STAGE = "fit word model"
SKIPPED = {  # why none is learned where all gains are equal
    RERANKER: "no retrieved record changed what the LLM's answer was worth",
    ADAPTER: "no two candidates of a query differed in what they were worth",
}


NO_LLM = "no LLM was given"


async def alearn(
    dataset: DataSet | Path | str,
    llm: ChatLLM | str = NONE,
    settings: Settings | None = None,
    *,
    out: Path | str | None = None,
    progress: StageProgress = silent,
    first: Bundle | None = None,
    strengths: Strengths = Strengths(),
    warn: Callable[[str], None] = lambda line: None,
) -> Learned:
    """Learn shared weights and heads from a data set's training users; `out` is a folder to write.

    With `first`, a bundle of the same users, only the adapter is learned: the reranker is copied,
    and with it the candidates. `strengths` are the strengths of regularization to choose among.
    `warn` gets a line for each doubt about the data, before the LLM is asked. Without an LLM
    recorded choices and labels are learned from, and no reranker is.

    Raises BundleError: `out` is a file, or a folder of something else. DataError: the data set is
    broken or has no training users with records. LLMError: the budget is spent (a repeat
    continues), or every call failed.
    """
    if out is not None:
        check_place(Path(out))
    settings, data, model = _opened(dataset, llm, settings)
    users = data.users("train")[: settings.users]
    records = {user: data.answered(user) for user in users if data.history(user)}
    _check_learnable(model, data.task, records)
    _warn(data, warn)
    blank = blank_bundle(data.task, model, settings, records, partial(progress, "encode texts"))
    notes = _lacking(users, records, "have no records and were left out")
    learned = Learned(replace(blank, trained_on=tuple(records)), tuple(records), notes=notes)
    asked = asked_about(data, settings, learned.users[: settings.labelled_users])
    await _Work(learned, model, progress, out, strengths, asked).learn(first)
    blank.features.encoder.progress = None
    counts = {"users": len(records), "calls": learned.usage.calls, "cached": learned.usage.cached}
    learned.report(**counts, stages=learned.stages_json())
    if out is not None:
        learned.bundle.save(out)
    return learned


async def afit(
    dataset: DataSet | Path | str,
    bundle: Bundle | Path | str,
    llm: ChatLLM | str = NONE,
    *,
    users: Sequence[str] | None = None,
    settings: Settings | None = None,
    progress: StageProgress = silent,
) -> Learned:
    """Fit the heads of new users on their histories; with a bundle's path, write the bundle back.

    `users` defaults to the data set's new users (split `test`). Heads of users who have one are
    fitted anew. A user without records gets the shared head.

    Raises SettingsError: `settings` change what was fixed in learning; `Bundle.settings_with` makes
    some that do not. UnknownUser: a user whom the data set does not have. DataError: the data set
    is of another task than the bundle.
    """
    given = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    if settings is not None:
        given = replace(given, settings=as_learned(given.settings, settings))
    _, data, model = _opened(dataset, llm, given.settings)
    given.check_task(data.task)
    names = data.users("test") if users is None else list(dict.fromkeys(users))
    if unknown := [name for name in names if name not in data.splits]:
        known = f"the data set has {len(data.splits)} users, see `hydra-llm data check`"
        raise UnknownUser(f"unknown user '{unknown[0]}': {known}")
    own = {name: in_order(data.history(name)) for name in names}
    notes = _lacking(names, own, "have no records: they get the shared head")
    given = replace(given, records=_overlaid(given.records, own))
    learned = Learned(given, tuple(names), notes=notes)
    await _Work(learned, model, progress).fit()
    if not isinstance(bundle, Bundle):
        learned.bundle.save(bundle)
    return learned


def _blocking(function: Callable[P, Awaitable[T]]) -> Callable[P, T]:
    """An async function `aNAME` as `NAME` for sync code; pickled by its name."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return run_sync(partial(function, *args, **kwargs))

    call.__name__ = call.__qualname__ = function.__name__.removeprefix("a")
    return call


learn, fit = _blocking(alearn), _blocking(afit)


def blank_bundle(
    task: Task,
    llm: ChatLLM,
    settings: Settings,
    records: Mapping[str, Sequence[Record]],
    progress: Progress | None = None,
) -> Bundle:
    """A bundle that has learned nothing: all that prompts need. `progress` is the encoder's."""
    encoder = open_encoder(
        settings.encoder, pooling=settings.pooling, max_length=settings.max_length
    )
    encoder.progress = progress
    store = FeatureCache(encoder, settings.cache / "features.sqlite")
    stats = fit_stats(task, store, list(records.values()))
    return Bundle(task, settings, dict(llm.identity), store, stats, records=records)


def _opened(
    dataset: DataSet | Path | str, llm: ChatLLM | str, settings: Settings | None
) -> tuple[Settings, DataSet, ChatLLM]:
    chosen = settings or load_settings()
    if chosen.tune_encoder and chosen.features != "cross":
        fault = "a tower keeps its features and cannot be tuned"
        raise SettingsError(f"tune_encoder needs features=cross: {fault}")
    data = dataset if isinstance(dataset, DataSet) else load(dataset)
    model = open_llm(llm, chosen) if isinstance(llm, str) else llm
    return chosen, data, model


def _check_learnable(llm: ChatLLM, task: Task, records: Mapping[str, Sequence[Record]]) -> None:
    """DataError: there is nothing to learn from, or not without an LLM."""
    if not records:
        raise DataError("no training user has records: users.jsonl needs users with split 'train'")
    if is_none(llm) and not (task.labels or any(map(offered, chain(*records.values())))):
        fix = "give --llm SPEC, whose candidates it learns to choose from"
        raise DataError(f"without an LLM there are no recorded choices to learn from: {fix}")


def _warn(data: DataSet, warn: Callable[[str], None]) -> None:
    for doubt in doubts(data, of_learning=True):
        warn(f"data {doubt.severity}: {doubt}")


def _lacking(users: Sequence[str], records: Mapping[str, Sequence[Record]], fate: str) -> list[str]:
    without = [user for user in users if not records.get(user)]
    named = ", ".join(without[:3]) + (", …" if len(without) > 3 else "")
    return [f"{len(without)} of {len(users)} users {fate} ({named})"] if without else []


def _overlaid(old: Mapping[str, T], new: Mapping[str, T]) -> Mapping[str, T]:
    """Both, `new` first, without a copy of what may be a million users'."""
    if isinstance(old, ChainMap):
        return ChainMap({**old.maps[0], **new}, *old.maps[1:])
    return ChainMap(dict(new), old)  # type: ignore[arg-type]  # nobody writes to the second


@dataclass(frozen=True)
class _Work:
    """Learning or fitting: its result so far, the LLM, and where progress is reported."""

    learned: Learned
    llm: ChatLLM
    progress: StageProgress
    out: Path | str | None = None  # the bundle's folder, beside which checkpoints lie
    strengths: Strengths = Strengths()
    asked: Asked | None = None  # of training users; new users are asked about their latest records

    async def learn(self, first: Bundle | None) -> None:
        """The reranker, or that of `first`; then the adapter."""
        learned, settings = self.learned, self.learned.bundle.settings
        self.fit_words(first)
        ranking: LabelledData | None = None
        if first is not None:
            scorers = {name: own for name, own in first.scorers.items() if name == RERANKER}
            heads = {name: own for name, own in first.heads.items() if name == RERANKER}
            bundle = replace(learned.bundle, scorers=scorers, heads=heads)
            learned.bundle = replace(bundle, use_reranker=first.use_reranker)
            learned.report(reranker=first.report.get(RERANKER, {}))
        elif is_none(self.llm):
            learned.report(reranker={"skipped": NO_LLM})
        elif settings.retrieved > 0 and settings.rerank != "never":
            ranking = await self.labelled_data(RERANKER)
            self.train(ranking, tune=settings.tune_encoder)
        picking = await self.labelled_data(ADAPTER)
        self.train(picking, tune=settings.tune_encoder)
        if settings.tune_encoder and picking is not None:
            self.train(ranking)  # the encoder has moved under the reranker
        self.fit_gate()

    def fit_words(self, first: Bundle | None) -> None:
        """Learn the word model of free texts, or take that of `first`."""
        learned, started = self.learned, perf_counter()
        bundle = learned.bundle
        if bundle.task.labels or not bundle.settings.word_model:
            return
        models: WordModels | None = None
        if first is not None and first.word_model and first.word_models:
            models = WordModels(first.word_model, first.word_models)
        else:
            self.progress(WORD_STAGE, 0, 1)
            models = learn_word_model(bundle.records, bundle.settings.seed)
            self.progress(WORD_STAGE, 1, 1)
        if models is None:
            learned.notes.append(f"no word model was learned: {TOO_FEW}")
            return
        learned.bundle = replace(bundle, word_model=models.model, word_models=models.without)
        learned.stages[WORD_STAGE] = StageCost(len(learned.users), perf_counter() - started)

    def fit_gate(self) -> None:
        """Fit the gate, with the encoder and reranker as they are now."""
        learned, started = self.learned, perf_counter()
        self.progress("fit gate", 0, 1)
        gate, report = fit_gate(learned.bundle)
        self.progress("fit gate", 1, 1)
        learned.bundle = replace(learned.bundle, gate=gate)
        learned.report(gate=report)
        learned.stages["fit gate"] = StageCost(len(learned.users), perf_counter() - started)

    async def labelled_data(self, name: str) -> LabelledData | None:
        """What a scorer is trained on; None where no candidate is better than another."""
        learned, bundle, users = self.learned, self.learned.bundle, self.learned.users
        plain = self.plain(name)
        collected = Collected(lambda featurizer: [])
        if name == ADAPTER or asks_of_records(bundle.settings):
            collected = await self.collect(name, plain, users[: bundle.settings.labelled_users])

        def groups(featurizer: Featurizer) -> list[LabelledGroup]:
            return [*collected.groups(featurizer), *_weak_groups(name, plain, featurizer, users)]

        if not any(len(set(group.gains)) > 1 for group in groups(bundle.featurizer)):
            learned.report(**{name: {"skipped": SKIPPED[name]}})
            learned.notes.append(f"no {name} was learned: {SKIPPED[name]}")
            return None
        side_names = getattr(bundle.featurizer, f"{name}_names")
        by_label = name == ADAPTER and reads_labels(bundle.task, bundle.settings)
        return LabelledData(name, groups, side_names, target_rule(bundle, name), by_label)

    def plain(self, name: str) -> UserPipeline:
        """The pipeline without the scorer that is to be learned or fitted."""
        bundle, adapt = self.learned.bundle, name == RERANKER
        rerank = name == ADAPTER and bundle.settings.label_order != "retriever"
        return bundle.personalizer(self.llm, rerank=rerank, adapt=adapt)

    async def collect(self, name: str, plain: UserPipeline, users: Sequence[str]) -> Collected:
        """Let the LLM label what it is asked about training users, or new users' latest records."""
        learned, stage, most = self.learned, STAGES[name], plain.settings.queries_per_user
        if is_none(self.llm):
            return Collected(lambda featurizer: [])
        latest = (training_queries(plain.task, plain.records[user], most) for user in users)
        queries, label = list(chain(*latest)), adapter_groups
        if self.asked is not None:
            queries, plain = self.asked.all, replace(plain, records=self.asked.records)
        if name == RERANKER:
            label = reranker_groups
        collected = await label(plain, queries, partial(self.progress, stage))
        learned.failures += collected.failures
        learned.stages[stage] = StageCost(len(users), collected.usage.seconds, collected.usage)
        if collected.notes:
            count = f"{len(collected.notes)} notes on {collected.calls} questions"
            learned.notes.append(f"{stage}: {count}, the first: {collected.notes[0]}")
        if collected.failures and len(collected.failures) == collected.calls:
            raise LLMError(f"every call failed, the first with: {collected.failures[0]}")
        return collected

    def train(self, data: LabelledData | None, *, tune: bool = False) -> None:
        """Train a scorer; held-out users decide whether a reranker is used."""
        if data is None:
            return
        learned, started = self.learned, perf_counter()
        checkpoint = None if self.out is None else Path(f"{self.out}.{data.name}.checkpoint")
        bundle = train_scorer(learned.bundle, data, tune, checkpoint, self.progress, self.strengths)
        learned.stages[f"fit {data.name}"] = StageCost(len(learned.users), perf_counter() - started)
        prior = bundle.report[data.name].get("prior", "")
        if prior and prior != "learned":
            learned.notes.append(f"the prior of the {data.name}'s heads is {prior}")
        if data.name == RERANKER:
            if not asks_of_records(bundle.settings):
                checked = {**bundle.report[RERANKER], "checked_by": "history"}
                bundle = replace(bundle, report={**bundle.report, RERANKER: checked})
            helps = reranker_helps(bundle.report)
            if bundle.use_reranker and not helps:
                reason = "on held-out users the reranker's first records were worth less"
                learned.notes.append(f"the retriever's order is kept: {reason}")
            bundle = replace(bundle, use_reranker=helps)
        learned.bundle = bundle

    async def fit(self) -> None:
        """The users' heads of each scorer, on weak labels where there are some."""
        learned, users = self.learned, self.learned.users
        for name in (name for name in (RERANKER, ADAPTER) if name in learned.bundle.scorers):
            plain, bundle = self.plain(name), learned.bundle
            groups, of_llm = _weak_groups(name, plain, bundle.featurizer, users), name == ADAPTER
            of_choices = all(group.exact for group in groups)  # records need the LLM beside them
            if bundle.word_model and bundle.settings.fit_labels == "history":
                of_llm = False
            if of_choices and (of_llm or bundle.settings.reranker_labels == "llm"):
                collected = await self.collect(name, plain, users)
                groups += collected.groups(bundle.featurizer)
            started = perf_counter()
            heads = fit_new_heads(bundle, name, groups, users)
            own = _overlaid(bundle.heads.get(name, {}), heads)
            learned.bundle = replace(bundle, heads={**bundle.heads, name: own})
            learned.stages[f"fit {name}"] = StageCost(len(users), perf_counter() - started)
        bundle = learned.bundle
        # Encode what the reranker reads of these users: else their first question waits for it.
        if bundle.reranker is not None and not bundle.reranker.interaction.reads_pairs:
            records = chain(*(bundle.records[user] for user in users))
            with_answer = bundle.settings.record_answer
            bundle.features.texts(
                [record_text(record, with_answer=with_answer) for record in records]
            )


def _weak_groups(
    name: str, plain: UserPipeline, featurizer: Featurizer, users: Sequence[str]
) -> list[LabelledGroup]:
    """The groups that histories give without an LLM: not for a reranker that learns as published;
    for an adapter that does not learn from every label, recorded choices alone.
    """
    if name == RERANKER and plain.settings.reranker_labels != "llm":
        return [group for user in users for group in weak_reranker_groups(plain, featurizer, user)]
    if name == ADAPTER and offers_all(plain.task, plain.settings):
        records = (plain.records[user] for user in users)
        return [group for own in records for group in weak_adapter_groups(featurizer, own)]
    if name == ADAPTER:
        return [group for user in users for group in choice_groups(featurizer, plain.records[user])]
    return []
