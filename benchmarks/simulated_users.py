"""Simulated users with known preferences for the benchmark scripts, and labelled groups of real
users in the same form.

A text mixes words of two topics. Each user prefers some topics, partly individually and partly as
all users do. The preferences can be learned from the texts, and the probability of each label is
known, so that a log-loss can be compared with the best possible one.
"""

import gzip
import json
import math
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet, Split
from hydra_llm.history import before
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.scorer import Scorer
from hydra_llm.tasks.base import CohortStats, Task
from hydra_llm.training.dataset import LabelledGroup
from hydra_llm.training.train_scorer import LabelledData, train_scorer
from hydra_llm.types import Record

TOPICS = {
    "football": "striker goalkeeper penalty league coach stadium midfield derby transfer referee",
    "cooking": "recipe oven garlic butter chef roast simmer dough spices dinner",
    "finance": "shares bank inflation bond investor dividend interest profit market loan",
    "medicine": "vaccine surgeon patient hospital symptoms therapy infection clinic dose diagnosis",
    "travel": "beach airline hostel passport island itinerary luggage tourist resort ferry",
    "music": "guitar concert album singer orchestra melody drummer festival lyrics chorus",
    "space": "rocket orbit telescope galaxy astronaut lunar satellite comet launch planet",
    "elections": "ballot senator campaign voters primary debate governor turnout coalition poll",
    "gardening": "tulips compost pruning seeds lawn greenhouse soil roses watering hedge",
    "crime": "detective robbery suspect trial jury arrest forensic burglar verdict prison",
    "fashion": "runway designer dress silk couture handbag heels tailor boutique collection",
    "computers": (
        "software laptop server hacker processor keyboard database encryption browser code"
    ),
}
FILLERS_TEXT = (
    "the new story about people who say that after many years this week another long report shows"
    " how they want more"
)
FILLERS = tuple(FILLERS_TEXT.split())
LABELS = tuple(TOPICS)
CLASSIFY = Task(
    "topics",
    "classification",
    "Which topic would this person file this under? {input}",
    LABELS,
    ("accuracy",),
)
HEADLINE = Task(
    "headlines",
    "generation",
    "Generate a headline for the following article: {input}",
    (),
    ("rouge1",),
)
CANDIDATES = 8
LIKES = Task(
    "likes",
    "classification",
    "Would this person like the following text? {input}",
    ("no", "yes"),
    ("accuracy",),
)


def words(topics: Sequence[str], count: int, rng: random.Random) -> str:
    """About two of three words from the topics in equal parts, the rest fillers."""
    pool = [
        rng.choice(TOPICS[topics[i % len(topics)]].split()) if i % 3 else rng.choice(FILLERS)
        for i in range(count)
    ]
    rng.shuffle(pool)
    return " ".join(pool)


@dataclass(frozen=True)
class SimulatedUser:
    """A user with individual preferences."""

    name: str
    topic_preference: dict[str, float]
    """Topic → how much the user prefers answers about it."""
    record_preference: dict[str, float]
    """Topic → how useful a record about it is."""

    def prefers(self, topics: Sequence[str]) -> str:
        return max(topics, key=lambda topic: self.topic_preference[topic])


def simulate_users(count: int, seed: int, prefix: str = "p") -> list[SimulatedUser]:
    """`count` users; two thirds of the variance of their preferences are individual."""
    common = random.Random("common")
    shared = [{topic: common.gauss(0, 1.0) for topic in TOPICS} for _ in range(2)]
    out = []
    for i in range(count):
        rng = random.Random(f"{prefix} {i} {seed}")
        out.append(
            SimulatedUser(
                f"{prefix}{i}",
                *(
                    {topic: mean + rng.gauss(0, 1.4) for topic, mean in table.items()}
                    for table in shared
                ),
            )
        )
    return out


@dataclass(frozen=True)
class Rows:
    """Labelled groups of several users for both scorers; each user's in time order."""

    reranker: list[LabelledGroup]
    adapter: list[LabelledGroup]
    probabilities: dict[tuple[str, str], tuple[float, ...]]
    """(scorer, query) → each pair's probability of label 1; empty for real data."""


