"""Learn a bundle from training users; fit the heads of new users (paper, section 3).

    alearn   training users → labelled groups → shared weights and heads → Bundle
    afit     new users' histories → labelled groups → heads → Bundle with the same shared weights

Both give a new bundle and change none of their arguments. LLM calls are what this costs: they go
through the cache, so that a run that was stopped continues where it was. `learn` and `fit` are the
same from sync code.
"""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TypeVar

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings, as_learned, load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import load
from hydra_llm.errors import DataError, LLMError, SettingsError, UnknownUser
from hydra_llm.history import in_order
from hydra_llm.llm.base import ChatLLM
from hydra_llm.llm.concurrency import StageProgress, run_sync
from hydra_llm.llm.registry import open_llm
from hydra_llm.model.encoder import open_encoder
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.persistence import check_place
from hydra_llm.model.upgrade import reranker_helps
from hydra_llm.pipeline import Personalizer
from hydra_llm.rerank import record_text
from hydra_llm.side_features import Featurizer, fit_stats
from hydra_llm.tasks.base import Task
from hydra_llm.training.convex import Heads
from hydra_llm.training.labelling import (
    Collected,
    adapter_groups,
    offers_all,
    reads_labels,
    reranker_groups,
    training_queries,
    weak_adapter_groups,
    weak_reranker_groups,
)
from hydra_llm.training.train_scorer import (
    LabelledData,
    TrainingFiles,
    empty_heads,
    fit_new_heads,
    silent,
    target_rule,
    train_scorer,
)
from hydra_llm.types import LabelledGroup, Query, Record, StageCost, Usage

T = TypeVar("T")


@dataclass
class Learned:
    """What learning or fitting did, beside the bundle."""

    bundle: Bundle
    users: tuple[str, ...]
    failures: list[str] = field(default_factory=list)
    """One line per call that failed; its pair was left out."""
    notes: list[str] = field(default_factory=list)
    """One line for each thing that was left out or differs from what was asked for."""
    stages: dict[str, StageCost] = field(default_factory=dict)

    @property
    def usage(self) -> Usage:
        """Of all stages."""
        return sum((spent.usage for spent in self.stages.values()), Usage())

    @property
    def seconds(self) -> dict[str, float]:
        """Of each stage."""
        return {stage: spent.seconds for stage, spent in self.stages.items()}

    def told(self) -> dict[str, dict[str, float]]:
        """The stages as JSON values."""
        return {stage: spent.to_json() for stage, spent in self.stages.items()}


# ---- learning the shared base


async def alearn(
    dataset: DataSet | Path | str,
    llm: ChatLLM | str,
    settings: Settings | None = None,
    *,
    out: Path | str | None = None,
    progress: StageProgress = silent,
    first: Bundle | None = None,
) -> Learned:
    """Learn shared weights and heads from a data set's training users; with `out`, write the bundle
    there.

    With `first`, a bundle of the same users, only the adapter is learned: the reranker is taken
    over, and with it the candidates.

    Raises:
        BundleError: `out` is a file, or a folder of something else.
        DataError: the data set is broken or has no training users with records.
        LLMError: the budget is spent (a repeat continues), or every call failed.
    """
    if out is not None:
        check_place(Path(out))
    settings, data, model = _opened(dataset, llm, settings)
    users = data.users("train")[: settings.users]
    records = {user: data.answered(user) for user in users if data.history(user)}
    if not records:
        raise DataError("no training user has records: users.jsonl needs users with split 'train'")
    bundle = replace(blank_bundle(data.task, model, settings, records), trained_on=tuple(records))
    notes = _lacking(users, records, "have no records and were left out")
    learned = Learned(bundle, tuple(records), notes=notes)
    files = TrainingFiles(out, progress)
    if first is None:
        ranking = await _reranker_data(learned, model, progress)
        _train(learned, ranking, files, tune=settings.tune_encoder)
        _use_reranker(learned)
    else:
        ranking = None
        _take_reranker(learned, first)
    picking = await _adapter_data(learned, model, progress)
    _train(learned, picking, files, tune=settings.tune_encoder)
    if settings.tune_encoder and picking is not None:
        _train(learned, ranking, files)  # the encoder has moved under the reranker
        _use_reranker(learned)
    _report(learned)
    if out is not None:
        learned.bundle.save(out)
    return learned


