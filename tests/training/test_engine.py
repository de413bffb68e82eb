"""Every engine gives what this process gives: here one that takes nothing over but what can be
pickled. test_ray.py runs a cluster.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.errors import LLMError, LLMRefused, SettingsError
from hydra_llm.llm.base import ChatLLM, PartlyFailed, Sampling
from hydra_llm.llm.concurrency import Progress, StageProgress
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.llm.registry import wrap
from hydra_llm.model.encoder import open_encoder
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.pipeline import UserPipeline
from hydra_llm.training import encode, labelling, work
from hydra_llm.training.api import fit, learn
from hydra_llm.training.engine import Asks, Local, open_engine
from hydra_llm.training.train_scorer import silent
from hydra_llm.types import Generation, Message, Usage
from tests.learning import ONE_STRENGTH
from tests.training.test_sample import made, same_heads, settings


class Pickling:
    """Does all here, with copies."""

    spreads = True

    def __init__(self) -> None:
        self.functions: list[str] = []

    def each(
        self, function: Callable[[Any, Any], Any], shared: Any, parts: Iterable[Any]
    ) -> Iterator[Any]:
        self.functions.append(function.__name__)
        for part in parts:
            copied = pickle.loads(pickle.dumps((function, shared, part)))
            yield pickle.loads(pickle.dumps(copied[0](*copied[1:])))

    async def ask(
        self,
        function: Asks[Any, Any],
        pipeline: UserPipeline,
        items: Sequence[Any],
        progress: Progress | None = None,
    ) -> list[Any]:
        self.functions.append(getattr(function, "__name__", ""))
        plain = replace(pipeline, llm=None, records={}, heads={})  # type: ignore[arg-type]
        function, plain, items = pickle.loads(pickle.dumps((function, plain, list(items))))
        results = await Local().ask(function, replace(plain, llm=pipeline.llm), items, progress)
        return list(pickle.loads(pickle.dumps(results)))


class Choosing(RuleLLM):
    """Draws a label, and knows what it was asked."""

    def __init__(self) -> None:
        super().__init__(lambda messages, index, draw: draw.choice(["no", "yes"]), keep=False)
        self.asked: list[str] = []

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        self.asked.append(f"{sampling} {messages}")
        return await super().generate(messages, sampling)


def learned(given: Settings, llm: ChatLLM, progress: StageProgress = silent) -> Bundle:
    """A bundle with the heads of new users, both scorers labelled by an LLM with a cache."""
    data, kept = made(), wrap(llm, given)
    bundle = learn(data, kept, given, strengths=ONE_STRENGTH, progress=progress).bundle
    return fit(data, bundle, kept, settings=given).bundle


def asking(folder: Path, **given: Any) -> Settings:
    """Settings with which the LLM labels whatever it can."""
    asked = {"reranker_labels": "llm", "label_features": False, "candidates": "sampled"}
    return settings(cache=folder, **asked, **given)


@pytest.mark.slow
def test_copies_of_the_parts_give_the_same_labels_and_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, other, engine = Choosing(), Choosing(), Pickling()
    here = learned(asking(tmp_path / "here"), llm)
    for module in (encode, labelling, work):
        monkeypatch.setattr(module, "open_engine", lambda name: engine)
    there = learned(asking(tmp_path / "there"), other)
    assert {"_encoded", "_usefulness", "_propose", "fit_block"} == set(engine.functions)
    assert sorted(other.asked) == sorted(llm.asked)
    assert here.heads.keys() == {"reranker", "adapter"}
    assert len(here.heads["adapter"]) == 14
    same_heads(here, there, list(here.heads["adapter"]), tolerance=1e-6)


@pytest.mark.parametrize(
    "error",
    [
        LLMRefused("too long", fits=0.5),
        LLMError("no answer"),
        PartlyFailed("one of two", Generation(("a",), Usage(1))),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_calls_can_be_sent(error: LLMError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_vectors_of_another_process_are_kept(tmp_path: Path) -> None:
    encoder, texts = open_encoder("minilm", max_length=16), ["one", "two", "three"]
    cache = FeatureCache(encoder, tmp_path / "features.sqlite")
    cache.texts(texts[:1])
    assert cache.absent([*texts, "two"]) == texts[1:]
    cache.add(texts[1:], encoder.encode(texts[1:]))
    assert cache.missing(texts) == 0
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.missing(texts) == 0
    assert (copy.texts(texts) == cache.texts(texts)).all()


def test_the_engine_is_no_part_of_a_bundle_and_may_change() -> None:
    assert isinstance(open_engine("local"), Local)
    assert "engine" not in Settings.checked({"engine": "ray"}).stored()
    for wrong in ("spark", "ray:", "ray:host", "ray:host:port", "ray://host:1"):
        with pytest.raises(SettingsError, match="take local, ray or ray:HOST:PORT"):
            Settings.checked({"engine": wrong})
