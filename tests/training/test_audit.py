"""The membership test of a bundle's shared base."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from hydra_llm.bundle import Bundle
from hydra_llm.cli.main import run
from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import save
from hydra_llm.errors import DataError, SettingsError
from hydra_llm.model.scorer import Scorer
from hydra_llm.tasks.base import Task
from hydra_llm.training import audit as audited
from hydra_llm.training.api import learn
from hydra_llm.training.audit import audit
from hydra_llm.training.dataset import LabelledGroup
from hydra_llm.training.membership import attacks, auc, draw_members, true_positives
from hydra_llm.training.strengths import Strengths
from hydra_llm.training.train_scorer import LabelledData
from hydra_llm.types import Record

TASK = Task("likes", "classification", "Would they like this? {input}", ("no", "yes"))
WORDS = ("amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heath", "iris", "kelp")
WORDS += ("lotus", "maple")
USERS, RECORDS = 24, 4
WEAK = Strengths(ridges=(0.03,), side_ridges=(1.0,), precisions=(30.0,))


def made(users: int = USERS, labels: tuple[str, ...] = TASK.labels) -> DataSet:
    """Users with texts of their own, whose labels are drawn by lot: a base can only memorise."""
    draw, records = np.random.default_rng(0), []
    for user in range(users):
        for at in range(RECORDS):
            text = f"{WORDS[user % 12]} {WORDS[(user // 12 + 5 * at) % 12]} {user} {at}"
            label = labels[int(draw.integers(len(labels)))]
            records.append(Record(f"u{user:02}", f"r{user}-{at}", text, label, str(2000 + at)))
    return DataSet.from_records(
        TASK, {f"u{user:02}": "train" for user in range(users)}, records, []
    )


@pytest.fixture(scope="module")
def bundle(shared_minilm: None, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    cache = tmp_path_factory.mktemp("caches")
    given: dict[str, Any] = {"max_length": 32, "cache": cache, "head_prior": "isotropic"}
    return learn(made(), settings=Settings.checked(given), strengths=WEAK).bundle


def test_members_of_a_base_that_memorises_are_found(bundle: Bundle) -> None:
    seen: list[tuple[str, int, int]] = []
    found = audit(bundle, made(), users=10, bases=16, progress=lambda *own: seen.append(own))
    assert found.attacks["ratio"].auc.low > 0.75
    assert (found.users, found.training_users, found.bases) == (10, USERS, 16)
    assert [own for own in seen if own[0] == "learn bases"][-1] == ("learn bases", 16, 16)


def test_a_base_that_is_the_same_without_a_user_tells_nothing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = audited.learned_base

    def of_one_half(bundle: Bundle, labelled: LabelledData, groups: list[LabelledGroup]) -> Scorer:
        every = labelled.groups(bundle.featurizer)
        return learned(bundle, labelled, every[: len(every) // 2])

    monkeypatch.setattr(audited, "learned_base", of_one_half)
    assert audit(bundle, made(), users=10, bases=8).attacks["ratio"].auc.value == 0.5


def test_other_data_are_refused_in_one_line(bundle: Bundle) -> None:
    fewer = made(USERS - 1)
    with pytest.raises(DataError, match="user 'u23' is not in it; give the set that `learn` read"):
        audit(bundle, fewer)
    changed = made(labels=("no", "no"))
    with pytest.raises(DataError, match="user 'u00' has other records"):
        audit(bundle, changed)
    task = replace(TASK, labels=("bad", "good"))
    with pytest.raises(DataError, match="is not the bundle's 'likes'"):
        audit(bundle, DataSet.from_records(task, {}, [], []))


def test_what_cannot_be_audited_is_told_in_one_line(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError, match="has no reranker to audit: it has adapter"):
        audit(bundle, made(), scorer="reranker")
    with pytest.raises(SettingsError, match="10 bases: take a multiple of 4 from 8"):
        audit(bundle, made(), bases=10)
    head = replace(bundle, settings=bundle.settings.model_copy(update={"tune_encoder": True}))
    with pytest.raises(SettingsError, match="tune_encoder cannot be audited"):
        audit(head, made())
    monkeypatch.setattr(audited, "LEAST_USERS", 30)
    with pytest.raises(DataError, match="24 of 24 training users have labelled records, an audit"):
        audit(bundle, made())


def test_each_user_is_in_exactly_half_of_the_bases() -> None:
    members = draw_members(users=30, bases=12, seed=1)
    for half in (members[:6], members[6:]):
        assert (half.sum(0) == 3).all()
    assert len({tuple(row) for row in members}) == 12


def test_the_auc_equals_that_of_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    members, guesses = draw.random((6, 20)) < 0.5, draw.integers(0, 9, (6, 20)).astype(float)
    assert auc(guesses, members) == pytest.approx(roc_auc_score(members.ravel(), guesses.ravel()))
    every = np.arange(200.0)[None]
    assert true_positives(every, every >= 100) == 1.0
    assert true_positives(-every, every >= 100) == 0.0


def test_statistics_that_say_nothing_give_one_half() -> None:
    values = [
        attacks(np.random.default_rng(seed).normal(size=(16, 40, 2)), draw_members(40, 16, seed))
        for seed in range(8)
    ]
    mean = np.mean([own["ratio"].auc.value for own in values])
    assert 0.47 < mean < 0.53  # a user whom a base is judged by itself would be below


def test_the_ratio_knows_users_apart_and_one_threshold_does_not() -> None:
    members, draw = draw_members(40, 32, 0), np.random.default_rng(0)
    usual = draw.normal(size=40) * 10  # of each user, far more than membership changes
    loss = usual - 0.3 * members + 0.1 * draw.normal(size=members.shape)
    found = attacks(np.stack([loss, draw.normal(size=loss.shape)], -1), members)
    assert found["ratio"].auc.value > 0.95
    assert found["ratio"].true_positives.value > 0.3
    assert abs(found["loss"].auc.value - 0.5) < 0.1


def test_the_command_prints_json_and_a_table(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle.save(tmp_path / "b")
    save(made(), tmp_path / "data")
    words = ["audit", str(tmp_path / "b"), str(tmp_path / "data"), "--bases", "8", "--users", "8"]
    assert run(words) == 0
    assert "likelihood ratio (LiRA)" in capsys.readouterr().out
    assert run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["privacy"] is None
    assert 0 <= told["attacks"]["ratio"]["auc"]["value"] <= 1
