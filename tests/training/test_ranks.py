"""Two processes that share gradient steps learn what one learns, and only the first one asks the
LLM, writes and speaks.
"""

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra_llm import ranks
from hydra_llm.bundle import Bundle
from hydra_llm.cli.main import run
from hydra_llm.datasets.native import save
from hydra_llm.errors import SettingsError
from hydra_llm.model.encoder import open_encoder
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.heads import make_head
from hydra_llm.model.interactions import Cross
from hydra_llm.model.scorer import Scorer
from hydra_llm.training.dataset import make_training_set
from hydra_llm.training.sgd import TextSource, train_jointly
from tests.model.conftest import _save_model
from tests.training.test_sample import made
from tests.training.test_sgd import CONFIG, scorer_of, towers, word_groups
from tests.waiting import FOREVER

ROOT = Path(__file__).parents[2]
TRAIN = """
import sys, torch
from hydra_llm import ranks

if not ranks.follows():
    from tests.training.test_ranks import trained

    with ranks.leading("local", steps=True, say=lambda line: print(line, file=sys.stderr)):
        torch.save(trained(sys.argv[1]), sys.argv[2])
"""
DIE = """
import os
from hydra_llm import ranks

with ranks._group():
    ranks._sent(None)
    os.kill(os.getpid(), 9)
"""
LEARN = "learn data --llm fake:rule=labels --json --set max_length=32 --set rerank=never "
LEARN += "--set head=mlp --set epochs=3 --set candidates=sampled --set label_features=false"
TOLERANCE = 1e-5


def trained(encoder: str) -> dict[str, Any]:
    """What joint training makes of `mlp` heads, and of a tuned encoder without dropout."""
    table = towers()
    scorer = scorer_of(table)
    losses, heads = train_jointly(scorer, table, replace(CONFIG, patience=3, lr=1e-3))
    groups, phi = word_groups(), open_encoder(encoder, max_length=16)
    store, interaction = FeatureCache(phi), Cross(phi.width)
    words = make_training_set(store, interaction, groups, rule="exact", loss="binary")
    interaction.prepare(words.groups)
    cross = Scorer(interaction, make_head("linear", interaction), (), loss="binary")
    tuning = replace(CONFIG, epochs=2, lr=1e-3, batch=8)
    tuned, _ = train_jointly(cross, words, tuning, TextSource(phi, groups))
    # A bias that shifts all candidates' logits, or all attention of a token, alike has a gradient
    # of rounding errors, and Adam takes full steps along it.
    weights = {**scorer.tensors(), "head.shared": scorer.tensors()["head.shared"][:-2]}
    weights |= {f"head.{user}": torch.tensor(own.numbers[:-2]) for user, own in heads.items()}
    weights |= {n: own for n, own in phi.model.state_dict().items() if "key.bias" not in n}
    weights["head.tuned"] = cross.tensors()["head.shared"]
    return {"losses": [losses, tuned], "weights": weights}


