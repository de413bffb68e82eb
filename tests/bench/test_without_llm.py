"""A run without an LLM: methods that ask none answer, another is refused by name."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from hydra_llm.bench import experiment
from hydra_llm.bench.method import METHODS, load_method
from hydra_llm.bundle import Bundle
from hydra_llm.cli.main import run
from hydra_llm.config import Settings
from hydra_llm.datasets.native import save
from hydra_llm.tasks.base import Task
from hydra_llm.training.api import learn
from tests.bench.test_experiment import SMALL, TAGS, TITLES, users_data
from tests.learning import ONE_STRENGTH

STARS = Task("stars", "rating", "How many stars? {input}", ("1", "2", "3", "4", "5"))
NEVER = {"user-majority", "copy-nearest", "scorer-only", "scorer-mismatched"}
OFFSETS = {"user-offset", "item-offset"}
BY_ADAPTER = {"hydra", "hydra-shared", "hydra-adapter", "mismatched"}
pytestmark = pytest.mark.usefixtures("shared_minilm")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "learn", partial(learn, strengths=ONE_STRENGTH))


def asking_none(task: Task, **settings: object) -> set[str]:
    methods = [load_method(name) for name in METHODS.builtin]
    chosen = Settings(**settings)  # type: ignore[arg-type]
    able = (m for m in methods if m.answers(task.kind) and not m.only_choices)
    return {m.name for m in able if not m.asks_llm(task, chosen)}


def test_an_adapter_that_hears_no_llm_asks_none() -> None:
    assert asking_none(TAGS) == asking_none(STARS) == NEVER | OFFSETS | BY_ADAPTER
    assert asking_none(TITLES) == {"user-majority", "copy-nearest"}
    for settings in (
        {"ask": "always"},
        {"candidates": "sampled"},
        {"abstention_threshold": 1.0},
        {"gate": "always"},
    ):
        assert asking_none(TAGS, **settings) == NEVER | OFFSETS


def command(folder: Path, *more: str) -> list[str]:
    sets = [f"--set={name}={value}" for name, value in SMALL.items()]
    places = ["--out", str(folder / "run"), f"--set=cache={folder / 'cache'}"]
    return ["bench", "run", str(folder / "data"), *places, *sets, "--json", *more]


@pytest.mark.slow
@pytest.mark.parametrize("task", [TAGS, STARS], ids=lambda task: task.name)
def test_every_method_that_asks_none_runs_without_an_llm(
    task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(users_data(task), tmp_path / "data")
    names = ",".join(sorted(asking_none(task)))
    assert run(command(tmp_path, "--methods", names, "--dry-run")) == 0
    assert json.loads(capsys.readouterr().out)["total"]["calls"] == 0
    assert run(command(tmp_path, "--methods", names)) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == asking_none(task)
    assert all(row["calls"] == row["failed"] == 0 for row in rows.values())
    assert rows["hydra"]["metrics"] == rows["scorer-only"]["metrics"]
    # the same with its bundle, and by folds
    bundle = ["--bundle", str(tmp_path / "run" / "bundle"), "--methods", "hydra,scorer-only"]
    assert run(command(tmp_path, *bundle, "--out", str(tmp_path / "given"))) == 0
    folds = ["--folds", "2", "--methods", "hydra,user-offset", "--out", str(tmp_path / "folds")]
    assert run(command(tmp_path, *folds)) == 0


@pytest.mark.parametrize(
    ("task", "methods", "asking", "able"),
    [
        (TAGS, "user-majority,rag@1,hydra", "rag@1", "hydra-adapter, hydra, hydra-shared"),
        (TAGS, "all", "zero-shot", "hydra-adapter, hydra, hydra-shared"),
        (TITLES, "hydra", "hydra", "user-majority, copy-nearest"),
    ],
)
def test_a_method_that_asks_an_llm_is_named(
    task: Task,
    methods: str,
    asking: str,
    able: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save(users_data(task), tmp_path / "data")
    assert run(command(tmp_path, "--methods", methods)) == 2
    fault = capsys.readouterr().err
    fix = "give one of --llm SPEC and --replay FILE, or take only"
    assert f"method '{asking}' asks an LLM: {fix} {able}" in fault
    assert len(fault.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_bundle_that_hears_its_llm_needs_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(users_data(TAGS), tmp_path / "data")
    assert run(command(tmp_path, "--methods", "hydra")) == 0
    folder = tmp_path / "run" / "bundle"
    bundle = Bundle.load(folder)
    adapter = bundle.scorers["adapter"]
    place = next(i for i, name in enumerate(adapter.side_names) if name.startswith("llm_"))
    with torch.no_grad():
        adapter.side_weight[place] = 1.0
    replace(bundle, scorers={"adapter": adapter}).save(folder)
    capsys.readouterr()
    given = ["--bundle", str(folder), "--out", str(tmp_path / "given")]
    assert run(command(tmp_path, *given, "--methods", "scorer-only,hydra")) == 2
    assert "method 'hydra' asks an LLM" in capsys.readouterr().err
    assert run(command(tmp_path, *given, "--methods", "scorer-only")) == 0
    silent = [*given, "--methods", "hydra", "--set", "vote_share=false"]
    assert run(command(tmp_path, *silent, "--out", str(tmp_path / "silent"))) == 0
