"""P(word of the answer | word, input, user), from what users wrote before; no LLM is asked.

Boosted trees on where a word stands in the input, how often all users and this one use it, and how
often they keep it from an input. Learned in `training/word_model.py`, evaluated with numpy alone.
Letters: W words, F features, T trees, N nodes of all trees. Knows no files, tasks and users' names.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_llm.word_counts import (
    ABSENT,
    COUNTS,
    Place,
    PopulationWords,
    TextProfile,
    UserWords,
    text_profile,
)

Floats = NDArray[np.float64]
FEATURES = (
    *Place._fields,
    *("length", "digit", "text_words", "sentences", "rarity", "weight"),
    *("output_rate", "kept_rate", "rate_behind", "rate_before"),
    *("own_rate", "own_kept", "own_ratio", "own_records", "own_words"),
)
"""[F]. `weight` is rarity times `times`; rates are logarithms, the user's own shrunk to all
users'.
"""
SHRINK = 3.0  # records that a rate of others counts as
NEIGHBOURS = 10.0  # the same of rates by the neighbour's word


def word_features(
    asked: Sequence[str], text: str, population: PopulationWords, own: UserWords
) -> Floats:
    """[W, F] features of the asked words for a query's text."""
    profile, size = text_profile(text), len(asked)
    places = np.array([profile.places.get(word, ABSENT) for word in asked], dtype=np.float64)
    places = places.reshape(size, len(ABSENT))
    counts, used, n = population.rows(asked), own.rows(asked), population.records
    usual = (population.kept_words + 1) / (population.input_words + 10)
    output_rate = (counts[:, 1] + 0.5) / (n + 1)
    kept_rate = (counts[:, 2] + SHRINK * usual) / (counts[:, 0] + SHRINK)
    rarity = np.log((n + 1) / (counts[:, 0] + 1))
    behind, before = _rates_beside(profile, population, usual)
    own_rate = (used[:, 1] + SHRINK * output_rate) / (own.records + SHRINK)
    own_kept = (used[:, 2] + SHRINK * kept_rate) / (used[:, 0] + SHRINK)
    mean_words = (own.output_words + SHRINK * population.length) / (own.records + SHRINK)
    columns = [
        np.array([len(word) for word in asked], dtype=np.float64),
        np.array([word.isdigit() for word in asked], dtype=np.float64),
        np.full(size, math.log1p(len(profile.tokens))),
        np.full(size, float(profile.sentences)),
        rarity,
        rarity * places[:, Place._fields.index("times")],
        np.log(output_rate),
        np.log(kept_rate),
        np.log([behind.get(word, usual) for word in asked]),
        np.log([before.get(word, usual) for word in asked]),
        np.log(own_rate),
        np.log(own_kept),
        np.log(own_rate / output_rate),
        np.full(size, math.log1p(own.records)),
        np.full(size, mean_words),
    ]
    return np.concatenate([places, np.stack(columns, 1)], 1)


def _rates_beside(
    profile: TextProfile, population: PopulationWords, usual: float
) -> tuple[dict[str, float], dict[str, float]]:
    """How often words behind, and before, the same neighbours are in outputs: each word's greatest
    rate over its places in the text ("called X", "X outperforms").
    """
    counts, none = population.counts, [0] * COUNTS
    behind: dict[str, float] = {}
    before: dict[str, float] = {}
    for left, right in pairwise(profile.tokens):
        row = counts.get(left, none)
        rate = (row[4] + NEIGHBOURS * usual) / (row[3] + NEIGHBOURS)
        behind[right] = max(behind.get(right, 0.0), rate)
        row = counts.get(right, none)
        rate = (row[6] + NEIGHBOURS * usual) / (row[5] + NEIGHBOURS)
        before[left] = max(before.get(left, 0.0), rate)
    return behind, before


@dataclass(frozen=True)
class Forest:
    """Boosted regression trees as arrays; a leaf is its own child."""

    feature: NDArray[np.int64]  # [N] of an inner node
    threshold: Floats  # [N] up to it: to the left
    left: NDArray[np.int64]  # [N] places of the children
    right: NDArray[np.int64]
    value: Floats  # [N] of a leaf
    roots: NDArray[np.int64]  # [T]
    depth: int  # steps from a root to the farthest leaf
    baseline: float

    @classmethod
    def constant(cls, share: float) -> "Forest":
        """The same probability for every word."""
        share = min(max(share, 1e-3), 1 - 1e-3)
        none, numbers = np.zeros(0, dtype=np.int64), np.zeros(0)
        return cls(none, numbers, none, none, numbers, none, 0, math.log(share / (1 - share)))

    def logits(self, features: Floats) -> Floats:
        """[W, F] → [W] log-odds."""
        rows = np.arange(len(features))[:, None]
        node = np.broadcast_to(self.roots, (len(features), len(self.roots)))
        for _ in range(self.depth):
            goes_left = features[rows, self.feature[node]] <= self.threshold[node]
            node = np.where(goes_left, self.left[node], self.right[node])
        total: Floats = self.baseline + self.value[node].sum(1)
        return total


TENSORS = ("feature", "threshold", "left", "right", "value", "roots")
TOTALS = ("records", "output_words", "input_words", "kept_words")


@dataclass(frozen=True)
class WordModel:
    """What all users share of the word model."""

    population: PopulationWords
    forest: Forest
    skill: float = 0.0
    """Of the words of held-out users' inputs, the share of the variance within a record that it
    explains; 0 where it was not measured (bundles of older versions).
    """

    def probabilities(self, asked: Sequence[str], text: str, own: UserWords) -> Floats:
        """[W] how likely the user's answer to the text has each word."""
        if not asked:
            return np.zeros(0)
        logits = self.forest.logits(word_features(asked, text, self.population, own))
        shares: Floats = 1 / (1 + np.exp(-logits))
        return shares

    # ---- on disk

    def config(self) -> dict[str, Any]:
        """What is no array."""
        totals = {name: getattr(self.population, name) for name in TOTALS}
        forest = {"depth": self.forest.depth, "baseline": self.forest.baseline}
        return {"features": list(FEATURES), "skill": self.skill, **totals, **forest}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every array under a name; the words are UTF-8, a line each."""
        population, forest = self.population, self.forest
        vocabulary = "\n".join(population.counts).encode()
        rows = np.array(list(population.counts.values()), dtype=np.int32).reshape(-1, COUNTS)
        arrays: dict[str, NDArray[Any]] = {name: getattr(forest, name) for name in TENSORS}
        return arrays | {"words": np.frombuffer(vocabulary, dtype=np.uint8).copy(), "counts": rows}

    @classmethod
    def restore(
        cls, config: Mapping[str, Any] | None, arrays: Mapping[str, NDArray[Any]]
    ) -> "WordModel | None":
        """The inverse of `config` and `arrays`; None for None. KeyError or ValueError: they do not
        fit together.
        """
        if config is None:
            return None
        if tuple(config["features"]) != FEATURES:
            raise ValueError("the word model has other features than this version's")
        text, rows = bytes(arrays["words"]).decode(), arrays["counts"].tolist()
        vocabulary = text.split("\n") if text else []
        counts = dict(zip(vocabulary, rows, strict=True))
        population = PopulationWords(counts, **{name: config[name] for name in TOTALS})
        trees = {name: arrays[name] for name in TENSORS}
        forest = Forest(**trees, depth=config["depth"], baseline=config["baseline"])
        return cls(population, forest, config.get("skill", 0.0))
