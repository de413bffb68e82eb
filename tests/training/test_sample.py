"""Learning from more users than the shared weights need: a sample for what is shared, the others'
heads by their histories; and a killed `learn` goes on.
"""

import gc
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hydra_llm import rows
from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet, Split
from hydra_llm.datasets.native import load, save
from hydra_llm.model.interactions import Groups, LabelBilinear
from hydra_llm.tasks.base import Task
from hydra_llm.training import api, fitting, resume, work
from hydra_llm.training.api import fit, learn, sampled_users
from hydra_llm.training.calibration import FitReport
from hydra_llm.training.learned import Learned
from hydra_llm.training.prior import State
from hydra_llm.training.strengths import _Base, _Fold
from hydra_llm.training.train_scorer import solve_heads
from hydra_llm.types import Record
from tests.learning import ONE_STRENGTH

TASK = Task("likes", "classification", "Would they like this? {input}", ("no", "yes"))
TOPICS = ("football match", "garlic soup", "bond market", "rose garden", "moon rocket")
USERS, RECORDS = 14, 8


def made(users: int = USERS) -> DataSet:
    """Users who like some topics; the last two are new."""
    records = []
    for number in range(users):
        likes = np.random.default_rng(number).random(len(TOPICS)) < 0.5
        for at in range(RECORDS):
            topic = (number + at) % len(TOPICS)
            label = TASK.labels[int(likes[topic])]
            text = f"{TOPICS[topic]} {at // len(TOPICS)}"
            records.append(Record(f"u{number}", f"r{at}", text, label, str(2000 + at)))
    splits: dict[str, Split] = {f"u{number}": "train" for number in range(users - 2)}
    splits |= {f"u{number}": "test" for number in range(users - 2, users)}
    return DataSet.from_records(TASK, splits, records, [])


def settings(**given: Any) -> Settings:
    return Settings.checked({"max_length": 32, **given})


def alive() -> int:
    """How many records are in memory."""
    gc.collect()
    return sum(type(own) is Record for own in gc.get_objects())


def same_heads(one: Bundle, other: Bundle, users: Sequence[str], tolerance: float = 0.0) -> None:
    for user in users:
        first, second = one.heads_of(user)["adapter"], other.heads_of(user)["adapter"]
        np.testing.assert_allclose(first.numbers, second.numbers, atol=tolerance)
        assert (first.records, first.until) == (second.records, second.until)


def same_weights(one: Bundle, other: Bundle) -> None:
    for name, value in one.scorers["adapter"].tensors().items():
        assert torch.equal(value, other.scorers["adapter"].tensors()[name]), name


def test_all_users_are_the_base_where_they_are_few() -> None:
    users = [f"u{number}" for number in range(50)]
    assert sampled_users(users, settings(base_users=50)) == users
    some = sampled_users(users, settings(base_users=20))
    assert len(some) == len(set(some)) == 20
    assert some == [user for user in users if user in set(some)], "in their order"
    assert some == sampled_users(users, settings(base_users=20))
    assert some != sampled_users(users, settings(base_users=20, seed=1))


@pytest.mark.slow
def test_a_sample_is_learned_from_and_every_user_has_a_head() -> None:
    """The same as learning from the sample alone, then fitting the others as new users."""
    data, few = made(), settings(base_users=6)
    learned = learn(data, settings=few, strengths=ONE_STRENGTH)
    base, train = learned.bundle.trained_on, data.users("train")
    assert base == tuple(sampled_users(train, few))
    assert learned.users == tuple(train)
    assert set(learned.bundle.heads["adapter"]) == set(learned.bundle.records) == set(train)
    assert learned.bundle.report["base_users"] == 6
    assert learned.bundle.report["users"] == len(train)
    assert any("6 of 12 users, drawn by lot; standard error of" in note for note in learned.notes)
    splits: dict[str, Split] = {user: "train" if user in base else "test" for user in train}
    alone = replace(data, splits=splits)
    other = learn(alone, settings=few, strengths=ONE_STRENGTH).bundle
    other = fit(alone, other).bundle
    same_weights(learned.bundle, other)
    same_heads(learned.bundle, other, train)


@pytest.mark.slow
def test_users_fitted_some_at_a_time_get_the_same_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    data = made()
    bundle = learn(data, settings=settings(), strengths=ONE_STRENGTH).bundle
    names = data.users()
    at_once = fit(data, bundle, users=names)
    monkeypatch.setattr(work, "blocks", partial(work.blocks, most=3 * RECORDS))
    told = list[tuple[str, int, int]]()
    apart = fit(data, bundle, users=names, progress=lambda *step: told.append(step))
    same_heads(at_once.bundle, apart.bundle, names, tolerance=1e-5)
    assert [step for step in told if step[0] == "fit adapter"][-1] == ("fit adapter", 14, 14)
    stages = [own.stages["fit adapter"].users for own in (at_once, apart)]
    assert stages == [len(names)] * 2