def simulated_rows(users: Sequence[SimulatedUser], count: int, seed: int) -> Rows:
    """`count` groups of 8 pairs for each user and scorer."""
    rows = Rows([], [], {})
    for user in users:
        rng = random.Random(f"{user.name} rows {seed}")
        for index in range(count):
            topics = rng.sample(LABELS, 2)
            text, query = words(topics, 20, rng), f"{user.name}-{index}"
            topics_offered = [
                *(rng.choice(topics) for _ in range(CANDIDATES // 2)),
                *rng.sample(LABELS, CANDIDATES - CANDIDATES // 2),
            ]
            headlines = [words([topic], 10, rng) for topic in topics_offered]
            records = [
                f"{words([topic], 20, rng)} → {words([topic], 10, rng)}" for topic in topics_offered
            ]
            for scorer, rights, preference, out in (
                ("reranker", records, user.record_preference, rows.reranker),
                ("adapter", headlines, user.topic_preference, rows.adapter),
            ):
                probabilities = tuple(
                    1 / (1 + math.exp(-(preference[topic] + 2.0 * (topic in topics) - 1.5)))
                    for topic in topics_offered
                )
                gains = tuple(float(rng.random() < chance) for chance in probabilities)
                blank = np.zeros((len(rights), 0))
                out.append(
                    LabelledGroup(user.name, query, text, tuple(rights), gains, blank, index)
                )
                rows.probabilities[scorer, query] = probabilities
    return rows


def real_rows(
    data: DataSet, users: Sequence[str], store: FeatureCache, count: int, seed: int
) -> Rows:
    """The latest `count` records of each user as queries.

    Adapter: the user's answer has label 1; other labels, or other users' headlines of the nearest
    texts, have label 0. Reranker: 8 random earlier records; a record has label 1 if the gain of its
    answer is above the group's mean.
    """
    rows, rng = Rows([], [], {}), random.Random(seed)
    others = [record for user in data.users("train")[:40] for record in data.history(user)]
    vectors = None if data.task.labels else store.texts([record.input for record in others])
    for user in users:
        records = data.answered(user)
        for record in records[-count:]:
            seen = before(records, record)
            sampled = rng.sample(seen, min(CANDIDATES, len(seen)))
            if not sampled:
                continue
            gains = [data.task.gain(other.output, record.output) for other in sampled]
            useful = [gain > sum(gains) / len(gains) or gain == 1.0 for gain in gains]
            texts = [f"{other.input} → {other.output}" for other in sampled]
            rows.reranker.append(_group(record, texts, useful))
            if vectors is None:
                wrong = [label for label in data.task.labels if label != record.output]
                rng.shuffle(wrong)
            else:
                order = (-(vectors @ store.texts([record.input])[0])).argsort()[:60]
                wrong = _outputs_of_others(record, [others[i] for i in order])
            answers = [record.output, *wrong[: CANDIDATES - 1]]
            rng.shuffle(answers)
            correct = [answer == record.output for answer in answers]
            rows.adapter.append(_group(record, answers, correct))
    return rows


def _group(record: Record, rights: Sequence[str], gains: Sequence[bool]) -> LabelledGroup:
    """A record as a query over candidates, without side features."""
    blank, gain_values = np.zeros((len(rights), 0)), tuple(map(float, gains))
    query = record.user, record.id, record.input
    return LabelledGroup(*query, tuple(rights), gain_values, blank, record.position)


def _outputs_of_others(record: Record, near: Sequence[Record]) -> list[str]:
    outputs = [other.output for other in near if other.user != record.user]
    return [text for text in dict.fromkeys(outputs) if text != record.output]


def simulated_data(
    task: Task, users: Sequence[SimulatedUser], records: int, seed: int, new: int = 0
) -> DataSet:
    """A data set of users; the last `new` are new users. Answers are the topic, or a headline
    about it, that the user prefers.
    """
    splits: dict[str, Split] = {
        user.name: "train" if i < len(users) - new else "test" for i, user in enumerate(users)
    }
    return DataSet.from_records(task, splits, _histories(task, users, records, seed), [])


def _histories(
    task: Task, users: Sequence[SimulatedUser], records: int, seed: int
) -> Iterator[Record]:
    for user in users:
        rng = random.Random(f"{user.name} history {seed}")
        for index in range(records):
            topics = rng.sample(LABELS, 2)
            topic = user.prefers(topics)
            yield Record(
                user.name,
                f"r{index}",
                words(topics, 20, rng),
                topic if task.labels else words([topic], 10, rng),
            )


@dataclass(frozen=True)
class Pool:
    """Texts that the users of a large simulated data set are asked about; two topics each."""

    texts: list[str]
    topics: NDArray[np.int64]  # [T, 2] places in `LABELS`

    @staticmethod
    def of(count: int, seed: int) -> "Pool":
        rng = random.Random(f"pool {seed}")
        pairs = [rng.sample(range(len(LABELS)), 2) for _ in range(count)]
        texts = [words([LABELS[place] for place in pair], 12, rng) for pair in pairs]
        return Pool(texts, np.array(pairs))


def hashed_vectors(texts: Sequence[str], width: int) -> NDArray[np.float32]:
    """[N, width] unit rows: sums of a random vector for each word, a cheap stand-in for an
    encoder's.
    """
    rows = np.zeros((len(texts), width), dtype=np.float32)
    for row, text in zip(rows, texts, strict=True):
        for word in text.split():
            row += _word_vector(word, width)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(length, 1e-9), dtype=np.float32)


@lru_cache(maxsize=100_000)
def _word_vector(word: str, width: int) -> NDArray[np.float32]:
    draw = np.random.default_rng(zlib.crc32(word.encode()))
    return draw.standard_normal(width).astype(np.float32)


def write_simulated(
    folder: Path, pool: Pool, users: int, records: int, *, new: int = 0, seed: int = 0
) -> None:
    """Write a data set of `LIKES`, a user at a time: `users` training users and `new` new ones with
    `records` records each, drawn from the pool. A user likes a text by lot, with the odds of the
    sum of what the user thinks of its topics; two thirds of the variance of these are individual.
    """
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps(LIKES.to_json()), encoding="utf-8")
    common = np.random.default_rng(0).normal(0, 1.0, len(LABELS))
    with (
        (folder / "users.jsonl").open("w", encoding="utf-8") as names,
        gzip.open(folder / "history.jsonl.gz", "wt", compresslevel=1, encoding="utf-8") as rows,
        gzip.open(folder / "queries.jsonl.gz", "wt", compresslevel=1, encoding="utf-8") as asked,
    ):
        asked.write("")
        for number in range(users + new):
            name, draw = f"p{number}", np.random.default_rng((seed, number))
            split = "train" if number < users else "test"
            names.write(json.dumps({"user": name, "split": split}) + "\n")
            taste = common + draw.normal(0, 1.4, len(LABELS))
            places = draw.integers(len(pool.texts), size=records)
            odds = taste[pool.topics[places]].sum(1)
            likes = draw.random(records) < 1 / (1 + np.exp(-odds))
            for at, (place, liked) in enumerate(zip(places.tolist(), likes.tolist(), strict=True)):
                time, text = str(1_600_000_000 + 86_400 * at), pool.texts[place]
                fields = {"user": name, "id": str(at), "time": time, "input": text}
                rows.write(json.dumps({**fields, "output": LIKES.labels[liked]}) + "\n")


def learn_scorer(
    store: FeatureCache,
    settings: Settings,
    task: Task,
    name: str,
    groups: Sequence[LabelledGroup],
    side_names: Sequence[str],
    rule: str,
    by_label: bool = False,
) -> tuple[Scorer, dict[str, Any]]:
    """A scorer trained on labelled groups as in `hydra_llm.learn`, and its report."""
    bundle = Bundle(task, settings, {}, store, CohortStats())
    data = LabelledData(name, lambda _: list(groups), side_names, rule, by_label)
    learned = train_scorer(bundle, data, tune=settings.tune_encoder)
    return learned.scorers[name], learned.report[name]


def open_data(folder: Path) -> DataSet:
    from hydra_llm.datasets.native import load

    return load(folder)
