"""Learn the word model from training users' records, which cost no LLM call.

Each record is a query for its user's earlier ones. The words that its answer might have are those
of its input, common ones, and those of other outputs; each is a row, with the target whether the
answer has it. Traps: all users' counts come from other folds of users, the user's own from earlier
records. Counts without the record alone would tell the target: the rarer, the likelier.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hydra_llm.history import in_order
from hydra_llm.model.word_model import FEATURES, Floats, Forest, WordModel, word_features
from hydra_llm.text import words
from hydra_llm.training.dataset import folds
from hydra_llm.types import Record
from hydra_llm.word_counts import PopulationWords, UserWords

FOLDS = 4  # of users
RECORDS, USER_RECORDS = 5000, 150  # at most so many are rows, in all and of one user
OTHERS, OWN, COMMON, FREQUENT = 8, 4, 40, 20  # other outputs, and words, beside the input's
LEAST = 50  # words that an answer has, and that one lacks; with fewer no model is learned
TOO_FEW = "the training users' records hold too few words"
TREES: Mapping[str, Any] = {
    "max_iter": 100,
    "learning_rate": 0.08,
    "max_leaf_nodes": 15,
    "min_samples_leaf": 40,
    "l2_regularization": 1.0,
    "early_stopping": False,
}
Histories = Mapping[str, Sequence[Record]]


@dataclass(frozen=True)
class WordModels:
    """The word model, and for each training user one that has not seen the user."""

    model: WordModel
    without: Mapping[str, WordModel]


@dataclass(frozen=True)
class _Rows:
    """Words that an answer may have, of some users."""

    features: Floats  # [R, F]
    target: np.ndarray  # [R] whether the answer has it
    record: np.ndarray  # [R] which of the records it is a word of


def learn_word_model(histories: Histories, seed: int = 0) -> WordModels | None:
    """The model of these users' records; None where there is too little to learn from."""
    ordered = {user: in_order(records) for user, records in histories.items() if records}
    parts = folds(list(ordered), FOLDS, seed)
    if len(parts) < 2:
        return None
    populations = [
        PopulationWords.of(own for user, own in ordered.items() if user not in part)
        for part in map(set, parts)
    ]
    sampler = _Sampler(ordered, np.random.default_rng(seed))
    rows = [
        sampler.rows(part, population) for part, population in zip(parts, populations, strict=True)
    ]
    targets = np.concatenate([part.target for part in rows])
    if min(targets.sum(), (~targets).sum()) < LEAST:  # e.g. a vocabulary of one word
        return None
    forests = [_forest(rows[1 - i :: 2], seed) for i in (0, 1)]  # each for the other folds
    without = {
        user: WordModel(populations[place], forests[place % 2])
        for place, part in enumerate(parts)
        for user in part
    }
    population = PopulationWords.of(ordered.values())
    skill = _skill(rows, forests)
    return WordModels(WordModel(population, _forest(rows, seed), skill), without)


def _skill(parts: Sequence[_Rows], forests: Sequence[Forest]) -> float:
    """Of the words of an input, how much of the variance within a record the model of other users
    explains, at most 1 (a Brier skill score); below 0 it is worse than one share for all.
    """
    inside, missed, spread = FEATURES.index("inside"), 0.0, 0.0
    for place, part in enumerate(parts):
        words_of_input = part.features[:, inside] > 0
        shares = 1 / (1 + np.exp(-forests[place % 2].logits(part.features[words_of_input])))
        record, target = part.record[words_of_input], part.target[words_of_input].astype(float)
        missed += _within(record, target - shares)
        spread += _within(record, target)
    return 1 - missed / spread if spread > 0 else 0.0


def _within(record: np.ndarray, values: Floats) -> float:
    """The sum of squares of values [R] around the means of their records."""
    count = np.maximum(np.bincount(record), 1)
    means = np.bincount(record, values, minlength=len(count)) / count
    return float(np.square(values - means[record]).sum())


class _Sampler:
    """Draws the records that are rows, and the words of each."""

    def __init__(self, histories: Histories, rng: np.random.Generator):
        self.histories, self.rng = histories, rng
        self.outputs = [record.output for own in histories.values() for record in own]
        self.most = max(1, min(USER_RECORDS, RECORDS // max(1, len(histories))))

    def rows(self, users: Sequence[str], population: PopulationWords) -> _Rows:
        features, target = [np.zeros((0, len(FEATURES)))], [np.zeros(0, dtype=bool)]
        sizes: list[int] = []
        common = population.common(COMMON)
        for user in users:
            for record, own, earlier in self._drawn(user):
                asked = self._asked(record, own, earlier, common)
                out = set(words(record.output))
                features.append(word_features(asked, record.input, population, own))
                target.append(np.array([word in out for word in asked], dtype=bool))
                sizes.append(len(asked))
        places = np.repeat(np.arange(len(sizes)), sizes)
        return _Rows(np.concatenate(features), np.concatenate(target), places)

    def _drawn(self, user: str) -> Iterator[tuple[Record, UserWords, Sequence[Record]]]:
        """Some of a user's records, with the earlier ones and their counts as of then."""
        records, own, counted = self.histories[user], UserWords(), 0
        count = min(self.most, len(records))
        for place in sorted(self.rng.choice(len(records), count, replace=False).tolist()):
            own.add(records[counted:place])
            counted = place
            yield records[place], own, records[:place]

    def _asked(
        self, record: Record, own: UserWords, earlier: Sequence[Record], common: Sequence[str]
    ) -> list[str]:
        draw = self.rng.integers
        texts = [self.outputs[i] for i in draw(0, len(self.outputs), OTHERS)]
        if earlier:
            texts += [earlier[i].output for i in draw(0, len(earlier), OWN)]
        frequent = sorted(own.outputs.items(), key=lambda item: (-item[1], item[0]))[:FREQUENT]
        asked = {*words(record.input), *common, *(word for word, _ in frequent)}
        return sorted(asked.union(*map(words, texts)))


def _forest(parts: Sequence[_Rows], seed: int) -> Forest:
    from sklearn.ensemble import HistGradientBoostingClassifier  # 2 s to import

    features = np.concatenate([part.features for part in parts])
    target = np.concatenate([part.target for part in parts])
    if target.all() or not target.any():
        return Forest.constant(float(target.mean()) if len(target) else 0.5)
    model = HistGradientBoostingClassifier(**TREES, random_state=seed).fit(features, target)
    return as_forest(model)


def as_forest(model: Any) -> Forest:
    """A fitted HistGradientBoostingClassifier of two classes as plain arrays."""
    trees = [predictors[0].nodes for predictors in model._predictors]
    sizes = [len(nodes) for nodes in trees]
    roots = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
    nodes = np.concatenate(trees)
    places, shift = np.arange(len(nodes)), np.repeat(roots, sizes)
    leaf = nodes["is_leaf"].astype(bool)
    return Forest(
        feature=np.where(leaf, 0, nodes["feature_idx"]).astype(np.int64),
        threshold=np.where(leaf, np.inf, nodes["num_threshold"]).astype(np.float64),
        left=np.where(leaf, places, nodes["left"] + shift).astype(np.int64),
        right=np.where(leaf, places, nodes["right"] + shift).astype(np.int64),
        value=np.where(leaf, nodes["value"], 0.0).astype(np.float64),
        roots=roots,
        depth=int(max((own["depth"].max() for own in trees), default=0)),
        baseline=float(np.ravel(model._baseline_prediction)[0]),
    )
