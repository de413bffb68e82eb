"""Contract checks for plug-ins, to be called from tests of your own package. Each raises
AssertionError with what is broken. The built-in parts pass them too.
"""

from hydra_llm.extras import require

require("learn", "checking a plug-in")

import json
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from itertools import product
from typing import TypeVar, get_args
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray

from hydra_llm.errors import LLMRefused
from hydra_llm.llm.base import ChatLLM, Sampling
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.masking import Detector, Mask
from hydra_llm.model.heads import Head, HeadKind, HeadProblem, SGDConfig
from hydra_llm.model.interactions import Cross, Groups, Interaction, LabelBilinear
from hydra_llm.model.laplace import LaplacePosterior
from hydra_llm.model.newton import losses
from hydra_llm.model.users_file import head_of, pack_head
from hydra_llm.plugins import DETECTORS, HEADS
from hydra_llm.retrieve import Retriever, make_retriever
from hydra_llm.tasks.base import KINDS, FeatureContext, Floats, Pairs, Parsing, Task
from hydra_llm.types import Candidate, Generation, Query, Record

T = TypeVar("T")
TEXTS = ("a quiet night in the rain", "The Loud War of Stars", "rain")
ODD_TEXTS = ("", " ", "שלום 🦊 é\u2028", "{input} {% x %}", "a\0b", "cut \ud83d")


def _assert_close(actual: torch.Tensor, expected: torch.Tensor, message: str) -> None:
    assert torch.allclose(actual.detach(), expected.detach(), atol=1e-5), message


def _hashed(texts: Sequence[str]) -> NDArray[np.float32]:
    """[N, 8] unit vectors of texts, without an encoder."""
    rows = [np.random.default_rng(crc32(text.encode())).standard_normal(8) for text in texts]
    wide = np.asarray(rows, dtype=np.float32).reshape(-1, 8)
    unit: NDArray[np.float32] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit


def check_task(task: Task | str, answers: Sequence[str] = ()) -> None:
    """Check the contract of a task's kind (`tasks.base.TaskKind`), also by its registered name: a
    kind with a closed set then gets the labels 1 to 5. `answers`: of a kind without; else `TEXTS`.
    """
    if isinstance(task, str):
        labels = tuple("12345") if KINDS.load(task).closed else ()
        task = Task("checked", task, "Answer: {input}", labels)
    answers = task.labels or answers or TEXTS
    assert len(set(answers)) > 1, "at least two different answers are needed"
    restored = Task.from_json(task.to_json())
    assert restored.to_json() == task.to_json(), "task.json changes when it is read"
    assert all(task.strategy.prompt_words()), "prompt words are missing"
    assert task.strategy.closed == bool(task.labels), "`closed` does not fit the labels"
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
    _check_metrics(task, answers)
    _check_side_features(task, answers)


def _check_metrics(task: Task, answers: Sequence[str]) -> None:
    golds = [*answers, answers[0]]
    pairs: Pairs = list(zip([*reversed(answers), None], golds, strict=True))
    for name, spec in task.metric_specs.items():
        rows = partial(task.strategy.metric_rows, name)
        assert len(rows([])) == 0, f"{name} has rows of no queries"
        for pair, row in zip(pairs, rows(pairs), strict=True):
            assert (rows([pair]) == row).all(), f"{name}: a batch differs from one by one"
        right, wrong = [(gold, gold) for gold in golds], [(None, gold) for gold in golds]
        sums = [rows(part).sum(0, keepdims=True) for part in (pairs, right, wrong)]
        values = [float(spec.statistic(part)[0]) for part in sums]
        assert np.isfinite(values).all(), f"{name} is not finite"
        assert spec.sign * (values[1] - values[2]) > 0, f"{name} does not reward gold answers"


def _check_side_features(task: Task, answers: Sequence[str]) -> None:
    kind = task.strategy
    outputs = [answers[i % len(answers)] for i in range(5)]
    records = [Record("u", str(i), f"text {i}", out, position=i) for i, out in enumerate(outputs)]
    candidates = [Candidate(text, text, i, greedy=i == 1) for i, text in enumerate(answers)]
    whole = kind.vectorize(records, _hashed)
    for seen in ([], records[:1], records):
        history = kind.vectorize(seen, _hashed)
        if whole.places is not None or len(whole) == len(records):
            pairs = zip(whole.first(len(seen)).rows, history.rows, strict=True)
            same = [np.array_equal(first, alone) for first, alone in pairs]
            assert all(same), "a row depends on other records"
        stats = kind.cohort_stats([record.output for record in seen], 0.4)
        context = FeatureContext(_hashed(["text 1"])[0], history, stats, _hashed)
        of_candidates = partial(kind.candidate_features, context)
        _check_table(of_candidates, candidates, kind.candidate_columns)
        _check_table(partial(kind.record_features, context), records, kind.record_columns)
        table, backwards = of_candidates(candidates), of_candidates(candidates[::-1])
        assert np.allclose(backwards[::-1], table), "side features depend on the candidates' order"


