"""Controls: another user's history, and offsets of users and inputs, against figures by hand."""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.bench.controls import Targets, item_means, ridge_on, variance_ratio
from hydra_llm.bench.experiment import run_methods
from hydra_llm.bench.method import Parts, find_methods, partners
from hydra_llm.bench.runlog import Sample
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.tasks.base import Task
from hydra_llm.types import Message, Query, Record
from tests.bench.test_methods import QUERY, RECORDS, STARS, TAGS, TEXTS, loud, parts

OTHER = ("star sea", "old night")


def with_other(llm: RuleLLM, task: Task = TAGS) -> Parts:
    own = parts(llm, task)
    other = [Record("v", str(i), text, "calm", "2030", position=i) for i, text in enumerate(OTHER)]
    return replace(own, records={**RECORDS, "v": other}, partners={"u": "v"})


def answers(name: str, given: Parts, queries: Sequence[Query]) -> list[Sample]:
    return run_sync(lambda: run_methods(find_methods([name]), given, queries))


def test_mismatched_shows_another_users_records_alone() -> None:
    llm = RuleLLM(loud)
    (sample,) = answers("mismatched@2,4", with_other(llm), [QUERY])
    assert (sample.user, sample.query, sample.answer) == ("u", "q", "loud")
    text = "".join(message["content"] for call in llm.calls for message in call)
    assert all(shown in text for shown in OTHER)
    assert not any(own in text for own in TEXTS)
    assert QUERY.input in text


def test_without_another_user_mismatched_fails() -> None:
    alone = replace(with_other(RuleLLM(loud)), partners={"w": "v"})
    other = Query("w", "q", "war", "odd")
    first, second = answers("mismatched@2,4", alone, [QUERY, other])
    assert "no other user" in first.error
    assert not second.error


@pytest.mark.parametrize("name", ["mismatched@2,4", "bbox-adapter"])
def test_what_asks_nobody_leaves_the_run_alone(name: str) -> None:
    """Nobody has a partner, and no user is trained on: the endpoint is not to blame."""
    alone = replace(with_other(RuleLLM(loud)), partners={})
    samples = answers(name, alone, [QUERY])
    assert [sample.answer for sample in samples] == [None] * len(samples)
    assert all("no other user" in s.error or "nothing to learn" in s.error for s in samples)


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 3))
def test_partners_form_a_circle(having: int, bare: int, seed: int) -> None:
    users = [f"u{i}" for i in range(having + bare)]
    given = partners(users, lambda user: int(user[1:]) < having, seed)
    assert all(int(other[1:]) < having and other != user for user, other in given.items())
    if having > 1:
        assert set(given) == set(users)
        assert {given[user] for user in users[:having]} == set(users[:having])
        seen, at = set(), "u0"
        while at not in seen:
            seen.add(at)
            at = given[at]
        assert seen == set(users[:having])


