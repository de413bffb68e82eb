"""Encoders in fewer bits: close to fp32, alike in every company, and never mixed with it."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from hydra_llm.model import precision as module
from hydra_llm.model.encoder import Encoder, open_encoder
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.persistence import (
    BundleFiles,
    encoder_config,
    encoder_of,
    precision_of,
    read_bundle,
    write_bundle,
)
from hydra_llm.model.precision import Precision

TEXTS = [
    "A quiet film about rain in an old harbour town.",
    "Senate passes the budget after a long night of debate",
    "How to bake bread with three ingredients",
    "Team wins the cup in extra time, fans celebrate until dawn",
    "The best stretches for people who sit all day",
    "A sailor reads letters from a war by night",
    "New phone has a better camera and a smaller battery",
    "Voters say that taxes decide the election",
    "Rain, again.",
    "Vegan recipes for a cold winter evening, with beans and lentils",
    "Goalkeeper out for six weeks with a knee injury",
    "Doctors advise eight hours of sleep",
]


@pytest.mark.slow
def test_texts_are_as_near_each_other_as_in_fp32(minilm: Encoder) -> None:
    places = np.triu_indices(len(TEXTS), 1)
    plain, other = (own.encode(TEXTS) for own in (minilm, minilm.at("bf16")))
    correlation = spearmanr((plain @ plain.T)[places], (other @ other.T)[places])[0]
    assert correlation >= 0.98
    assert not np.array_equal(plain, other)


def test_a_text_does_not_feel_its_company(tiny: Encoder) -> None:
    encoder = tiny.at("bf16")
    loud = ["star " * 30, "war film " * 14]
    alone = encoder.encode(["quiet film"])
    assert (encoder.encode(["quiet film", *loud])[0] @ alone[0]) > 0.999


def test_features_of_two_precisions_are_kept_apart(tiny: Encoder, tmp_path: Path) -> None:
    own: dict[str, np.ndarray] = {}
    for precision in ("fp32", "bf16"):
        cache = FeatureCache(tiny.at(precision), tmp_path / "features.sqlite")  # type: ignore[arg-type]
        assert cache.missing(["a film"]) == 1
        own[precision] = cache.texts(["a film"])
        cache.close()
    for precision, vector in own.items():
        again = FeatureCache(tiny.at(precision), tmp_path / "features.sqlite")  # type: ignore[arg-type]
        assert again.missing(["a film"]) == 0
        assert np.array_equal(again.texts(["a film"]), vector)
        again.close()
    last = FeatureCache(tiny, tmp_path / "features.sqlite")
    assert last.forget(["a film"]) == 2  # a deletion takes both of them
    last.close()


def test_the_digest_is_the_same_when_it_is_opened_again(tiny_folder: Path) -> None:
    kinds: tuple[Precision, ...] = ("fp32", "bf16")
    digests = [open_encoder(str(tiny_folder), precision=kind).digest for kind in kinds]
    assert len(set(digests)) == 2
    assert digests == [open_encoder(str(tiny_folder), precision=kind).digest for kind in kinds]


@pytest.mark.parametrize("learned", ["fp32", "bf16"])
def test_a_bundle_opens_its_encoder_as_learned_or_as_asked(
    tiny_folder: Path, tmp_path: Path, learned: Precision
) -> None:
    encoder = open_encoder(str(tiny_folder), max_length=20, precision=learned)
    write_bundle(tmp_path, BundleFiles({"encoder": encoder_config(encoder)}))
    files = read_bundle(tmp_path)
    assert precision_of(files.config) == learned
    assert encoder_of(files).digest == encoder.digest
    for other in ("fp32", "bf16"):
        asked = open_encoder(str(tiny_folder), max_length=20, precision=other)  # type: ignore[arg-type]
        assert encoder_of(files, other).digest == asked.digest  # type: ignore[arg-type]


def test_a_bundle_of_an_older_version_is_of_fp32(tiny_folder: Path, tmp_path: Path) -> None:
    encoder = open_encoder(str(tiny_folder), max_length=20)
    entry = encoder_config(encoder)
    del entry["precision"]
    write_bundle(tmp_path, BundleFiles({"encoder": entry}))
    assert encoder_of(read_bundle(tmp_path)).digest == encoder.digest


def test_without_its_instructions_a_line_says_what_helps(
    tiny: Encoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "has_fast_bf16", lambda: False)
    tiny.at("bf16")
    slow = "this processor has no matrix instructions of bfloat16: fp32 is faster"
    assert [record.getMessage() for record in caplog.records] == [slow]
