"""The fakes: what each says, that they are deterministic, and that they call themselves fake."""

import json
from pathlib import Path
from random import Random
from typing import Any

import anyio
import pytest

from hydra_llm.config import Settings
from hydra_llm.errors import LLMError, LLMRefused, SettingsError
from hydra_llm.llm.base import ChatLLM, Sampling
from hydra_llm.llm.fake import RuleLLM, from_spec
from hydra_llm.types import Usage

pytestmark = pytest.mark.anyio


def ask(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text} for text in texts]


def fake(rest: str, **given: Any) -> ChatLLM:
    return from_spec(rest, Settings(**given))


@pytest.mark.parametrize("rest", ["echo", "rule=labels", "", "fail=error"])
def test_every_fake_says_that_it_is_one(rest: str) -> None:
    assert fake(rest).identity["kind"] == "fake"


async def test_echo_is_the_last_message_cut_at_stop_and_length() -> None:
    generation = await fake("echo").generate(
        ask("first", "one two three four"), Sampling(n=2, stop=("three",), max_tokens=9)
    )
    assert generation.texts == ("one two ", "one two ")
    assert generation.usage == Usage(calls=1, prompt_tokens=5, completion_tokens=4)
    assert (await fake("echo").generate(ask("one two three"), Sampling(max_tokens=2))).texts == (
        "one two",
    )


async def test_a_fake_of_the_command_line_keeps_no_prompts() -> None:
    llm = fake("echo")
    assert isinstance(llm, RuleLLM)
    await llm.generate(ask("hello"), Sampling())
    assert llm.calls == []


async def test_the_rule_picks_labels_by_chance_that_repeats() -> None:
    llm = fake("rule=labels")
    labels = ("a", "b", "c")
    drawn = await llm.generate(ask("x"), Sampling(n=30, temperature=1.0, seed=1, choices=labels))
    assert set(drawn.texts) == set(labels)
    assert (
        drawn.texts
        == (
            await fake("rule=labels").generate(
                ask("x"), Sampling(n=30, temperature=1.0, seed=1, choices=labels)
            )
        ).texts
    )
    assert (
        drawn.texts
        != (
            await llm.generate(ask("y"), Sampling(n=30, temperature=1.0, seed=1, choices=labels))
        ).texts
    )
    assert (
        drawn.texts
        != (
            await llm.generate(ask("x"), Sampling(n=30, temperature=1.0, seed=99, choices=labels))
        ).texts
    )


async def test_greedy_answers_depend_on_nothing_but_the_messages() -> None:
    llm = RuleLLM(lambda messages, index, rng: f"{index} {rng.random()}")
    greedy = [
        await llm.generate(ask("x"), Sampling(n=2, temperature=0.0, seed=seed))
        for seed in (None, 1, 2)
    ]
    assert len({text for generation in greedy for text in generation.texts}) == 1


async def test_sample_i_is_drawn_with_seed_plus_i() -> None:
    llm = RuleLLM(lambda messages, index, rng: str(rng.random()))
    eight = await llm.generate(ask("x"), Sampling(n=8, temperature=1.0, seed=3))
    assert (
        await llm.generate(ask("x"), Sampling(n=4, temperature=1.0, seed=7))
    ).texts == eight.texts[4:]


async def test_without_labels_the_rule_says_the_first_eight_words() -> None:
    generation = await fake("rule=labels").generate(ask("1 2 3 4 5 6 7 8 9 10"), Sampling())
    assert generation.texts == ("1 2 3 4 5 6 7 8",)


async def test_a_list_gives_its_texts_in_order_and_then_fails(tmp_path: Path) -> None:
    script = tmp_path / "s.json"
    script.write_text(json.dumps(["one", "two", "three"]))
    llm = fake(f"script={script}")
    assert (await llm.generate(ask("x"), Sampling(n=2, temperature=1.0))).texts == ("one", "two")
    assert (await llm.generate(ask("x"), Sampling())).texts == ("three",)
    with pytest.raises(LLMError, match="used up"):
        await llm.generate(ask("x"), Sampling())


async def test_a_map_answers_by_a_part_of_the_message(tmp_path: Path) -> None:
    script = tmp_path / "s.json"
    script.write_text(json.dumps({"sea": "blue", "sun": "yellow"}))
    llm = fake(f"script={script}")
    assert (await llm.generate(ask("the sea?", "the sun?"), Sampling())).texts == ("yellow",)
    with pytest.raises(LLMError, match="no key"):
        await llm.generate(ask("the moon?"), Sampling())


@pytest.mark.parametrize("content", ["{", "3"])
def test_a_script_that_is_none_is_one_line(tmp_path: Path, content: str) -> None:
    script = tmp_path / "s.json"
    script.write_text(content)
    with pytest.raises(SettingsError, match="s.json"):
        fake(f"script={script}")


async def test_failures_come_every_so_many_calls() -> None:
    llm = fake("fail=refused,every=3")
    outcomes = []
    for _ in range(6):
        try:
            outcomes.append((await llm.generate(ask("x"), Sampling())).texts[0])
        except LLMRefused:
            outcomes.append("refused")
    assert outcomes == ["x", "x", "refused"] * 2


async def test_a_hang_lasts_until_the_timeout_or_until_it_is_cancelled() -> None:
    with pytest.raises(LLMError, match="hang"):
        await fake("fail=hang", timeout=0.01).generate(ask("x"), Sampling())
    with anyio.move_on_after(0.01) as scope:
        await fake("fail=hang", timeout=100).generate(ask("x"), Sampling())
    assert scope.cancelled_caught


@pytest.mark.parametrize(
    "rest",
    [
        "nope",
        "script=",
        "script=/no/such.json",
        "fail=",
        "fail=nope",
        "fail=error,every=0",
        "rule=other",
    ],
)
def test_an_unknown_fake_is_one_line(rest: str) -> None:
    with pytest.raises(SettingsError, match="fake:"):
        fake(rest)


def test_a_rule_sees_messages_index_and_chance() -> None:
    seen: list[Any] = []
    llm = RuleLLM(lambda *arguments: str(seen.append(arguments)))
    anyio.run(lambda: llm.generate(ask("x"), Sampling(n=2, temperature=1.0)))
    assert [(messages, index) for messages, index, _ in seen] == [(ask("x"), 0), (ask("x"), 1)]
    assert all(isinstance(rng, Random) for *_, rng in seen)