def blank_bundle(
    task: Task, llm: ChatLLM, settings: Settings, records: Mapping[str, Sequence[Record]]
) -> Bundle:
    """A bundle that has learned nothing: all that prompts need."""
    encoder = open_encoder(
        settings.encoder, pooling=settings.pooling, max_length=settings.max_length
    )
    store = FeatureCache(encoder, settings.cache / "features.sqlite")
    stats = fit_stats(task, store, list(records.values()))
    return Bundle(task, settings, dict(llm.identity), store, stats, records=records)


async def _reranker_data(
    learned: Learned, llm: ChatLLM, progress: StageProgress
) -> LabelledData | None:
    bundle = learned.bundle
    if bundle.settings.retrieved == 0:
        return None
    plain = bundle.personalizer(llm, rerank=False)
    collected = await _collect_reranker(learned, plain, _asked(learned), progress)

    def groups(featurizer: Featurizer) -> list[LabelledGroup]:
        weak = _weak_reranker_groups(plain, featurizer, learned.users)
        return [*collected.groups(featurizer), *weak]

    if not _informative(groups(bundle.featurizer)):
        _skip(learned, "reranker", "no retrieved record changed what the LLM's answer was worth")
        return None
    names, rule = bundle.featurizer.reranker_names, target_rule(bundle, "reranker")
    return LabelledData("reranker", groups, names, rule)


async def _adapter_data(
    learned: Learned, llm: ChatLLM, progress: StageProgress
) -> LabelledData | None:
    bundle = learned.bundle
    plain = bundle.personalizer(llm, adapt=False)
    collected = await _collect_adapter(learned, plain, _asked(learned), progress)

    def groups(featurizer: Featurizer) -> list[LabelledGroup]:
        weak = _weak_adapter_groups(bundle, featurizer, learned.users)
        return [*collected.groups(featurizer), *weak]

    if not _informative(groups(bundle.featurizer)):
        _skip(learned, "adapter", "no two candidates of a query differed in what they were worth")
        return None
    names, rule = bundle.featurizer.adapter_names, target_rule(bundle, "adapter")
    by_label = reads_labels(bundle.task, bundle.settings)
    return LabelledData("adapter", groups, names, rule, by_label)


def _informative(groups: Sequence[LabelledGroup]) -> bool:
    return any(len(set(group.gains)) > 1 for group in groups)


def _train(
    learned: Learned, data: LabelledData | None, files: TrainingFiles, *, tune: bool = False
) -> None:
    if data is None:
        return
    started = perf_counter()
    learned.bundle = train_scorer(learned.bundle, data, tune=tune, files=files)
    learned.stages[f"fit {data.name}"] = StageCost(len(learned.users), perf_counter() - started)


def _use_reranker(learned: Learned) -> None:
    """Decide by held-out users whether the reranker is used."""
    helps = reranker_helps(learned.bundle.report)
    if learned.bundle.reranker is not None and learned.bundle.use_reranker and not helps:
        learned.notes.append(
            "the retriever's order stands: on held-out users the reranker's first records were"
            " worth less"
        )
    learned.bundle = replace(learned.bundle, use_reranker=helps)


def _take_reranker(learned: Learned, first: Bundle) -> None:
    bundle = learned.bundle
    learned.bundle = replace(
        bundle,
        scorers={name: each for name, each in first.scorers.items() if name == "reranker"},
        heads={name: each for name, each in first.heads.items() if name == "reranker"},
        use_reranker=first.use_reranker,
        report={**bundle.report, "reranker": first.report.get("reranker", {})},
    )


def _skip(learned: Learned, name: str, why: str) -> None:
    bundle = learned.bundle
    learned.bundle = replace(bundle, report={**bundle.report, name: {"skipped": why}})
    learned.notes.append(f"no {name} was learned: {why}")


