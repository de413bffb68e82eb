"""Private mode of the library: no byte of a record reaches the LLM, neither by learning, nor by
fitting, nor by answering.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from hydra_llm import Personalizer, fit, learn
from hydra_llm.bench.folds import deal
from hydra_llm.bench.method import check_methods, find_methods
from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import DataError, SettingsError
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.pipeline import Pipeline
from hydra_llm.retrieve import Recent
from hydra_llm.tasks.base import Task
from hydra_llm.training.private import check_private
from hydra_llm.types import Generation, Message, Query, Record
from tests.learning import ONE_STRENGTH

MARK = "zq7"  # in every record, and nowhere else
TAGS = Task("tags", "classification", "Which tag? {input}", ("calm", "loud"))
TITLES = Task("titles", "generation", "A title for: {input}")
WORDS = ("sea", "storm", "harbour", "whale", "sailor", "boat", "wave", "fish")
SMALL: Any = {"samples": 3, "retrieved": 4, "k": 2, "max_length": 32, "width": 16}


def rule(messages: Sequence[Message], index: int, rng: random.Random) -> str:
    task = TAGS if "Which tag?" in messages[-1]["content"] else TITLES
    return rng.choice(task.labels or WORDS)


class Noted(RuleLLM):
    """A fake LLM that notes what it is asked."""

    def __init__(self) -> None:
        super().__init__(rule)
        self.asked = list[str]()

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        self.asked.append(str(messages))
        return await super().generate(messages, sampling)


def data_of(task: Task, *, queries: bool = True) -> DataSet:
    """Six training users and two new ones, whose records are marked, and their known queries."""
    dice, records, asked = random.Random(0), list[Record](), list[Query]()
    splits = {**{f"train{i}": "train" for i in range(6)}, "new0": "test", "new1": "test"}
    for user in splits:
        for i in range(8):
            text = f"{MARK} {' '.join(dice.sample(WORDS, 4))}"
            output = dice.choice(task.labels) if task.labels else f"{MARK} {dice.choice(WORDS)}"
            records.append(Record(user, f"r{i}", text, output, position=i))
        for i in range(2 * queries):
            gold = dice.choice(task.labels or WORDS)
            text = " ".join(dice.sample(WORDS, 4))
            asked.append(Query(user, f"q{i}", text, gold=gold, position=20 + i))
    return DataSet.from_records(task, splits, records, asked)


def asked_by_all(task: Task, private: bool, **settings: Any) -> tuple[list[str], Bundle]:
    """All that the LLM reads of learning, fitting and answering."""
    llm, data = Noted(), data_of(task)
    chosen = Settings(private=private, **SMALL, **settings)
    learned = learn(data, llm, chosen, strengths=ONE_STRENGTH).bundle
    fitted = fit(data, learned, llm).bundle
    personalizer = Personalizer.load(fitted, llm, ask="always")
    for user in ("new0", "new1"):
        personalizer.answer("a storm at the harbour", user=user)
    return llm.asked, fitted


VARIANTS: Sequence[tuple[Task, dict[str, Any]]] = (
    (TAGS, {"candidates": "sampled", "features": "cross"}),  # whose heads learn from samples
    (TITLES, {"word_model": False, "choose": "auto", "candidate_prompts": "zero-shot,recent@2"}),
)


@pytest.mark.parametrize(("task", "settings"), VARIANTS)
def test_the_llm_sees_no_record(task: Task, settings: dict[str, Any]) -> None:
    asked, bundle = asked_by_all(task, private=True, **settings)
    assert asked
    assert not [text for text in asked if MARK in text]
    assert "reranker" not in bundle.scorers
    assert bundle.settings.private, "a bundle that was learned so answers so"
    head = bundle.heads["adapter"]["new0"]
    if task.labels:  # all of them are candidates: the record's own answer is the right one
        assert head.records == 8
    assert np.any(head.numbers) == bool(task.labels)


def test_a_private_fit_of_any_bundle_asks_nothing() -> None:
    data, llm = data_of(TITLES), Noted()
    chosen = Settings(word_model=False, rerank="never", **SMALL)
    bundle = learn(data, llm, chosen, strengths=ONE_STRENGTH).bundle
    assert [text for text in llm.asked if MARK in text], "as usual"
    before = len(llm.asked)
    private = bundle.settings_with(private=True)
    assert fit(data, bundle, llm, settings=private).usage.calls == 0
    assert len(llm.asked) == before
    fit(data, bundle, llm, users=["new0"])
    assert len(llm.asked) > before


@pytest.mark.parametrize(
    "conflict",
    [
        {"rerank": "always"},
        {"reranker_labels": "llm"},
        {"reranker_check": "llm"},
        {"fit_labels": "llm"},
        {"label_queries": "history"},
        {"label_queries": "both"},
    ],
)
def test_what_needs_records_in_prompts_is_refused_in_one_line(conflict: Any) -> None:
    (name,) = conflict
    with pytest.raises(SettingsError, match=rf"^setting 'private': {name}=.*leave {name} out$"):
        learn(data_of(TAGS), Noted(), Settings(private=True, **SMALL, **conflict))


def test_texts_without_known_queries_cannot_be_learned_from() -> None:
    data, settings = data_of(TITLES, queries=False), Settings(private=True, **SMALL)
    with pytest.raises(DataError, match=r"^private: .* known queries alone, and there are none"):
        learn(data, llm := Noted(), settings)
    assert not llm.asked
    labels = data_of(TAGS, queries=False)  # whose records say enough
    assert "adapter" in learn(labels, llm, settings, strengths=ONE_STRENGTH).bundle.scorers
    assert not llm.asked


def test_methods_that_show_records_are_refused() -> None:
    chosen = Settings(private=True)
    methods = find_methods(["zero-shot", "hydra", "pag", "bbox-adapter"])
    with pytest.raises(SettingsError, match=r"^method 'pag' shows .*: leave out pag, bbox-adapter"):
        check_methods(methods, TAGS, chosen, without_llm=False)
    check_methods(methods[:2], TAGS, chosen, without_llm=False)
    check_methods(methods, TAGS, Settings(), without_llm=False)


@pytest.mark.parametrize("task", [TAGS, TITLES])
def test_runs_by_folds_may_be_private(task: Task) -> None:
    for fold in deal(data_of(task), Settings(private=True), 2, users=None, limit=None):
        check_private(fold.settings)
        assert fold.settings.label_queries == "queries"


def test_a_profile_is_no_way_around() -> None:
    data = data_of(TITLES)
    query, records = data.queries("new0")[0], data.history("new0")
    for private in (True, False):
        settings = Settings(private=private, retriever="recent")
        pipeline = Pipeline(TITLES, Recent(), settings, profile=f"writes {MARK}")
        assert (MARK in str(pipeline.render(query, records).messages)) is not private
