"""Encoding by ONNX Runtime: torch's vectors, a graph that is made once, torch where it fails."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hydra_llm.errors import MissingExtra, SettingsError
from hydra_llm.model import onnx_encoder as module
from hydra_llm.model.encoder import Encoder, open_encoder
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.onnx_encoder import graph_of, use_onnx

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TEXTS = [
    "",
    "star",
    "quiet film",
    "war film " * 9,
    "日本 🙂 naïve",
    "star " * 90,
    "\ud800 film\x00",
]


@pytest.fixture(autouse=True)
def fresh() -> None:
    """No graph of another test."""
    module._opened.clear()


def made(encoder: Encoder, folder: Path | None) -> Encoder:
    cache = FeatureCache(encoder, folder and folder / "features.sqlite")
    use_onnx(cache)
    cache.close()
    return cache.encoder


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_those_of_torch(tiny_folder: Path, tmp_path: Path, pooling: Any) -> None:
    plain = open_encoder(str(tiny_folder), max_length=32, pooling=pooling)
    other = made(plain, tmp_path)
    assert other.graph is not None
    assert plain.graph is None
    assert other.digest == plain.digest, "one cache"
    expected = plain.encode(TEXTS)
    assert np.abs(other.encode(TEXTS) - expected).max() < 1e-5
    alone = np.concatenate([other.encode([text]) for text in TEXTS])
    assert np.abs(alone - expected).max() < 1e-5, "padding is not seen"
    pairs = [own.encode_pairs(TEXTS, TEXTS[::-1]) for own in (plain, other)]
    assert np.abs(pairs[0] - pairs[1]).max() < 1e-5
    assert other.encode([]).shape == plain.encode([]).shape
    assert other.forward_pairs(["a"], ["film"]).requires_grad, "gradients are torch's"


@pytest.mark.slow
def test_minilm_is_the_same(minilm: Encoder, tmp_path: Path) -> None:
    texts = [*TEXTS, "A quiet film about rain in an old harbour town.", "word " * 300, "?" * 400]
    assert np.abs(made(minilm, tmp_path).encode(texts) - minilm.encode(texts)).max() < 1e-5


def test_a_graph_is_made_once(
    tiny: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    made(tiny, tmp_path)
    assert [own.name for own in (tmp_path / module.FOLDER).iterdir()] == [
        f"{tiny.digest[:32]}-fp32-{module.RECIPE}.onnx"
    ]
    assert [own.levelname for own in caplog.records] == ["INFO"], "told once, without warnings"
    module._opened.clear()  # as another process
    monkeypatch.setattr(module, "trace", lambda *_: pytest.fail("made again"))
    assert made(tiny, tmp_path).graph is not None


@pytest.mark.parametrize("damage", ["cut", "others"])
def test_a_damaged_graph_is_made_anew(
    tiny: Encoder, save_model: Any, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / module.FOLDER / f"{tiny.digest[:32]}-fp32-{module.RECIPE}.onnx"
    if damage == "cut":
        made(tiny, tmp_path)
        path.write_bytes(path.read_bytes()[:-999])
    else:
        other = open_encoder(str(save_model(tmp_path / "other", seed=1)), max_length=32)
        made(other, tmp_path)
        next(path.parent.iterdir()).rename(path)
    module._opened.clear()
    found = made(tiny, tmp_path).encode(["film"])
    assert np.abs(found - tiny.encode(["film"])).max() < 1e-5


def test_without_a_folder_it_is_made_all_the_same(tiny: Encoder, tmp_path: Path) -> None:
    (tmp_path / module.FOLDER).write_text("a file where the folder should be")
    assert made(tiny, tmp_path).graph is not None
    module._opened.clear()
    assert made(tiny, None).graph is not None


def test_what_cannot_be_traced_stays_with_torch(
    longformer_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = open_encoder(str(longformer_folder))
    for _ in range(2):
        assert made(plain, tmp_path).graph is None
    lines = [own.getMessage() for own in caplog.records if own.levelname == "WARNING"]
    fault = "ONNX Runtime cannot run it: the attention of a Longformer is no graph"
    assert lines == [f"encoder '{longformer_folder}' stays with torch, {fault}"]
    with pytest.raises(SettingsError, match=r"^encoder_precision=int8: encoder '.*' has none: "):
        made(plain.at("int8"), tmp_path)


def test_a_graph_of_other_vectors_is_not_used(
    tiny: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = module._Pooled.forward
    monkeypatch.setattr(module._Pooled, "forward", lambda *own: traced(*own) * 1.001)
    assert made(tiny, tmp_path).graph is None
    assert not list((tmp_path / module.FOLDER).iterdir()), "nor kept"


def test_long_texts_are_torchs_in_fp32(
    tiny: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, low = made(tiny, tmp_path), made(tiny.at("int8"), tmp_path)
    monkeypatch.setattr(Encoder, "pooled", lambda *_: pytest.fail("by torch"))
    monkeypatch.setattr("hydra_llm.model.encoder.GRAPH_TOKENS", 3)
    other.encode(["film"])
    low.encode(["a quiet film"])
    with pytest.raises(pytest.fail.Exception, match="by torch"):
        other.encode(["a quiet film"])


def test_without_the_extra_torch_encodes(
    tiny: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_llm.extras._is_there", lambda name: name != "onnxruntime")
    assert made(tiny, tmp_path) is tiny
    line = r"^encoder_precision=int8 needs the extra 'onnx' \(onnxruntime is not installed\): pip "
    with pytest.raises(MissingExtra, match=line):
        tiny.at("int8")


def test_int8_has_features_of_its_own(tiny: Encoder, tmp_path: Path) -> None:
    low = made(tiny.at("int8"), tmp_path)
    assert low.precision == "int8"
    assert low.digest not in (tiny.digest, tiny.at("bf16").digest)
    vectors = tiny.encode(TEXTS), low.encode(TEXTS), tiny.at("int8").encode(TEXTS)
    assert not np.array_equal(vectors[0], vectors[1])
    assert ((vectors[0] * vectors[1]).sum(1) > module.LEAST_COSINE).all()
    assert np.array_equal(vectors[1], vectors[2]), "also where the caller did not ask for a graph"


def test_another_process_gets_no_session(tiny: Encoder, tmp_path: Path) -> None:
    sent = pickle.loads(pickle.dumps(made(tiny, tmp_path)))
    assert sent.graph is None
    assert np.array_equal(sent.encode(TEXTS), tiny.encode(TEXTS))


def test_threads_share_a_session(tiny: Encoder) -> None:
    one, other = graph_of(tiny), graph_of(tiny)
    assert one is other
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert graph_of(tiny) is not one, "as many as torch has"
    finally:
        torch.set_num_threads(threads)
