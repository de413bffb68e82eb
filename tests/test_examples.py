"""The examples: their data are what the script makes, and their code does what it says."""

import importlib.util
import json
import random
import re
from pathlib import Path
from types import ModuleType

import pytest

from hydra_llm import alearn
from hydra_llm.bench.details import read_details
from hydra_llm.bench.method import METHODS
from hydra_llm.cli.main import run
from hydra_llm.datasets.tabular import read_table
from tests.learning import ONE_STRENGTH

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


@pytest.mark.slow
def test_the_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setenv("HYDRA_CACHE", str(tmp_path))
    defaults = alearn.__kwdefaults__ or {}
    monkeypatch.setitem(defaults, "strengths", ONE_STRENGTH)  # their choice takes most of the time
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            assert not cell["outputs"]
    out = capsys.readouterr().out
    right, of = map(int, re.findall(r"(\d+) of (\d+) answers", out)[0])
    assert right > 1.5 * of / 4


def test_a_method_of_ones_own_stands_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(METHODS, "added", {})
    monkeypatch.setenv("HYDRA_CACHE", str(tmp_path / "cache"))
    module("my_method")
    data, out = str(tmp_path / "data"), tmp_path / "run"
    assert run(["data", "import", str(EXAMPLES / "agents" / "labels.csv"), "--out", data]) == 0
    methods = ["--methods", "rag@4,distinct@4", "--limit", "1"]
    assert run(["bench", "run", data, "--llm", "fake:echo", "--out", str(out), *methods]) == 0
    details = read_details(out).items()
    shown = [own["records"][: own["shown"]] for key, own in details if key[0] == "distinct@4"]
    assert len(shown) == len({key[1:] for key, _ in details}) > 5
    for records in shown:
        answers = [record["output"] for record in records]
        assert len(set(answers)) == len(answers) > 1
    capsys.readouterr()
    assert run(["bench", "show", str(out), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["runs"]
    groups = {row["method"]: row["group"] for row in report["methods"]}
    assert groups == {"rag@4": "prompt", "distinct@4": "prompt"}
    assert run(["bench", "methods"]) == 0
    assert "K records with distinct answers" in capsys.readouterr().out
