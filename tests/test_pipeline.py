"""The main path, with LLMs that say what a test wants: what becomes a candidate, what is told, what
is refused.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_llm.config import Settings
from hydra_llm.errors import BudgetExceeded, LLMError, LLMRefused, UnknownUser, UserFault
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.concurrency import map_calls, run_sync
from hydra_llm.llm.fake import FailingLLM, RuleLLM
from hydra_llm.pipeline import UNTOLD, Pipeline, UserPipeline
from hydra_llm.retrieve import BM25
from hydra_llm.tasks.base import Task
from hydra_llm.types import Candidate, Generation, Message, Query, Record, Usage

TAGS = Task("tags", "classification", "Which tag? {input}", ("calm", "loud", "odd"))
STARS = Task("stars", "rating", "How many stars? {input}", ("1", "2", "3", "4", "5"))
TITLES = Task("titles", "generation", "Title of: {input}")
RECORDS = {
    "u": [Record("u", str(i), f"rain {i}", TAGS.labels[i % 3], position=i) for i in range(6)]
}


class Temperatures:
    """Says one thing at temperature 0 and others above; either may fail instead."""

    identity: Mapping[str, Any] = {"kind": "fake", "model": "fake:temperatures", "constrains": True}

    def __init__(self, greedy: str | LLMError, sampled: Sequence[str] | LLMError):
        self.greedy, self.sampled = greedy, sampled
        self.asked: list[dict[str, Any]] = []
        self.messages: Sequence[Message] = ()

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        options = asdict(sampling)
        self.asked.append(options)
        self.messages = messages
        reply = self.greedy if options["temperature"] == 0 else self.sampled
        await anyio.sleep(0.01 if options["temperature"] == 0 else 0)  # the samples come first
        if isinstance(reply, LLMError):
            raise reply
        texts = (reply,) * options["n"] if isinstance(reply, str) else tuple(reply)
        return Generation(texts, Usage(calls=1, prompt_tokens=10, completion_tokens=options["n"]))

    async def aclose(self) -> None: ...


def door(llm: Any, task: Task = TAGS, **chosen: Any) -> UserPipeline:
    options = {"samples": 4, "k": 2, "retrieved": 3, "candidates": "sampled", **chosen}
    return UserPipeline(task, BM25(), Settings(**options), llm=llm, records=RECORDS)


# ---- candidates


def test_the_greedy_answer_is_first_and_equal_ones_are_votes() -> None:
    llm = Temperatures("The tag is odd", ["calm", "odd", "calm"])
    proposal = door(llm).propose(Query("u", "q", "rain"))
    assert proposal.candidates == (
        Candidate("The tag is odd", "odd", votes=2, greedy=True),
        Candidate("calm", "calm", votes=2),
    )
    assert sorted((ask["n"], ask["temperature"]) for ask in llm.asked) == [(1, 0.0), (3, 0.5)]
    assert proposal.usage == Usage(calls=2, prompt_tokens=20, completion_tokens=4)
    assert proposal.notes == ()
    assert list(proposal.seconds) == ["retrieve", "rerank", "prompt", "llm"]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"samples": 1}, [(1, 0.0)]),
        ({"samples": 1, "greedy_first": False}, [(1, 0.0)]),
        ({"samples": 5, "greedy_first": False, "temperature": 1.0}, [(5, 1.0)]),
        ({"samples": 2}, [(1, 0.0), (1, 0.5)]),
    ],
)
def test_what_is_asked_for(chosen: dict[str, Any], expected: list[tuple[int, float]]) -> None:
    llm = Temperatures("odd", ["odd"])
    proposal = door(llm, **chosen).propose(Query("u", "q", "rain"))
    assert sorted((ask["n"], ask["temperature"]) for ask in llm.asked) == expected
    assert proposal.candidates[0].greedy == (expected[0][1] == 0.0)


def test_all_labels_are_candidates_greedy_first_then_by_votes() -> None:
    llm = Temperatures("loud", ["odd", "odd", "odd"])
    proposal = door(llm, candidates="labels").propose(Query("u", "q", "rain"))
    assert [(c.answer, c.votes, c.greedy) for c in proposal.candidates] == [
        ("loud", 1, True),
        ("odd", 3, False),
        ("calm", 0, False),
    ]


def test_unparsable_candidates_are_noted_and_have_no_answer() -> None:
    llm = Temperatures("I cannot say", ["odd", "?", "?"])
    proposal = door(llm).propose(Query("u", "q", "rain"))
    assert [(c.text, c.answer, c.votes) for c in proposal.candidates] == [
        ("I cannot say", None, 1),
        ("odd", "odd", 1),
        ("?", None, 2),
    ]
    assert proposal.notes == ("3 of 4 answers could not be parsed",)


@pytest.mark.parametrize("candidates", ["sampled", "labels"])
def test_without_an_adapter_an_unreadable_answer_is_no_label(candidates: str) -> None:
    """Else a baseline that cannot be read would be scored as if it had answered the task's first
    label.
    """
    answer = door(Temperatures("I cannot say", []), candidates=candidates, samples=1).answer(
        "rain", user="u"
    )
    assert answer.candidates[answer.chosen].answer is None
    assert answer.text == "I cannot say"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4", "4"), ("3.4", "3"), ("3.5", "3"), ("4.6 stars", "5"), ("11", None), ("none", None)],
)
def test_a_rating_between_two_labels_counts_for_the_nearer(text: str, expected: str | None) -> None:
    (candidate,), notes = Pipeline(STARS, BM25(), Settings(candidates="sampled")).read([text], 1)
    assert candidate.answer == expected
    assert bool(notes) == (expected is None)


@given(
    st.lists(
        st.sampled_from(["calm", "Loud.", "loud", "odd or calm", "", "?", "calm!"]), max_size=9
    ),
    st.integers(0, 2),
    st.booleans(),
)
def test_no_sample_is_lost(texts: list[str], greedy: int, labels: bool) -> None:
    chosen = Settings(candidates="labels" if labels else "sampled")
    candidates, _ = Pipeline(TAGS, BM25(), chosen).read(texts, greedy)
    assert sum(candidate.votes for candidate in candidates) == len(texts)
    answers = [candidate.answer for candidate in candidates if candidate.answer is not None]
    assert len(answers) == len(set(answers))
    assert not labels or set(answers) == set(TAGS.labels)
    for candidate in candidates:
        own = [
            place
            for place, text in enumerate(texts)
            if (TAGS.parse(text) or f"?{text}") == (candidate.answer or f"?{candidate.text}")
        ]
        assert candidate.votes == len(own)
        assert candidate.greedy == any(place < greedy for place in own)


# ---- calls that fail


def test_failing_samples_leave_the_greedy_answer() -> None:
    proposal = door(Temperatures("odd", LLMError("HTTP 500"))).propose(Query("u", "q", "rain"))
    assert [(c.answer, c.greedy) for c in proposal.candidates] == [("odd", True)]
    assert proposal.notes == ("a call failed: HTTP 500",)
    assert (proposal.usage.calls, proposal.usage.failed) == (1, 1)


def test_without_the_greedy_answer_no_sample_is_greedy() -> None:
    proposal = door(Temperatures(LLMError("HTTP 500"), ["odd", "calm"])).propose(
        Query("u", "q", "rain")
    )
    assert [(c.answer, c.greedy) for c in proposal.candidates] == [("odd", False), ("calm", False)]


@pytest.mark.parametrize(
    ("greedy", "sampled", "expected"),
    [
        (LLMError("a"), LLMError("b"), LLMError),
        ("odd", LLMRefused("401"), LLMRefused),
        ("odd", BudgetExceeded("spent"), BudgetExceeded),
        (LLMError("a"), BudgetExceeded("spent"), BudgetExceeded),
    ],
)
def test_all_failing_or_going_on_in_vain_is_an_error(
    greedy: Any, sampled: Any, expected: type[LLMError]
) -> None:
    with pytest.raises(expected) as caught:
        door(Temperatures(greedy, sampled)).propose(Query("u", "q", "rain"))
    assert caught.type is expected


def test_every_second_call_failing_is_noted_in_each_proposal() -> None:
    llm = FailingLLM(RuleLLM(lambda *_: "odd"), every=2)
    for _ in range(3):
        proposal = door(llm).propose(Query("u", "q", "rain"))
        assert proposal.usage.failed == 1
        assert len(proposal.notes) == 1


# ---- a prompt beyond the LLM's window


class Window:
    """An LLM whose tokens are characters: refuses what is longer than its window, telling how much
    would fit, or not.
    """

    identity: Mapping[str, Any] = {"kind": "fake", "model": "fake:window", "constrains": False}

    def __init__(self, size: int, fits: float | None = None, sampled_size: int | None = None):
        self.size, self.fits, self.sampled_size = size, fits, sampled_size or size
        self.asked: list[tuple[float, str]] = []

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        temperature, n = sampling.temperature, sampling.n
        text = text_of(messages)
        self.asked.append((temperature, text))
        if len(text) > (size := self.sampled_size if temperature else self.size):
            raise LLMRefused("too long", fits=self.fits or size / len(text))
        return Generation(("odd",) * n, Usage(calls=1, prompt_tokens=len(text)))

    async def aclose(self) -> None: ...


LONG = Query("u", "q", "0123456789" * 200)  # 2000 characters, 572 tokens by estimate


@pytest.mark.parametrize("fits", [None, 0.6])
def test_a_prompt_too_long_for_the_llm_is_cut_and_noted_once(fits: float | None) -> None:
    llm = Window(800, fits)
    proposal = door(llm).propose(LONG)
    assert [c.answer for c in proposal.candidates] == ["odd"]
    assert 400 < len(text_of(proposal.messages)) <= 800
    assert {text for _, text in llm.asked[-2:]} == {
        text_of(proposal.messages)
    }  # greedy and sampled ones
    assert sum("cut again" in note for note in proposal.notes) == 1
    assert sum("text of query 'q'" in note for note in proposal.notes) == 1
    assert (proposal.usage.calls, proposal.usage.failed) == (2, len(llm.asked) - 2)


def test_greedy_answer_and_samples_always_share_a_prompt() -> None:
    llm = Window(5000, sampled_size=1000)
    proposal = door(llm).propose(LONG)
    assert {text for _, text in llm.asked[-2:]} == {text_of(proposal.messages)}
    assert proposal.candidates[0].votes == 4
    assert proposal.usage.prompt_tokens == sum(
        len(text) for temperature, text in llm.asked if len(text) <= (1000 if temperature else 5000)
    )


@pytest.mark.parametrize("fits", [0.9, 0.0001])
def test_what_is_refused_at_any_length_stays_refused(fits: float) -> None:
    llm = Window(3, fits)
    with pytest.raises(LLMRefused, match="too long"):
        door(llm, samples=1).propose(LONG)
    assert len(llm.asked) == (4 if fits == 0.9 else 1)  # three cuts, or no room for the instruction


def test_one_prompt_that_is_too_long_does_not_stop_the_others() -> None:
    llm = Window(100, fits=0.9)
    queries = [LONG, Query("v", "short", "rain")]
    results = run_sync(lambda: map_calls(door(llm, samples=1).apropose, queries, limit=1))
    assert isinstance(results[0], LLMRefused)
    assert not isinstance(results[1], LLMError)


# ---- what the LLM sees


def text_of(proposal_messages: Sequence[Message]) -> str:
    return "\n".join(message["content"] for message in proposal_messages)


@settings(max_examples=30, deadline=None)
@given(position=st.integers(0, 8), data=st.data())
def test_the_prompt_holds_only_what_came_before_the_query(
    position: int, data: st.DataObject
) -> None:
    records = [Record("u", str(i), f"rain thing{i}x", "odd", position=i) for i in range(8)]
    data.draw(st.randoms()).shuffle(records)
    llm = RuleLLM(lambda *_: "odd")
    asker = UserPipeline(
        TAGS,
        BM25(),
        Settings(samples=2, k=9, retrieved=9),
        llm=llm,
        records={"u": records, "v": RECORDS["u"]},
    )
    proposal = asker.propose(Query("u", "q", "rain", position=position))
    text = text_of(proposal.messages)
    assert {i for i in range(8) if f"thing{i}x" in text} == set(range(position))
    assert {int(item.record.id) for item in proposal.retrieved} == set(range(position))
    assert "rain 0" not in text  # another user's


def test_only_the_first_k_stand_in_the_prompt() -> None:
    proposal = door(RuleLLM(lambda *_: "odd"), k=1, retrieved=3).propose(Query("u", "q", "rain 3"))
    assert len(proposal.retrieved) == len(proposal.records) == 3
    assert "rain 3" in text_of(proposal.messages)
    assert (
        sum(
            f"rain {i}" in text_of(proposal.messages[:-1]) + text_of(proposal.messages)
            for i in (0, 1, 2, 4, 5)
        )
        == 0
    )


def test_labels_constrain_the_llm_only_where_that_is_asked_for() -> None:
    for constrain, expected in ((False, ()), (True, TAGS.labels)):
        llm = Temperatures("odd", ["odd"])
        door(llm, constrain=constrain).propose(Query("u", "q", "rain"))
        assert {tuple(ask["choices"]) for ask in llm.asked} == {tuple(expected)}


def test_a_user_without_records_is_answered_without_any() -> None:
    answer = door(RuleLLM(lambda *_: "odd")).answer(Query("stranger", "q", "rain"))
    assert answer.text == "odd"
    assert answer.proposal.retrieved == ()


# ---- the sync door


def test_a_plain_text_needs_a_known_user_and_must_say_something() -> None:
    asker = door(RuleLLM(lambda *_: "odd"))
    for user in ("stranger", None):
        with pytest.raises(UnknownUser, match="1 users are known"):
            asker.answer("rain", user=user)
    for text in ("", " \n\t"):
        with pytest.raises(UserFault, match="empty"):
            asker.answer(text, user="u")
    assert len(asker.answer("rain", user="u").proposal.retrieved) == 3


@pytest.mark.anyio
async def test_the_sync_door_opens_inside_a_running_loop() -> None:
    asker = door(RuleLLM(lambda *_: "odd"))
    assert asker.answer("rain", user="u").text == "odd"
    assert (
        asker.propose(Query("u", "q", "rain")).candidates
        == (await asker.apropose(Query("u", "q", "rain"))).candidates
    )
    with pytest.raises(LLMError, match="HTTP 500"):
        door(Temperatures(LLMError("HTTP 500"), LLMError("HTTP 500"))).answer("rain", user="u")


@pytest.mark.anyio
async def test_sync_and_async_take_the_same_questions() -> None:
    asker = door(RuleLLM(lambda *_: "odd"))
    query = asker.query("rain", "u")
    answers = [
        asker.answer("rain", user="u"),
        asker.answer(query),
        asker.answer(query, user="u"),
        await asker.aanswer("rain", user="u"),
        await asker.aanswer(asker.context_of(query)),
    ]
    assert {answer.proposal.query for answer in answers} == {query}
    assert {answer.text for answer in answers} == {"odd"}
    proposals = [asker.propose("rain", user="u"), await asker.apropose("rain", user="u")]
    assert {proposal.messages[-1]["content"] for proposal in proposals} == {
        answers[0].proposal.messages[-1]["content"]
    }
    for call in (asker.aanswer, asker.apropose):
        with pytest.raises(UnknownUser, match="stranger"):
            await call("rain", user="stranger")
        with pytest.raises(UserFault, match="of user 'u', not of 'v'"):
            await call(query, user="v")


def test_deciding_makes_no_llm_call() -> None:
    llm = RuleLLM(lambda *_: "odd")
    asker = door(llm)
    proposal = asker.propose(Query("u", "q", "rain"))
    calls = len(llm.calls)
    answer = asker.decide(asker.context_of(proposal.query), proposal)
    assert len(llm.calls) == calls
    assert answer.usage == proposal.usage
    assert set(answer.seconds) == {*proposal.seconds, "adapt"}


@pytest.mark.parametrize(
    "text",
    ["🎬 שלום", "nul \0 in it", "{input}", "the of and", "x" * 20_000],
    ids=["emoji", "nul", "braces", "stop words", "long"],
)
def test_odd_texts_are_asked_and_answered(text: str) -> None:
    def rule(messages: Sequence[Message], index: int, rng: random.Random) -> str:
        return "odd"

    proposal = door(RuleLLM(rule), max_prompt_tokens=256).propose(Query("u", "q", text))
    assert proposal.candidates[0].answer == "odd"
    assert "\0" not in text_of(proposal.messages)
    assert bool(proposal.notes) == (len(text) > 1000)


@pytest.mark.anyio
async def test_label_probabilities_take_the_place_of_samples() -> None:
    class Telling(Temperatures):
        async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
            generation = await super().generate(messages, sampling)
            assert sampling.probabilities
            assert sampling.choices == TAGS.labels
            return Generation(generation.texts, generation.usage, probabilities={"odd": 0.75})

    llm = Telling("odd", [])
    pipeline = door(llm, candidates="labels", label_probabilities=True)
    proposal = await pipeline.apropose("rain", user="u")
    assert [(asked["n"], asked["temperature"]) for asked in llm.asked] == [(1, 0.0)]
    told = {own.answer: own.llm_probability for own in proposal.candidates}
    assert told == {"odd": 0.75, "calm": None, "loud": None}
    assert proposal.candidates[0].greedy


@pytest.mark.anyio
@pytest.mark.parametrize(("kind", "count"), [("labels", 1), ("sampled", 0)])
async def test_probabilities_that_are_not_told_are_noted(kind: str, count: int) -> None:
    """Once, where they would have been used: one vote is all that is left."""
    pipeline = door(Temperatures("odd", []), candidates=kind, label_probabilities=True)
    notes = (await pipeline.apropose("rain", user="u")).notes
    assert [UNTOLD in note for note in notes] == [True] * count


@pytest.mark.anyio
async def test_texts_have_no_label_probabilities() -> None:
    llm = Temperatures("a", ["b", "c", "d"])
    await door(llm, TITLES, label_probabilities=True).apropose("rain", user="u")
    assert sorted(asked["n"] for asked in llm.asked) == [1, 3]
    assert not any(asked["probabilities"] for asked in llm.asked)
