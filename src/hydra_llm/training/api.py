"""Learn a bundle from training users; fit the heads of new users (paper, section 3).

    alearn   training users → labelled groups → shared weights and heads → Bundle
    afit     new users' histories → labelled groups → heads → Bundle with the same shared weights

Both change none of their arguments. LLM calls go through the cache: a stopped run continues where
it was. `learn` and `fit` are the same from sync code.
"""

import random
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import partial, wraps
from itertools import chain
from pathlib import Path
from typing import ParamSpec, TypeVar

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings, as_learned, load_settings
from hydra_llm.datasets.dataset import DataSet, offered
from hydra_llm.datasets.native import load
from hydra_llm.datasets.verdicts import doubts
from hydra_llm.errors import DataError, SettingsError, UnknownUser
from hydra_llm.llm.base import ChatLLM
from hydra_llm.llm.concurrency import StageProgress, run_sync
from hydra_llm.llm.none import NONE, NoLLM, is_none
from hydra_llm.llm.registry import open_llm
from hydra_llm.model.encoder import open_encoder
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.persistence import check_place
from hydra_llm.plugins import HEADS
from hydra_llm.rows import LATEST
from hydra_llm.side_features import fit_stats, texts_of_stats
from hydra_llm.tasks.base import Task
from hydra_llm.training import dp
from hydra_llm.training.encode import STAGE, encode_ahead, encode_histories
from hydra_llm.training.labelling import asked_about
from hydra_llm.training.learned import Learned
from hydra_llm.training.private import check_askable, check_private
from hydra_llm.training.refit import KeptFit
from hydra_llm.training.strengths import Strengths
from hydra_llm.training.train_scorer import silent
from hydra_llm.training.work import Work
from hydra_llm.types import Overlaid, Record