def launched(rank: int, port: int, **more: str) -> dict[str, str]:
    """The environment of a process, as launchers make it."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    places |= {"MASTER_PORT": port}
    named = {name: str(value) for name, value in places.items()}
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    own = {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return {**os.environ, **named, **own, **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(arguments: list[str], folder: Path, own: Mapping[str, str]) -> Iterator[Any]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = subprocess.Popen([sys.executable, *arguments], cwd=folder, env=own, **pipes)
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    dropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    encoder = str(_save_model(tmp_path / "bert", **dropped))
    port, made_by_two = free_port(), tmp_path / "two.pt"
    arguments = ["-c", TRAIN, encoder, str(made_by_two)]
    with (
        process(arguments, tmp_path, launched(1, port)) as second,
        process(arguments, tmp_path, launched(0, port)) as first,
    ):
        alone = trained(encoder)
        said = first.communicate(timeout=FOREVER)
        assert first.returncode == 0, said[1]
        assert second.communicate(timeout=FOREVER) == ("", "")
        assert second.returncode == 0
    assert said[1].count("2 processes take the gradient steps together") == 1
    both = torch.load(made_by_two)
    for own, others in zip(alone["losses"], both["losses"], strict=True):
        assert own == pytest.approx(others, abs=TOLERANCE)
    assert alone["weights"].keys() == both["weights"].keys()
    for name, value in alone["weights"].items():
        assert torch.allclose(value, both["weights"][name], rtol=0, atol=TOLERANCE), name
    # far less than the training itself, which the second process's gradients are half of
    before = open_encoder(encoder).model.state_dict()
    moved = [(both["weights"][n] - own).abs().max() for n, own in before.items() if "query" in n]
    assert max(moved) > 100 * TOLERANCE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands run: it holds the data set `data`."""
    save(made(8), tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_CACHE", str(tmp_path / "alone"))
    return tmp_path


@pytest.mark.slow
def test_accelerate_launch_asks_and_writes_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(shlex.split(f"{LEARN} --out one")) == 0
    alone = json.loads(capsys.readouterr().out)
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port"
    command = f"{launcher} {free_port()} -m hydra_llm {LEARN} --out two --record calls.jsonl"
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    own = {**os.environ, "HYDRA_CACHE": str(folder / "both"), "PYTHONPATH": path}
    with process(shlex.split(command), folder, own) as launch:
        out, err = launch.communicate(timeout=FOREVER)
    assert launch.returncode == 0, err
    both = json.loads(out)
    assert err.count("accelerate: 2 processes") == 1
    assert both["llm_calls"] == alone["llm_calls"] > 0
    assert both["llm_calls_cached"] == alone["llm_calls_cached"] == 0
    scorers = [Bundle.load(Path(name)).scorers["adapter"].tensors() for name in ("one", "two")]
    for name, value in scorers[0].items():
        shifts = 2 if name == "head.shared" else 0  # as in `trained`
        end = len(value) - shifts if value.ndim else None
        pair = (value, scorers[1][name]) if end is None else (value[:end], scorers[1][name][:end])
        assert torch.allclose(*pair, rtol=0, atol=TOLERANCE), name


@pytest.mark.slow
def test_a_lost_process_ends_the_run_and_labels_stay(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port, learn = free_port(), shlex.split(f"-m hydra_llm {LEARN} --out bundle")
    with (
        process(["-c", DIE], folder, launched(1, port)),
        process(learn, folder, launched(0, port)) as first,
    ):
        out, err = first.communicate(timeout=FOREVER)
    assert (first.returncode, out) == (1, "")
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("hydra-llm: accelerate: another process ended: what was labelled is")
    assert not (folder / "bundle").exists()
    assert run(shlex.split(f"{LEARN} --out bundle")) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["llm_calls"] == 0 < again["llm_calls_cached"]


def test_ray_and_accelerate_together_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in launched(0, 1).items():
        monkeypatch.setenv(name, value)
    assert run(shlex.split(f"{LEARN} --out bundle --set research.engine=ray")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hydra-llm: engine=ray and accelerate spread work in two ways: ")
    monkeypatch.setenv("RANK", "1")
    assert run(["learn", "--no-such-option"]) == 2
    assert capsys.readouterr().err == "", "the first process says it"


def test_a_launcher_that_starts_one_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with (
        pytest.raises(SettingsError, match="--multi_gpu"),
        ranks.leading("local", steps=True, say=print),
    ):
        raise AssertionError


def test_what_has_no_gradient_steps_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in launched(0, 1).items():
        monkeypatch.setenv(name, value)
    sent, said = list[object](), list[str]()
    monkeypatch.setattr(ranks, "_group", nullcontext)
    monkeypatch.setattr(ranks, "_sent", sent.append)
    with ranks.leading("local", steps=False, say=said.append):
        assert not sent
    assert sent == [None]  # the others may end
    [line] = said
    assert "have no gradient steps to share here" in line
