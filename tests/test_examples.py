"""The examples: their data are what the script makes, and their code does what it says."""

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest

from hydra_llm.datasets.tabular import read_table

EXAMPLES = Path(__file__).parents[1] / "examples"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_script_makes_the_committed_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = module("make_agents")
    monkeypatch.setattr(maker, "FOLDER", tmp_path)
    maker.main()
    for name in ("labels.csv", "replies.csv"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "agents" / name).read_bytes()


def test_both_files_are_data_sets_of_thirty_users_with_habits() -> None:
    labels = read_table(EXAMPLES / "agents" / "labels.csv")
    assert (labels.task.kind, len(labels.users())) == ("classification", 30)
    texts = read_table(EXAMPLES / "agents" / "replies.csv")
    assert (texts.task.kind, len(texts.users())) == ("generation", 30)
    maker = module("make_agents")
    agents = [maker.make_agent(number, random.Random(number)) for number in range(30)]
    done = {topic: {maker.action(a, topic, "calm") for a in agents} for topic in maker.TOPICS}
    assert all(len(actions) > 1 for actions in done.values())