def _check_table(
    features: Callable[[Sequence[T]], Floats], rows: Sequence[T], names: Sequence[str]
) -> None:
    assert len(set(names)) == len(names), f"a column occurs twice: {names}"
    table = features(rows)
    assert table.shape == (len(rows), len(names)), f"{table.shape} numbers for the columns {names}"
    assert table.dtype == np.float64, f"side features are {table.dtype}"
    assert np.isfinite(table).all(), "a side feature is not finite"
    shared = [i for i, name in enumerate(names) if not name.startswith("llm_")]
    for row, item in zip(table, rows, strict=True):
        (alone,) = features([item])
        assert np.allclose(alone[shared], row[shared]), "a batch differs from one by one"


def check_llm(llm: ChatLLM) -> None:
    """Check the contract of an LLM (`llm.base.ChatLLM`) with about a dozen short calls; closes it.
    Greedy answers must be repeatable, so a hosted model that does not promise that fails.
    """
    run_sync(partial(_check_llm, llm))


async def _check_llm(llm: ChatLLM) -> None:
    identity = json.dumps(dict(llm.identity), sort_keys=True)
    missing = {"kind", "model", "constrains"} - llm.identity.keys()
    assert not missing, f"the identity names no {', '.join(sorted(missing))}"
    question = "Name three colours of the sea."
    async with aclosing(llm):
        for n in (3, 7):
            await _generate(llm, question, Sampling(n=n, temperature=1.0, max_tokens=8, seed=1))
        greedy = await _generate(llm, question, Sampling(max_tokens=8))
        again = await _generate(llm, question, Sampling(n=2, max_tokens=8, seed=7))
        assert again.texts == greedy.texts * 2, "greedy texts are not the same"
        (text,) = greedy.texts
        if words := text.split():
            stopped = await _generate(llm, question, Sampling(max_tokens=8, stop=(words[-1],)))
            assert words[-1] not in stopped.texts[0], "a text goes on behind a stop text"
            assert text.startswith(stopped.texts[0]), "a stop text changes what stands before it"
        for text in ODD_TEXTS:
            with suppress(LLMRefused):  # it answers or refuses, and fails in no other way
                await _generate(llm, text, Sampling(max_tokens=2))
        if llm.identity["constrains"]:
            choices = ("red", "green 🦊")
            closed = await _generate(llm, "Which?", Sampling(n=4, temperature=1.0, choices=choices))
            assert set(closed.texts) <= set(choices), "a text is none of the choices"
        later = json.dumps(dict(llm.identity), sort_keys=True)
        assert later == identity, "the identity changes with the calls"


async def _generate(llm: ChatLLM, text: str, sampling: Sampling) -> Generation:
    """One call; what is true of every answer is checked."""
    messages = [{"role": "user", "content": text}]
    answer = await llm.generate(messages, sampling)
    texts, usage = answer.texts, answer.usage
    assert messages == [{"role": "user", "content": text}], "the messages were changed"
    assert len(texts) == sampling.n, f"{len(texts)} texts for n = {sampling.n}"
    assert all(isinstance(text, str) for text in texts), "a text is no str"
    assert len(answer.ends) in (0, sampling.n), "the reasons of the ends are not one per text"
    assert usage.calls + usage.cached >= 1, "the call was not counted"
    assert not usage.failed, "an answered call counts as failed"
    assert min(usage.prompt_tokens, usage.completion_tokens) >= 0, "tokens are negative"
    assert usage.seconds >= 0, "seconds are negative"
    return answer