def test_variance_ratio_is_that_of_a_balanced_table() -> None:
    """By hand: within (.5 + .5) / 2 = .5; between (mean square 8 - .5) / 2 = 3.75."""
    values, owners = np.array([[1.0], [2.0], [4.0], [3.0]]), ["a", "a", "b", "b"]
    assert variance_ratio(values, owners) == pytest.approx(0.5 / ((4.0 - 0.5) / 2))
    assert variance_ratio(values[[0, 2, 1, 3]], owners) == 1e6  # nothing between
    dice = np.random.default_rng(0)
    names = [str(i // 5) for i in range(20_000)]
    drawn = np.repeat(dice.normal(0, 0.5, 4000), 5) + dice.normal(0, 1, 20_000)
    assert variance_ratio(drawn[:, None], names) == pytest.approx(4, rel=0.1)


def test_a_record_is_no_part_of_the_mean_that_predicts_it() -> None:
    inputs, values = ["x", "x", "x", "y", "y"], np.array([[1.0], [1.0], [0.0], [0.0], [0.0]])
    base, residuals = item_means(inputs, values)
    ratio, mean = variance_ratio(values, inputs), 0.4
    assert base(["x", "new"])[:, 0] == pytest.approx([mean + (2 - 3 * mean) / (3 + ratio), mean])
    third = mean + (2 - 2 * mean) / (2 + ratio)
    assert residuals[2, 0] == pytest.approx(0 - third)
    # All that was answered twice agrees: nothing varies within, and "z" has no other record.
    values = np.array([[1.0], [1.0], [0.0], [0.0], [3.0]])
    base, residuals = item_means(["x", "x", "y", "y", "z"], values)
    assert residuals[:, 0] == pytest.approx([0, 0, 0, 0, 2])  # by the mean of all, 1
    assert base(["x", "z", "new"])[:, 0] == pytest.approx([1, 3, 1])


def test_the_ridge_is_judged_by_users_it_has_not_seen() -> None:
    dice = np.random.default_rng(1)
    owners = [f"u{i % 10}" for i in range(200)]
    vectors = dice.normal(size=(200, 4))
    values = (
        vectors @ np.array([[1.0], [-1.0], [0.5], [0.0]]) + 0.1 * dice.normal(size=(200, 1)) + 2
    )
    weights, residuals = ridge_on(vectors, values, owners)
    assert weights[:, 0] == pytest.approx([2, 1, -1, 0.5, 0], abs=0.05)
    part = np.array([int(owner[1:]) % 5 == 0 for owner in owners])
    x = np.c_[np.ones(200), vectors]
    least = np.linalg.lstsq(
        np.r_[x[~part], np.diag([1e-3, 1, 1, 1, 1])],
        np.r_[values[~part], np.zeros((5, 1))],
        rcond=None,
    )[0]
    assert residuals[part] == pytest.approx(values[part] - x[part] @ least, abs=1e-6)


def test_targets_are_ratings_or_indicators() -> None:
    records = [Record("u", "0", "x", "2"), Record("u", "1", "x", "5")]
    assert Targets(STARS).of(records).tolist() == [[2.0], [5.0]]
    assert [Targets(STARS).answer(np.array([v])) for v in (-3.0, 2.4, 4.6)] == ["1", "2", "5"]
    tags = Targets(TAGS)
    assert tags.of([Record("u", "0", "x", "loud")]).tolist() == [[0.0, 1.0, 0.0]]
    assert tags.answer(np.array([0.2, 0.2, 0.6])) == "odd"


@pytest.mark.parametrize("name", ["user-offset", "item-offset"])
def test_offsets_learn_who_agrees_and_with_what(name: str) -> None:
    """Users who always or never agree, and inputs that most agree with."""
    task = Task("votes", "classification", "{input}", ("agree", "disagree"), metrics=("accuracy",))
    dice = random.Random(0)
    inputs = [f"{word} {i}" for i in range(8) for word in ("rain", "war", "love")]

    def votes(user: str, lean: float) -> list[Record]:
        def label(text: str) -> str:
            liked = 0.8 if text.startswith("rain") else -0.8
            return "agree" if liked + lean + dice.gauss(0, 0.3) > 0 else "disagree"

        return [Record(user, str(i), t, label(t), position=i) for i, t in enumerate(inputs)]

    training = {f"t{i}": votes(f"t{i}", (-1.5, 0.0, 0.0, 1.5)[i % 4]) for i in range(32)}
    own = {
        "yes": votes("yes", 1.5)[:20],
        "no": votes("no", -1.5)[:20],
        "mixed": votes("mixed", 0.0)[:20],
    }
    given = replace(parts(RuleLLM(never), task), records=own, training=training)
    asked = [Query(user, text, text, "agree") for user in own for text in ("rain 7", "war 7")]
    found = answers(name, given, asked)
    assert [s.answer for s in found] == [
        *("agree", "agree"),
        *("disagree", "disagree"),
        *("agree", "disagree"),
    ]


def never(messages: Sequence[Message], index: int, rng: random.Random) -> str:
    raise AssertionError("no LLM is asked")
