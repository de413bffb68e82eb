"""The adapter on a device: an export's scores are the full scorer's, without torch."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from hydra_llm import device as device_module
from hydra_llm.bundle import Bundle
from hydra_llm.cli.main import run
from hydra_llm.config import Settings
from hydra_llm.device import Device
from hydra_llm.errors import BundleError, UnknownUser
from hydra_llm.export import export_onnx, write_scorer
from hydra_llm.model.encoder import open_encoder
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.head import Head
from hydra_llm.model.heads import make_head
from hydra_llm.model.heads.bias import BiasHead
from hydra_llm.model.heads.linear import LinearHead
from hydra_llm.model.interactions import Cross, Interaction, LabelBilinear, Tower
from hydra_llm.model.scorer import Scorer
from hydra_llm.model.word_model import Forest, WordModel
from hydra_llm.select import all_labels
from hydra_llm.side_features import Featurizer
from hydra_llm.tasks.base import CohortStats, Task
from hydra_llm.types import Candidate, Query, Record
from hydra_llm.word_counts import PopulationWords

pytestmark = pytest.mark.slow
STARS = Task("stars", "rating", "Stars? {input}", ("1", "2", "3"))
LINES = Task("lines", "generation", "A line? {input}")
WORDS = ("film", "song", "night", "rain", "star", "love", "war", "old", "great", "dull")
TEXTS = [f"the {a} of {b}" for a in WORDS for b in WORDS]
WITHOUT_TORCH = """
import json, sys

sys.modules.update(dict.fromkeys(("torch", "transformers", "sklearn", "scipy", "onnx")))
from hydra_llm.device import Device

device = Device.load(sys.argv[1])
texts = json.loads(sys.argv[2])
candidates = [candidate for text in texts for candidate in device.read([text])]
chosen = device.choose(sys.argv[3], candidates)
print(json.dumps([chosen.chosen, [own.score for own in chosen.candidates]]))
"""


def randomized(scorer: Scorer) -> Scorer:
    """Weights, means and scales as if they had been learned."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*scorer.parameters(), *scorer.buffers()]:
            tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.2)
    return scorer.eval()


def bundle_of(task: Task, folder: Path, interaction: Interaction, head: str) -> Bundle:
    """A bundle of two users, of whom one has a head."""
    features = FeatureCache(open_encoder(str(folder), max_length=32))
    outputs = task.labels or TEXTS[50:60]
    records = [
        Record(user, f"{user}{i}", TEXTS[7 * i], outputs[i % 3], str(2000 + i), position=i)
        for user in ("ada", "bob")
        for i in range(9)
    ]
    of = {user: [own for own in records if own.user == user] for user in ("ada", "bob")}
    words = (
        None if task.labels else WordModel(PopulationWords.of(of.values()), Forest.constant(0.4))
    )
    stats = CohortStats((0.5, 0.3, 0.2) if task.labels else ())
    names = Featurizer(task, features, stats, words).adapter_names
    kind = make_head(head, interaction, rank=3)
    if isinstance(kind, LinearHead) and interaction.by_label:
        kind.set_basis(torch.zeros(3, interaction.size))
    if isinstance(interaction, LabelBilinear) and interaction.known is not None:
        known = torch.from_numpy(features.texts(TEXTS[: 7 * len(interaction.known) : 7]))
    scorer = randomized(Scorer(interaction, kind, names))
    if isinstance(interaction, LabelBilinear) and interaction.known is not None:
        interaction.known.copy_(known)
    size = kind.numbers_per_user or 0
    numbers = np.random.default_rng(2).normal(size=size).astype(np.float32)
    settings = Settings(encoder=str(folder), head=head, max_length=32)
    return Bundle(
        task,
        settings,
        {},
        features,
        stats,
        scorers={"adapter": scorer},
        heads={"adapter": {"ada": Head.of(numbers, 9, 0.0)}},
        word_model=words,
        records=of,
    )


def of_labels(folder: Path) -> Bundle:
    interaction = LabelBilinear(16, 3, 6, codes=2, texts=2, own_rank=4)
    return bundle_of(STARS, folder, interaction, "linear")


