"""Which questions see records: a gate that compares words, one that is learned on a fake encoder,
and the pipeline around it.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.context import Context
from hydra_llm.gate import (
    FORM_WIDTH,
    Floor,
    GateWeights,
    LearnedGate,
    LexicalGate,
    coverage,
    form,
    forms,
    generic_requests,
    repeats,
)
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.pipeline import UserPipeline
from hydra_llm.retrieve import BM25
from hydra_llm.tasks.base import CohortStats, Task
from hydra_llm.training.gate import fit_gate
from hydra_llm.types import Query, Ranked, Record

PRIORITY = Task("priority", "classification", "How urgent is it? {input}", ("low", "high"))
WIDTH = 32
THINGS = ("printer", "server", "laptop", "projector", "router", "scanner", "monitor", "phone")
FAULTS = ("is on fire", "prints blank pages", "does not start", "restarts every hour", "is stolen")
PLACES = ("on the second floor", "in accounting", "at reception", "in the lab", "in room twelve")
OFF_TASK = ("What is the capital of France?", "Hi, how are you?", "2+2", "今日は何曜日ですか")


def embed(texts: Sequence[str]) -> Any:
    """Unit vectors [N, WIDTH]: hashed words."""
    rows = np.zeros((len(texts), WIDTH), dtype=np.float32)
    for row, text in zip(rows, texts, strict=True):
        for word in text.lower().split() or [""]:
            row[hashlib.sha256(word.encode()).digest()[0] % WIDTH] += 1
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def tickets(user: str, count: int, seed: int = 0) -> list[Record]:
    dice = random.Random(f"{user} {seed}")
    out = []
    for i in range(count):
        text = f"The {dice.choice(THINGS)} {dice.choice(FAULTS)} {dice.choice(PLACES)}"
        out.append(Record(user, f"t{i}", text, dice.choice(PRIORITY.labels), position=i))
    return out


def context(question: str, records: Sequence[Record]) -> Context:
    return Context(Query("u", "asked", question), tuple(records))


def blank() -> Bundle:
    """A bundle on the fake encoder that has learned nothing yet."""
    store: Any = SimpleNamespace(texts=embed, encoder=SimpleNamespace(width=WIDTH))
    users = [f"u{i}" for i in range(12)]
    records = {user: tickets(user, 30) for user in users}
    return Bundle(
        PRIORITY, Settings(), {}, store, CohortStats((0.5, 0.5)),
        records=records, trained_on=tuple(users),
    )  # fmt: skip


@pytest.fixture(scope="module")
def weights() -> GateWeights:
    learned, report = fit_gate(blank())
    assert learned is not None
    assert report["generic_passed"] < 0.02
    return learned


def test_a_learned_gate_tells_tasks_from_requests(weights: GateWeights) -> None:
    gate = LearnedGate(weights, embed)
    new = [record.input for record in tickets("new user", 50, seed=1)]
    kept = [gate.belongs(context(text, ())) for text in new]
    assert sum(kept) >= 0.9 * len(new)
    assert not any(gate.belongs(context(text, ())) for text in OFF_TASK)
    records = tickets("u", 10)
    assert gate.belongs(context("2+2", [replace(records[0], input="2+2"), *records]))  # repeated


def test_learning_a_gate_is_deterministic(weights: GateWeights) -> None:
    again, _ = fit_gate(blank())
    assert again is not None
    assert again.threshold == weights.threshold
    assert np.array_equal(again.weights, weights.weights)


def test_a_gate_survives_a_file(weights: GateWeights) -> None:
    again = GateWeights.restore(weights.config(), weights.weights)
    assert again is not None
    assert again.config() == weights.config()
    assert GateWeights.restore(None, None) is None
    assert GateWeights.restore({"version": 0}, weights.weights) is None


def test_few_training_inputs_give_no_learned_gate() -> None:
    bundle = blank()
    few = {user: own[:2] for user, own in bundle.records.items()}
    learned, report = fit_gate(replace(bundle, records=few))
    assert learned is None
    assert "at least 100 are needed" in report["skipped"]


@settings(max_examples=10)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6))
def test_a_higher_threshold_never_lets_more_pass(thresholds: list[float]) -> None:
    numbers = np.linspace(-1, 1, WIDTH + FORM_WIDTH)
    passed = []
    for threshold in sorted(thresholds):
        gate = LearnedGate(GateWeights(numbers, threshold, Floor()), embed)
        passed.append(sum(gate.belongs(context(text, ())) for text in generic_requests()[::200]))
    assert passed == sorted(passed, reverse=True)


def test_the_floor_drops_records_worth_less_than_none() -> None:
    records = tickets("u", 3)
    ranked = [Ranked(record, 1.0, i, usefulness=1.0 - i) for i, record in enumerate(records)]
    learned = GateWeights(np.zeros(WIDTH + FORM_WIDTH), 0.0, Floor(0.0, 0.0, 1.0))
    passed = LearnedGate(learned, embed).relevant(context("x", records), ranked)
    assert [item.record.id for item in passed] == ["t0", "t1"]


@pytest.mark.parametrize("count", [1, 3, 8, 60])
def test_words_alone_tell_tasks_from_requests(count: int) -> None:
    gate, records = LexicalGate(), tickets("u", count)
    ranked = [Ranked(record, 0.0, i) for i, record in enumerate(records)]

    def passes(text: str) -> bool:
        asked = context(text, records)
        return gate.belongs(asked) and bool(gate.relevant(asked, ranked))

    assert not any(passes(text) for text in OFF_TASK)
    assert passes(records[0].input)
    assert passes(records[0].input.replace("The", "My"))


def test_words_of_any_script_are_compared() -> None:
    records = [
        Record("u", "1", "打印机卡纸了", "low"),
        Record("u", "2", "Сервер не отвечает", "low"),
    ]
    inputs = [record.input for record in records]
    assert coverage("打印机又卡纸", inputs)[0] > 0.3
    assert coverage("Сервер снова не отвечает", inputs)[1] > 0.3
    assert coverage("你好", inputs).max() == 0
    assert repeats("сервер НЕ отвечает!", inputs)
    assert not repeats("", inputs)


@settings(max_examples=30)
@given(st.text(max_size=200))
def test_a_form_is_finite_bounded_and_the_same_again(text: str) -> None:
    numbers = form(text)
    assert numbers.shape == (FORM_WIDTH,)
    assert np.isfinite(numbers).all()
    assert np.abs(numbers).max() <= 1
    assert np.array_equal(numbers, forms([text])[0])


def test_a_closed_gate_costs_one_call_without_records() -> None:
    records = {"u": tickets("u", 20)}
    llm = RuleLLM(lambda messages, index, dice: dice.choice(PRIORITY.labels))
    chosen = Settings(samples=4, k=2, retrieved=3)
    pipeline = UserPipeline(PRIORITY, BM25(), chosen, gate=LexicalGate(), llm=llm, records=records)

    def notes(mode: str, text: str) -> tuple[list[str], int, int]:
        llm.calls.clear()
        own = chosen.model_copy(update={"gate": mode})
        answer = replace(pipeline, settings=own).answer(text, user="u")
        shown = len(llm.calls[0])
        return [n for n in answer.proposal.notes if n.startswith("gate")], len(llm.calls), shown

    question = "What is the capital of France?"
    assert notes("always", question) == (["gate: off-task"], 1, 1)
    assert notes("auto", question) == ([], 2, 5)  # the task's own instruction asks it
    assert notes("off", question) == ([], 2, 5)
    assert notes("always", records["u"][0].input)[:2] == ([], 2)