T = TypeVar("T")
P = ParamSpec("P")


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
    and with it the candidates; not with `dp_epsilon`. `strengths` are those to choose among.
    `warn` gets a line for each doubt about the data, before the LLM is asked. Without an LLM
    recorded choices and labels are learned from, and no reranker is.

    Raises BundleError: `out` is a file, or a folder of something else. DataError: the data set is
    broken or has no training users with records. LLMError: the budget is spent (a repeat
    continues), or every call failed.
    """
    if out is not None:
        check_place(Path(out))
    settings, data, model = _opened(dataset, llm, settings)
    check_private(settings)
    learned, users = _begun(data, model, settings, progress, warn)
    asked = asked_about(data, settings, learned.users[: settings.labelled_users])
    check_askable(settings, data.task, learned.bundle.records, asked.all)
    model, first = (model, first) if settings.dp_epsilon is None else (NoLLM(), None)
    work = Work(learned, model, progress, out, strengths, asked)
    checkpoint = await work.learn_from(users, first)
    learned.bundle.features.progress = None
    counts = {"users": len(users), "calls": learned.usage.calls, "cached": learned.usage.cached}
    learned.report(**counts, stages=learned.stages_json())
    if out is not None:
        learned.bundle.save(out)
        if checkpoint is not None:
            checkpoint.remove()
    return learned


def _begun(
    data: DataSet,
    llm: ChatLLM,
    settings: Settings,
    progress: StageProgress,
    warn: Callable[[str], None],
) -> tuple[Learned, list[str]]:
    """A blank bundle of the users from whom what is shared is to be learned, and the names of all
    training users with records.
    """
    named, with_records = data.users("train")[: settings.users], set(data.with_records("train"))
    own = [user for user in named if user in with_records]
    _check_learnable(llm, data.task, data.all_answered(own))
    # With ε all count: their number and a sample of them would tell who has records.
    users = own if settings.dp_epsilon is None else named
    records = data.all_answered(users)
    for doubt in doubts(data, of_learning=True):
        warn(f"data {doubt.severity}: {doubt}")
    base = sampled_users(users, settings)
    blank = blank_bundle(data.task, llm, settings, records, progress, base)
    blank = dp.begun(replace(blank, trained_on=tuple(base)))
    weak = settings.reranker_labels == "history" and settings.learns_reranker
    every = list(chain.from_iterable(records[user] for user in base))
    encode_histories(blank, every, progress, ranks=weak and not is_none(llm))
    fate = "have no records and " + ("were left out" if users is own else "get the shared head")
    notes = _lacking(named, with_records, fate)
    return Learned(blank, blank.trained_on, notes=notes), users


async def afit(
    dataset: DataSet | Path | str,
    bundle: Bundle | Path | str,
    llm: ChatLLM | str = NONE,
    *,
    users: Sequence[str] | None = None,
    settings: Settings | None = None,
    progress: StageProgress = silent,
    kept: Mapping[str, KeptFit] | None = None,
    changed: Mapping[str, int] | None = None,
) -> Learned:
    """Fit the heads of new users on their histories; with a bundle's path, write the bundle back.

    `users` defaults to the new users (split `test`). Heads of users who have one are fitted anew;
    a user without records gets the shared head. `kept`: that of an earlier result, or an empty
    dict: where a history has only grown at its end, just the new records are labelled and encoded.
    `changed`: how many of a user's records came before a change of taste; these count a tenth. With
    `private` the LLM is not asked. Raises SettingsError: `settings` change what was fixed in
    learning; `Bundle.settings_with` makes some that do not. UnknownUser: a user whom the data set
    does not have. DataError: the data set is of another task than the bundle.
    """
    given = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    if settings is not None:
        given = replace(given, settings=as_learned(given.settings, settings))
        check_private(settings, ("fit_labels",))
    _, data, model = _opened(dataset, NoLLM() if given.settings.private else llm, given.settings)
    given.check_precision()
    given.check_task(data.task)
    names = data.users("test") if users is None else _known(list(dict.fromkeys(users)), data)
    own, fate = data.histories(names), "have no records: they get the shared head"
    lacking, few = _lacking(names, set(data.with_records()), fate), len(own) <= LATEST
    given = replace(given, records=Overlaid(dict(own) if few else own, given.records))
    learned = Learned(given, tuple(names), notes=lacking, changed=changed or {})
    given.features.progress = partial(progress, STAGE)
    await Work(learned, model, progress, kept=kept).fit()
    given.features.progress = None
    if not isinstance(bundle, Bundle):
        learned.bundle.save_users(bundle, names)
    return learned


def _known(names: list[str], data: DataSet) -> list[str]:
    if unknown := [name for name in names if name not in data.splits]:
        known = f"the data set has {len(data.splits)} users, see `hydra-llm data check`"
        raise UnknownUser(f"unknown user '{unknown[0]}': {known}")
    return names


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
    progress: StageProgress = silent,
    base: Sequence[str] | None = None,
) -> Bundle:
    """A bundle that has learned nothing: all that prompts need. `base` are the users whose
    statistics count, by default all.
    """
    if settings.encoder_precision == "int8":
        fix = "learn with fp32, and give int8 to what answers"
        raise SettingsError(f"setting 'encoder_precision': nothing is learned with int8: {fix}")
    encoder = open_encoder(settings.encoder, **settings.of_encoder)
    store = FeatureCache(encoder, settings.cache / "features.sqlite")
    store.progress = partial(progress, STAGE)
    histories = [records[user] for user in (records if base is None else base)]
    encode_ahead(store, texts_of_stats(histories), progress, settings.engine)
    stats = fit_stats(task, store, histories)
    bundle = Bundle(task, settings, dict(llm.identity), store, stats, records=records)
    return replace(bundle, precision=encoder.precision)


def sampled_users(users: Sequence[str], settings: Settings) -> list[str]:
    """Those from whom all that is shared is learned, in order: all, or `base_users` by lot."""
    if len(users) <= settings.base_users:
        return list(users)
    places = random.Random(settings.training_seed).sample(range(len(users)), settings.base_users)
    return [users[place] for place in sorted(places)]


def _opened(
    dataset: DataSet | Path | str, llm: ChatLLM | str, settings: Settings | None
) -> tuple[Settings, DataSet, ChatLLM]:
    chosen = settings or load_settings()
    if chosen.tune_encoder and chosen.features != "cross":
        fault = "a tower keeps its features and cannot be tuned"
        raise SettingsError(f"tune_encoder needs features=cross: {fault}")
    if chosen.tune_encoder and chosen.encoder_precision not in ("auto", "fp32"):
        raise SettingsError(f"tune_encoder needs fp32, not {chosen.encoder_precision}")
    if chosen.discount != "none" and (
        chosen.loss == "binary" or not HEADS.load(chosen.head).convex
    ):
        fix = "it weighs groups in a convex fit; take loss=listwise and another head, or none"
        raise SettingsError(f"setting 'discount' needs loss=listwise and a convex head: {fix}")
    if chosen.labelling == "adaptive" and (
        chosen.tune_encoder or not HEADS.load(chosen.head).convex
    ):
        fault = "each round fits the scorer anew, which needs a convex head and a frozen encoder"
        raise SettingsError(f"labelling=adaptive: {fault}; take labelling=all")
    data = dataset if isinstance(dataset, DataSet) else load(dataset)
    dp.check(chosen, data.task)
    model = open_llm(llm, chosen) if isinstance(llm, str) else llm
    return chosen, data, model


def _check_learnable(llm: ChatLLM, task: Task, records: Mapping[str, Sequence[Record]]) -> None:
    """DataError: there is nothing to learn from, or not without an LLM."""
    if not records:
        raise DataError("no training user has records: users.jsonl needs users with split 'train'")
    if is_none(llm) and not (task.labels or any(map(offered, chain(*records.values())))):
        fix = "give --llm SPEC, whose candidates it learns to choose from"
        raise DataError(f"without an LLM there are no recorded choices to learn from: {fix}")


def _lacking(users: Sequence[str], known: Container[str], fate: str) -> list[str]:
    without = [user for user in users if user not in known]
    named = ", ".join(without[:3]) + (", …" if len(without) > 3 else "")
    return [f"{len(without)} of {len(users)} users {fate} ({named})"] if without else []
