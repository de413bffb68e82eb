"""Learn a bundle from training users; fit the heads of new users (DESIGN 1 and 5; paper section 3).

    alearn   training users → labelled groups → base, heads → Bundle
    afit     a new user's history → labelled groups → one head in each bank; nothing shared changes

LLM calls are what this costs: they go through the cache, so that a run that was stopped continues
where it was. `learn` and `fit` are the same from sync code.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

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
from hydra_llm.model.scorer import Scorer
from hydra_llm.pipeline import Personalizer
from hydra_llm.rerank import record_text
from hydra_llm.side_features import fit_stats
from hydra_llm.tasks.base import Task
from hydra_llm.training.labelling import (
    Collected,
    adapter_groups,
    copy_groups,
    label_groups,
    offers_all,
    reads_labels,
    reranker_groups,
    training_queries,
)
from hydra_llm.training.train_scorer import Lesson, fit_groups, learn_scorer, silent, target_rule
from hydra_llm.types import LabelledGroup, Query, Record, StageCost, Usage


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
    """Learn base and heads from a data set's training users; with `out`, write the bundle there.

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
    learned = Learned(
        bundle, tuple(records), notes=_told(users, records, "have no records and were left out")
    )
    tune = settings.tune_encoder
    ranking = await _reranker_lesson(learned, model, progress) if first is None else None
    if first is not None:
        bundle.reranker = deepcopy(first.reranker)
        bundle.report["reranker"] = first.report.get("reranker", {})
    if ranking is not None:
        bundle.reranker = _learn_scorer(learned, ranking, tune=tune, out=out, progress=progress)
        if not bundle.reranks:
            learned.notes.append(
                "the retriever's order stands: on held-out users the reranker's first records were"
                " worth less"
            )
    picking = await _adapter_lesson(learned, model, progress)
    if picking is not None:
        bundle.adapter = _learn_scorer(learned, picking, tune=tune, out=out, progress=progress)
    if (
        tune and ranking is not None and picking is not None
    ):  # the adapter's tuning has moved the encoder under the reranker
        bundle.reranker = _learn_scorer(learned, ranking, out=out, progress=progress)
    bundle.report |= {
        "users": len(records),
        "calls": learned.usage.calls,
        "cached": learned.usage.cached,
        "stages": learned.told(),
    }
    if out is not None:
        bundle.save(out)
    return learned


def blank_bundle(
    task: Task, llm: ChatLLM, settings: Settings, records: dict[str, list[Record]]
) -> Bundle:
    """A bundle that has learned nothing: all that prompts need."""
    encoder = open_encoder(
        settings.encoder, pooling=settings.pooling, max_length=settings.max_length
    )
    store = FeatureCache(encoder, settings.cache / "features.sqlite")
    return Bundle(
        task,
        settings,
        dict(llm.identity),
        store,
        fit_stats(task, store, list(records.values())),
        records=records,
    )


async def _reranker_lesson(
    learned: Learned, llm: ChatLLM, progress: StageProgress
) -> Lesson | None:
    bundle = learned.bundle
    if bundle.settings.retrieved == 0:
        return None
    door = bundle.personalizer(llm, rerank=False)
    collected = await _collect_reranker(learned, door, _asked(learned), progress)

    def groups() -> list[LabelledGroup]:
        return [*collected.groups(), *_from_copies(bundle, door, learned.users)]

    if not _teaches(groups()):
        _skip(learned, "reranker", "no retrieved record changed what the LLM's answer was worth")
        return None
    return Lesson(
        "reranker", groups, bundle.featurizer.reranker_names, target_rule(bundle, "reranker")
    )


async def _adapter_lesson(learned: Learned, llm: ChatLLM, progress: StageProgress) -> Lesson | None:
    bundle = learned.bundle
    collected = await _collect_adapter(
        learned, bundle.personalizer(llm, adapt=False), _asked(learned), progress
    )

    def groups() -> list[LabelledGroup]:
        return [*collected.groups(), *_from_labels(bundle, learned.users)]

    if not _teaches(groups()):
        _skip(learned, "adapter", "no two candidates of a query differed in what they were worth")
        return None
    by_label = reads_labels(bundle.task, bundle.settings)
    return Lesson(
        "adapter", groups, bundle.featurizer.adapter_names, target_rule(bundle, "adapter"), by_label
    )


def _learn_scorer(
    learned: Learned,
    lesson: Lesson,
    *,
    tune: bool = False,
    out: Path | str | None,
    progress: StageProgress,
) -> Scorer:
    started = perf_counter()
    scorer = learn_scorer(learned.bundle, lesson, tune=tune, out=out, progress=progress)
    learned.stages[f"fit {lesson.name}"] = StageCost(len(learned.users), perf_counter() - started)
    return scorer


