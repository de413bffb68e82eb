"""`check_llm`: the built-in LLMs pass it, and each broken one fails in the point that it breaks."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.config import Settings
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.cache import CachedLLM
from hydra_llm.llm.fake import RuleLLM, from_spec, label_rule
from hydra_llm.llm.gguf import smollm2
from hydra_llm.llm.openai import OpenAILLM
from hydra_llm.llm.registry import open_llm, wrap
from hydra_llm.testing import check_llm
from hydra_llm.types import Generation, Message, Usage


@pytest.mark.parametrize("spec", ["echo", "rule=labels"])
def test_the_fakes(spec: str) -> None:
    check_llm(from_spec(spec, Settings()))


def test_a_scripted_fake(tmp_path: Path) -> None:
    (tmp_path / "script.json").write_text(json.dumps({"": "blue, grey and green"}))
    check_llm(from_spec(f"script={tmp_path / 'script.json'}", Settings()))


def test_an_llm_with_cache_and_meter_again_and_again(tmp_path: Path) -> None:
    settings = Settings(cache=tmp_path)
    for _ in range(2):  # the second time everything is kept
        check_llm(wrap(label_rule(), settings))
    check_llm(CachedLLM(label_rule(), tmp_path / "llm.sqlite", replay_only=True))


def test_an_endpoint(serve: Any, wire: Any) -> None:
    def answer(body: dict[str, Any], count: int) -> Any:
        text = "blue, grey and green"
        for stop in body.get("stop", ()):
            text = text.split(stop)[0]
        return wire.completion(*[text] * body.get("n", 1))

    check_llm(OpenAILLM("m", base_url=serve(answer).url, retries=0))


@pytest.mark.llm
def test_the_embedded_smollm2(tmp_path: Path) -> None:
    check_llm(smollm2("", Settings()))
    check_llm(open_llm("smollm2", Settings(cache=tmp_path)))


class Broken(RuleLLM):
    """A fake whose answers a test spoils."""

    def __init__(self, **identity: Any) -> None:
        super().__init__(lambda *_: "blue and green", choose=lambda m, i, r, choices: choices[0])
        self.more = identity
        self.closed = False

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**super().identity, **self.more}

    async def aclose(self) -> None:
        self.closed = True


class TooFew(Broken):
    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        return await super().generate(messages, replace(sampling, n=1))


class Changing(Broken):
    count = itertools.count()

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        generation = await super().generate(messages, sampling)
        return replace(
            generation, texts=tuple(f"{next(self.count)} {text}" for text in generation.texts)
        )


class Unstoppable(Broken):
    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        return await super().generate(messages, replace(sampling, stop=()))


class Free(Broken):
    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        return await super().generate(messages, replace(sampling, choices=()))


class Uncounted(Broken):
    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        return replace(await super().generate(messages, sampling), usage=Usage())


class Rewriting(Broken):
    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        generation = await super().generate(messages, sampling)
        messages[0]["content"] += "!"  # type: ignore[index]
        return generation


@pytest.mark.parametrize(
    ("llm", "fault"),
    [
        (TooFew(), "1 texts for n = 3"),
        (Changing(), "greedy texts are not the same"),
        (Unstoppable(), "goes on behind a stop text"),
        (Free(), "none of the choices"),
        (Uncounted(), "not counted"),
        (Rewriting(), "messages were changed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Broken) else "",
)
def test_a_broken_llm_is_told_what_is_broken(llm: Broken, fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        check_llm(llm)
    assert llm.closed


def test_an_identity_is_json_and_names_what_is_needed() -> None:
    with pytest.raises(TypeError, match="JSON"):
        check_llm(Broken(path=Path("x")))
    with pytest.raises(AssertionError, match="constrains"):
        check_llm(NoIdentity())


class NoIdentity(Broken):
    @property
    def identity(self) -> Mapping[str, Any]:
        return {"kind": "fake", "model": "m"}