def of_texts(folder: Path) -> Bundle:
    return bundle_of(LINES, folder, Tower(16, 8), "lowrank")


@pytest.fixture(scope="module", params=[of_labels, of_texts], ids=["labels", "texts"])
def exported(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, Path, Path]:
    """A bundle as it is on disk, its folder, and that of the device."""
    folder = tmp_path_factory.mktemp("device")
    request.param(tiny_folder).save(folder / "bundle")
    bundle = Bundle.load(folder / "bundle", cache=folder)
    export_onnx(bundle, folder / "phone", "ada")
    return bundle, folder / "bundle", folder / "phone"


def candidates_for(task: Task, place: int) -> list[Candidate]:
    if task.labels:
        return all_labels(task, [Candidate("2", "2", votes=3, greedy=True)])
    texts = [TEXTS[(17 * place + 31 * i) % 100] for i in range(2 + place % 4)]
    return [Candidate(text, text, i + 1, i == 0) for i, text in enumerate(texts)]


def both(bundle: Bundle, device: Device, count: int = 20) -> tuple[list[list[float]], list[bool]]:
    """Scores of the full scorer and of the device, and whether they pick the same."""
    pipeline, user = bundle.pipeline(), device.user
    scores: tuple[list[float], list[float]] = ([], [])
    same = []
    for place in range(count):
        query = Query(user, "asked", TEXTS[7 * place % 100])
        offered = candidates_for(bundle.task, place)
        context = pipeline.context(query, bundle.records.get(user, ()), bundle.heads_of(user))
        chosen = pipeline.select(context, offered), device.choose(query, offered)
        for own, selection in zip(scores, chosen, strict=True):
            own += [candidate.score for candidate in selection.candidates]
        same.append(chosen[0].chosen == chosen[1].chosen)
    return list(scores), same


def with_vectors_of(bundle: Bundle, device: Device) -> Device:
    """The device with the full encoder's vectors: what differs is the graph alone."""
    selector = device.pipeline.selector
    assert isinstance(selector, device_module.OnnxSelector)
    old = selector.featurizer
    new = Featurizer(old.task, bundle.features, old.stats, old.word_model)
    chosen = device_module.OnnxSelector(selector.scorer, new, selector.settings)
    stages = replace(device.pipeline, selector=chosen, vectorize=new.vectorize)
    return replace(device, pipeline=stages)


def test_the_graph_has_the_scores_of_the_scorer(exported: tuple[Bundle, Path, Path]) -> None:
    bundle, _, phone = exported
    (full, ours), same = both(bundle, with_vectors_of(bundle, Device.load(phone)))
    assert ours == pytest.approx(full, abs=1e-4)
    assert all(same)


def test_int8_orders_candidates_as_the_full_encoder(exported: tuple[Bundle, Path, Path]) -> None:
    bundle, _, phone = exported
    (full, ours), same = both(bundle, Device.load(phone))
    assert spearmanr(full, ours)[0] >= 0.98
    assert np.mean(same) >= 0.9


def test_the_head_and_the_records_count(exported: tuple[Bundle, Path, Path]) -> None:
    bundle, _, phone = exported
    device = Device.load(phone)
    (full, ours), _ = both(bundle, replace(device, heads={}), 5)
    assert np.abs(np.array(ours) - full).max() > 0.05
    (full, ours), _ = both(bundle, replace(device, records=()), 5)
    assert np.abs(np.array(ours) - full).max() > 0.05