def _report(learned: Learned) -> None:
    usage = learned.usage
    told = {"users": len(learned.users), "calls": usage.calls, "cached": usage.cached}
    report = {**learned.bundle.report, **told, "stages": learned.told()}
    learned.bundle = replace(learned.bundle, report=report)


# ---- fitting new users


async def afit(
    dataset: DataSet | Path | str,
    bundle: Bundle | Path | str,
    llm: ChatLLM | str,
    *,
    users: Sequence[str] | None = None,
    settings: Settings | None = None,
    progress: StageProgress = silent,
) -> Learned:
    """Fit the heads of new users on their histories; with a bundle's path, write the bundle back.

    `users` defaults to the data set's new users (split `test`). Heads of users who have one are
    fitted anew. A user without records gets the shared head.

    Raises:
        SettingsError: `settings` change what was fixed in learning; `Bundle.settings_with` makes
            some that do not. UnknownUser: a user whom the data set does not have. DataError: the
            data set is of another task than the bundle.
    """
    folder = None if isinstance(bundle, Bundle) else Path(bundle)
    given = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    if settings is not None:
        given = replace(given, settings=as_learned(given.settings, settings))
    _, data, model = _opened(dataset, llm, given.settings)
    given.check_task(data.task)
    names = list(users) if users else data.users("test")
    _check_known(names, data)
    own = {name: in_order(data.history(name)) for name in names}
    notes = _lacking(names, own, "have no records: they get the shared head")
    fresh = replace(given, records=_overlaid(given.records, own))
    learned = Learned(fresh, tuple(names), notes=notes)
    await _fit_reranker(learned, model, progress)
    await _fit_adapter(learned, model, progress)
    if folder is not None:
        learned.bundle.save(folder)
    return learned


def _check_known(names: Sequence[str], data: DataSet) -> None:
    known = set(data.users())
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise UnknownUser(
            f"unknown user '{unknown}': the data set has {len(known)} users, see"
            " `hydra-llm data check`"
        )


async def _fit_reranker(learned: Learned, llm: ChatLLM, progress: StageProgress) -> None:
    bundle, users = learned.bundle, learned.users
    if bundle.reranker is None:
        return
    plain = bundle.personalizer(llm, rerank=False)
    groups = _weak_reranker_groups(plain, bundle.featurizer, users)
    if bundle.settings.reranker_labels == "llm":
        collected = await _collect_reranker(learned, plain, users, progress)
        groups = collected.groups(bundle.featurizer)
    _add_heads(learned, "reranker", groups)
    if not bundle.reranker.interaction.reads_pairs:  # else the first question waits for it
        with_answer = bundle.settings.record_answer
        records = (record for user in users for record in bundle.records[user])
        bundle.store.texts([record_text(record, with_answer=with_answer) for record in records])


async def _fit_adapter(learned: Learned, llm: ChatLLM, progress: StageProgress) -> None:
    bundle, users = learned.bundle, learned.users
    if bundle.adapter is None:
        return
    groups = _weak_adapter_groups(bundle, bundle.featurizer, users)
    if not groups:
        plain = bundle.personalizer(llm, adapt=False)
        collected = await _collect_adapter(learned, plain, users, progress)
        groups = collected.groups(bundle.featurizer)
    _add_heads(learned, "adapter", groups)


def _add_heads(learned: Learned, name: str, groups: Sequence[LabelledGroup]) -> None:
    """Fitted anew: a user without groups has the shared head."""
    bundle, users, started = learned.bundle, learned.users, perf_counter()
    heads: Heads = (
        fit_new_heads(bundle, name, groups, users) if groups else empty_heads(bundle, name, users)
    )
    own = _overlaid(bundle.heads.get(name, {}), heads)
    learned.bundle = replace(bundle, heads={**bundle.heads, name: own})
    learned.stages[f"fit {name}"] = StageCost(len(users), perf_counter() - started)


def _overlaid(old: Mapping[str, T], new: Mapping[str, T]) -> Mapping[str, T]:
    """Both, `new` first, without a copy of what may be a million users'."""
    if isinstance(old, ChainMap):
        return ChainMap({**old.maps[0], **new}, *old.maps[1:])
    return ChainMap(dict(new), old)  # type: ignore[arg-type]  # nobody writes to the second


