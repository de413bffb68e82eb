"""Kinds of task: the contract that each keeps, and one that another package registers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hydra_llm.bench.method import find_methods
from hydra_llm.bench.stats import score
from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.tabular import read_table
from hydra_llm.errors import DataError, SettingsError
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.personalizer import Personalizer
from hydra_llm.tasks.base import KINDS, Task
from hydra_llm.tasks.lamp import LAMP
from hydra_llm.tasks.rating import Rating
from hydra_llm.testing import check_task
from hydra_llm.training.api import learn
from hydra_llm.types import Record

MODULE = '''
from hydra_llm.tasks.classification import Classification
from hydra_llm.tasks.base import MetricSpec, PromptWords, with_count


class YesNo(Classification):
    """Yes or no."""

    metrics = (MetricSpec("agreement"),)

    def prompt_words(self):
        return PromptWords("What this person said before:", "Question", "Reply")

    def metric_rows(self, metric, pairs):
        return with_count([float(answer == gold) for answer, gold in pairs])

    @classmethod
    def tidy(cls, output):
        return "yes" if output.lower() in ("y", "yes", "true") else "no"
'''


@pytest.fixture
def yes_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """A task of a kind that an installed package registers."""
    site = tmp_path / "site"
    info = site / "yes_no_task-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "yes_no_task.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: yes-no-task\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{KINDS.group}]\nyes_no = yes_no_task:YesNo\n")
    monkeypatch.syspath_prepend(site)
    return Task("likes", "yes_no", "Would this person like it? {input}", ("yes", "no"))


# ---- the contract


@pytest.mark.parametrize("kind", list(KINDS.names()))
def test_every_built_in_kind_keeps_the_contract(kind: str) -> None:
    check_task(kind)


@pytest.mark.parametrize("task", LAMP.values(), ids=lambda task: task.name)
def test_every_lamp_task_keeps_the_contract(task: Task) -> None:
    check_task(task)


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("gain", lambda self, answer, gold: 2.0 * (answer == gold), "worth 1 against itself"),
        ("gain", lambda self, answer, gold: float(answer <= gold), "not symmetric"),
        ("parse", lambda self, text, parsing: "1", "an empty text has an answer"),
        ("parse", lambda self, text, parsing: "1" if text else None, "does not parse to itself"),
        ("read", lambda self, text, parsing: "1", "read as another answer"),
        ("typical", lambda self, outputs: "6", "typical answer does not parse"),
        ("metric_rows", lambda self, metric, pairs: np.ones((len(pairs), 2)), "does not reward"),
        ("candidate_columns", ("only",), "for the columns"),
        (
            "record_features",
            lambda self, context, records: (
                np.arange(10.0).reshape(5, 2)[: len(records)] + len(records)
            ),
            "one by one",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_kind_does_not_pass(
    monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[..., object], said: str
) -> None:
    monkeypatch.setattr(Rating, name, wrong)
    with pytest.raises(AssertionError, match=said):
        check_task("rating")


# ---- one that another package registers


def test_an_installed_kind_keeps_the_contract(yes_no: Task) -> None:
    assert KINDS.names() == ["classification", "rating", "generation", "yes_no"]
    check_task(yes_no)


@pytest.mark.slow
def test_learn_and_ask_with_an_installed_kind(yes_no: Task, tmp_path: Path) -> None:
    records = [
        Record(
            f"u{user}",
            str(i),
            f"{('rain', 'war')[(i + user) % 2]} film {i}",
            ("yes", "no")[(i + user) % 2],
            position=i,
        )
        for user in range(4)
        for i in range(6)
    ]
    data = DataSet.from_records(
        yes_no, {"u0": "train", "u1": "train", "u2": "train", "u3": "test"}, records, []
    )
    llm = RuleLLM(lambda messages, index, rng: rng.choice(("Yes!", "**no**")))
    bundle = learn(data, llm, Settings(cache=tmp_path)).bundle
    assert set(bundle.scorers) == {"reranker", "adapter"}
    bundle.save(tmp_path / "bundle")
    answer = Personalizer.load(str(tmp_path / "bundle"), llm).answer("rain film", user="u0")
    assert answer.text in ("yes", "no")
    assert {candidate.answer for candidate in answer.candidates} == {"yes", "no"}
    scores = score(yes_no, [answer.text, None], ["yes", "no"])
    assert list(scores) == ["agreement"]


def test_an_installed_kind_reaches_tables_and_methods(yes_no: Task, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text(
        "user,input,output\n" + "".join(f"u{i % 3},t{i},{'Yn'[i % 2]}\n" for i in range(12))
    )
    data = read_table(file, kind="yes_no")
    assert data.task.labels == ("no", "yes")
    assert "scorer-only" in {method.name for method in find_methods(["all"], "yes_no")}


def test_a_kind_that_is_not_installed_is_named() -> None:
    with pytest.raises(SettingsError, match="unknown kind 'yes_no'"):
        _ = Task("likes", "yes_no", "{input}").strategy
    with pytest.raises(DataError) as caught:
        Task.from_json({"name": "n", "kind": "yes_no", "prompt": "{input}"})
    assert caught.value.field == "kind"