def check_head(kind: type[HeadKind] | str) -> None:
    """Check the contract of a kind of head (`model.heads.HeadKind`), or of a registered name, on
    features of pairs and, where it goes with them, of labels.
    """
    factory: type[HeadKind] = HEADS.load(kind) if isinstance(kind, str) else kind
    for interaction in [Cross(6), *([LabelBilinear(6, 4, 3)] if factory.on_labels else [])]:
        problem = _head_problem(interaction)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            head = factory.create(interaction, 2)
            if head.convex:
                head.set_shared(torch.randn(interaction.size), torch.tensor(0.3))
        head.learn_shared([problem])
        _check_fit(head, problem)
        _check_bytes(head, problem)
        if head.joint_numbers:
            _check_gradients(head, problem)
        if head.updates_online:
            _check_update(head, problem.user(0))


def _head_problem(interaction: Interaction) -> HeadProblem:
    """Three users with five labelled groups of four candidates each; the last user has one."""
    draw = torch.Generator().manual_seed(1)
    left, right = torch.randn(15, 6, generator=draw), torch.randn(15, 4, 6, generator=draw)
    none, every = torch.zeros(15, 4, 0), torch.ones(15, 4, dtype=torch.bool)
    groups = Groups(left, None if interaction.by_label else right, none, every)
    interaction.prepare(groups)
    x = interaction(groups).detach().unflatten(0, (3, 5))
    mask = torch.ones(3, 5, 4, dtype=torch.bool)
    mask[2, 1:] = False
    target = torch.nn.functional.one_hot(torch.randint(4, (3, 5), generator=draw), 4) * mask
    users, offset, sgd = ("ann", "bob", "cid"), torch.zeros(3, 5, 4), SGDConfig(epochs=3)
    return HeadProblem(users, interaction, x, offset, target.float(), mask, "listwise", sgd=sgd)


def _score(head: HeadKind, problem: HeadProblem, heads: Sequence[Head | None]) -> torch.Tensor:
    """[G, C] of the first user's groups."""
    return head.score(problem.interaction, problem.x[0], heads).detach()


def _check_fit(head: HeadKind, problem: HeadProblem) -> None:
    shared = head.shared_score(problem.interaction, problem.x[0])
    assert shared.shape == problem.offset[0].shape, "scores have another shape than [G, C]"
    for empty in (None, Head.of(head.empty())):
        message = "an empty history does not give exactly the shared score"
        _assert_close(_score(head, problem, [empty] * 5), shared, message)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    together = [Head.of(numbers) for numbers in head.fit(problem)]
    assert len(together) == len(problem.users), "not every user is fitted"
    assert any(own.numbers.any() for own in together), "a fit learns nothing"
    for u, own in enumerate(together):
        (alone,) = head.fit(problem.user(u))
        assert np.allclose(alone, own.numbers, atol=1e-3), "a head depends on who else is fitted"
    mixed = [*together, None, None][:5]
    for g, score in enumerate(_score(head, problem, mixed)):
        one = head.score(problem.interaction, problem.x[0, g : g + 1], [mixed[g]])
        _assert_close(one[0], score, "a batch differs from one by one")
    if head.convex and head.has_precision:
        (pulled,) = head.fit(replace(problem.user(0), precision=1e9))
        assert np.allclose(pulled, head.empty(), atol=1e-4), "a fit ignores the prior's precision"
    after = head.state_dict()
    same = all(torch.equal(value, after[name]) for name, value in before.items())
    assert same, "fitting or scoring changes what all users share"
    shared = head.shared_score(problem.interaction, problem.x[0])
    message = "something of a fitted user stays in the shared head"
    _assert_close(_score(head, problem, [None] * 5), shared, message)


def _check_bytes(head: HeadKind, problem: HeadProblem) -> None:
    numbers = head.fit(problem)
    heads = [Head.of(row) for row in numbers]
    before = _score(head, problem, [heads[0]] * 5)
    again = _score(head, problem, [head_of(pack_head(heads[0]))] * 5)
    assert torch.equal(again, before), "a head is another one after it was kept"
    for row in numbers:
        row[...] = 7
    assert torch.equal(_score(head, problem, [heads[0]] * 5), before), "a head shares memory"
    size = head.numbers_per_user
    for u, kept in enumerate(heads):
        largest = size or (int(problem.mask[u].sum()) + 1) * (problem.interaction.size + 4)
        assert size in (None, len(kept.numbers)), "numbers_per_user is not true"
        assert len(kept.numbers) <= largest, "a head outgrows its history"
    assert len(head.empty()) == (size or 0), "an empty head has another size"