def _skip(learned: Learned, name: str, why: str) -> None:
    learned.bundle.report[name] = {"skipped": why}
    learned.notes.append(f"no {name} was learned: {why}")


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
    loaded = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    if settings is not None:
        loaded = replace(loaded, settings=as_learned(loaded.settings, settings))
    _, data, model = _opened(dataset, llm, loaded.settings)
    loaded.check_task(data.task)
    names = list(users) if users else data.users("test")
    unknown = [name for name in names if name not in set(data.users())]
    if unknown:
        raise UnknownUser(
            f"unknown user '{unknown[0]}': the data set has {len(data.users())} users, see"
            " `hydra-llm data check`"
        )
    loaded.records |= {name: in_order(data.history(name)) for name in names}
    learned = Learned(
        loaded,
        tuple(names),
        notes=_told(names, loaded.records, "have no records: they get the shared head"),
    )
    await _fit_users(learned, model, progress)
    if folder is not None:
        loaded.save(folder)
    return learned


async def _fit_users(learned: Learned, llm: ChatLLM, progress: StageProgress) -> None:
    bundle = learned.bundle
    if bundle.reranker is not None:
        door = bundle.personalizer(llm, rerank=False)
        groups = _from_copies(bundle, door, learned.users)
        if bundle.settings.reranker_labels == "llm":
            groups = (await _collect_reranker(learned, door, learned.users, progress)).groups()
        _fit_into(learned, "reranker", bundle.reranker, groups)
        _warm(bundle, learned.users)
    if bundle.adapter is not None:
        groups = _from_labels(bundle, learned.users)
        if not groups:
            groups = (
                await _collect_adapter(
                    learned, bundle.personalizer(llm, adapt=False), learned.users, progress
                )
            ).groups()
        _fit_into(learned, "adapter", bundle.adapter, groups)


def _fit_into(learned: Learned, name: str, scorer: Scorer, groups: Sequence[LabelledGroup]) -> None:
    bundle, started = learned.bundle, perf_counter()
    scorer.enrol(learned.users)
    for user in learned.users:  # fitted anew: a user without groups has the shared head
        scorer.bank.clear(scorer.row(user))
    if groups:
        fit_groups(bundle, name, scorer, groups, learned.users)
    learned.stages[f"fit {name}"] = StageCost(len(learned.users), perf_counter() - started)


def _warm(bundle: Bundle, users: Sequence[str]) -> None:
    """Encode what the reranker will read of these users' records, so that their first question does
    not wait for it.
    """
    if bundle.settings.features == "tower":
        with_answer = bundle.settings.record_answer
        bundle.store.texts(
            [
                record_text(record, with_answer=with_answer)
                for user in users
                for record in bundle.records[user]
            ]
        )


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


def _told(users: Sequence[str], records: Mapping[str, Sequence[Record]], fate: str) -> list[str]:
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
    learned: Learned, personalizer: Any, users: Sequence[str], progress: StageProgress
) -> Collected:
    queries = _latest_queries(learned, users)
    collected = await reranker_groups(
        personalizer, learned.bundle.featurizer, queries, partial(progress, "label records")
    )
    return _account(learned, "label records", len(users), collected)


async def _collect_adapter(
    learned: Learned, personalizer: Any, users: Sequence[str], progress: StageProgress
) -> Collected:
    queries = _latest_queries(learned, users)
    collected = await adapter_groups(
        personalizer, learned.bundle.featurizer, queries, partial(progress, "label candidates")
    )
    return _account(learned, "label candidates", len(users), collected)


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


def _from_labels(bundle: Bundle, users: Sequence[str]) -> list[LabelledGroup]:
    """The groups that histories give without an LLM, where the adapter reads labels."""
    if not offers_all(bundle.task, bundle.settings):
        return []
    return [
        group for user in users for group in label_groups(bundle.featurizer, bundle.records[user])
    ]


def _from_copies(bundle: Bundle, door: Personalizer, users: Sequence[str]) -> list[LabelledGroup]:
    """The reranker's groups from histories alone; none where it learns as published."""
    if bundle.settings.reranker_labels == "llm":
        return []
    return [group for user in users for group in copy_groups(door, bundle.featurizer, user)]


def _teaches(groups: Sequence[LabelledGroup]) -> bool:
    return any(len(set(group.gains)) > 1 for group in groups)


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
