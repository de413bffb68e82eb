"""Histories are encoded ahead, with progress, in learning, fitting and answering."""

import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings, load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import SettingsError
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.heads import make_head
from hydra_llm.model.interactions import LabelBilinear, make_interaction
from hydra_llm.model.scorer import Scorer
from hydra_llm.personalizer import Personalizer
from hydra_llm.tasks.base import Task
from hydra_llm.training import encode
from hydra_llm.training.api import fit, learn
from hydra_llm.training.encode import STAGE, encode_ahead, vectorized
from hydra_llm.types import Record
from tests.learning import ONE_STRENGTH

MOODS = Task("moods", "classification", "Which mood? {input}", ("calm", "wild"))
USERS = {"t0": "train", "t1": "train", "t2": "train", "new": "test"}
RECORDS = [
    Record(user, f"r{i}", f"a {word} {i} of {user}", "calm" if word == "lake" else "wild", f"{i}")
    for user in USERS
    for i, word in enumerate(["lake", "storm"] * 4)
]


@pytest.fixture(scope="module")
def data() -> DataSet:
    return DataSet.from_records(MOODS, USERS, RECORDS, [])  # type: ignore[arg-type]


Reports = list[tuple[str, int, int]]


def settings(folder: Path, **given: object) -> Settings:
    return load_settings(cache=folder / "cache", max_length=32, retrieved=3, **given)


def learned(data: DataSet, folder: Path, reports: Reports, **given: object) -> Bundle:
    def report(stage: str, done: int, total: int) -> None:
        reports.append((stage, done, total))

    own = settings(folder, **given)
    out = folder / "bundle"
    learn(data, settings=own, out=out, progress=report, strengths=ONE_STRENGTH)
    return Bundle.load(out, here=settings(folder))


def of_encoding(reports: Reports) -> Reports:
    return [report for report in reports if report[0] == STAGE]


@pytest.mark.slow
def test_learning_and_fitting_report_what_they_encode(
    data: DataSet, tmp_path: Path, shared_minilm: None
) -> None:
    reports: Reports = []
    bundle = learned(data, tmp_path, reports)
    first = of_encoding(reports)
    assert first[0] == (STAGE, 0, 24)
    assert first[-1] == (STAGE, 24, 24)
    reports.clear()
    fit(data, bundle, progress=lambda *report: reports.append(report))
    assert of_encoding(reports) == [(STAGE, 0, 8), (STAGE, 8, 8)]
    reports.clear()  # all is kept now: there is nothing to wait for
    fit(data, bundle, progress=lambda *report: reports.append(report))
    assert of_encoding(reports) == []


@pytest.mark.slow
def test_a_bundle_scores_in_another_precision_but_is_not_fitted(
    data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_minilm: None
) -> None:
    reports: Reports = []
    plain = learned(data, tmp_path, reports)
    assert (plain.precision, plain.features.encoder.precision) == ("fp32", "fp32")
    fitted = fit(data, plain).bundle
    fitted.save(tmp_path / "bundle")
    low = Bundle.load(tmp_path / "bundle", here=settings(tmp_path, encoder_precision="bf16"))
    assert (low.precision, low.features.encoder.precision) == ("fp32", "bf16")
    line = r"^setting 'encoder_precision': .* learned with fp32, not bf16: its heads belong"
    with pytest.raises(SettingsError, match=line):
        fit(data, low)
    with pytest.raises(SettingsError, match=line):
        low.save(tmp_path / "bundle")
    monkeypatch.setenv("HYDRA_ENCODER_PRECISION", "bf16")
    asked = Personalizer.load(tmp_path / "bundle", "fake:rule=labels", cache=tmp_path / "cache")
    assert asked.settings.encoder_precision == "bf16"
    assert asked.answer("a lake at night", user="new").text in MOODS.labels


@pytest.mark.slow
def test_a_bundle_learned_in_bf16_stays_in_bf16(
    data: DataSet, tmp_path: Path, shared_minilm: None
) -> None:
    bundle = learned(data, tmp_path, [], encoder_precision="bf16")
    assert (bundle.precision, bundle.features.encoder.precision) == ("bf16", "bf16")
    fit(data, bundle).bundle.save(tmp_path / "bundle")
    assert Bundle.load(tmp_path / "bundle", here=settings(tmp_path)).precision == "bf16"


def test_a_tuned_encoder_is_of_fp32(data: DataSet, tmp_path: Path) -> None:
    own = settings(tmp_path, features="cross", tune_encoder=True, encoder_precision="bf16")
    with pytest.raises(SettingsError, match=r"^tune_encoder needs fp32, not bf16$"):
        learn(data, settings=own)