def test_it_runs_where_torch_is_not_there(exported: tuple[Bundle, Path, Path]) -> None:
    bundle, _, phone = exported
    texts: Sequence[str] = bundle.task.labels or TEXTS[3:6]
    command = [sys.executable, "-c", WITHOUT_TORCH, str(phone), json.dumps(texts), TEXTS[5]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pick, scores = json.loads(done.stdout)
    device = Device.load(phone)
    offered = [own for text in texts for own in device.read([text])]
    here = device.choose(TEXTS[5], offered)
    assert (here.chosen, [own.score for own in here.candidates]) == (pick, scores)


def test_only_the_users_file_is_written_again(exported: tuple[Bundle, Path, Path]) -> None:
    bundle, place, phone = exported
    before = {path.name: path.stat().st_mtime_ns for path in phone.iterdir()}
    line = ["bundles", "export", str(place), "--onnx", "--out", str(phone), "--user", "bob"]
    assert run(line) == 0
    changed = [p.name for p in phone.iterdir() if p.stat().st_mtime_ns != before.get(p.name)]
    assert changed == ["user.json"]
    device = Device.load(phone)
    assert (device.user, dict(device.heads)) == ("bob", {})
    assert "ada" not in (phone / "user.json").read_text()
    shared = "".join(path.read_text("utf-8", "replace") for path in phone.glob("*.json"))
    assert '"ada' not in shared
    export_onnx(bundle, phone, "ada")


@pytest.mark.parametrize(
    ("interaction", "head"), [(Tower(16, 8), "mlp"), (Cross(16), "bias")], ids=["mlp", "cross"]
)
def test_other_heads_and_features_are_expressed(
    interaction: Interaction, head: str, tmp_path: Path
) -> None:
    names = ("cosine", "llm_votes")
    scorer = randomized(Scorer(interaction, make_head(head, interaction), names))
    write_scorer(scorer, tmp_path / "scorer.onnx")  # which compares the scores of both


class Odd(BiasHead):
    """A plug-in whose score depends on a number's sign, which no graph has."""

    name = "odd"

    def score_numbers(self, interaction: Interaction, x: Tensor, numbers: Tensor) -> Tensor:
        return super().score_numbers(interaction, x, numbers if numbers.sum() > 0 else -numbers)


def test_what_cannot_be_expressed_is_one_line_that_names_it(
    tiny_folder: Path, longformer_folder: Path, tmp_path: Path
) -> None:
    bundle = bundle_of(LINES, tiny_folder, Tower(16, 8), "kernel")
    with pytest.raises(BundleError, match="head 'kernel' of the adapter grows with the history"):
        export_onnx(bundle, tmp_path / "a")
    unsure = replace(bundle, settings=Settings(abstention_threshold=1.0))
    with pytest.raises(BundleError, match="'abstention_threshold' needs the head's posterior"):
        export_onnx(unsure, tmp_path / "a")
    odd = randomized(Scorer(Tower(16, 8), Odd(8), ("cosine",)))
    with pytest.raises(BundleError, match="head 'odd' of the adapter cannot be exported to ONNX: "):
        write_scorer(odd, tmp_path / "scorer.onnx")
    with pytest.raises(BundleError, match="no adapter"):
        export_onnx(replace(bundle, scorers={}), tmp_path / "a")
    with pytest.raises(UnknownUser, match="unknown user 'eve'"):
        export_onnx(bundle, tmp_path / "a", "eve")
    long = bundle_of(LINES, longformer_folder, Tower(16, 8), "linear")
    with pytest.raises(BundleError, match="encoder '.*longformer' is a Longformer"):
        export_onnx(long, tmp_path / "a")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(BundleError, match="holds other things than an export"):
        export_onnx(of_texts(tiny_folder), tmp_path / "notes")
    assert not (tmp_path / "a").exists()


def test_damaged_and_foreign_files_are_one_line(exported: tuple[Bundle, Path, Path]) -> None:
    _, _, phone = exported
    with pytest.raises(BundleError, match="cannot be read .* bundles export BUNDLE --onnx"):
        Device.load(phone / "nowhere")
    user = phone / "user.json"
    kept = user.read_text()
    user.write_text(json.dumps({**json.loads(kept), "bundle": "other"}))
    with pytest.raises(BundleError, match="exported from another bundle"):
        Device.load(phone)
    user.write_text(kept)
    graph = phone / "scorer.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=r"scorer\.onnx: damaged"):
        Device.load(phone)
    graph.write_bytes(content)
