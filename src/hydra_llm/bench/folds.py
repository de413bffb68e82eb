"""Users take turns as new users: `bench run --folds N`.

Of every fold, a bundle is learned from all users outside it, evaluated or not; the fold's users are
then fitted as new users, on their histories alone. Knows no LLM and no methods.

The LLM labels only what the run asks it anyway: of a training user the queries that are evaluated
when it is this user's turn, with the records that they see then, in the retriever's order, which no
fold has learned. Where new users' heads are fitted on labels of the LLM (texts), their latest
records are labelled for that in any case, and serve here too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet, Split
from hydra_llm.errors import SettingsError
from hydra_llm.training.dataset import folds
from hydra_llm.training.labelling import known_queries, offers_all
from hydra_llm.types import Query, Record

MIN_TRAINING = 2  # users with records outside a fold: one to learn from, one to be held out


@dataclass(frozen=True)
class Fold:
    """One turn: a data set in which the fold's users alone are new, and the settings for it."""

    number: int  # from 1
    data: DataSet
    settings: Settings


def evaluated_users(data: DataSet, most: int | None) -> list[str]:
    """The first users with a known answer, those of split `test` first."""
    order = [*data.users("test"), *data.users("train")]
    return [user for user in order if known_queries(data, user, 1)][:most]


def deal(
    data: DataSet,
    settings: Settings,
    count: int,
    *,
    users: int | None,
    limit: int | None,
    choices: bool | None = None,
) -> list[Fold]:
    """The folds of a run, equally many users in each, by the seed of the settings; of data that mix
    recorded choices with other queries those that `choices` says are asked. SettingsError: a fold
    without users, or one that leaves too few to learn from.
    """
    asking = data if choices is None else data.asking(choices=choices)
    evaluated = evaluated_users(asking, users)
    if len(evaluated) < count:
        fix = (
            f"take --folds {len(evaluated)} or fewer" if len(evaluated) > 1 else "leave --folds out"
        )
        asked = f"{len(evaluated)} users are evaluated, so that some of {count} folds have none"
        raise SettingsError(f"--folds {count}: {asked}: {fix}, or more --users")
    others = [user for user in data.users() if user not in set(evaluated)]
    dealt = []
    for number, own in enumerate(folds(evaluated, count, settings.seed), 1):
        training = [u for u in (*evaluated, *others) if u not in set(own) and data.history(u)]
        if len(training[: settings.users]) < MIN_TRAINING:
            left = f"fold {number} leaves {len(training[: settings.users])} training users"
            fix = f"{MIN_TRAINING} are needed: take more folds, a larger `users`, or more data"
            raise SettingsError(f"--folds {count}: {left} with records: {fix}")
        new = [user for user in evaluated if user in set(own)]
        order = [*new, *(user for user in (*evaluated, *others) if user not in set(own))]
        part = _fold_data(data, asking, order, set(new), set(evaluated), limit)
        labelled = sum(user in set(evaluated) for user in training)
        dealt.append(Fold(number, part, _fold_settings(data, settings, labelled)))
    return dealt


def _fold_settings(data: DataSet, settings: Settings, labelled: int) -> Settings:
    """What `auto` means in a fold, and no label of a user who is not evaluated."""
    known = "queries" if settings.private or offers_all(data.task, settings) else "both"
    most = labelled if settings.labelled_users is None else min(labelled, settings.labelled_users)
    chosen: dict[str, object] = {"labelled_users": most}
    if settings.label_queries == "auto":
        chosen["label_queries"] = known
    if settings.label_order == "auto":
        chosen["label_order"] = "retriever"
    return settings.model_copy(update=chosen)


def _fold_data(
    data: DataSet,
    asking: DataSet,  # `data` without the queries of the other kind
    order: Sequence[str],
    new: set[str],
    evaluated: set[str],
    limit: int | None,
) -> DataSet:
    """The users in this order, those of the fold as new ones. A training user's queries that are
    never evaluated are records, which give weak labels alone.
    """
    splits: dict[str, Split] = {user: "test" if user in new else "train" for user in order}
    records: dict[str, Sequence[Record]] = {}
    queries: dict[str, Sequence[Query]] = {}
    for user in order:
        known = known_queries(asking, user)
        asked = known[:limit] if user in evaluated else []
        ids = {f"query:{query.id}" for query in asked}
        queries[user] = asking.queries(user) if user in new else asked
        answered = data.history(user) if user in new else data.answered(user)
        records[user] = [record for record in answered if record.id not in ids]
    return DataSet(data.task, splits, records, queries, data.notes)
