"""Contract checks for plug-ins: call one from a test of your own package.

Each raises AssertionError with what is broken. The built-in parts pass them too.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import get_args
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from hydra_llm.errors import LLMRefused
from hydra_llm.llm.base import ChatLLM, Sampling
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.tasks.base import KINDS, FeatureContext, Floats, MetricSpec, Parsing, Task
from hydra_llm.types import Candidate, Generation, Record

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


# ---- LLMs

ODD_TEXTS = ("", " ", "שלום 🦊 é\u2028", "{input} {% x %}", "a\0b", "cut \ud83d")
"""What a message may hold: an LLM answers or refuses it, and fails in no other way."""


def check_llm(llm: ChatLLM) -> None:
    """Check the contract of an LLM (`llm.base.ChatLLM`) with about a dozen short calls; closes it.

    Greedy answers must be repeatable, so a hosted model that does not promise that fails.
    """
    run_sync(partial(_check_llm, llm))


async def _check_llm(llm: ChatLLM) -> None:
    identity = json.dumps(dict(llm.identity), sort_keys=True)
    missing = {"kind", "model", "constrains"} - llm.identity.keys()
    assert not missing, f"the identity names no {', '.join(sorted(missing))}"
    try:
        await _check_sampling(llm)
        await _check_odd_texts(llm)
        if llm.identity["constrains"]:
            choices = ("red", "green 🦊")
            made = await _generate(llm, "Which?", Sampling(n=4, temperature=1.0, choices=choices))
            assert set(made.texts) <= set(choices), "a text is none of the choices"
        later = json.dumps(dict(llm.identity), sort_keys=True)
        assert later == identity, "the identity changes with the calls"
    finally:
        await llm.aclose()


async def _check_sampling(llm: ChatLLM) -> None:
    question = "Name three colours of the sea."
    await _generate(llm, question, Sampling(n=3, temperature=1.0, max_tokens=8, seed=1))
    greedy = await _generate(llm, question, Sampling(max_tokens=8))
    again = await _generate(llm, question, Sampling(n=2, max_tokens=8, seed=7))
    assert again.texts == greedy.texts * 2, "greedy texts are not the same"
    (text,) = greedy.texts
    if words := text.split():
        stopped = await _generate(llm, question, Sampling(max_tokens=8, stop=(words[-1],)))
        assert words[-1] not in stopped.texts[0], "a text goes on behind a stop text"
        assert text.startswith(stopped.texts[0]), "a stop text changes what stands before it"


async def _check_odd_texts(llm: ChatLLM) -> None:
    for text in ODD_TEXTS:
        with suppress(LLMRefused):
            await _generate(llm, text, Sampling(max_tokens=2))


async def _generate(llm: ChatLLM, text: str, sampling: Sampling) -> Generation:
    """One call; what is true of every answer is checked."""
    messages = [{"role": "user", "content": text}]
    made = await llm.generate(messages, sampling)
    assert messages == [{"role": "user", "content": text}], "the messages were changed"
    assert len(made.texts) == sampling.n, f"{len(made.texts)} texts for n = {sampling.n}"
    assert all(isinstance(each, str) for each in made.texts), "a text is no str"
    assert len(made.ends) in (0, sampling.n), "the reasons of the ends are not one per text"
    usage = made.usage
    assert usage.calls + usage.cached >= 1, "the call was not counted"
    assert not usage.failed, "an answered call counts as failed"
    assert min(usage.prompt_tokens, usage.completion_tokens) >= 0, "tokens are negative"
    assert usage.seconds >= 0, "seconds are negative"
    return made