def test_nothing_is_learned_with_int8(data: DataSet, tmp_path: Path) -> None:
    line = r"^setting 'encoder_precision': nothing is learned with int8: learn with fp32, and"
    with pytest.raises(SettingsError, match=line):
        learn(data, settings=settings(tmp_path, encoder_precision="int8"))


def test_a_wrong_precision_is_one_line() -> None:
    line = r"^setting 'encoder_precision': .*'fp32', 'bf16' or 'int8' \(got 'fp16'\)$"
    with pytest.raises(SettingsError, match=line):
        load_settings(encoder_precision="fp16")


def test_what_is_encoded_ahead_is_what_the_side_features_compare() -> None:
    records = [Record("u", "1", "in", "calm"), Record("u", "2", "other", "wild")]
    assert vectorized(MOODS, records) == ["in", "other"]
    texts = Task("t", "generation", "{input}")
    assert vectorized(texts, records) == ["in", "other", "calm", "wild"]


def test_what_would_not_be_kept_is_not_encoded_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        digest, width = "0", 4

    monkeypatch.setattr("hydra_llm.model.feature_cache.MEMORY_BYTES", 100)
    store = FeatureCache(Refusing())  # type: ignore[arg-type]
    assert store.holds(6)
    assert not store.holds(7)
    encode_ahead(store, map(str, range(7)), lambda *report: pytest.fail("nothing is encoded"))


IN_A_TERMINAL = """
import sys, time
from pathlib import Path
from hydra_llm.cli.console import progress
from hydra_llm.model.encoder import open_encoder
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.heads import make_head
from hydra_llm.model.interactions import LabelBilinear, make_interaction
from hydra_llm.model.scorer import Scorer
from hydra_llm.training import encode
encode.AT_ONCE = 16
texts = [f"number {i} of many texts about rain and harbours" for i in range(160)]
with progress() as report:
    encode.encode_ahead(FeatureCache(open_encoder("minilm"), Path(sys.argv[1])), texts, report)
"""


@pytest.mark.slow
def test_a_terminal_shows_the_rate_and_the_time_that_remains(tmp_path: Path) -> None:
    terminal, child_end = pty.openpty()
    command = [sys.executable, "-c", IN_A_TERMINAL, str(tmp_path / "features.sqlite")]
    process = subprocess.Popen(
        command, stderr=child_end, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    )
    os.close(child_end)
    drawn = b""
    try:
        while piece := os.read(terminal, 65536):
            drawn += piece
    except OSError:  # how Linux ends a terminal
        pass
    os.close(terminal)
    assert process.wait() == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())
    assert re.search(r"encode texts .*\d+/160 .*[\d.]+/s, \d+ s left", plain)
    assert encode.STAGE == "encode texts"


@pytest.mark.slow
def test_a_bundle_knows_its_texts_in_every_precision(
    data: DataSet, tmp_path: Path, shared_minilm: None
) -> None:
    bundle = learned(data, tmp_path, [])
    adapter = bundle.scorers["adapter"]
    assert isinstance(adapter.interaction, LabelBilinear)
    shape = {**adapter.interaction.config(), "texts": 2, "own_rank": 3}
    interaction = make_interaction(shape)
    knowing = Scorer(interaction, make_head("linear", interaction), adapter.side_names)
    texts = ["a quiet lake at night", "rain over the harbour"]
    interaction.known = torch.from_numpy(bundle.features.texts(texts))
    replace(bundle, scorers={"adapter": knowing}, heads={}).save(tmp_path / "knowing")
    asked = [texts[1], "a quiet lake at nightfall", texts[0]]
    for precision in ("fp32", "bf16"):
        here = settings(tmp_path, encoder_precision=precision)
        loaded = Bundle.load(tmp_path / "knowing", here=here)
        assert (loaded.precision, loaded.features.encoder.precision) == ("fp32", precision)
        vectors = torch.from_numpy(loaded.features.texts(asked))
        places = loaded.scorers["adapter"].interaction._projected(vectors)[:, -1]
        assert places.tolist() == [1, -1, 0]
    pytest.importorskip("onnxscript")
    line = (
        r"^setting 'encoder_precision': the bundle knows texts by their vectors, which int8 moves"
    )
    with pytest.raises(SettingsError, match=line):
        Bundle.load(tmp_path / "knowing", here=settings(tmp_path, encoder_precision="int8"))
