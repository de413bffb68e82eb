"""Adaptive labelling asks in rounds, of training users alone, stops where labels no longer help,
and asks nothing twice.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax

from hydra_llm import learn
from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import BudgetExceeded, SettingsError
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.cache import CachedLLM
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.model.scorer import Scorer
from hydra_llm.pipeline import UserPipeline
from hydra_llm.retrieve import BM25
from hydra_llm.tasks.base import Task
from hydra_llm.training import adaptive
from hydra_llm.training.adaptive import FIRST, Judge, Losses, Rounds, in_turns
from hydra_llm.training.calibration import CALIBRATION_RIDGE, HeldOut, VoteTable
from hydra_llm.training.dataset import LabelledGroup, TrainingSet
from hydra_llm.training.labelling import Collected, reranker_groups
from hydra_llm.training.learned import Learned
from hydra_llm.types import Generation, Message, Query, Record, Usage
from tests.learning import ONE_STRENGTH
from tests.training.simulated import cross_scorer, simulate
from tests.training.test_labelling import maker

TAGS = Task("tags", "classification", "Which tag? {input}", ("calm", "loud", "odd"))
TITLES = Task("titles", "generation", "Title of: {input}")
WORDS = ("rain", "war", "song", "night", "film", "sea", "king", "dream")
TRAIN, NEW, RECORDS = 9, 3, 7


# ---- rounds, with labels and a judge that are made up


def queries(users: int = 30, each: int = 5) -> list[Query]:
    return [
        Query(f"u{u:02}", f"q{i}", f"text {u} {i}", "gold")
        for u in range(users)
        for i in range(each)
    ]


@dataclass
class Labeller:
    asked: list[Query] = field(default_factory=list)

    async def __call__(self, pipeline: Any, own: Sequence[Query], progress: Any) -> Collected:
        self.asked += own
        if progress is not None:
            progress(len(own), len(own))
        return Collected(lambda featurizer: [], len(own), usage=Usage(calls=len(own)))


def saving(*saved: float) -> Judge:
    """Each round's labels lower every user's loss by so much, give or take .1."""
    left = list(saved)

    def judge(before: Collected, known: Collected) -> Losses:
        noise = torch.tensor([-0.1, 0.1] * 8)
        users = [f"u{i}" for i in range(16)]
        return Losses(1.0 + left.pop(0) + noise, torch.ones(16), users)

    return judge


def rounds(judge: Judge, count: int = 150, seed: int = 0) -> tuple[Rounds, Labeller, Collected]:
    labeller, own = Labeller(), Rounds(judge, seed)
    asked = run_sync(partial(own.label, labeller, None, queries()[:count]))  # type: ignore[arg-type]
    return own, labeller, asked


def test_rounds_double_until_labels_gain_too_little() -> None:
    own, labeller, collected = rounds(saving(0.5, 0.02))
    assert [entry["queries"] for entry in own.report["rounds"]] == [FIRST, 2 * FIRST, 4 * FIRST]
    assert (own.report["queries"], own.report["left"]) == (4 * FIRST, 150 - 4 * FIRST)
    assert collected.calls == collected.usage.calls == len(labeller.asked) == 4 * FIRST
    last = own.report["rounds"][-1]
    assert last["gained"] == pytest.approx(0.02)
    assert last["error"] == pytest.approx(0.1 / 4, rel=0.05)
    assert str(own) == (
        "128 of 150 queries were labelled (22 calls saved): the last labels lowered the loss of"
        " held-out users by 0.0200 ± 0.0250"
    )


@pytest.mark.parametrize("saved", [0.5, float("nan")])
def test_all_are_labelled_where_nothing_says_stop(saved: float) -> None:
    own, labeller, _ = rounds(saving(saved, saved, saved))
    assert own.report["queries"] == len(labeller.asked) == 150
    assert "all 150 queries were labelled" in str(own)


@pytest.mark.parametrize("count", [0, 5, FIRST])
def test_a_single_round_needs_no_judge(count: int) -> None:
    own, labeller, _ = rounds(saving(), count)
    assert own.report["queries"] == len(labeller.asked) == count
    assert own.report["left"] == own.report["saved_calls"] == 0


def test_users_take_turns_in_an_order_of_the_seed() -> None:
    every = queries()
    order = in_turns(every, 3)
    assert sorted(order, key=every.index) == every
    for turn in range(5):
        assert len({query.user for query in order[30 * turn : 30 * (turn + 1)]}) == 30
    assert order == in_turns(every, 3)
    assert order != in_turns(every, 4)


def test_progress_never_falls_and_ends_where_labelling_does() -> None:
    seen: list[tuple[int, int]] = []
    own = Rounds(saving(0.0), 0)
    label = partial(own.label, Labeller(), None, queries())  # type: ignore[arg-type]
    run_sync(lambda: label(lambda done, total: seen.append((done, total))))
    assert seen == [(FIRST, 150), (2 * FIRST, 150), (2 * FIRST, 2 * FIRST)]


def test_where_every_call_fails_no_second_round_is_asked() -> None:
    labeller = Labeller()

    async def failing(pipeline: Any, own: Sequence[Query], progress: Any) -> Collected:
        out = await labeller(pipeline, own, progress)
        return replace(out, failures=["the line was cut"] * len(own))

    label = partial(Rounds(saving(), 0).label, failing, None, queries())  # type: ignore[arg-type]
    assert len(run_sync(label).failures) == len(labeller.asked) == FIRST


# ---- one call for records that agree


def test_of_records_with_equal_answers_one_is_asked_for() -> None:
    words = ("rain", "war", "song", "rain")
    outputs = ("calm", "loud", "calm", "calm")
    records = [
        Record("u", f"r{i}", f"{word} at night", output, position=i)
        for i, (word, output) in enumerate(zip(words, outputs, strict=True))
    ]
    query = Query("u", "q", "rain and war at night", "calm")

    def asked(labelling: Any) -> tuple[Collected, LabelledGroup, RuleLLM]:
        # what the LLM says depends on the whole prompt, not on the record's answer alone
        llm = RuleLLM(lambda messages, index, rng: rng.choice(TAGS.labels))
        settings = Settings(k=1, retrieved=4, gate="off", labelling=labelling)
        pipeline = UserPipeline(TAGS, BM25(), settings, llm=llm, records={"u": records})
        collected = run_sync(lambda: reranker_groups(pipeline, [query]))
        (group,) = collected.groups(maker(TAGS))
        return collected, group, llm

    few, own, fewer = asked("adaptive")
    every, whole, more = asked("all")
    assert (few.calls, len(fewer.calls)) == (2, 2)
    assert (every.calls, len(more.calls)) == (4, 4)
    assert own.rights == whole.rights
    first = [
        next(i for i, text in enumerate(own.rights) if tag in text) for tag in ("calm", "loud")
    ]
    for place, text in enumerate(own.rights):
        assert own.gains[place] == whole.gains[first["loud" in text]]


# ---- what votes are worth, against an independent solver


def test_votes_are_judged_as_an_independent_fit_says() -> None:
    data, _ = simulate(users=6, groups=5)
    scorer = cross_scorer("linear", data)
    scorer = Scorer(scorer.interaction, scorer.head, ("llm_votes",))
    draw = torch.Generator().manual_seed(1)
    own = torch.randn(data.groups.mask.shape, generator=draw)
    groups = replace(data.groups, side_features=torch.zeros(*own.shape, 1))
    voted = torch.ones(len(data), dtype=torch.bool)
    late = TrainingSet(groups, data.users, data.positions, voted, data.gains)
    table = VoteTable(scorer, [HeldOut(late, own, own)])
    known = list(range(0, len(data), 2))
    votes = {
        g: (data.target[g] + 0.3 * torch.randn(own.shape[1], generator=draw))[:, None]
        for g in known
    }
    used = set(known[: len(known) // 2])
    found = table.losses(votes, used)

    names = sorted({data.users[g] for g in known}, key=[data.users[g] for g in known].index)
    expected = []
    for g in known:
        train = [
            h
            for h in known
            if h in used and names.index(data.users[h]) % 10 != names.index(data.users[g]) % 10
        ]

        def cost(v: np.ndarray, rows: Sequence[int] = tuple(train)) -> float:
            return sum(_loss(v, h, own, votes, data) for h in rows) + CALIBRATION_RIDGE / 2 * float(
                v @ v
            )

        expected.append(_loss(minimize(cost, np.zeros(2), tol=1e-10).x, g, own, votes, data))
    assert found.tolist() == pytest.approx(expected, abs=2e-3)


def _loss(
    v: np.ndarray, group: int, own: torch.Tensor, votes: dict[int, torch.Tensor], data: TrainingSet
) -> float:
    mask = data.groups.mask[group].numpy()
    scores = (1 + v[0]) * own[group].numpy() + v[1] * votes[group][:, 0].numpy()
    return float(-(log_softmax(scores[mask]) * data.target[group].numpy()[mask]).sum())


# ---- learning, with an LLM that counts


@dataclass
class Counting:
    """A fake LLM that keeps what it was asked, and after `most` calls answers no more."""

    task: Task
    most: int | None = None
    asked: list[str] = field(default_factory=list)
    identity: dict[str, str] = field(default_factory=lambda: {"kind": "counting"})

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        if self.most is not None and len(self.asked) >= self.most:
            raise BudgetExceeded("the budget is spent")
        text = messages[-1]["content"]
        self.asked.append(text)
        texts = []
        for index in range(sampling.n):
            dice = random.Random(f"{text} {sampling.temperature} {(sampling.seed or 0) + index}")
            texts.append(dice.choice(self.task.labels or WORDS))
        return Generation(tuple(texts), Usage(calls=1))

    async def aclose(self) -> None:
        """Nothing to release."""


def data_of(task: Task) -> DataSet:
    dice = random.Random(0)
    users = [*(f"train{i}" for i in range(TRAIN)), *(f"new{i}" for i in range(NEW))]
    records = []
    for user in users:
        taste = dict(zip(WORDS, (dice.choice(task.labels or WORDS) for _ in WORDS), strict=True))
        for i in range(RECORDS):
            word = dice.choice(WORDS)
            records.append(
                Record(user, f"r{i}", f"{word} of {user} {i}", taste[word], str(2000 + i))
            )
    own = [Query(f"new{i}", "q", f"asked of new{i}", taste["rain"], "2100") for i in range(NEW)]
    splits = {user: "train" if user.startswith("train") else "test" for user in users}
    return DataSet.from_records(task, splits, records, own)  # type: ignore[arg-type]


def learned(task: Task, llm: Any, folder: Path, **chosen: Any) -> Learned:
    given: dict[str, Any] = {"queries_per_user": 4, "samples": 3, "k": 2, "rerank": "never"}
    given |= {
        "word_model": False,
        "labelling": "adaptive",
        "cache": folder / "cache",
        "gate": "off",
    }
    return learn(data_of(task), llm, Settings(**given | chosen), strengths=ONE_STRENGTH)


@pytest.fixture(autouse=True)
def small_rounds(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("slow"):
        monkeypatch.setattr(adaptive, "FIRST", 8)


KINDS = pytest.mark.parametrize("task", [TAGS, TITLES], ids=["labels", "texts"])


@pytest.mark.slow
@KINDS
def test_fewer_calls_of_training_users_alone(task: Task, tmp_path: Path) -> None:
    llm = Counting(task)
    result = learned(task, llm, tmp_path)
    every = Counting(task)
    all_of_them = learned(task, every, tmp_path, labelling="all")
    report = result.bundle.report["labelling"]
    assert report["queries"] in (16, 32, 4 * TRAIN)
    assert report["queries"] + report["left"] == 4 * TRAIN
    assert len(llm.asked) == result.usage.calls == 2 * report["queries"]  # greedy, and samples
    assert len(every.asked) == all_of_them.usage.calls == 2 * 4 * TRAIN
    assert len(every.asked) - len(llm.asked) == report["saved_calls"]
    assert set(llm.asked) <= set(every.asked)
    assert not any("new" in text for text in llm.asked)
    assert any("queries were labelled" in note for note in result.notes)
    assert "labelling" not in all_of_them.bundle.report


@pytest.mark.slow
@KINDS
def test_a_stopped_run_continues_and_ends_alike(task: Task, tmp_path: Path) -> None:
    whole = learned(task, CachedLLM(Counting(task), tmp_path / "whole.sqlite"), tmp_path)
    total, asked = whole.usage.calls, list[str]()
    for most in (5, total - 7, None):
        llm = Counting(task, most)
        cached = CachedLLM(llm, tmp_path / "answers.sqlite")
        if most is None:
            again = learned(task, cached, tmp_path)
        else:
            with pytest.raises(BudgetExceeded):
                learned(task, cached, tmp_path)
        asked += llm.asked
        run_sync(cached.aclose)
    assert len(asked) == total
    assert again.bundle.weights == whole.bundle.weights
    assert again.bundle.report["labelling"] == whole.bundle.report["labelling"]


@pytest.mark.slow
@KINDS
def test_other_seeds_of_the_scorer_ask_for_no_more(task: Task, tmp_path: Path) -> None:
    llm = Counting(task)
    cached = CachedLLM(llm, tmp_path / "answers.sqlite")
    first = learned(task, cached, tmp_path, fit_seed=0)
    calls = len(llm.asked)
    settings = first.bundle.settings.model_copy(update={"fit_seed": 1})
    other = learn(data_of(task), cached, settings, first=first.bundle, strengths=ONE_STRENGTH)
    assert len(llm.asked) == calls
    assert other.bundle.report["labelling"] == first.bundle.report["labelling"]


@pytest.mark.slow
@KINDS
def test_what_is_learned_is_what_these_labels_teach(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge that never stops leaves the scorer of all labels."""
    monkeypatch.setattr(adaptive, "error_by_users", lambda values, users: torch.tensor(-1e9))
    one = learned(task, Counting(task), tmp_path)
    other = learned(task, Counting(task), tmp_path, labelling="all")
    assert one.usage.calls == other.usage.calls
    mine, theirs = (own.bundle.scorers["adapter"].tensors() for own in (one, other))
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)


def test_a_head_that_is_not_convex_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="labelling=adaptive: .* take labelling=all"):
        learned(TAGS, Counting(TAGS), tmp_path, head="mlp")
