"""k, temperature and number of samples are those that training users' queries answer best."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from hydra_llm.bench.report.findings import _chosen
from hydra_llm.config import Settings
from hydra_llm.errors import LLMError
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.pipeline import UserPipeline
from hydra_llm.retrieve import BM25
from hydra_llm.select import ByVotes
from hydra_llm.tasks.base import Task
from hydra_llm.training.choosing import Choice, choose_sampling, chosen_over, drawn, some_of_each
from hydra_llm.types import Candidate, Generation, Message, Query, Record, Usage

TITLES = Task("titles", "generation", "Title of: {input}")
TAGS = Task("tags", "classification", "Which tag? {input}", ("calm", "loud", "odd"))
USERS = ("ann", "bob", "cyd", "dan", "eve", "fay")
GOLD, OTHER = "the wanted title", "something else"


@dataclass
class Particular:
    """A fake LLM whose samples are right with so many records and at this temperature, but for the
    first ones; its greedy answers never are.
    """

    k: int
    temperature: float
    wrong_first: int = 0
    fails: str = "no text has this"
    asked: list[Sampling] = field(default_factory=list)
    identity: dict[str, str] = field(default_factory=lambda: {"kind": "particular"})

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        self.asked.append(sampling)
        text = " ".join(message["content"] for message in messages)
        if self.fails in text:
            raise LLMError("the line was cut")
        right = text.count("output") == self.k and sampling.temperature == self.temperature
        texts = (GOLD if right and i >= self.wrong_first else OTHER for i in range(sampling.n))
        return Generation(tuple(texts), Usage(calls=1))

    async def aclose(self) -> None:
        """Nothing to release."""


def pipeline(llm: Any, task: Task = TITLES, **settings: Any) -> UserPipeline:
    records = {
        user: [Record(user, f"{i}", f"input {i}", f"output {i}", position=i) for i in range(9)]
        for user in USERS
    }
    given = Settings(**{"k": 4, "temperature": 0.5, "samples": 8, "gate": "off"} | settings)
    return UserPipeline(
        task, BM25(), given, selector=ByVotes(task, "best"), llm=llm, records=records
    )


def queries(task: Task = TITLES) -> list[Query]:
    gold = task.labels[0] if task.labels else GOLD
    return [Query(user, f"q{i}", f"input of {user}", gold) for user in USERS for i in range(2)]


def chosen(llm: Particular, **settings: Any) -> Choice:
    return run_sync(lambda: choose_sampling(pipeline(llm, **settings), queries()))


@pytest.mark.parametrize(
    ("llm", "k", "temperature", "samples"),
    [
        (Particular(1, 0.5), 1, 0.5, 8),
        (Particular(0, 0.5), 0, 0.5, 8),
        (Particular(4, 1.0), 4, 1.0, 8),
        (Particular(4, 0.5), 4, 0.5, 8),  # as given
        (Particular(2, 0.5), 4, 0.5, 8),  # what is not tried is not found
        (Particular(4, 0.5, wrong_first=5), 4, 0.5, 16),
    ],
)
def test_the_best_values_are_found(
    llm: Particular, k: int, temperature: float, samples: int
) -> None:
    choice = chosen(llm)
    found = choice.settings
    assert (found.k, found.temperature, found.samples) == (k, temperature, samples)
    assert choice.queries == 12
    gains = [tried["gain"] for tried in choice.tried]
    kept = [tried["gain"] for tried in choice.tried if tried["k"] == k]
    assert max(kept) == max(gains)
    assert str(choice).startswith(f"k {k}, ")


def test_fewer_samples_cost_no_call() -> None:
    llm = Particular(4, 0.5)
    choice = chosen(llm)
    # for k = 4, 0, 1, temperature 1 and 16 samples: a greedy answer and the other samples
    assert len(llm.asked) == choice.usage.calls == 12 * 2 * 5
    assert {sampling.n for sampling in llm.asked} == {1, 7, 15}
    assert [tried["samples"] for tried in choice.tried] == [8, 8, 8, 8, 4, 16]


def test_retrieved_is_raised_with_k() -> None:
    assert chosen(Particular(4, 0.5), k=1, retrieved=2).settings.retrieved == 4


def test_of_labels_with_probabilities_k_alone_is_tried() -> None:
    llm = Particular(4, 0.5)
    plain = pipeline(llm, TAGS, label_probabilities=True)
    choice = run_sync(lambda: choose_sampling(plain, queries(TAGS)))
    assert [tried["k"] for tried in choice.tried] == [4, 0, 1]
    assert {sampling.temperature for sampling in llm.asked} == {0.0}


def test_a_failed_call_leaves_out_its_query() -> None:
    choice = chosen(Particular(1, 0.5, fails="input of bob"))
    assert (choice.queries, choice.settings.k) == (10, 1)
    assert choice.usage.failed == 2 * len(choice.tried[:-2]) + 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("asked", "why"), [(0, "no query of theirs asks the LLM"), (12, "every call failed")]
)
def test_with_nothing_to_choose_by_settings_stay(asked: int, why: str) -> None:
    plain = pipeline(Particular(1, 0.5, fails="input"))
    choice = run_sync(lambda: choose_sampling(plain, queries()[:asked]))
    assert choice.settings == plain.settings
    assert str(choice) == f"nothing, as {why}: the settings stay as given"
    assert all(tried["gain"] is None for tried in choice.to_json()["tried"])
    assert not list(_chosen([{"chosen": choice.to_json()}]))


def test_progress_reaches_its_total() -> None:
    seen: list[tuple[int, int]] = []
    plain = pipeline(Particular(4, 0.5))
    run_sync(
        lambda: choose_sampling(plain, queries(), lambda done, total: seen.append((done, total)))
    )
    assert seen == sorted(seen)
    assert seen[-1] == (60, 60)


def test_users_take_turns() -> None:
    assert [q.user for q in some_of_each(queries(), 8)] == [*USERS, "ann", "bob"]
    assert len(some_of_each(queries())) == 12


def test_drawn_samples_hold_the_greedy_one() -> None:
    candidates = [
        Candidate("greedy", "greedy", votes=2, greedy=True),
        Candidate("b", "b", votes=5),
        Candidate("never", "never"),
        Candidate("d", "d", votes=1),
    ]
    draw, counts = np.random.default_rng(0), np.zeros(3)
    for _ in range(500):
        some = drawn(candidates, 3, draw)
        votes = {own.answer: own.votes for own in some}
        assert sum(votes.values()) == 3
        assert votes["greedy"] >= 1
        assert votes["never"] == 0  # a label that the LLM did not name stays
        counts += [votes["greedy"] - 1, votes.get("b", 0), votes.get("d", 0)]
    assert counts / 500 == pytest.approx(2 * np.array([1, 5, 1]) / 7, abs=0.1)
    assert drawn(candidates, 8, draw) == candidates


def test_what_was_chosen_for_others_is_taken_over() -> None:
    others = Settings(k=1, retrieved=7, temperature=1.0, samples=16, max_tokens=9)
    own = chosen_over(Settings(seed=3), others)
    assert (own.k, own.retrieved, own.temperature, own.samples) == (1, 7, 1.0, 16)
    assert (own.seed, own.max_tokens) == (3, Settings().max_tokens)