@pytest.mark.slow
def test_neither_learning_nor_fitting_holds_all_histories(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of 60 users' records, those of a few users are alive at any time."""
    monkeypatch.setattr(rows, "LATEST", 2)
    monkeypatch.setattr(api, "LATEST", 2)
    few_records = partial(work.blocks, most=4 * RECORDS)
    monkeypatch.setattr(work, "blocks", few_records)
    save(made(60), tmp_path / "data")
    most = 0

    def counted(*args: Any) -> Any:
        nonlocal most
        most = max(most, alive())
        return solve_heads(*args)

    monkeypatch.setattr(fitting, "solve_heads", counted)
    data = load(tmp_path / "data")
    folder, few = tmp_path / "bundle", settings(base_users=5)
    gc.collect()
    gc.freeze()  # what is there already is neither counted nor looked through each time
    try:
        learn(data, settings=few, out=folder, strengths=ONE_STRENGTH)
        fit(load(tmp_path / "data"), folder, users=data.users("train"))
    finally:
        gc.unfreeze()
    assert 0 < most <= 20 * RECORDS


def test_the_error_of_the_prior_is_the_jackknifes() -> None:
    """Against Σ written out: the deviations of the folds' from their mean."""
    draw = torch.Generator().manual_seed(0)
    bases = [torch.randn(3, 7, generator=draw) for _ in range(4)]
    trains: list[Any] = [object() for _ in bases]
    report = FitReport(prior_ridge=10.0, prior_steps=2)
    empty = (torch.zeros(0), torch.zeros(0), torch.zeros(0))
    known = {
        (id(train), 10.0, 2): State(torch.zeros(7), torch.zeros(()), empty, basis)
        for train, basis in zip(trains, bases, strict=True)
    }
    folds = [_Fold(train, []) for train in trains]
    nothing: Any = None
    base = _Base(nothing, nothing, folds, report, nothing, 3, known)
    sigmas = torch.stack([basis.T @ basis for basis in bases])
    mean = sigmas.mean(0)
    expected = math.sqrt(3 / 4 * float((sigmas - mean).square().sum())) / float(mean.norm())
    assert base.error_of_prior() == pytest.approx(expected, rel=1e-4)
    assert math.isnan(base._replace(report=FitReport()).error_of_prior())


def test_groups_that_share_texts_are_those_that_do_not() -> None:
    """Features, places and principal directions do not depend on how vectors are kept."""
    draw = torch.Generator().manual_seed(0)
    left = torch.randn(9, 6, generator=draw)
    text = torch.randint(9, (40,), generator=draw)
    side, mask = torch.zeros(40, 2, 0), torch.ones(40, 2, dtype=torch.bool)
    shared, plain = Groups(left, None, side, mask, text=text), Groups(left[text], None, side, mask)
    one, other = LabelBilinear(6, 2, 3, 1, 2), LabelBilinear(6, 2, 3, 1, 2)
    for interaction, groups in ((one, shared), (other, plain)):
        interaction.known = left[:2].clone()
        interaction.prepare(groups)
    torch.testing.assert_close(one.mean, other.mean)
    torch.testing.assert_close(one.project, other.project)
    for part in (slice(None), slice(0, 3), torch.tensor([5, 1])):
        torch.testing.assert_close(one(shared[part]), other(plain[part]))
    distinct, places = shared.distinct()
    torch.testing.assert_close(one(distinct)[places], one(shared))


SCRIPT = """
import sys
from pathlib import Path
from tests.training import test_sample as own
from hydra_llm.datasets.native import load
from hydra_llm.training import resume, work
work.blocks, resume.SECONDS = own.partial(work.blocks, most=2 * own.RECORDS), 0.0
told = Path(sys.argv[3])
def progress(stage, done, total):
    with told.open("a") as file:
        file.write(f"{stage} {done}\\n")
own.learn(load(sys.argv[1]), settings=own.settings(base_users=5, cache=Path(sys.argv[4])),
    out=sys.argv[2], strengths=own.ONE_STRENGTH, progress=progress)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kill -9")
def test_a_killed_learn_goes_on_and_gives_the_same_bundle(tmp_path: Path) -> None:
    save(made(), tmp_path / "data")
    folder, told = tmp_path / "bundle", tmp_path / "told"
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "data")]
    places = [str(told), str(tmp_path / "cache")]
    child = subprocess.Popen([*command, str(folder), *places])
    while "fit heads 4" not in (told.read_text() if told.exists() else ""):
        assert child.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not folder.exists(), "half of the users are no bundle"
    assert Path(f"{folder}.users.checkpoint").exists()
    told.unlink()
    subprocess.run([*command, str(folder), *places], check=True)
    again = told.read_text().splitlines()
    assert not any(line.startswith("fit adapter") for line in again), "the base was kept"
    assert "fit heads 7" not in again, "these heads were kept"
    assert not Path(f"{folder}.users.checkpoint").exists()
    told.unlink()
    subprocess.run([*command, str(tmp_path / "whole"), *places], check=True)
    one, other = Bundle.load(folder), Bundle.load(tmp_path / "whole")
    same_weights(one, other)
    same_heads(one, other, made().users("train"))
    assert set(one.records) == set(other.records) == set(made().users("train"))


@pytest.mark.slow
def test_a_checkpoint_of_other_data_is_not_taken(tmp_path: Path) -> None:
    folder, few = tmp_path / "bundle", settings(base_users=5)
    learned = learn(made(), settings=few, strengths=ONE_STRENGTH)
    blank = replace(learned.bundle, scorers={}, heads={})
    now = Learned(blank, learned.bundle.trained_on)
    here = resume.SampleCheckpoint.of(now, folder)
    assert not here.resume(now)
    here.write(learned)
    other = resume.SampleCheckpoint(here.folder, "of other records")
    assert not other.resume(now)
    assert here.resume(now)
    same_weights(now.bundle, learned.bundle)
    assert now.bundle.records is blank.records
    assert resume.KEY not in now.bundle.report
    here.remove()
    assert not Path(f"{folder}.users.checkpoint").exists()