def _check_gradients(head: HeadKind, problem: HeadProblem) -> None:
    """Trained jointly, a small step against the gradient lowers the loss."""
    numbers = torch.zeros(5, head.joint_numbers, requires_grad=True)

    def loss(own: torch.Tensor) -> torch.Tensor:
        scores = head.score_numbers(problem.interaction, problem.x[0], own)
        return losses(scores, problem.target[0], problem.mask[0], problem.loss).sum()

    (gradient,) = torch.autograd.grad(loss(numbers), numbers)
    step = 1e-2 * torch.randn(numbers.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        change = float(loss(numbers + step) - loss(numbers - step)) / 2
        expected = float((gradient * step).sum())
    message = "the gradient of the loss is not that of finite differences"
    assert abs(change - expected) <= 1e-3 + 0.02 * abs(expected), message


def _check_update(head: HeadKind, own: HeadProblem) -> None:
    """Feedback on the groups that a fit would see is that fit, and changes no argument."""
    factors = head.fisher(own.interaction, own.x[0], torch.full_like(own.target[0], 0.25), False)
    assert factors is not None, "a head that is updated by feedback needs a posterior"
    posterior = LaplacePosterior.of(*factors)
    fitted = Head.of(head.empty(), 0, 5.0)
    updated = head.online_update(own, posterior, fitted)
    (expected,) = head.fit(own)
    assert np.allclose(updated.numbers, expected, atol=5e-3), "feedback is not a fit"
    assert (updated.records, updated.until) == (0, 5.0), "feedback is no record"
    assert not fitted.numbers.any(), "feedback changes its argument"
    spread = head.covariance(own.interaction, own.x[0, :1], posterior, torch.ones(()))
    assert spread is not None, "a posterior without a covariance"
    _assert_close(spread, spread.T, "the covariance is not symmetric")
    assert float(spread.detach().diagonal().min()) >= -1e-6, "a variance is negative"


def check_retriever(retriever: Retriever | str) -> None:
    """Check the contract of a retriever (`retrieve.Retriever`), or of a registered name: at most m
    of the given records, best first, each once. It is deterministic, takes empty histories and odd
    texts, changes nothing, and leaks nothing from one user to another.
    """
    if isinstance(retriever, str):
        retriever = make_retriever(retriever, embed=_hashed)
    texts = ("rain at night", "", "the of and", "\u05e9\u05dc\u05d5\u05dd", "rain", "rain")
    records = [Record("u", str(i), text, f"answer {i}", position=i) for i, text in enumerate(texts)]
    query = Query("u", "q", "rain at night")
    assert list(retriever.retrieve(query, [], 3)) == [], "an empty history has records"
    for text, m in product(("rain at night", "", "unseen words"), (0, 1, 2, 3, 11)):
        given, own = list(records), Query("u", "q", text)
        ranking = retriever.retrieve(own, given, m)
        ids, scores = [item.record.id for item in ranking], [item.score for item in ranking]
        assert len(ranking) <= m, f"more than m = {m} records"
        assert len(set(ids)) == len(ids), "a record is found twice"
        assert all(item.record in records for item in ranking), "a record that was not given"
        assert [item.rank for item in ranking] == list(range(len(ranking))), "ranks are not 0, 1, …"
        assert np.isfinite(scores).all(), "a score is not finite"
        assert scores == sorted(scores, reverse=True), "not best first"
        assert retriever.retrieve(own, given, m) == ranking, "not deterministic"
        assert given == records, "the given records were changed"
    everything = retriever.retrieve(query, records, 6)
    others = [Record("v", "0", "rain at night", "another", position=0)]
    retriever.retrieve(Query("v", "q", "rain at night"), others, 1)
    assert retriever.retrieve(query, records, 6) == everything, "users are mixed up"
    edited = [Record("u", "0", "an edited text", "answer", position=0)]
    ranking = retriever.retrieve(query, edited, 1)
    assert all(item.record in edited for item in ranking), "an edited record is found as it was"


def check_detector(detector: Detector | str) -> None:
    """Check a detector of personal data: spans within the text, and the text comes back."""
    own = DETECTORS.load(detector) if isinstance(detector, str) else detector
    for text in (*TEXTS, *ODD_TEXTS, "write to ada@example.org, +1 415-555-2671"):
        mask = Mask({"checked": own}, text)
        assert mask.show(mask.hide(text)) == text, f"{text!r} does not come back"
