"""Contract checks for plug-ins: call one from a test of your own package.

Each raises AssertionError with what is broken. The built-in parts pass them too.
"""

from collections.abc import Sequence
from typing import get_args
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from hydra_llm.tasks.base import KINDS, FeatureContext, Floats, MetricSpec, Parsing, Task
from hydra_llm.types import Candidate, Record

# ---- kinds of task


def check_task(task: Task | str, answers: Sequence[str] = ()) -> None:
    """Check the contract of a task's kind (`tasks.base.TaskKind`).

    `task` may be the name of a registered kind; one with a closed set then gets the labels 1 to 5.
    `answers` are valid answers of a kind without labels; three texts by default.
    """
    if isinstance(task, str):
        labels = ("1", "2", "3", "4", "5") if KINDS.load(task).closed else ()
        task = Task("checked", task, "Answer: {input}", labels)
    answers = (
        task.labels or answers or ("a quiet night in the rain", "The Loud War of Stars", "rain")
    )
    assert len(set(answers)) > 1, "at least two different answers are needed"
    restored = Task.from_json(task.to_json())
    assert restored.to_json() == task.to_json(), "task.json changes when it is read"
    assert all(task.strategy.prompt_words()), "prompt words are missing"
    assert task.strategy.closed == bool(task.labels), "`closed` does not fit the labels"
    _check_answers(task, answers)
    _check_metrics(task, answers)
    _check_side_features(task, answers)


def _check_answers(task: Task, answers: Sequence[str]) -> None:
    for parsing in get_args(Parsing):
        assert task.parse("", parsing) is None, "an empty text has an answer"
        for answer in answers:
            assert task.parse(answer, parsing) == answer, f"'{answer}' does not parse to itself"
            assert task.read(answer, parsing) == answer, f"'{answer}' is read as another answer"
    assert task.gain(None, answers[0]) == 0, "an unparsable answer has a gain"
    for outputs in ([], answers[:1], answers):
        typical = task.strategy.typical(outputs)
        assert not typical or task.parse(typical) == typical, "the typical answer does not parse"
        assert not outputs or typical in outputs, "the typical answer is none of the outputs"
    gains = np.array([[task.gain(one, other) for other in answers] for one in answers])
    assert (gains.diagonal() == 1).all(), "an answer is not worth 1 against itself"
    assert (gains == gains.T).all(), "gains are not symmetric"
    assert ((gains >= 0) & (gains <= 1)).all(), "a gain is not from 0 to 1"
    assert np.array_equal(task.gain_matrix(answers), gains), "the gain matrix differs from gains"
    assert np.asarray(task.gain_matrix([])).size == 0, "no answers have gains"


def _check_metrics(task: Task, answers: Sequence[str]) -> None:
    golds = [*answers, answers[0]]
    said: list[str | None] = [*reversed(answers), None]
    for name, spec in task.metric_specs.items():

        def rows(found: Sequence[str | None], gold: Sequence[str], name: str = name) -> Floats:
            return task.strategy.metric_rows(name, list(zip(found, gold, strict=True)))

        def value(rows: Floats, spec: MetricSpec = spec) -> float:
            return float(spec.statistic(rows.sum(0, keepdims=True))[0])

        every = rows(said, golds)
        assert len(rows([], [])) == 0, f"{name} has rows of no queries"
        for i, row in enumerate(every):
            alone = rows(said[i : i + 1], golds[i : i + 1])
            assert (alone == row).all(), f"{name}: a batch differs from one by one"
        right, wrong = value(rows(golds, golds)), value(rows([None] * len(golds), golds))
        assert np.isfinite([value(every), right, wrong]).all(), f"{name} is not finite"
        assert spec.sign * right > spec.sign * wrong, f"{name} does not reward gold answers"


def _check_side_features(task: Task, answers: Sequence[str]) -> None:
    kind = task.strategy
    outputs = [answers[i % len(answers)] for i in range(5)]
    records = [Record("u", str(i), f"text {i}", out, position=i) for i, out in enumerate(outputs)]
    candidates = [Candidate(each, each, i, greedy=i == 1) for i, each in enumerate(answers)]
    shared = [i for i, name in enumerate(kind.candidate_columns) if not name.startswith("llm_")]
    for names in (kind.candidate_columns, kind.record_columns):
        assert len(set(names)) == len(names), f"a column stands twice: {names}"
    for seen in ([], records[:1], records):
        history = kind.vectorize(seen, _hashed)
        stats = kind.cohort_stats([record.output for record in seen], 0.4)
        context = FeatureContext(_hashed(["text 1"])[0], history, stats, _hashed)
        table = kind.candidate_features(context, candidates)
        _check_table(table, len(candidates), kind.candidate_columns)
        backwards = kind.candidate_features(context, candidates[::-1])
        assert np.allclose(backwards[::-1], table), "side features depend on the candidates' order"
        for row, candidate in zip(table, candidates, strict=True):
            (alone,) = kind.candidate_features(context, [candidate])
            assert np.allclose(alone[shared], row[shared]), "a batch differs from one by one"
        table = kind.record_features(context, records)
        _check_table(table, len(records), kind.record_columns)
        for row, record in zip(table, records, strict=True):
            (alone,) = kind.record_features(context, [record])
            assert np.allclose(alone, row), "a batch differs from one by one"


def _check_table(table: Floats, rows: int, names: Sequence[str]) -> None:
    assert table.shape == (rows, len(names)), f"{table.shape} numbers for the columns {names}"
    assert table.dtype == np.float64, f"side features are {table.dtype}"
    assert np.isfinite(table).all(), "a side feature is not finite"


def _hashed(texts: Sequence[str]) -> NDArray[np.float32]:
    """[N, 8] unit vectors of texts, without an encoder."""
    rows = [np.random.default_rng(crc32(text.encode())).standard_normal(8) for text in texts]
    wide = np.asarray(rows, dtype=np.float32).reshape(-1, 8)
    unit: NDArray[np.float32] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit
