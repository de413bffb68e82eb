"""User-level differential privacy of the base and of the prior of heads."""

import json
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.bundle import Bundle
from hydra_llm.cli.main import run
from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import save
from hydra_llm.errors import SettingsError
from hydra_llm.gate import generic_requests
from hydra_llm.gateway.store_training import _dataset
from hydra_llm.llm.registry import open_llm
from hydra_llm.store.store import Store
from hydra_llm.tasks.base import CohortStats, Task
from hydra_llm.training import dp
from hydra_llm.training.api import blank_bundle, learn
from hydra_llm.training.dp import Budget, clipped, noisy_moments, noisy_sum, secret_normals
from hydra_llm.training.labelling import weak_adapter_groups
from hydra_llm.training.train_scorer import training_set
from hydra_llm.types import Record

TASK = Task("likes", "classification", "Would they like this? {input}", ("no", "yes"))
TOPICS = ("football match", "garlic soup", "bond market", "rose garden", "moon rocket")


def made(users: int = 12, leave_out: str = "", task: Task = TASK) -> DataSet:
    """Users who like some topics; one may have no records."""
    records, splits = [], {}
    for user in range(users):
        name, likes = f"u{user:02}", np.random.default_rng(user).random(5) < 0.6
        splits[name] = "train"
        for at in range(6):
            topic = (user + at) % 5
            text, label = f"{TOPICS[topic]} {user % 3}", TASK.labels[int(likes[topic])]
            if name != leave_out:
                records.append(Record(name, f"r{at}", text, label, str(2000 + at)))
    return DataSet.from_records(task, splits, records, [])


def quiet(count: int) -> torch.Tensor:
    """No noise."""
    return torch.zeros(count, dtype=torch.float64)


@pytest.fixture(scope="module", autouse=True)
def few_texts() -> Iterator[None]:
    """A tenth of the public texts: encoding them would be most of what a test costs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dp, "generic_requests", lambda: generic_requests()[::10])
        yield


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory, shared_minilm: None) -> Settings:
    cache = tmp_path_factory.mktemp("caches")  # public texts are encoded once
    return Settings.checked({"max_length": 32, "cache": cache, "dp_epsilon": 3.0})


rows = st.integers(1, 6).flatmap(
    lambda width: st.lists(
        st.lists(st.floats(-1e3, 1e3), min_size=width, max_size=width), min_size=1, max_size=6
    )
)


@given(rows, st.floats(0.01, 10))
def test_a_sum_moves_by_at_most_the_bound_without_a_user(
    values: list[list[float]], norm: float
) -> None:
    every = torch.tensor(values, dtype=torch.float64)
    without = every.clone()
    without[0] = 0.0
    moved = noisy_sum(every, norm, 0.0, quiet) - noisy_sum(without, norm, 0.0, quiet)
    assert float(moved.norm()) <= norm * (1 + 1e-9)


@given(rows, st.floats(0.01, 10))
def test_moments_move_by_at_most_the_squared_bound(values: list[list[float]], norm: float) -> None:
    every = torch.tensor(values, dtype=torch.float64)
    without = every.clone()
    without[-1] = 0.0
    moved = noisy_moments(every, norm, 0.0, quiet) - noisy_moments(without, norm, 0.0, quiet)
    assert float(torch.linalg.matrix_norm(moved)) <= norm**2 * (1 + 1e-9)


def test_without_clipping_the_bound_would_not_hold() -> None:
    every = torch.tensor([[3.0, 4.0], [0.1, 0.0]])
    assert float(every.norm(dim=1).max()) == 5.0
    assert clipped(every, 1.0).norm(dim=1).tolist() == pytest.approx([1.0, 0.1])


def test_noise_has_the_deviation_that_the_accountant_asks_for() -> None:
    draw = torch.Generator().manual_seed(0)

    def normals(count: int) -> torch.Tensor:
        return torch.randn(count, generator=draw, dtype=torch.float64)

    empty = torch.zeros(1, 20_000)
    assert float(noisy_sum(empty, 0.5, 3.0, normals).std()) == pytest.approx(1.5, rel=0.03)
    noise = noisy_moments(torch.zeros(1, 150), 2.0, 3.0, normals)
    assert torch.equal(noise, noise.T)
    assert float(noise.diagonal().std()) == pytest.approx(12.0, rel=0.2)
    above = noise[torch.triu(torch.ones_like(noise), 1) > 0]  # σ in an isometric basis
    assert float(above.std()) == pytest.approx(12.0 / math.sqrt(2), rel=0.05)
    own = secret_normals(20_000)
    assert float(own.mean()) == pytest.approx(0.0, abs=0.04)
    assert float(own.std()) == pytest.approx(1.0, rel=0.03)
    assert not torch.equal(own, secret_normals(20_000))


@pytest.mark.parametrize("byte", [b"\x00", b"\x7f", b"\x80", b"\xff"])
def test_noise_is_finite_for_all_random_bytes(byte: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.urandom", lambda count: byte * count)
    assert bool(secret_normals(3).isfinite().all())


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf, 1e200])
def test_no_user_is_the_whole_sum(fault: float) -> None:
    every = torch.tensor([[1.0, 0.0], [fault, 1.0]], dtype=torch.float64)
    assert float((noisy_sum(every, 2.0, 0.0, quiet) - every[0]).norm()) <= 2.0
    moved = noisy_moments(every, 2.0, 0.0, quiet) - torch.outer(every[0], every[0])
    assert float(moved.norm()) <= 4.0


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 3.0, 8.0])
def test_the_accountant_finds_what_was_asked_for(epsilon: float) -> None:
    budget = Budget.of(Settings.checked({"dp_epsilon": epsilon}), users=565)
    assert budget.delta == pytest.approx(565**-1.1)
    spent = budget.spent()
    assert spent["epsilon"] <= epsilon * 1.001
    assert spent["epsilon"] == pytest.approx(epsilon, rel=0.01)
    less = replace(budget, noise=budget.noise / 2).spent()
    assert less["epsilon"] > 1.5 * epsilon


def test_another_accountant_finds_no_more_than_the_budget() -> None:
    """Each released sum as an event of its own, by privacy loss distributions."""
    budget = Budget.of(Settings.checked({"dp_epsilon": 1.0}), users=565)
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for name, count in {"labels": 1, "base": dp.STEPS, "prior": 1}.items():
        accountant.compose(dp_accounting.GaussianDpEvent(budget.noise_of(name, count)), count)
    assert accountant.get_epsilon(budget.delta) == pytest.approx(1.0, rel=0.01)


def test_gradients_of_neighbouring_sets_differ_by_the_bound(chosen: Settings) -> None:
    sums = [
        clipped(gradients(made(leave_out=name), chosen), 0.1).double().sum(0)
        for name in ("", "u05")
    ]
    assert 0.01 < float((sums[0] - sums[1]).norm()) <= 0.1 * (1 + 1e-6)


def gradients(data: DataSet, chosen: Settings) -> torch.Tensor:
    """[U, D] of each user, at a point that is not the start."""
    records = data.all_answered(data.with_records("train"))
    bundle = blank_bundle(data.task, open_llm("none", chosen), chosen, records)
    bundle = replace(bundle, population=CohortStats(label_shares=(0.5, 0.5)))
    groups = [g for own in records.values() for g in weak_adapter_groups(bundle.featurizer, own)]
    scorer = dp.private_scorer(bundle, bundle.featurizer.adapter_names)
    table = training_set(bundle, "exact", scorer, groups)
    size = scorer.interaction.size + len(scorer.side_names)
    return dp.UserGradients.of(scorer, table).at(torch.full((size,), 0.1))


def test_learning_spends_the_budget_and_says_so(chosen: Settings, tmp_path: Path) -> None:
    learned = learn(made(), settings=chosen, out=tmp_path / "b")
    bundle = Bundle.load(tmp_path / "b")
    privacy = bundle.report["privacy"]
    assert privacy["epsilon"] == pytest.approx(3.0, rel=0.01)
    assert privacy["delta"] == pytest.approx(12**-1.1)
    assert bundle.gate is None
    assert set(bundle.scorers) == {"adapter"}
    assert set(bundle.report["adapter"]) == {"users", "features", "head"}
    assert set(bundle.heads["adapter"]) == set(learned.bundle.trained_on)
    assert bundle.settings.dp_epsilon == 3.0


def test_all_that_is_shared_comes_from_noise_and_public_texts(
    chosen: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the releases are zeros, other data leave the same: nothing else has seen the users."""
    monkeypatch.setattr(dp, "clipped", lambda rows, norm: torch.zeros_like(rows))
    noise = torch.Generator()

    def normals(count: int) -> torch.Tensor:
        return torch.randn(count, generator=noise, dtype=torch.float64)

    monkeypatch.setattr(dp, "secret_normals", normals)
    shared = []
    for seed_of_data in (0, 1):
        noise.manual_seed(0)
        data = made() if not seed_of_data else others()
        bundle = learn(data, settings=chosen).bundle
        adapter = {key: own.clone() for key, own in bundle.scorers["adapter"].tensors().items()}
        shared.append((adapter, bundle.population, bundle.report["privacy"], bundle.gate))
    first, second = shared
    assert first[1:] == second[1:]
    assert first[0].keys() == second[0].keys()
    for name, value in first[0].items():
        assert torch.equal(value, second[0][name]), name


def others() -> DataSet:
    """As many users of other texts, labels and numbers of records."""
    records = [
        Record(f"u{user:02}", f"r{at}", f"paper boat {user} {at}", "yes", str(1990 + at))
        for user in range(12)
        for at in range(2 + user % 3)
    ]
    return DataSet.from_records(TASK, {f"u{user:02}": "train" for user in range(12)}, records, [])


def test_the_base_does_not_tell_who_has_records(chosen: Settings) -> None:
    settings = chosen.model_copy(update={"base_users": 6})
    bundles = [learn(made(leave_out=name), settings=settings).bundle for name in ("", "u04")]
    assert bundles[0].trained_on == bundles[1].trained_on
    assert "u04" in bundles[0].trained_on  # else the seed proves nothing
    own = [{**bundle.report, "stages": None} for bundle in bundles]
    assert own[0] == own[1]


def test_all_users_of_a_store_count(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'store.sqlite'}"
    with closing(Store(url, create=True)) as store:
        store.add_records("ada", [Record("ada", "r", "rose garden", "yes", "2000")])
        store.add_records("bob", [])
        assert _dataset(store, TASK)[1].users("train") == ["ada"]
        assert _dataset(store, TASK, every=True)[1].users("train") == ["ada", "bob"]


def test_no_reranker_without_privacy_is_taken_over(chosen: Settings) -> None:
    own = learn(made(), settings=chosen).bundle
    scorers, report = {"reranker": own.scorers["adapter"]}, {"reranker": {"loss": 0.1}}
    first = replace(own, scorers=scorers, report=report)
    learned = learn(made(), settings=chosen, first=first).bundle
    assert set(learned.scorers) == {"adapter"}
    assert "skipped" in learned.report["reranker"]


def test_little_noise_learns_what_helps(chosen: Settings) -> None:
    bundle = learn(made(40), settings=chosen.model_copy(update={"dp_epsilon": 300.0})).bundle
    adapter = bundle.scorers["adapter"]
    weights = dict(zip(adapter.side_names, adapter.side_weight.tolist(), strict=True))
    assert weights["share_0.05"] > 0.05  # the user's own similar records speak
    assert weights["llm_votes"] == weights["llm_greedy"] == 0.0


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"dp_epsilon": 0}, "setting 'dp_epsilon': Input should be greater than 0"),
        ({"dp_epsilon": -1.5}, "setting 'dp_epsilon': Input should be greater than 0"),
        ({"dp_epsilon": "nan"}, "setting 'dp_epsilon': "),
        ({"dp_epsilon": 1, "dp_delta": 0}, "setting 'dp_delta': Input should be greater than 0"),
        ({"dp_epsilon": 1, "dp_delta": 1}, "setting 'dp_delta': Input should be less than 1"),
    ],
)
def test_a_budget_out_of_range_is_one_line(given: dict[str, Any], line: str) -> None:
    with pytest.raises(SettingsError, match=line):
        Settings.checked(given)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"head": "mlp", "dp_epsilon": 1}, "head=mlp: take linear or lowrank"),
        ({"head": "kernel", "dp_epsilon": 1}, "head=kernel: take linear or lowrank"),
        ({"loss": "binary", "dp_epsilon": 1}, "loss=binary: take listwise"),
        ({"dp_delta": 0.1}, "'dp_delta' has no effect without dp_epsilon"),
        ({"discount": 0.9, "dp_epsilon": 1}, "discount: leave it at none"),
        ({"head_prior": "isotropic", "dp_epsilon": 1}, "head_prior=isotropic: take learned"),
        ({"label_rank": 4, "dp_epsilon": 1}, "label_rank: leave it out"),
    ],
)
def test_what_cannot_be_private_is_one_line(given: dict[str, Any], line: str) -> None:
    with pytest.raises(SettingsError, match=line):
        learn(made(), settings=Settings.checked(given))


def test_free_texts_cannot_be_private() -> None:
    task = Task("titles", "generation", "Title of: {input}")
    with pytest.raises(SettingsError, match="a task of kind generation: its labels come from"):
        dp.check(Settings.checked({"dp_epsilon": 1}), task)


def test_the_commands_learn_show_and_audit(
    chosen: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(made(20), tmp_path / "data")
    words = ["--set", "max_length=32", "--set", f"cache={chosen.cache}", "--dp-epsilon", "2"]
    folder = str(tmp_path / "b")
    data = str(tmp_path / "data")
    assert run(["learn", data, "--out", folder, "--dp-delta", "0.01", *words]) == 0
    capsys.readouterr()
    assert run(["bundles", "show", folder, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["privacy"]["epsilon"] == pytest.approx(2.0, rel=0.01)
    assert (told["training_users"], told["privacy"]["delta"]) == (20, 0.01)
    assert run(["audit", folder, data, "--bases", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["privacy"] == told["privacy"]
    assert run(["learn", data, "--out", folder, "--dp-epsilon", "0"]) == 2
    assert "greater than 0" in capsys.readouterr().err
