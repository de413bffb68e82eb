"""A fit with one more record goes on from the one before: the same heads, and nothing that was
labelled or encoded is so again.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydra_llm.bundle import Bundle
from hydra_llm.config import load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.model import newton
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.heads import additive
from hydra_llm.tasks.base import Task
from hydra_llm.training import labelling
from hydra_llm.training.api import fit, learn
from hydra_llm.types import Generation, Message, Record
from tests.learning import ONE_STRENGTH

WORDS = ["storm", "sea", "calm", "boat", "wine", "dry", "red", "bread", "salt", "moon", "stone"]
TONES = ("loud", "soft", "odd")
TASKS = {
    "labels": Task("tones", "classification", "Which tone has {input}?", TONES),
    "texts": Task("lines", "generation", "Say it: {input}"),
}
COUNT = 12

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_minilm")]


class Counting(RuleLLM):
    """A fake that says a random label or line, and counts."""

    def __init__(self, task: Task) -> None:
        said = task.labels or tuple(f"{one} {two}" for one in WORDS for two in WORDS)
        super().__init__(lambda messages, index, rng: rng.choice(said), name=task.name)
        self.asked = 0

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        self.asked += 1
        return await super().generate(messages, sampling)


def history(task: Task, user: str, count: int) -> list[Record]:
    draw, out = random.Random(user), list[Record]()
    for place in range(count):
        words = draw.sample(WORDS, 4)
        label = TONES[(WORDS.index(words[0]) + len(user)) % 3]
        answer = label if task.labels else f"{words[1]} {words[0]} {place}"
        text = f"{' '.join(words)} {user} {place}"
        out.append(Record(user, f"r{place}", text, answer, position=place))
    return out


@pytest.fixture(scope="module", params=TASKS)
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    task, users = TASKS[request.param], [f"{'x' * (n + 1)}" for n in range(6)]
    records = [record for user in users for record in history(task, user, 10)]
    data = DataSet.from_records(task, dict.fromkeys(users, "train"), records, [])
    asks = {"reranker_labels": "llm", "fit_labels": "llm", "word_model": False, "samples": 3}
    folder = tmp_path_factory.mktemp("cache")
    settings = load_settings(cache=folder, **({} if task.labels else asks))
    return learn(data, Counting(task), settings, strengths=ONE_STRENGTH).bundle


def fitted(bundle: Bundle, records: Sequence[Record], **more: Any) -> Any:
    data = DataSet.from_records(bundle.task, {"ada": "test"}, records, [])
    llm = Counting(bundle.task)
    done = fit(data, bundle, llm, users=["ada"], **more)
    return done, llm.asked


def to_convergence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additive, "newton_cg", partial(newton.newton_cg, products=200))
    for name in ("TOLERANCE", "CONTINUED"):
        monkeypatch.setattr(additive, name, 1e-7)


def same_heads(one: Bundle, other: Bundle) -> None:
    own, others = one.heads_of("ada"), other.heads_of("ada")
    assert own.keys() == others.keys() == one.scorers.keys()
    for name, head in own.items():
        assert (head.records, head.until) == (others[name].records, others[name].until)
        np.testing.assert_allclose(head.numbers, others[name].numbers, rtol=0, atol=1e-6)


def test_a_fit_that_goes_on_has_the_heads_of_one_from_scratch(
    learned: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_convergence(monkeypatch)
    records = history(learned.task, "ada", COUNT + 4)
    before, _ = fitted(learned, records[:COUNT], kept={})
    assert any(np.abs(head.numbers).max() > 1e-3 for head in before.bundle.heads_of("ada").values())
    for count in (COUNT + 1, COUNT + 2, COUNT + 4):  # one more record, then another, then two
        before, _ = fitted(learned, records[:count], kept=before.kept)
        scratch, _ = fitted(learned, records[:count])
        same_heads(before.bundle, scratch.bundle)


def test_only_the_new_record_is_labelled_and_encoded(
    learned: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    features = FeatureCache(learned.features.encoder, tmp_path / "features.sqlite")
    bundle, records = replace(learned, features=features), history(learned.task, "ada", COUNT + 1)
    before, asked = fitted(bundle, records[:COUNT], kept={})
    encoded, contexts = list[str](), list[Record]()
    with monkeypatch.context() as patched:
        plain, each = type(features.encoder).encode, labelling._with_contexts

        def encode(self: Any, texts: Sequence[str], **how: Any) -> Any:
            encoded.extend(texts)
            return plain(self, texts, **how)

        def counted(*args: Any) -> Any:
            for record, context in each(*args):
                contexts.append(record)
                yield record, context

        patched.setattr(type(features.encoder), "encode", encode)
        patched.setattr(labelling, "_with_contexts", counted)
        _, again = fitted(bundle, records, kept=before.kept)
    new = records[-1]
    assert {own.id for own in contexts} == {new.id}
    if bundle.task.labels:
        assert asked == again == 0
        assert encoded
        assert all(new.input in text for text in encoded)
    else:  # three queries of the LLM; each ten records for the reranker, and the samples
        assert 0 < again <= asked / 3 + 1
        own = {text for text in encoded if "ada" in text}
        assert all(new.input in text for text in own)
        said = set(encoded) - own
        assert len(said) <= bundle.settings.samples + 2, "what the LLM said to the new record"


@pytest.mark.parametrize("how", ["replaced", "removed", "amid"])
def test_another_history_is_fitted_from_scratch(
    learned: Bundle, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_convergence(monkeypatch)
    records = history(learned.task, "ada", COUNT + 1)
    first = [*records[:4], *records[5:]] if how == "amid" else records[:COUNT]
    before, _ = fitted(learned, first, kept={})
    if how == "replaced":
        records[3] = replace(records[3], input="another text")
    elif how == "removed":
        del records[3]
    after, _ = fitted(learned, records, kept=before.kept)
    scratch, _ = fitted(learned, records)
    same_heads(after.bundle, scratch.bundle)


def test_fits_of_others_are_not_kept(learned: Bundle) -> None:
    records = history(learned.task, "ada", COUNT)
    assert fitted(learned, records)[0].kept == {}
    kept = fitted(learned, records, kept={})[0].kept
    assert set(kept) == {"ada"}
    assert all(own.bytes > 1000 for own in kept["ada"].values())
    without = fitted(learned, [], kept=kept)[0]
    assert not without.bundle.heads_of("ada")["adapter"].numbers.any()