# ---- what both need


def _opened(
    dataset: DataSet | Path | str, llm: ChatLLM | str, settings: Settings | None
) -> tuple[Settings, DataSet, ChatLLM]:
    chosen = settings or load_settings()
    if chosen.tune_encoder and chosen.features != "cross":
        raise SettingsError(
            "tune_encoder needs features=cross: a tower keeps its features and cannot be tuned"
        )
    data = dataset if isinstance(dataset, DataSet) else load(dataset)
    return chosen, data, open_llm(llm, chosen) if isinstance(llm, str) else llm


def _lacking(users: Sequence[str], records: Mapping[str, Sequence[Record]], fate: str) -> list[str]:
    without = [user for user in users if not records.get(user)]
    named = ", ".join(without[:3]) + (", …" if len(without) > 3 else "")
    return [f"{len(without)} of {len(users)} users {fate} ({named})"] if without else []


def _asked(learned: Learned) -> Sequence[str]:
    """The training users whose pairs may cost LLM calls."""
    return learned.users[: learned.bundle.settings.labelled_users]


def _latest_queries(learned: Learned, users: Sequence[str]) -> list[Query]:
    bundle = learned.bundle
    return [
        query
        for user in users
        for query in training_queries(
            bundle.task, bundle.records[user], bundle.settings.queries_per_user
        )
    ]


async def _collect_reranker(
    learned: Learned, plain: Personalizer, users: Sequence[str], progress: StageProgress
) -> Collected:
    stage, queries = "label records", _latest_queries(learned, users)
    collected = await reranker_groups(plain, queries, partial(progress, stage))
    return _account(learned, stage, len(users), collected)


async def _collect_adapter(
    learned: Learned, plain: Personalizer, users: Sequence[str], progress: StageProgress
) -> Collected:
    stage, queries = "label candidates", _latest_queries(learned, users)
    collected = await adapter_groups(plain, queries, partial(progress, stage))
    return _account(learned, stage, len(users), collected)


def _account(learned: Learned, stage: str, users: int, collected: Collected) -> Collected:
    learned.failures += collected.failures
    learned.stages[stage] = StageCost(users, collected.usage.seconds, collected.usage)
    if collected.notes:
        learned.notes.append(
            f"{stage}: {len(collected.notes)} notes on {collected.calls} questions, the first:"
            f" {collected.notes[0]}"
        )
    if collected.failures and len(collected.failures) == collected.calls:
        raise LLMError(f"every call failed, the first with: {collected.failures[0]}")
    return collected


def _weak_adapter_groups(
    bundle: Bundle, featurizer: Featurizer, users: Sequence[str]
) -> list[LabelledGroup]:
    """The groups that histories give without an LLM, where the adapter learns from every label."""
    if not offers_all(bundle.task, bundle.settings):
        return []
    return [
        group for user in users for group in weak_adapter_groups(featurizer, bundle.records[user])
    ]


def _weak_reranker_groups(
    plain: Personalizer, featurizer: Featurizer, users: Sequence[str]
) -> list[LabelledGroup]:
    """The reranker's groups from histories alone; none where it learns as published."""
    if plain.settings.reranker_labels == "llm":
        return []
    return [group for user in users for group in weak_reranker_groups(plain, featurizer, user)]


def learn(
    dataset: DataSet | Path | str,
    llm: ChatLLM | str,
    settings: Settings | None = None,
    *,
    out: Path | str | None = None,
    progress: StageProgress = silent,
    first: Bundle | None = None,
) -> Learned:
    """`alearn` from sync code."""
    return run_sync(
        partial(alearn, dataset, llm, settings, out=out, progress=progress, first=first)
    )


def fit(
    dataset: DataSet | Path | str,
    bundle: Bundle | Path | str,
    llm: ChatLLM | str,
    *,
    users: Sequence[str] | None = None,
    settings: Settings | None = None,
    progress: StageProgress = silent,
) -> Learned:
    """`afit` from sync code."""
    return run_sync(
        partial(afit, dataset, bundle, llm, users=users, settings=settings, progress=progress)
    )
