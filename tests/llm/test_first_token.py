"""Probabilities of choices from first tokens: by hand, and as endpoints tell or refuse them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.llm.base import Sampling
from hydra_llm.llm.cache import CachedLLM, open_recording, write_recording
from hydra_llm.llm.first_token import probabilities, told_tokens
from hydra_llm.llm.openai import OpenAILLM
from hydra_llm.types import Generation, Usage

MESSAGES = [{"role": "user", "content": "Agree or disagree?"}]
CHOICES = ("agree", "disagree")
ASKED = Sampling(choices=CHOICES, probabilities=True)


def told(*tokens: tuple[str, float]) -> dict[str, Any]:
    top = [{"token": token, "logprob": math.log(share)} for token, share in tokens]
    return {"content": [{"token": "x", "logprob": 0.0, "top_logprobs": top}]}


def test_tokens_count_for_the_choices_that_they_begin() -> None:
    tokens = [("Agree", 0.5), (" dis", 0.2), ("ag", 0.1), ("The", 0.2)]
    logs = [(token, math.log(share)) for token, share in tokens]
    assert probabilities(logs, CHOICES) == pytest.approx({"agree": 0.75, "disagree": 0.25})


@pytest.mark.parametrize("raw", ["▁{}", "Ġ{}", "Ċ{}", "▁▁{}", "{}▁"])
def test_raw_tokens_begin_a_choice(raw: str) -> None:
    """As servers tell them that do not decode: of SentencePiece, and of byte-level BPE."""
    logs = [(raw.format("dis"), math.log(0.6)), (raw.format("Agree"), math.log(0.4))]
    assert probabilities(logs, CHOICES) == pytest.approx({"agree": 0.4, "disagree": 0.6})
    assert probabilities([(raw.format(""), -0.1)], CHOICES) == {}


def test_a_label_may_begin_with_what_stands_for_a_blank() -> None:
    logs = [("Ġ", math.log(0.6)), ("im", math.log(0.4))]  # a letter of Maltese
    assert probabilities(logs, ("Ġimgħa", "imħabba"))["Ġimgħa"] == pytest.approx(0.6)


def test_labels_that_differ_in_case_alone_are_told_apart() -> None:
    logs = [("A", math.log(0.7)), (" a", math.log(0.2)), ("B", math.log(0.1))]
    assert probabilities(logs, ("A", "a", "b")) == pytest.approx({"A": 0.7, "a": 0.2, "b": 0.1})


@pytest.mark.parametrize("said", ["", "\ufffd", "bytes:\\xe6\\x97"])
def test_a_token_may_be_a_part_of_a_character(said: str) -> None:
    """As byte-level tokenizers write rare ones; endpoints tell its bytes."""
    tokens = [
        {"token": said, "bytes": list("日".encode()[:2]), "logprob": math.log(0.6)},
        {"token": said, "bytes": list("京".encode()[:2]), "logprob": math.log(0.3)},
        {"token": "é", "bytes": [0xC3, 0xA9], "logprob": math.log(0.1)},
    ]
    told_ = told_tokens({"logprobs": {"content": [{"top_logprobs": tokens}]}})
    shares = probabilities(told_, ("日本", "京都", "Été"))
    assert shares == pytest.approx({"日本": 0.6, "京都": 0.3, "Été": 0.1})


@pytest.mark.parametrize("wrong", [[300], ["a"], [-1], [], "ab", None, {}])
def test_bytes_that_are_none_leave_the_text(wrong: object) -> None:
    token = {"token": "agree", "bytes": wrong, "logprob": -0.2}
    assert told_tokens({"logprobs": {"content": [{"top_logprobs": [token]}]}}) == [("agree", -0.2)]


def test_a_token_of_several_choices_is_shared() -> None:
    logs = [("3", math.log(0.6)), ("s", math.log(0.4))]
    shares = probabilities(logs, ("3", "3.5", "style", "sports"))
    # 3.5 has no token of its own, and nothing is left for it
    assert shares == pytest.approx({"3": 0.6, "3.5": 0, "style": 0.2, "sports": 0.2}, abs=1e-8)
    assert shares["3.5"] > 0


def test_a_choice_that_was_cut_off_is_unlikely() -> None:
    shares = probabilities([("agree", math.log(0.9)), ("I", math.log(0.02))], CHOICES)
    assert shares["disagree"] == pytest.approx(0.01 / 0.91)


@pytest.mark.parametrize("count", [1, 3])
def test_choices_without_a_token_share_what_is_left(count: int) -> None:
    others = [f"no{i}" for i in range(count)]
    shares = probabilities([("yes", math.log(0.82))], ("yes", *others))
    assert shares == pytest.approx({"yes": 0.82} | dict.fromkeys(others, 0.18 / count))


def test_an_answer_that_begins_with_other_words_tells_none() -> None:
    """Of "The answer is yes" the small share of `no` says nothing about the label."""
    tokens = [("The", -0.05), ("no", -4.0)]
    assert probabilities(tokens, ("yes", "no")) == {}
    # where a grammar allows labels alone, it does
    assert probabilities(tokens, ("yes", "no"), enough=0.0)["no"] > 0.5


@pytest.mark.parametrize(
    "wrong", [math.nan, math.inf, -math.inf, 900, 10**400, -(10**400), None, "-0.1", [], {}]
)
def test_what_is_no_log_probability_is_not_told(wrong: object) -> None:
    tokens = [{"token": "disagree", "logprob": wrong}, {"token": "agree", "logprob": -0.2}]
    choice = {"logprobs": {"content": [{"top_logprobs": [*tokens, None, {"logprob": -1.0}]}]}}
    assert told_tokens(choice) == [("agree", -0.2)]


def test_nothing_is_known_where_no_token_begins_a_choice() -> None:
    assert probabilities([("The", -0.1), (" ", -3.0)], CHOICES) == {}
    assert probabilities([], CHOICES) == {}
    assert probabilities([("\ud83d", -0.1)], CHOICES) == {}


@given(st.lists(st.tuples(st.text("adi日 s", max_size=3), st.floats(-20, 0)), max_size=8))
def test_they_are_a_distribution_or_nothing(tokens: list[tuple[str, float]]) -> None:
    shares = probabilities(tokens, ("agree", "disagree", "日本", "a"))
    assert not shares or sum(shares.values()) == pytest.approx(1)
    assert all(share > 0 for share in shares.values())


@pytest.mark.parametrize(
    "choice",
    [{}, {"logprobs": None}, {"logprobs": {"content": []}}, {"logprobs": {"content": [{}]}}],
)
def test_an_answer_without_logprobs_tells_none(choice: dict[str, Any]) -> None:
    assert told_tokens(choice) == []


@pytest.mark.anyio
async def test_an_endpoint_that_tells_logprobs(serve: Any, wire: Any) -> None:
    def answer(body: dict[str, Any], count: int) -> Any:
        status, headers, content = wire.completion("agree")
        told_json = told(("agree", 0.6), ("dis", 0.3))
        text = content.decode().replace(
            '"index": 0', f'"index": 0, "logprobs": {json.dumps(told_json)}'
        )
        return status, headers, text.encode()

    endpoint = serve(answer)
    llm = OpenAILLM("m", base_url=endpoint.url, retries=0)
    generation = await llm.generate(MESSAGES, ASKED)
    assert generation.probabilities == pytest.approx({"agree": 2 / 3, "disagree": 1 / 3})
    assert endpoint.bodies[0]["logprobs"] is True
    assert endpoint.bodies[0]["top_logprobs"] == 20


@pytest.mark.anyio
async def test_an_endpoint_that_refuses_logprobs_is_asked_without(serve: Any, wire: Any) -> None:
    def answer(body: dict[str, Any], count: int) -> Any:
        if "logprobs" in body:
            return wire.refusal(400, "Unsupported parameter: 'logprobs'", param="logprobs")
        return wire.completion("agree")

    endpoint = serve(answer)
    llm = OpenAILLM("m", base_url=endpoint.url, retries=0)
    for _ in range(2):
        generation = await llm.generate(MESSAGES, ASKED)
        assert (generation.texts, generation.probabilities) == (("agree",), {})
    assert ["logprobs" in body for body in endpoint.bodies] == [True, False, False]
    assert not any("top_logprobs" in body for body in endpoint.bodies[1:])


@pytest.mark.anyio
async def test_an_endpoint_that_tells_fewer_tokens_is_asked_for_them(serve: Any, wire: Any) -> None:
    """Calls at the same time learn the limit each, and none fails."""

    def answer(body: dict[str, Any], count: int) -> Any:
        if body["top_logprobs"] > 5:
            return wire.refusal(400, "must be less than or equal to 5", param="top_logprobs")
        return wire.completion("agree")

    endpoint = serve(answer)
    llm = OpenAILLM("m", base_url=endpoint.url, retries=0)
    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(llm.generate, MESSAGES, ASKED)
    assert (await llm.generate(MESSAGES, ASKED)).texts == ("agree",)
    limits = [body["top_logprobs"] for body in endpoint.bodies]
    assert limits.count(5) == 5, "each call once, and the last without a refusal"
    assert limits[-1] == 5


class Telling:
    """A fake that tells probabilities, and counts its calls."""

    identity: Mapping[str, Any] = {"kind": "fake", "model": "fake:telling", "constrains": True}

    def __init__(self) -> None:
        self.calls = 0

    async def generate(self, messages: Any, sampling: Sampling) -> Any:
        self.calls += 1
        shares = {"agree": 0.7, "disagree": 0.3} if sampling.probabilities else {}
        return Generation(("agree",) * sampling.n, Usage(calls=1), probabilities=shares)

    async def aclose(self) -> None: ...


@pytest.mark.anyio
async def test_the_cache_and_a_recording_keep_them(tmp_path: Path) -> None:
    inner = Telling()
    llm = CachedLLM(inner, tmp_path / "llm.sqlite")
    plain = await llm.generate(MESSAGES, Sampling(choices=CHOICES))
    assert plain.probabilities == {}
    for _ in range(2):
        told_ones = await llm.generate(MESSAGES, ASKED)
        assert told_ones.probabilities == {"agree": 0.7, "disagree": 0.3}
    assert (inner.calls, told_ones.texts) == (2, plain.texts)
    # what was asked with them answers what is asked without
    assert (await llm.generate(MESSAGES, Sampling(choices=CHOICES))).texts == ("agree",)
    assert inner.calls == 2
    write_recording(tmp_path / "r.jsonl.gz", llm)
    replayed = await open_recording(tmp_path / "r.jsonl.gz").generate(MESSAGES, ASKED)
    assert replayed.probabilities == {"agree": 0.7, "disagree": 0.3}


@pytest.mark.anyio
async def test_a_recording_without_them_is_replayed_without(tmp_path: Path) -> None:
    llm = CachedLLM(Telling(), tmp_path / "llm.sqlite")
    await llm.generate(MESSAGES, Sampling(choices=CHOICES))
    write_recording(tmp_path / "r.jsonl.gz", llm)
    replayed = await open_recording(tmp_path / "r.jsonl.gz").generate(MESSAGES, ASKED)
    assert (replayed.texts, replayed.probabilities) == (("agree",), {})
