"""The questions of a pool that tell most about one user, by model/questions.py."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from hydra_llm.bundle import Bundle
from hydra_llm.errors import SettingsError
from hydra_llm.model.head import Head
from hydra_llm.model.interactions import Groups, make_groups
from hydra_llm.model.questions import can_ask, in_turn
from hydra_llm.select import all_labels
from hydra_llm.training.labelling import weak_adapter_groups
from hydra_llm.types import Query, Record

LATEST = 200  # records of a user that count as answered


def next_questions(
    bundle: Bundle,
    records: Sequence[Record],
    pool: Sequence[str],
    count: int = 1,
    head: Head | None = None,
) -> list[tuple[str, float]]:
    """At most `count` texts of the pool that the user has not answered, the one that tells most
    first, each with its worth: by how much an answer lowers the expected log-loss of an answer to
    the pool, in nats, once those before it are answered. `records`: the user's, oldest first;
    `head`: the adapter's of the user.

    Raises SettingsError: the bundle's adapter does not know how uncertain its heads are.
    """
    scorer = bundle.scorers.get("adapter")
    if scorer is None or not can_ask(scorer):
        fix = "it needs labels, loss=listwise and a linear, lowrank or bias head"
        raise SettingsError(f"this bundle's adapter cannot tell which question tells most: {fix}")
    known = {record.input for record in records}
    texts = [text for text in dict.fromkeys(pool) if text not in known]
    if not texts:
        return []
    featurizer, candidates = bundle.featurizer, all_labels(bundle.task, [])
    vectors, labels = featurizer.vectorize(records), bundle.task.labels

    def groups(lefts: Sequence[str], sides: Sequence[Any]) -> Groups:
        rights = [labels] * len(lefts)
        return make_groups(bundle.features, scorer.interaction, lefts, rights, sides)

    sides = [featurizer.adapter(Query("", "", text), candidates, vectors) for text in texts]
    own = weak_adapter_groups(featurizer, records, max(0, len(records) - LATEST))
    answered = groups([o.left for o in own], [o.side_features for o in own]) if own else None
    ordered = islice(in_turn(scorer, groups(texts, sides), answered, head), count)
    return [(texts[place], worth / (2 * len(texts))) for place, worth in ordered]
